"""No temporary of the size batch x inputs x outputs: what XLA reports for compiled steps that would show one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqxproj
from eqxproj._problem._state import iterate, prepared

BATCH, WIDTH = 128, 256
CUBE = 4 * BATCH * WIDTH * WIDTH  # bytes of one copy of every scalar product's operand in the hidden layer


def _loss(model, x, y):
    return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()


def _setting():
    model = eqx.nn.MLP(64, 10, WIDTH, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, 64))
    return model, x, jnp.zeros(BATCH, jnp.int32)


def _bytes(function, *args):
    report = jax.jit(function).lower(*args).compile().memory_analysis()
    return report.temp_size_in_bytes, report.temp_size_in_bytes + report.output_size_in_bytes


def _adam_step(direction):
    model, x, y = _setting()
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    adam = optax.adam(1e-3)

    def step(parameters, state, x, y):
        _, moved = direction(eqx.combine(parameters, static), x, y)
        updates, state = adam.update(moved, state, parameters)
        return eqx.apply_updates(parameters, updates), state

    return _bytes(step, parameters, adam.init(parameters), x, y)


def _solver_step(copies, store_copies=False):
    problem = eqxproj.feasibility_problem(_loss, *_setting(), copies=copies)
    arrays, rest = eqx.partition(problem, eqx.is_array)
    solver = eqxproj.AlternatingProjections()
    start = prepared(lambda s: solver.step(problem, s), problem.start(store_copies))

    def step(state, arrays):
        return iterate(lambda s: solver.step(eqx.combine(arrays, rest), s), state, 1)

    return _bytes(step, start, arrays)


def test_a_displacement_needs_no_more_than_a_gradient():
    _, gradient = _adam_step(eqx.filter_value_and_grad(_loss))
    temporary, written = _adam_step(eqxproj.filter_value_and_displacement(_loss))
    assert temporary < CUBE / 8
    assert written <= 1.5 * gradient


def test_alternating_projections_hold_no_copies():
    _, gradient = _adam_step(eqx.filter_value_and_grad(_loss))
    temporary, written = _solver_step("neuron")
    assert temporary < CUBE / 8
    assert written <= 3 * gradient


def test_the_bound_would_catch_materialized_copies():
    assert _solver_step("neuron", store_copies=True)[1] > CUBE
