"""Piecewise affine functions: the algebra against JAX itself, the projection against a brute-force search."""

import functools
import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from eqxproj._numerics._piecewise import MAX_PIECES, PiecewiseAffine, apply_primitive
from eqxproj._numerics._piecewise_dual import piecewise_affine_dual

EPS = float(jnp.finfo(jnp.float32).eps)


def interpret(jaxpr, args):
    """Applies a jaxpr of elementwise operations to functions and numbers."""
    known = dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: float(v.val) if hasattr(v, "val") else known[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            out = interpret(inner, operands)
        else:
            out = apply_primitive(eqn.primitive.name, eqn.params, operands)
        if out is None:
            return None
        known[eqn.outvars[0]] = out
    return read(jaxpr.outvars[0])


def recognize(fn) -> Any:
    """The closed form of an elementwise JAX function, or None."""
    return interpret(jax.make_jaxpr(fn)(jnp.float32(1.0)).jaxpr, [PiecewiseAffine.identity()])


def objective(fn, s, s0, mu, kappa, sigma):
    """The objective of the scalar node, in float64."""
    with np.errstate(all="ignore"):
        cost = (s - s0) ** 2 / sigma + kappa * (fn(s) - fn(s0) - mu / kappa) ** 2
    return np.where(np.isfinite(cost), cost, np.inf)


def brute_force(fn, s0, mu, kappa, sigma, extra=()):
    """The lowest objective that a dense grid and local searches around its best points find, in float64."""
    radius = abs(mu) * np.sqrt(sigma / kappa) * 1.0001
    steps = np.concatenate([np.geomspace(1e-9, 1, 400) * radius, np.linspace(0, 1, 1000) * radius])
    steps = np.concatenate([steps, np.geomspace(1e-9, 1e2, 400)])
    points = np.unique(np.concatenate([s0 - steps, s0 + steps, np.asarray(extra, float)]))
    cost = objective(fn, points, s0, mu, kappa, sigma)
    best = cost.min()
    inner = np.flatnonzero((cost[1:-1] <= cost[:-2]) & (cost[1:-1] <= cost[2:])) + 1
    for i in inner[np.argsort(cost[inner])][:5]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = minimize_scalar(
                lambda s: float(objective(fn, s, s0, mu, kappa, sigma)),
                bounds=(points[i - 1], points[i + 1]),
                method="bounded",
                options={"xatol": 1e-13 * max(1.0, abs(points[i]))},
            )
        best = min(best, float(found.fun))
    return best


def signed(low, high):
    """Numbers of either sign, of magnitudes spread over decades, and zero."""
    magnitude = st.floats(low, high).map(lambda x: 10.0**x)
    return st.one_of(st.just(0.0), magnitude, magnitude.map(lambda x: -x))


positive = st.floats(-6, 6).map(lambda x: 10.0**x)

# name, function, description
FUNCTIONS = [
    ("identity", lambda x: x, "identity"),
    ("affine", lambda x: 3 - 2 * (x + 1), "affine"),
    ("constant", lambda x: 0 * x + 2, "affine"),
    ("relu", jax.nn.relu, "relu"),
    ("relu by where", lambda x: jnp.where(x > 0, x, 0.0), "relu"),
    ("relu by abs", lambda x: (x + jnp.abs(x)) / 2, "relu"),
    ("leaky_relu", jax.nn.leaky_relu, "leaky_relu"),
    ("leaky_relu by max", lambda x: jnp.maximum(x, 0.25 * x), "leaky_relu"),
    ("abs", jnp.abs, "abs"),
    ("clip", lambda x: jnp.clip(x, -1, 2), "clip"),
    ("clamp", lambda x: jax.lax.clamp(-1.0, x, 2.0), "clip"),
    ("relu6", jax.nn.relu6, "clip"),
    ("hard_tanh", jax.nn.hard_tanh, "clip"),
    ("hard_sigmoid", jax.nn.hard_sigmoid, "piecewise affine (3 pieces)"),
    ("sign", jnp.sign, "sign"),
    ("step", lambda x: (x > 0.25).astype(x.dtype), "step"),
    ("heaviside", lambda x: jnp.heaviside(x, 0.5), "step"),
    ("negative step", lambda x: jnp.where(jnp.logical_not(x >= 0), 1.0, -1.0), "piecewise affine (2 pieces)"),
    ("window", lambda x: jnp.where((x > -1) & (x <= 2), x, 5.0), "piecewise affine (3 pieces)"),
    ("outside", lambda x: jnp.where((x < -1) | (x == 3), 1.0, 0 * x), "piecewise affine (3 pieces)"),
    ("gated", lambda x: x * (x > 0.5), "piecewise affine (2 pieces)"),
    ("ternary", lambda x: jnp.sign(jnp.where(jnp.abs(x) < 0.5, 0.0, x)), "piecewise affine (3 pieces)"),
    ("quantized", lambda x: sum((x > t).astype(x.dtype) for t in (-1, 0, 1, 2)) / 4, "piecewise affine (5 pieces)"),
    ("nan_to_num", jnp.nan_to_num, "identity"),
    ("max with -inf", lambda x: jnp.maximum(x, -jnp.inf), "identity"),
    ("finite", lambda x: jnp.where(jnp.isfinite(x), x, 0.0), "identity"),
    ("shrink", lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0), "piecewise affine (3 pieces)"),
    ("indicator", lambda x: (x != 0).astype(jnp.int32).astype(x.dtype), "piecewise affine (2 pieces)"),
    ("zigzag", lambda x: jnp.abs(jnp.abs(jnp.abs(x) - 2) - 1), "piecewise affine (8 pieces)"),
]
names = [row[0] for row in FUNCTIONS]
DUALS = [row for row in FUNCTIONS if row[0] not in ("outside", "indicator")]  # isolated points are no destination


