"""The projection onto maxima and minima, against a search over all levels of every group of candidates.

The oracle knows an operation as its groups: for each output the elements that it is the largest (or smallest) of, where
-1 stands for padding. Windows that overlap own copies of the elements that they share.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bilinear_oracle import node_of, projected
from test_water_level import least_cost

import eqxproj


class Case(NamedTuple):
    function: Callable
    shapes: tuple[tuple[int, ...], ...]
    groups: Callable[[], np.ndarray]
    sign: float = 1.0


def of_two(function, sign=1.0):
    return Case(function, ((2, 3), (2, 3)), lambda: np.stack([np.arange(6), 6 + np.arange(6)], -1), sign)


def reduction(function, shape, axes, sign=1.0):
    def groups():
        index = np.arange(math.prod(shape)).reshape(shape)
        kept = [d for d in range(len(shape)) if d not in axes]
        return index.transpose(*kept, *axes).reshape(-1, math.prod(shape[d] for d in axes))

    return Case(lambda x: function(x, axes), (shape,), groups, sign)


def window(shape, size, strides, padding: Any = "VALID", base=None, dilation=None, sign=1.0):
    rank = len(shape)
    base, dilation = base or (1,) * rank, dilation or (1,) * rank
    operation, start = (jax.lax.max, -jnp.inf) if sign > 0 else (jax.lax.min, jnp.inf)

    def function(x):
        return jax.lax.reduce_window(x, start, operation, size, strides, padding, base, dilation)

    def groups():
        index = np.arange(math.prod(shape)).reshape(shape)
        wide = [(n - 1) * b + 1 for n, b in zip(shape, base)]
        span = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
        if padding == "SAME":
            total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(wide, strides, span)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [(0, 0)] * rank if padding == "VALID" else padding
        outs = [(n + lo + hi - k) // s + 1 for n, (lo, hi), k, s in zip(wide, pads, span, strides)]
        found = []
        for out in np.ndindex(*outs):
            found.append([])
            for k in np.ndindex(*size):
                at = [o * s + i * d - lo for o, s, i, d, (lo, _) in zip(out, strides, k, dilation, pads)]
                inside = all(0 <= x < n and x % b == 0 for x, n, b in zip(at, wide, base))
                found[-1].append(index[tuple(x // b for x, b in zip(at, base))] if inside else -1)
        return np.asarray(found)

    return Case(function, (shape,), groups, sign)


CASES = {
    "max of two": of_two(jnp.maximum),
    "min of two": of_two(jnp.minimum, -1.0),
    "max, last axis": reduction(jnp.max, (3, 5), (1,)),
    "max, first axis": reduction(jnp.max, (5, 2), (0,)),
    "max, two axes": reduction(jnp.max, (2, 3, 4), (0, 2)),
    "max of all": reduction(jnp.max, (3, 4), (0, 1)),
    "min, middle axis": reduction(jnp.min, (2, 4, 2), (1,), -1.0),
    "windows": window((2, 6), (1, 2), (1, 2)),
    "overlapping windows": window((4, 4), (2, 3), (1, 1)),
    "padded windows": window((1, 5, 4), (1, 3, 2), (1, 2, 2), "SAME"),
    "unevenly padded windows": window((5,), (3,), (1,), ((2, 1),)),
    "dilated windows": window((7,), (3,), (2,), ((1, 0),), None, (2,)),
    "windows on a dilated base": window((4,), (3,), (1,), ((1, 1),), (2,)),
    "smallest of windows": window((2, 5), (1, 3), (1, 2), sign=-1.0),
    "tiles": window((2, 4, 6), (1, 2, 2), (1, 2, 2)),
    "tiles with a rest": window((5, 7), (2, 3), (2, 3)),
    "padded tiles": window((4, 5), (2, 3), (2, 3), ((1, 0), (2, 1))),
    "smallest of tiles": window((4, 4), (2, 2), (2, 2), sign=-1.0),
}
WINDOWS = [n for n in CASES if "windows" in n or "tiles" in n]


@functools.cache
def groups_of(name):
    return CASES[name].groups()


@functools.cache
def node(name, store_copies) -> Any:
    problem, index = node_of(CASES[name].function, *(jnp.zeros(s) for s in CASES[name].shapes))
    assert problem.graph.nodes[index].describe_rule() == "maximum"
    return problem.graph.nodes[index].rule, eqxproj.readers.context(problem, index, store_copies)


@functools.cache
def projector(name, store_copies, log_weights, log_kappa):
    rule, ctx = node(name, store_copies)
    ctx = ctx.reweighted(log_weights, [log_kappa])

    def project(operands, dual):
        nus, (out,) = projected(rule, ctx, operands, [dual])
        return nus, out, rule.evaluate(ctx, operands)[0]

    return jax.jit(jax.vmap(project))


@functools.cache
def puller(name, store_copies, log_weights, log_kappa):
    rule, ctx = node(name, store_copies)
    ctx = ctx.reweighted(log_weights, [log_kappa])
    return jax.jit(jax.vmap(lambda operands, dual: rule.pullback(ctx, operands, [dual])))


def instances(name, residuals, kappa, spacing=None):
    """Operands and duals; with a spacing, no two elements are nearer than that."""
    rng = np.random.default_rng(0)
    n, case = len(residuals), CASES[name]
    sizes = [math.prod(s) for s in case.shapes]
    elements = rng.normal(size=(n, sum(sizes)))
    if spacing is not None:
        elements = spacing * (np.argsort(elements, 1) - 0.4 * sum(sizes))
    parts = np.split(elements.astype(np.float32), np.cumsum(sizes)[:-1], 1)
    operands = [x.reshape(n, *s) for x, s in zip(parts, case.shapes, strict=True)]
    shape = jax.eval_shape(case.function, *(x[0] for x in operands)).shape
    size = kappa * np.reshape(residuals, (n,) + (1,) * len(shape))
    return operands, (size * rng.choice([-1, 1], (n, *shape)) * rng.uniform(0.5, 1.5, (n, *shape))).astype(np.float32)


def collect(name, store_copies, arrays):
    """For each output (row) the entries that belong to its candidates, in float64."""
    if store_copies:
        return np.asarray(arrays[0], float).reshape(groups_of(name).shape)
    return np.append(np.concatenate([np.ravel(x) for x in arrays]).astype(float), 0.0)[groups_of(name)]


def expand(name, x):
    rule, ctx = node(name, True)
    return np.asarray(jax.vmap(lambda x: rule.expand(ctx, 0, x))(x))


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_hold_the_candidates_of_their_output(name):
    groups, shape = groups_of(name), CASES[name].shapes[0]
    index = 1.0 + np.arange(math.prod(shape)).reshape(1, *shape)
    held = expand(name, jnp.asarray(index, jnp.float32))[0].reshape(groups.shape)
    np.testing.assert_array_equal(np.where(np.abs(held) > 1e30, -1, held - 1), groups)
    counted = np.bincount(groups[groups >= 0], minlength=math.prod(shape)).reshape(shape)
    for store_copies in (False, True):
        rule, ctx = node(name, store_copies)
        np.testing.assert_array_equal(rule.copy_counts(ctx.equation, ctx.unknown, 0, ctx.copies), counted)


UNIT, UNEQUAL = (1.0, 1.0, 1.0), (0.2, 3.0, 2.0)
SETTINGS = [(name, (UNIT, UNEQUAL)[i % 2]) for i, name in enumerate(CASES)] + [("max of two", UNEQUAL)]


@pytest.mark.parametrize(("name", "weights"), SETTINGS)
def test_no_point_is_better(name, weights):
    case, groups, store_copies = CASES[name], groups_of(name), name in WINDOWS
    each, kappa = weights[: len(case.shapes)], weights[2]
    residuals = [0.01, 0.1, 1.0, 3.0, 30.0]
    operands, dual = instances(name, residuals, kappa)
    rng = np.random.default_rng(1)
    if store_copies:
        held = expand(name, operands[0])
        operands = [held + 0.2 * rng.normal(size=held.shape).astype(np.float32)]
    run = projector(name, store_copies, tuple(math.log(w) for w in each), math.log(kappa))
    nus, out, _ = run(operands, dual)
    arrived = [x + nu / np.float32(w) for x, nu, w in zip(operands, nus, each, strict=True)]
    for x in (operands, arrived):
        again, same, evaluated = run(x, np.zeros_like(dual))
        assert not any(nu.any() for nu in again)
        np.testing.assert_array_equal(same, evaluated)
    np.testing.assert_allclose(evaluated, out, rtol=1e-5, atol=1e-5)
    weight = np.broadcast_to(each if len(each) == 2 else each[0], groups.shape)
    for i in range(len(residuals)):
        x0, nu = (collect(name, store_copies, [x[i] for x in arrays]) for arrays in (operands, nus))
        wanted = dual[i].ravel().astype(float) / kappa
        for o, real in enumerate(groups >= 0):
            assert not nu[o][~real].any()
            x, w = case.sign * x0[o][real], weight[o][real]
            d, y = case.sign * nu[o][real] / w, x.max() + case.sign * wanted[o]

            def cost(d):
                return np.sum(w * d**2) + kappa * ((x + d).max() - y) ** 2  # noqa: B023

            np.testing.assert_allclose(case.sign * (x + d).max(), np.ravel(out[i])[o], rtol=1e-5, atol=1e-5)
            assert cost(d) <= least_cost(x, y, w, kappa) * (1 + 1e-3) + 1e-10
            for size, _ in itertools.product((1e-3, 0.1, 1.0), range(3)):
                assert cost(d) <= cost(d + size * rng.normal(size=d.shape)) * (1 + 1e-3) + 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWS)
def test_equal_copies_need_not_be_held(name):
    operands, dual = instances(name, [0.1, 1.0, 10.0], 1.0)
    lean, out, _ = projector(name, False, (0.0,), 0.0)(operands, dual)
    nus, same, _ = projector(name, True, (0.0,), 0.0)([expand(name, operands[0])], dual)
    np.testing.assert_allclose(out, same, rtol=1e-6)
    groups = groups_of(name).ravel()
    for x, nu in zip(np.asarray(lean[0]), np.asarray(nus[0]), strict=True):
        total = np.bincount(groups[groups >= 0], nu.ravel()[groups >= 0], x.size)
        np.testing.assert_allclose(x.ravel(), total, rtol=1e-5, atol=1e-6)


LIMIT = [(n, 400.0) for n in CASES] + [(n, 0.0) for n in ("max of two", "max, two axes", "overlapping windows")]


@pytest.mark.parametrize(("name", "log_kappa"), LIMIT)
def test_a_steep_metric_gives_the_vjp(name, log_kappa):
    """Also where the weights are beyond float32 and only their ratios are known."""
    operands, dual = instances(name, [1e-12, 1e-3, 1.0], 1.0, spacing=0.1)
    logs = tuple(log_kappa + x * math.log(10) for x in (6, 12)[: len(operands)])
    nus, _, _ = projector(name, False, logs, log_kappa)(operands, dual)
    assert_vjp(name, operands, dual, nus, 1e-4)


@pytest.mark.parametrize("store_copies", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_pullback_is_the_vjp_whatever_the_weights(name, store_copies):
    """Where no two candidates are equal."""
    operands, dual = instances(name, [1e-12, 1e-3, 1.0], 1.0, spacing=0.1)
    held = [expand(name, operands[0])] if store_copies and name in WINDOWS else operands
    logs = [(0.0, 0.0), (3.0, -2.0), (400.0, 1e4)]
    found = [puller(name, store_copies, pair[: len(operands)], 1.0)(held, dual) for pair in logs]
    for others in zip(*found, strict=True):
        assert all(np.array_equal(others[0], x) for x in others)
    nus = found[0]
    if held is not operands:
        groups = groups_of(name).ravel()
        real, size = groups >= 0, math.prod(CASES[name].shapes[0])
        totals = [np.bincount(groups[real], x.ravel()[real], size) for x in np.asarray(nus[0])]
        nus = [np.stack(totals).reshape(operands[0].shape)]
    assert_vjp(name, operands, dual, nus, 1e-6)


def assert_vjp(name, operands, dual, nus, tolerance):
    sign, groups = CASES[name].sign, groups_of(name)

    def function(*x):
        """The same by its groups: JAX has no derivative of windows with a dilation."""
        entries = sign * jnp.concatenate([jnp.ravel(v) for v in x])[groups]
        return sign * jnp.max(jnp.where(groups >= 0, entries, -jnp.inf), -1).reshape(dual.shape[1:])

    for i in range(len(dual)):
        want = jax.vjp(function, *(jnp.asarray(x[i]) for x in operands))[1](jnp.asarray(dual[i]))
        for nu, true in zip(nus, want, strict=True):
            assert np.linalg.norm(nu[i] - true) <= tolerance * np.linalg.norm(true)


@pytest.mark.parametrize("name", CASES)
def test_among_ties_the_first_rises_and_all_sink(name):
    """In the gradient regime, where entries that are not tied do not matter."""
    case, groups = CASES[name], groups_of(name)
    operands, dual = instances(name, [1.0] * 4, 1.0)
    operands = [np.round(x).astype(np.float32) for x in operands]
    nus = puller(name, False, (41.0,) * len(operands), 0.0)(operands, dual)
    ties = 0
    for i in range(len(dual)):
        x0 = collect(name, False, [x[i] for x in operands])
        want = np.zeros(sum(x[i].size for x in operands) + 1)
        for x, mu, group in zip(case.sign * x0, case.sign * dual[i].ravel().astype(float), groups, strict=True):
            tied = (x == x[group >= 0].max()) & (group >= 0)
            ties += tied.sum() > 1
            picked = group[tied][:1] if mu > 0 else group[tied]
            want[picked] += case.sign * mu / len(picked)
        found = np.concatenate([np.ravel(nu[i]) for nu in nus])
        np.testing.assert_allclose(found, want[:-1], rtol=1e-5, atol=1e-6)
    assert ties


def test_masked_entries_of_tiles_stay():
    rule, ctx = node("tiles", False)
    shape = CASES["tiles"].shapes[0]
    for x in (jnp.full(shape, -jnp.inf), jnp.zeros(shape).at[0, 0, 1].set(-jnp.inf)):
        for dual in (1.0, -1.0):
            (nu,) = rule.pullback(ctx, [x], [jnp.full(jax.eval_shape(CASES["tiles"].function, x).shape, dual)])
            assert jnp.isfinite(nu).all() and not nu[~jnp.isfinite(x)].any()


@pytest.mark.parametrize("name", ["max of two", "max, last axis", "padded windows"])
def test_always_finite(name):
    sizes = list(itertools.product([0.0, 1e-6, 1.0, 1e6], [0.0, 1e-6, 1.0, 1e6]))
    operands, dual = instances(name, [s for _, s in sizes], 1.0)
    scale = np.asarray([s for s, _ in sizes], np.float32)
    scaled = [x * scale.reshape((-1,) + (1,) * (x.ndim - 1)) for x in operands]
    nus, out, _ = projector(name, False, (0.0,) * len(operands), 0.0)(scaled, dual)
    assert all(np.isfinite(x).all() for x in (*nus, out))
