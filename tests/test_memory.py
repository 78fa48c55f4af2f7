"""No temporary of the size batch x inputs x outputs: what XLA reports for compiled steps that would show one."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import eqxproj

pytestmark = pytest.mark.usefixtures("optimized")

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


class Materialized(eqxproj.AbstractSolver):
    """Alternating projections that keep every copy."""

    store_copies: ClassVar[bool] = True
    needs_two_colors: ClassVar[bool] = True

    def step(self, problem, state):
        return eqxproj.AlternatingProjections().step(problem, state)


def _solver_step(solver):
    problem = eqxproj.feasibility_problem(_loss, *_setting(), copies="neuron")
    arrays, rest = eqx.partition(problem, eqx.is_array)
    start = eqxproj.solve(problem, solver, steps=1).state

    def step(state, arrays):
        new = solver.step(eqx.combine(arrays, rest), state)
        return eqx.combine(new, jax.tree.map(jnp.zeros_like, state))  # duals that are zero count as well

    return _bytes(step, start, arrays)


def test_a_displacement_needs_no_more_than_a_gradient():
    _, gradient = _adam_step(eqx.filter_value_and_grad(_loss))
    temporary, written = _adam_step(eqxproj.filter_value_and_displacement(_loss))
    assert temporary < CUBE / 8
    assert written <= 1.5 * gradient


@pytest.mark.slow
def test_alternating_projections_hold_no_copies():
    _, gradient = _adam_step(eqx.filter_value_and_grad(_loss))
    temporary, written = _solver_step(eqxproj.AlternatingProjections())
    assert temporary < CUBE / 8
    assert written <= 3 * gradient


@pytest.mark.slow
def test_the_bound_would_catch_materialized_copies():
    assert _solver_step(Materialized())[1] > CUBE