@functools.cache
def closed_form(name) -> Any:
    return recognize(dict((n, f) for n, f, _ in FUNCTIONS)[name])


@functools.cache
def solver(phi):
    return jax.jit(functools.partial(piecewise_affine_dual, phi))


def solve(phi, s0, mu, kappa, sigma, q=None):
    args = [jnp.asarray(x, jnp.float32) for x in (s0, mu, sigma, kappa * sigma if q is None else q)]
    return np.asarray(solver(phi)(*args), np.float64)


@pytest.mark.parametrize(("name", "fn", "description"), FUNCTIONS, ids=names)
def test_algebra_agrees_with_jax(name, fn, description):
    phi = closed_form(name)
    assert phi is not None and phi.describe() == description
    assert hash(phi) == hash(recognize(fn)) and phi == recognize(fn)
    random = np.random.default_rng(0).normal(size=200) * 4
    points = np.asarray([*random, *phi.breakpoints, 0.0, -1.0, 1.0, 3.0, 1e4, -1e4], np.float32)
    expected = np.asarray(jax.vmap(fn)(points), np.float64)
    np.testing.assert_allclose(phi(points), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * x,
        jnp.exp,
        jnp.floor,
        lambda x: 1 / x,
        lambda x: x * jax.nn.relu(x),
        lambda x: x.astype(jnp.int32).astype(x.dtype),
        lambda x: x.astype(bool).astype(x.dtype) + jnp.round(x),
        lambda x: sum((x > t).astype(x.dtype) for t in range(MAX_PIECES)),
    ],
)
def test_not_representable(fn):
    assert recognize(fn) is None


def test_infinite_and_nan_numbers():
    s = PiecewiseAffine.identity()
    assert apply_primitive("max", {}, [s, float("nan")]) is None
    assert apply_primitive("min", {}, [s, float("inf")]) == s
    infinite = apply_primitive("add", {}, [s, float("inf")])
    assert infinite is not None and infinite == PiecewiseAffine.constant(float("inf"))
    assert apply_primitive("sub", {}, [infinite, infinite]) is None
    assert apply_primitive("is_finite", {}, [infinite]) == PiecewiseAffine.constant(0.0)
    negative = apply_primitive("lt", {}, [s, 0.0])
    assert negative is not None
    barrier = apply_primitive("select_n", {}, [negative, s, float("inf")])
    assert barrier is not None
    assert float(solve(barrier, 1.0, -9.0, 1.0, 1.0)) == pytest.approx(-1.0, rel=1e-5)
    assert float(solve(barrier, -1.0, 9.0, 1.0, 1.0)) == 0.0


@pytest.mark.parametrize("name", [row[0] for row in DUALS])
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(s0=signed(-6, 6), residual=signed(-6, 6), kappa=positive, sigma=positive)
def test_no_point_is_better(name, s0, residual, kappa, sigma):
    phi = closed_form(name)
    s0, kappa, sigma = (float(np.float32(x)) for x in (s0, kappa, sigma))
    mu = float(np.float32(kappa * residual))
    delta = sigma * float(solve(phi, s0, mu, kappa, sigma))
    cost = float(objective(phi, s0 + delta, s0, mu, kappa, sigma))
    near = [b + k * 1e-9 * max(1, abs(b)) for b in phi.breakpoints for k in (-1, 1)]
    best = brute_force(phi, s0, mu, kappa, sigma, [*near, *(b for b in phi.breakpoints)])
    # What float32 can resolve of the step, and the margin kept at a jump.
    resolution = kappa * (4 * EPS * max(map(abs, phi.slopes)) * abs(delta)) ** 2
    margin = 16 * EPS * max(abs(s0), *map(abs, phi.breakpoints), 1e-6) if phi.breakpoints else 0.0
    if all(not any(phi.jumps(i)) for i in range(len(phi.breakpoints))):
        margin = 0.0
    slack = 1e3 * resolution + (2 * abs(delta) * margin + margin**2) / sigma
    slack += 1e3 * kappa * (max(map(abs, phi.slopes)) * margin) ** 2
    # The values at isolated points are in the grid of the oracle, but no destination: allow for them.
    isolated = [b for i, b in enumerate(phi.breakpoints) if all(phi.jumps(i))]
    if any(float(objective(phi, b, s0, mu, kappa, sigma)) <= best for b in isolated):
        return
    assert cost <= best * (1 + 1e-3) + 1e-6 * mu * mu / kappa + slack


