"""The generic local solver and the generic prox, against scipy in float64.

Both find a local minimum of a problem that need not be convex. What they promise is never to end above the cost of
staying put, to be exact in the limit of a steep metric, and to be near the minimum where the step is moderate.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from bilinear_oracle import node_of, projected

import eqxproj
from eqxproj._numerics._cross_entropy import cross_entropy_displacement


def normalized(x, numpy):
    centered = x - numpy.mean(x)
    return centered / numpy.sqrt(numpy.mean(centered**2) + 1e-3)


# name: the function, the same in float64, shapes and the outputs' number
CASES: dict[str, Any] = {
    "softmax": (lambda x: [jax.nn.softmax(x)], lambda x: [scipy.special.softmax(x)], [(4,)]),
    "logsumexp": (lambda x: [jax.nn.logsumexp(x)], lambda x: [scipy.special.logsumexp(x)], [(4,)]),
    "div": (lambda x, y: [x / (2 + y)], lambda x, y: [x / (2 + y)], [(3,), (3,)]),
    "normalization": (lambda x: [normalized(x, jnp)], lambda x: [normalized(x, np)], [(5,)]),
    "two outputs": (lambda x, y: [jnp.sin(x) * y, x + y**2], lambda x, y: [np.sin(x) * y, x + y**2], [(2,), (2,)]),
}


def hand_made(function, log_weights, log_kappas):
    return eqxproj.rules.Context(function, {}, None, ()).reweighted(log_weights, log_kappas)


@functools.cache
def solver(name, log_weights, log_kappas):
    ctx = hand_made(CASES[name][0], log_weights, log_kappas)
    return jax.jit(jax.vmap(lambda inputs, duals: projected(eqxproj.rules.LocalSolver(), ctx, inputs, duals)))


def instances(name, residuals, kappas, scale=1.0):
    rng = np.random.default_rng(0)
    n, (function, _, shapes) = len(residuals), CASES[name]
    inputs = [(scale * rng.uniform(-1, 1, (n, *s))).astype(np.float32) for s in shapes]
    outs = [x.shape for x in jax.eval_shape(function, *(x[0] for x in inputs))]
    size = [kappa * np.reshape(residuals, (n,) + (1,) * len(s)) for s, kappa in zip(outs, kappas, strict=True)]
    return inputs, [(k * rng.normal(size=(n, *s))).astype(np.float32) for s, k in zip(outs, size, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 4.0, 20.0)], ids=["unit", "unequal"])
@pytest.mark.parametrize("name", CASES)
def test_moderate_steps_reach_the_minimum(name, weights):
    _, function, shapes = CASES[name]
    each, number = weights[: len(shapes)], 2 if name == "two outputs" else 1
    kappas = (weights[2], 2 * weights[2])[:number]
    residuals = [0.003, 0.1, 0.3, 3.0, 30.0]
    inputs, duals = instances(name, residuals, kappas)
    run = solver(name, tuple(math.log(w) for w in each), tuple(math.log(k) for k in kappas))
    nus, outs = run(inputs, duals)
    assert not any(np.any(x) for x in run(inputs, [0 * mu for mu in duals])[0])
    for i in range(len(residuals)):
        start = [x[i].astype(float) for x in inputs]
        before = function(*start)
        wanted = [y + mu[i].astype(float) / k for y, mu, k in zip(before, duals, kappas, strict=True)]

        def cost(d):
            parts = [p.reshape(x.shape) for p, x in zip(np.split(d, np.cumsum([x.size for x in start])[:-1]), start)]  # noqa: B023
            moved = sum(w * np.sum(p**2) for w, p in zip(each, parts, strict=True))
            after = function(*(x + p for x, p in zip(start, parts, strict=True)))  # noqa: B023
            return moved + sum(k * np.sum((y - t) ** 2) for k, y, t in zip(kappas, after, wanted, strict=True))  # noqa: B023

        found = np.concatenate([np.ravel(nu[i]) / w for nu, w in zip(nus, each, strict=True)]).astype(float)
        assert cost(found) <= cost(0 * found) * (1 + 1e-5) + 1e-12
        moved = np.split(found, np.cumsum([x.size for x in start])[:-1])
        reached = function(*(x + d.reshape(x.shape) for x, d in zip(start, moved, strict=True)))
        for y, out in zip(reached, outs, strict=True):
            np.testing.assert_allclose(out[i], y, rtol=1e-4, atol=1e-4)
        if residuals[i] < 1:
            rng = np.random.default_rng(1)
            starts = [np.zeros_like(found), *(0.3 * rng.normal(size=(3, found.size)))]
            best = min(scipy.optimize.minimize(cost, x, method="BFGS", options=dict(gtol=1e-10)).fun for x in starts)
            assert cost(found) <= best * (1 + 1e-2) + 1e-9


@pytest.mark.parametrize("log_kappa", [0.0, 400.0])
@pytest.mark.parametrize("name", CASES)
def test_a_steep_metric_gives_the_vjp(name, log_kappa):
    function, _, shapes = CASES[name]
    number = 2 if name == "two outputs" else 1
    logs = tuple(log_kappa + x * math.log(10) for x in (6, 12))[: len(shapes)]
    inputs, duals = instances(name, [1e-12, 1e-3, 1.0], (1.0,) * number)
    nus, _ = solver(name, logs, (log_kappa,) * number)(inputs, duals)
    for i in range(3):
        pull = jax.vjp(function, *(jnp.asarray(x[i]) for x in inputs))[1]
        for nu, want in zip(nus, pull([jnp.asarray(mu[i]) for mu in duals]), strict=True):
            assert np.linalg.norm(nu[i] - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("logs", [(0.0, 0.0), (400.0, -1e4)])
@pytest.mark.parametrize("name", CASES)
def test_the_pullback_is_the_vjp_whatever_the_weights(name, logs):
    function, _, shapes = CASES[name]
    number = 2 if name == "two outputs" else 1
    ctx = hand_made(function, logs[: len(shapes)], (1.0,) * number)
    inputs, duals = instances(name, [1e-12, 1e-3, 1.0], (1.0,) * number)
    found = jax.jit(jax.vmap(lambda x, mu: eqxproj.rules.LocalSolver().pullback(ctx, x, mu)))(inputs, duals)
    want = jax.jit(jax.vmap(lambda x, mu: jax.vjp(function, *x)[1](mu)))(inputs, duals)
    for nu, true in zip(found, want, strict=True):
        np.testing.assert_array_equal(nu, true)


@pytest.mark.parametrize("name", CASES)
def test_always_finite(name):
    number = 2 if name == "two outputs" else 1
    run = solver(name, (0.0,) * len(CASES[name][2]), (0.0,) * number)
    for scale, residual in itertools.product([0.0, 1e-6, 1.0, 1e6], [0.0, 1e-6, 1.0, 1e6]):
        if name == "div" and scale > 1:
            continue  # the pole is among the operands
        inputs, duals = instances(name, [residual] * 5, (1.0,) * number, scale)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(inputs, duals)))


def test_graph_sends_what_has_no_rule_there():
    problem, index = node_of(lambda x, y: x / y, jnp.ones(3), 2 * jnp.ones(3))
    assert problem.graph.nodes[index].describe_rule() == "local solver"
    assert f"(derivatives of the node alone): nodes [{index}]" in problem.explain()


# ----------------------------------------------------------------------------------------------------------------------
# The generic prox
# ----------------------------------------------------------------------------------------------------------------------


def prox(loss, z, *args, tau):
    """The displacement of the objective of `loss(z, *args)`, as the graph sets it up for a z that depends on data."""
    shift = jnp.zeros_like(z)
    problem: Any = eqxproj.feasibility_problem(
        lambda b, x, *args: loss(x + b, *args), shift, jnp.asarray(z), *args, tau=tau
    )
    (index,) = problem.graph.objectives
    assert problem.graph.nodes[index].describe_rule() == "local prox"
    rule, ctx = problem.graph.nodes[index].rule, eqxproj.readers.context(problem, index, False)
    assert not problem.graph.nodes[index].outputs
    (moved,) = jax.jit(lambda z: rule.project(ctx, [z], []))(jnp.asarray(z))
    return np.asarray(moved, np.float64)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 5.0, 20.0])
def test_prox_of_cross_entropy(tau):
    rng = np.random.default_rng(0)
    z, labels = jnp.asarray(3 * rng.normal(size=(6, 5)), jnp.float32), jnp.arange(6) % 5

    def loss(z, y):
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    want = np.asarray(cross_entropy_displacement(z, labels, tau), float)
    # All samples are one problem to the generic prox, so the error is relative to the largest step.
    np.testing.assert_allclose(prox(loss, z, labels, tau=tau), want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("tau", [0.01, 1.0, 20.0])
def test_prox_of_huber(tau):
    z = jnp.asarray([-30.0, -3.0, -0.5, 0.0, 0.2, 1.0, 2.0, 50.0])
    got = prox(lambda z, y: optax.huber_loss(z, y).sum(), z, jnp.zeros(8), tau=tau)
    inside = np.abs(np.asarray(z)) <= 1 + tau
    want = np.where(inside, -tau * np.asarray(z) / (1 + tau), -tau * np.sign(z))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_prox_of_the_cosine_distance(tau):
    """Each sample has a curvature of its own, of 0.1 to 100; the angles are so small that there is one minimum."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(24, 3))
    z = np.geomspace(0.1, 3.0, 24)[:, None] * (y + 0.3 * rng.normal(size=y.shape))
    got = prox(lambda z, y: optax.cosine_distance(z, y, epsilon=1e-6).mean(), *map(jnp.float32, (z, y)), tau=tau)
    for zi, yi, di in zip(z, y, got, strict=True):

        def cost(d, zi=zi, yi=yi):
            w = zi + d
            return 0.5 * d @ d + tau * (1 - w @ yi / np.linalg.norm(w) / np.linalg.norm(yi))

        best = scipy.optimize.minimize(cost, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(di, best.x, atol=1e-4 * np.abs(got).max())


def test_small_prox_is_a_gradient_step():
    z = jnp.asarray([[0.3, -1.0, 2.0], [4.0, 0.1, -0.2]])

    def loss(z):
        return jnp.sum(jax.nn.logsumexp(z, -1) + jnp.sin(z).prod(-1))

    want = -1e-6 * np.asarray(jax.grad(loss)(z), float)
    np.testing.assert_allclose(prox(loss, z, tau=1e-6), want, rtol=1e-3, atol=1e-9)


WILD = [
    ("concave", lambda z: -jnp.sum(z**2)),
    ("quartic", lambda z: jnp.sum(z**4 - 3 * z**2)),
    ("waves", lambda z: jnp.sum(jnp.sin(20 * z) + 0.1 * z**2)),
    ("steep", lambda z: jnp.sum(jnp.exp(z**2))),
    ("with a pole", lambda z: jnp.sum(1 / z**2 + jnp.log(jnp.abs(z)))),
    ("kinks", lambda z: jnp.sum(jnp.abs(z)) + jnp.max(z)),
    ("flat", lambda z: jnp.sum(jnp.where(z > 100, z, 0.0))),
]


@pytest.mark.parametrize(("name", "loss"), WILD, ids=[row[0] for row in WILD])
@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_wild_losses_stay_finite(name, loss, tau):
    z = jnp.asarray([-3.0, -1.0, 0.1, 0.5, 2.0])
    moved = prox(loss, z, tau=tau)
    assert np.isfinite(moved).all()
    start = tau * float(loss(z))
    if name != "concave" or tau < 0.5:  # beyond, there is no minimum
        end = 0.5 * np.sum(moved**2) + tau * float(loss(z + jnp.asarray(moved, jnp.float32)))
        assert end <= start + 1e-5 * abs(start)
