"""The nodes of elementwise operations: what the graph makes of them, and their projection against a search.

Every case gives the operation as a user writes it, and in float64 its two halves: the affine `head` of the node's
operands (as their views show them) and the function `phi` of one number.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bilinear_oracle import node_of, projected
from scipy.special import erf
from test_piecewise import brute_force

import eqxproj

MASK = np.asarray([1.0, -2.0, 0.5], np.float32)
SHIFT = np.asarray([0.3, -1.0, 2.0], np.float32)


class Case(NamedTuple):
    function: Callable
    shapes: tuple[tuple[int, ...], ...]
    head: Callable
    phi: Callable
    rule: str


def unary(function, phi, rule):
    return Case(function, ((4,),), lambda x: x, phi, rule)


def sigmoid(s):
    return 1 / (1 + np.exp(-s))


def same(s):
    return s


def relu(s):
    return np.maximum(s, 0)


two, three = ((3,), (3,)), ((2, 3), (2, 3), (2, 3))
CASES = {
    "two terms": Case(lambda x, y: 2 * x - MASK * y, two, lambda x, y: 2 * x - MASK * y, same, "affine"),
    "three terms": Case(
        lambda x, y, z: MASK * x + y / MASK - 3 * z + SHIFT,
        three, lambda x, y, z: MASK * x + y / MASK - 3 * z + SHIFT, same, "affine",
    ),
    "known factor": Case(lambda x: MASK * x, ((3,),), lambda x: MASK * x, same, "affine"),
    "sum": Case(lambda x: jnp.sum(x, 0), ((4, 2),), lambda x: x.sum(0), same, "affine"),
    "sum of all": Case(lambda x: jnp.sum(x), ((3, 2),), lambda x: x.sum(), same, "affine"),
    "sum over two axes": Case(lambda x: jnp.sum(x, (0, 2)), ((2, 3, 2),), lambda x: x.sum((0, 2)), same, "affine"),
    "bias": Case(lambda x, b: x + b, ((2, 3), (3,)), lambda x, b: x + b, same, "affine"),
    "residual relu": Case(lambda x, y: jax.nn.relu(x + y), two, lambda x, y: x + y, relu, "scalar: relu"),
    "biased relu": Case(lambda x, b: jax.nn.relu(x + b), ((2, 3), (3,)), lambda x, b: x + b, relu, "scalar: relu"),
    "masked relu": Case(lambda x: jax.nn.relu(x * MASK), ((3,),), lambda x: x * MASK, relu, "scalar: relu"),
    "shifted relu": Case(lambda x: jax.nn.relu(x + SHIFT), ((3,),), lambda x: x + SHIFT, relu, "scalar: relu"),
    "relu": unary(jax.nn.relu, relu, "scalar: relu"),
    "leaky_relu": unary(jax.nn.leaky_relu, lambda s: np.where(s > 0, s, 0.01 * s), "scalar: leaky_relu"),
    "abs": unary(jnp.abs, np.abs, "scalar: abs"),
    "clip": unary(lambda x: jnp.clip(x, -0.5, 1.0), lambda s: np.clip(s, -0.5, 1), "scalar: clip"),
    "sign": unary(jnp.sign, np.sign, "scalar: sign"),
    "step": unary(lambda x: jnp.where(x > 0, 1.0, 0.0), lambda s: 1.0 * (s > 0), "scalar: step"),
    "hard_tanh": unary(jax.nn.hard_tanh, lambda s: np.clip(s, -1, 1), "scalar: clip"),
    "relu6": unary(jax.nn.relu6, lambda s: np.clip(s, 0, 6), "scalar: clip"),
    "round": unary(jnp.round, np.round, "scalar: round"),
    "floor": unary(jnp.floor, np.floor, "scalar: floor"),
    "square": unary(jnp.square, np.square, "scalar: square"),
    "product with itself": unary(lambda x: x * x, np.square, "scalar: square"),
    "square of a sum": Case(lambda x, y: (x - y) ** 2, two, lambda x, y: x - y, np.square, "scalar: square"),
    "gelu": unary(
        lambda x: jax.nn.gelu(x, approximate=False), lambda s: s * (1 + erf(s / np.sqrt(2))) / 2, "generic solver"
    ),
    "gelu of a sum": Case(
        lambda x, b: jax.nn.gelu(x + b, approximate=False), ((2, 3), (3,)),
        lambda x, b: x + b, lambda s: s * (1 + erf(s / np.sqrt(2))) / 2, "generic solver",
    ),
    "x sigmoid(x)": unary(lambda x: x * jax.nn.sigmoid(x), lambda s: s * sigmoid(s), "generic solver"),
    "written with where": unary(
        lambda x: jnp.where(x > 0, x, jnp.expm1(x)), lambda s: np.where(s > 0, s, np.expm1(s)), "generic solver"
    ),
}  # fmt: skip


@functools.cache
def node(name) -> Any:
    case = CASES[name]
    problem, index = node_of(case.function, *(jnp.zeros(s) + 0.1 for s in case.shapes))
    return problem, index, eqxproj.readers.context(problem, index, False)


@functools.cache
def projector(name, log_weights, log_kappa):
    """From the values of the unknowns and duals: operands as views show them, their duals, output, vjp and pullback."""
    problem, index, ctx = node(name)
    graph = problem.graph
    spec = graph.nodes[index]
    ctx = ctx.reweighted(log_weights, [log_kappa])
    parameter = {value: i for i, value in enumerate(graph.parameters)}

    def project(values, dual):
        edges = [graph.edges[e] for e in spec.edges]
        operands = [e.view.show(problem.known, [values[parameter[s]] for s in e.sources]) for e in edges]
        nus, (out,) = projected(spec.rule, ctx, operands, [dual])
        want = jax.vjp(lambda *x: ctx.function(*x)[0], *operands)[1](dual)
        return operands, nus, out, list(want), spec.rule.pullback(ctx, operands, [dual])

    return jax.jit(jax.vmap(project))


def project(name, log_weights, log_kappa, residuals, seed=0):
    rng = np.random.default_rng(seed)
    n = len(residuals)
    values = [jnp.asarray(1.5 * rng.normal(size=(n, *s)), jnp.float32) for s in CASES[name].shapes]
    shape = jax.eval_shape(CASES[name].function, *(v[0] for v in values)).shape
    dual = math.exp(log_kappa) * np.reshape(residuals, (n,) + (1,) * len(shape)) * rng.normal(size=(n, *shape))
    dual = np.asarray(dual, np.float32)
    run = projector(name, tuple(log_weights), log_kappa)
    _, again, settled, _, _ = run(values, jnp.zeros_like(dual))
    assert not any(x.any() for x in again)  # where nothing is wanted, nothing moves
    return dual, settled, *jax.tree.map(lambda x: np.asarray(x, np.float64), run(values, jnp.asarray(dual)))


def slopes(head, operands):
    """The coefficients of an affine function in each of its variables, one row an output."""
    flat = [x.ravel() for x in operands]
    sizes = np.cumsum([x.size for x in flat])[:-1]

    def call(v):
        return np.ravel(head(*(p.reshape(x.shape) for p, x in zip(np.split(v, sizes), operands, strict=True))))

    zero = np.zeros(sum(x.size for x in flat))
    return np.stack([call(e) - call(zero) for e in np.eye(len(zero))], -1), call


@pytest.mark.parametrize("name", CASES)
def test_is_recognized(name):
    problem, index, _ = node(name)
    spec = problem.graph.nodes[index]
    assert CASES[name].rule in spec.describe_rule()
    (line,) = [x for x in problem.explain().splitlines() if x.startswith(f"{index} ")]
    assert CASES[name].rule in line
    assert len(spec.edges) == len(CASES[name].shapes)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.1, 4.0, 1.0, 3.0)], ids=["unit", "unequal"])
@pytest.mark.parametrize("name", CASES)
def test_no_point_is_better(name, weights):
    case, (*each, kappa) = CASES[name], weights
    each = each[: len(case.shapes)]
    residuals = [0.01, 0.3, 1.0, 3.0]
    dual, settled, operands, nus, out, _, _ = project(name, np.log(each), math.log(kappa), residuals)
    rng = np.random.default_rng(1)
    for i in range(len(residuals)):
        here = [x[i] for x in operands]
        moved = [nu[i] / w for nu, w in zip(nus, each, strict=True)]
        matrix, call = slopes(case.head, here)
        start, step = np.concatenate([x.ravel() for x in here]), np.concatenate([x.ravel() for x in moved])
        stiff = np.concatenate([np.full(x.size, w) for x, w in zip(here, each, strict=True)])
        s0, mu = call(start), dual[i].ravel().astype(float)
        y0 = case.phi(s0) + mu / kappa
        np.testing.assert_allclose(settled[i].ravel(), case.phi(s0), rtol=1e-5, atol=1e-5)

        def costs(d, free=0.0):
            """Of every output with its variables; where the function jumps, `free` reaches the side that is meant."""
            s = call(start + d)
            gaps = np.stack([case.phi(s + x) - y0 for x in (0.0, free, -free)])
            return (matrix != 0) @ (stiff * d**2) + kappa * np.min(gaps**2, 0)

        cost = costs(step, 1e-5)
        best = [brute_force(case.phi, *x) for x in zip(s0, mu, [kappa] * len(s0), matrix**2 @ (1 / stiff), strict=True)]
        stay = mu**2 / kappa
        assert np.all(cost <= stay * (1 + 1e-4) + 1e-9)
        # The generic search is approximate, and near to a jump all is known to rounding only.
        tolerance = 0.01 if "generic solver" in case.rule else 1e-3
        assert np.all(cost <= np.asarray(best) * (1 + tolerance) + 1e-4 * stay)
        reached = call(start + step)
        values = np.stack([case.phi(reached + x) for x in (0.0, 1e-5, -1e-5)])
        assert np.all(np.min(np.abs(values - out[i].ravel()), 0) <= 1e-4)
        for size in (1e-3, 0.1, 1.0):
            near = costs(step + size * rng.normal(size=step.shape))
            assert cost.sum() <= near.sum() * (1 + tolerance) + 1e-4 * stay.sum()


FLAT = ("sign", "step", "round", "floor")


LIMIT = [(n, 400.0) for n in CASES if n not in FLAT] + [(n, 0.0) for n in ("relu", "bias", "square", "gelu", "sum")]


@pytest.mark.parametrize(("name", "log_kappa"), LIMIT)
def test_a_steep_metric_gives_the_vjp(name, log_kappa):
    """Also where the weights are beyond float32 and only their ratios are known."""
    logs = [log_kappa + x * math.log(10) for x in (6, 12, 9)][: len(CASES[name].shapes)]
    _, nus, _, want, _ = projector(name, tuple(logs), log_kappa)(*small_steps(name))
    for nu, true in zip(nus, want, strict=True):
        for x, y in zip(np.asarray(nu, float), np.asarray(true, float), strict=True):
            # The search takes differences of the function for its slope.
            tolerance = 2e-3 if "generic solver" in CASES[name].rule else 1e-4
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in FLAT])
def test_the_pullback_is_the_vjp_whatever_the_weights(name):
    found = []
    for logs in ((0.0, 0.0, 0.0), (3.0, -2.0, 1.0), (400.0, 1e4, -1e4)):
        run = projector(name, logs[: len(CASES[name].shapes)], 1.0)
        *_, want, nus = run(*small_steps(name))
        found.append(nus)
        for nu, true in zip(nus, want, strict=True):
            np.testing.assert_allclose(nu, true, rtol=1e-5, atol=1e-7 * np.abs(true).max())
    for others in zip(*found, strict=True):
        assert all(np.array_equal(others[0], x) for x in others)


def small_steps(name):
    """Values of the unknowns, and duals of very different sizes."""
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.normal(size=(3, *s)), jnp.float32) for s in CASES[name].shapes]
    shape = jax.eval_shape(CASES[name].function, *(v[0] for v in values)).shape
    sizes = jnp.asarray([1e-12, 1e-3, 0.1]).reshape((3,) + (1,) * len(shape))
    return values, sizes * jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)


def test_a_mean_is_two_exact_nodes():
    problem, _ = node_of(lambda x: jnp.mean(x, (0, 2)), jnp.ones((2, 3, 2)), operation="reduce_sum")
    rules = [n.describe_rule() for n in problem.graph.nodes if n.kind == "operation"]
    assert len(rules) == 2 and set(rules) <= {"affine", "identity"}
