"""A solver, a set, a loss and a rule of a user's own, written with public names alone."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj import rules, sets, solvers

A = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)


def distance(predictions, targets):
    return jnp.abs(predictions - targets)


def toward_targets(predictions, targets, tau):
    return jnp.clip(targets - predictions, -tau, tau)


absolute_error = eqxproj.custom_loss(distance, toward_targets)


def test_a_solver():
    """The Douglas-Rachford algorithm, from the public parts."""

    class HalfReflected(eqxproj.AbstractSolver):
        store_copies: ClassVar[bool] = True
        needs_two_colors: ClassVar[bool] = True

        def step(self, problem: eqxproj.FeasibilityProblem, state: eqxproj.State) -> eqxproj.State:
            reflected = solvers.reflect(problem, state, 0)
            twice = eqxproj.combine((2.0, -1.0), (solvers.onto(problem, reflected, 1), reflected))
            return eqxproj.combine((0.5, 0.5), (state, twice))

    def loss(model, x, y):
        return jnp.mean(eqxproj.losses.squared_error(jax.nn.relu(x @ model["w"]), y))

    problem = eqxproj.feasibility_problem(loss, {"w": A[:4]}, X, A, metric=eqxproj.Metric(), tau=10.0)
    mine, built_in = (
        eqxproj.solve(problem, solver, steps=5, tol=0.0) for solver in (HalfReflected(), eqxproj.DouglasRachford())
    )
    assert eqx.tree_equal(mine.state, built_in.state, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(mine.model["w"] - A[:4]).max()) > 1e-3


def test_a_set():
    class Symmetric(sets.AbstractSet):
        def __call__(self, x):
            return (x + x.T) / 2

    def loss(model, x, y):
        return jnp.mean(eqxproj.losses.squared_error(x @ model["w"], y))

    assert not Symmetric.is_discrete
    result = eqxproj.train(
        {"w": A[:3]}, (A, A), loss, steps=3, optimizer=optax.adam(0.1), constraints=[(lambda m: m["w"], Symmetric())]
    )
    np.testing.assert_array_equal(result.model["w"], result.model["w"].T)


def test_a_loss_is_a_function():
    y = A + 1
    np.testing.assert_array_equal(jax.jit(absolute_error)(A, y), distance(A, y))
    np.testing.assert_array_equal(jax.vmap(absolute_error)(A, y), distance(A, y))
    np.testing.assert_array_equal(jax.grad(lambda a: absolute_error(a, y).sum())(A), -jnp.ones_like(A))
    assert absolute_error.__name__ == "distance"


@pytest.mark.parametrize("batched", [False, True])
def test_a_loss_is_asked_for_its_displacement(batched):
    def loss(model, targets):
        return jnp.sum((jax.vmap(absolute_error) if batched else absolute_error)(model["a"], targets))

    targets = jnp.zeros_like(A)
    problem = eqxproj.feasibility_problem(loss, {"a": A}, targets, metric=eqxproj.Metric(), tau=0.3)
    assert "prox (distance)" in problem.explain()
    solution = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=1, tol=0.0)
    np.testing.assert_allclose(solution.model["a"], A + toward_targets(A, targets, 0.3), rtol=1e-6)


@pytest.mark.parametrize(
    "value, displacement, options, part",
    [
        ("distance", toward_targets, {}, "`value` must be a function, got 'distance'"),
        (distance, None, {}, "`displacement` must be a function, got None"),
        (distance, toward_targets, {"hard": 1}, "`hard` must be `True` or `False`, got 1"),
    ],
)
def test_bad_losses(value, displacement, options, part, untyped):
    with pytest.raises(TypeError, match=part):
        eqxproj.custom_loss(value, displacement, **options)


def test_a_displacement_of_another_shape():
    bad = eqxproj.custom_loss(distance, lambda predictions, targets, tau: tau[0])
    problem = eqxproj.feasibility_problem(
        lambda model, y: bad(model["a"], y).mean(), {"a": A}, A, metric=eqxproj.Metric()
    )
    with pytest.raises(ValueError, match=r"loss 'distance' returned shape \(3,\)"):
        eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=1)


def test_a_rule(registry):
    seen = []

    @rules.register_projection("erf_inv")
    def toward(ctx, inputs, target):
        seen.append(ctx)
        return jax.lax.erf(target)

    def loss(model, y):
        return jnp.mean(eqxproj.losses.squared_error(jax.lax.erf_inv(model["a"]), y))

    found = eqxproj.filter_displacement(loss)({"a": jnp.tanh(A)}, A)
    assert all(isinstance(ctx, rules.Context) for ctx in seen) and seen
    assert float(jnp.vdot(found["a"], jax.grad(lambda m: loss(m, A))({"a": jnp.tanh(A)})["a"])) > 0
    assert callable(rules.AbstractRule.project)