@pytest.mark.parametrize("name", [row[0] for row in DUALS])
@pytest.mark.parametrize(("mu", "kappa", "sigma", "q"), [(1e-20, 1e30, 1e-30, 1e-6), (-1e-12, 1.0, 1e-6, 1e-6)])
def test_small_steps_are_gradients(name, mu, kappa, sigma, q):
    fn = dict((n, f) for n, f, _ in FUNCTIONS)[name]
    s0 = jnp.asarray([3.1, -2.7, 0.6, -0.4, 1.3], jnp.float32)
    lam = solve(closed_form(name), s0, np.full(5, mu), kappa, sigma, q)
    slope = np.asarray(jax.vmap(jax.grad(fn))(s0), np.float64)
    np.testing.assert_allclose(lam / mu, slope / (1 + slope**2 * q), rtol=2e-6)


@pytest.mark.parametrize("name", names)
def test_always_finite(name):
    phi = closed_form(name)
    scales = np.asarray([0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6])
    s0 = np.concatenate([scales, -scales, phi.breakpoints])
    mu = np.concatenate([scales, -scales, [1e-38, -1e-20, 1e30]])
    s0, mu, kappa, sigma, factor = (
        x.ravel() for x in np.meshgrid(s0, mu, [1e-6, 1.0, 1e6, 1e30], [1e-30, 1e-6, 1.0, 1e6], [1.0, 1e-6])
    )
    assert np.all(np.isfinite(solve(phi, s0, mu, kappa, sigma, kappa * sigma * factor)))


@pytest.mark.parametrize("name", ["sign", "step", "quantized", "ternary", "gated"])
def test_jumps_survive_rounding(name):
    phi = closed_form(name)
    s0 = np.random.default_rng(1).normal(size=500).astype(np.float32) * 3
    for residual in (-1.5, 1.5):
        delta = solve(phi, s0, np.full(500, residual * 30.0), 30.0, 3.0) * 3.0
        exact, rounded = phi(s0 + delta), phi(s0 + delta.astype(np.float32))
        np.testing.assert_allclose(rounded, exact, atol=1e-5)
        assert np.any(exact != phi(s0))


def test_ties_and_known_answers():
    sign, relu, absolute = closed_form("sign"), closed_form("relu"), closed_form("abs")
    assert float(solve(sign, 0.5, 0.0, 1.0, 1.0)) == 0.0
    assert float(solve(sign, 0.5, 3.0, 1.0, 1.0)) == 0.0
    assert float(solve(sign, 0.5, -2.0, 1.0, 1.0)) == pytest.approx(-0.5, rel=1e-5)
    assert float(solve(sign, 2.5, -2.0, 1.0, 1.0)) == 0.0
    assert float(solve(relu, 0.0, 1.0, 1.0, 1.0)) == 0.5
    assert float(solve(relu, 0.0, -1.0, 1.0, 1.0)) == 0.0
    assert abs(float(solve(absolute, 0.0, 2.0, 1.0, 1.0))) == 1.0
    assert float(solve(closed_form("affine"), 3.0, 1e-20, 1e30, 1e-30, 1e-6)) == pytest.approx(-2e-20, rel=1e-5)


def enable_x64():
    """Double precision, under the name that this version of JAX has for it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # before JAX 0.8


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "float32"])
def test_dtype_and_transformations(dtype):
    with enable_x64():
        phi = closed_form("hard_tanh")
        s0 = jnp.linspace(-3, 3, 24).reshape(4, 6).astype(dtype)
        mu = jnp.ones((4, 6), dtype)
        lam = piecewise_affine_dual(phi, s0, mu, jnp.ones((4, 1), dtype), jnp.ones((6,), dtype))
        assert lam.dtype == dtype and lam.shape == (4, 6)
        mapped = jax.vmap(lambda s, m: piecewise_affine_dual(phi, s, m, 1.0, 1.0))(s0, mu)
        np.testing.assert_array_equal(np.asarray(lam), np.asarray(mapped))


def test_relu_compiles_to_few_operations():
    phi = closed_form("relu")
    args = [jnp.ones((8,), jnp.float32)] * 2 + [1.0, 1.0]
    jaxpr = jax.make_jaxpr(functools.partial(piecewise_affine_dual, phi))(*args)
    assert len(jaxpr.eqns) < 80
