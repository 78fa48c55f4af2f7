"""Selections by position: the steep answer against the expectation, the flat one against random feasible points."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from bilinear_oracle import projected

import eqxproj
from eqxproj import Metric


def node(function, x, weight, kappa):
    """The rule of the selection in a function of one array, and its context."""
    problem = eqxproj.feasibility_problem(lambda m: jnp.sum(jnp.sin(function(m))), x)
    nodes = problem.graph.nodes
    (found,) = [i for i, n in enumerate(nodes) if isinstance(n.rule, eqxproj.rules.Selection)]
    ctx = eqxproj.readers.context(problem, found, False)
    return nodes[found].rule, ctx.reweighted([float(np.log(weight))], [float(np.log(kappa))])


CASES = {
    "one_hot(argmax)": (lambda x: jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1]), 1.0),
    "one_hot(argmin)": (lambda x: jax.nn.one_hot(jnp.argmin(x, -1), x.shape[-1]), -1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_steep_answer_is_the_slope_of_the_expectation(name):
    function, sign = CASES[name]
    x, mu = jr.normal(jr.key(0), (5, 4)), jr.normal(jr.key(1), (5, 4))
    rule, ctx = node(function, x, 1e6, 1.0)
    (nu,) = rule.pullback(ctx, [x], [mu])
    wanted = jax.grad(lambda x: jnp.sum(mu * jax.nn.softmax(sign * x)))(x)
    np.testing.assert_allclose(nu, wanted, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kappa", [0.1, 1.0, 10.0])
def test_flat_answer_is_as_near_as_any_feasible_point(name, kappa):
    function, _ = CASES[name]
    x, target = jr.normal(jr.key(2), (6, 3)), jr.normal(jr.key(3), (6, 3))
    rule, ctx = node(function, x, 1.0, kappa)
    (nu,), (y,) = projected(rule, ctx, [x], [kappa * (target - function(x))])
    np.testing.assert_array_equal(y, function(x + nu))

    def cost(moved):
        return jnp.sum((moved - x) ** 2 + kappa * (function(moved) - target) ** 2, -1)

    scales = jnp.geomspace(1e-3, 3.0, 4000)[:, None, None]
    others = x + scales * jr.normal(jr.key(4), (4000, 6, 3))
    best = jnp.minimum(jnp.min(jax.vmap(cost)(others), 0), cost(x))
    assert np.all(cost(x + nu) <= best * (1 + 1e-4) + 1e-4)


def test_position_that_mixes_samples_stays():
    def loss(w):
        table = jnp.arange(12.0).reshape(4, 3)
        return jnp.sum((table[jnp.argmax(w, -1)].T @ jnp.ones(5)) ** 2 + jnp.sum(w**2))

    nodes = eqxproj.feasibility_problem(loss, jr.normal(jr.key(0), (5, 4))).graph.nodes
    assert all(n.rule is not None or n.kind == "parameter" for n in nodes)


def test_gate_is_learned():
    x = jr.normal(jr.key(0), (128, 2))
    y = jnp.where(x[:, :1] > 0, x @ jnp.ones((2, 1)), -3.0 * x @ jnp.ones((2, 1)))

    class Gated(eqx.Module):
        gate: jax.Array
        experts: jax.Array

        def __call__(self, x):
            return self.experts[jnp.argmax(self.gate @ x)] @ x

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    model = Gated(0.5 * jr.normal(jr.key(1), (2, 2)), 0.1 * jr.normal(jr.key(2), (2, 1, 2)))
    run = {
        method: eqxproj.train(
            model, (x, y), loss, steps=300, method=method, optimizer=optax.adam(2e-2), eval_data=(x, y)
        ).history["eval_loss"][-1]
        for method in ("projection", "gradient")
    }
    assert run["projection"] <= 0.5 * run["gradient"]


def test_a_loss_that_counts_positions_has_a_slope():
    """Nothing but a selection lies between the scores and the loss, which no parameter comes after."""

    def errors(w, x, y):
        return jnp.mean(jnp.argmax(x @ w, -1) != y)

    k1, k2, k3 = jr.split(jr.key(5), 3)
    w, x, y = jr.normal(k1, (4, 3)), jr.normal(k2, (20, 4)), jr.randint(k3, (20,), 0, 3)
    moved = eqxproj.filter_displacement(errors, metric=Metric(1e6, 1e6), tau=1e-3)(w, x, y)

    def expected(w):
        return 1 - jnp.mean(jnp.take_along_axis(jax.nn.softmax(x @ w), y[:, None], -1))

    wanted = jax.grad(expected)(w)
    size = jnp.linalg.norm(moved) * jnp.linalg.norm(wanted)
    assert float(jnp.vdot(moved, wanted) / size) > 0.999


def test_a_penalty_with_a_position_keeps_its_node():
    """A penalty reads parameters alone, and is part of the objective: but a local solver is blind to positions."""

    def penalized(w, x):
        return jnp.mean((x @ w) ** 2) + jnp.sum(jax.nn.one_hot(jnp.argmax(w), 4) * jnp.arange(4.0))

    w, x = jr.normal(jr.key(6), (4,)), jr.normal(jr.key(7), (5, 4))
    assert "selection" in eqxproj.feasibility_problem(penalized, w, x).explain()
    moved = eqxproj.filter_displacement(penalized, metric=Metric(1e6, 1e6), tau=1e-3, noise="everywhere")(w, x)
    wanted = jax.grad(lambda w: jnp.mean((x @ w) ** 2) + jnp.sum(jax.nn.softmax(w) * jnp.arange(4.0)))(w)
    np.testing.assert_allclose(moved, wanted, rtol=1e-2, atol=1e-3)
