"""The square, the roundings and the generic scalar solver, against a brute-force search and against `jax.grad`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from test_piecewise import EPS, brute_force, enable_x64, objective, positive, signed

from eqxproj._numerics._scalar import round_dual, square_dual
from eqxproj._numerics._search import generic_dual


def sigmoid(s):
    return (1 + np.tanh(s / 2)) / 2


def piecewise(s, numpy):
    """What a user may write: smooth pieces with a jump and a kink."""
    return numpy.where(s > 1, s * s, numpy.sin(3 * s))


# name, solver, the same function in float64
EXACT = [
    ("square", square_dual, np.square),
    ("round", functools.partial(round_dual, method="round"), np.round),
    ("floor", functools.partial(round_dual, method="floor"), np.floor),
    ("ceil", functools.partial(round_dual, method="ceil"), np.ceil),
]
# name, function, the same in float64, share of random problems that must be solved to 1e-3
GENERIC = [
    ("tanh", jnp.tanh, np.tanh, 0.95),
    ("sigmoid", jax.nn.sigmoid, sigmoid, 0.95),
    ("softplus", jax.nn.softplus, lambda s: np.logaddexp(0, s), 0.95),
    ("gelu", lambda s: jax.nn.gelu(s, approximate=False), lambda s: s * (1 + erf(s / np.sqrt(2))) / 2, 0.95),
    ("silu", jax.nn.silu, lambda s: s * sigmoid(s), 0.95),
    ("mish", jax.nn.mish, lambda s: s * np.tanh(np.logaddexp(0, s)), 0.95),
    ("sin", jnp.sin, np.sin, 0.9),
    ("square", jnp.square, np.square, 0.9),
    ("relu", jax.nn.relu, lambda s: np.maximum(s, 0), 0.9),
    ("exp", jnp.exp, np.exp, 0.8),
    ("log", jnp.log, np.log, 0.6),
    ("sqrt", jnp.sqrt, np.sqrt, 0.6),
    ("sign", jnp.sign, np.sign, 0.8),
    ("floor", jnp.floor, np.floor, 0.6),
    ("written with where", lambda s: piecewise(s, jnp), lambda s: piecewise(s, np), 0.85),
]
LENGTH, FILL = 6240, (1, 0, 1, 1)
FUNCTIONS = dict((name, fn) for name, fn, _, _ in GENERIC)


@functools.cache
def compiled(name):
    if name in FUNCTIONS:
        return jax.jit(functools.partial(generic_dual, FUNCTIONS[name]))
    return jax.jit(dict((n, solver) for n, solver, _ in EXACT)[name.removeprefix("exact ")])


def solve(name, s0, mu, kappa, sigma, q=None):
    """The duals. All problems are padded to one length, so that every function is compiled once."""
    args = np.broadcast_arrays(s0, mu, sigma, kappa * sigma if q is None else q)
    padded = [np.pad(np.ravel(x), (0, LENGTH - np.size(x)), constant_values=k) for x, k in zip(args, FILL, strict=True)]
    lam = compiled(name)(*(jnp.asarray(x, jnp.float32) for x in padded))
    return np.asarray(lam, np.float64)[: np.size(args[0])].reshape(np.shape(args[0]))


def rounded_problem(s0, residual, kappa, sigma):
    s0, kappa, sigma = (np.asarray(x, np.float32).astype(np.float64) for x in (s0, kappa, sigma))
    return s0, np.asarray(kappa * residual, np.float32).astype(np.float64), kappa, sigma


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(s0=signed(-6, 6), residual=signed(-6, 6), kappa=positive, sigma=positive)
def test_square_is_exact(s0, residual, kappa, sigma):
    s0, mu, kappa, sigma = map(float, rounded_problem(s0, residual, kappa, sigma))
    delta = sigma * float(solve("exact square", s0, mu, kappa, sigma))
    best = brute_force(np.square, s0, mu, kappa, sigma, [0.0])
    # What float32 can resolve of the step, through the slope of the square there.
    resolution = kappa * (8 * EPS * delta * (abs(s0) + abs(delta))) ** 2
    cost = objective(np.square, s0 + delta, s0, mu, kappa, sigma)
    assert cost <= best * (1 + 1e-4) + 1e-6 * mu * mu / kappa + 1e3 * resolution


@pytest.mark.parametrize(("name", "solver", "fn"), EXACT[1:], ids=[row[0] for row in EXACT[1:]])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(s0=signed(-3, 3), residual=signed(-6, 6), kappa=positive, sigma=positive)
def test_rounding_is_exact(name, solver, fn, s0, residual, kappa, sigma):
    s0, mu, kappa, sigma = map(float, rounded_problem(s0, residual, kappa, sigma))
    delta = sigma * float(solve("exact " + name, s0, mu, kappa, sigma))
    relaxed = (sigma * mu) / (1 + kappa * sigma)
    steps = np.concatenate([np.arange(-20, 21), np.round(relaxed) + np.arange(-20, 21)])
    edges = np.round(s0) + np.concatenate([steps, steps + 0.5])
    edges = np.concatenate([edges - 1e-9 - 1e-15 * abs(edges), edges, edges + 1e-9 + 1e-15 * abs(edges)])
    best = objective(fn, edges, s0, mu, kappa, sigma).min()
    best = min(best, float(objective(fn, np.float64(s0), s0, mu, kappa, sigma)))
    margin = 32 * EPS * max(abs(s0), abs(delta), 1e-3)
    slack = (2 * abs(delta) * margin + margin**2) / sigma
    slack += 1e3 * kappa * (EPS * delta * (abs(delta) > 1e6)) ** 2  # integers that float32 does not hold
    cost = float(objective(fn, np.float64(s0 + delta), s0, mu, kappa, sigma))
    assert cost <= best * (1 + 1e-4) + 1e-6 * mu * mu / kappa + slack


def test_known_answers():
    assert abs(float(solve("exact square", 0.0, 4.0, 1.0, 1.0))) == pytest.approx(np.sqrt(3.5), rel=1e-6)
    assert float(solve("exact square", 0.0, 0.25, 1.0, 1.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(solve("exact square", 0.0, 0.5, 1.0, 1.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(solve("exact square", 3.0, 1e-20, 1e30, 1e-30, 1e-6)) == pytest.approx(6e-20, rel=1e-4)
    assert 0 < float(solve("exact round", 0.5, 0.6, 1.0, 1.0)) < 1e-5
    assert float(solve("exact round", 0.4, 1.0, 1.0, 1.0)) == pytest.approx(0.1, abs=1e-5)
    assert float(solve("exact floor", 0.9, 1e-20, 1.0, 1.0)) == 0.0
    assert float(solve("exact ceil", 2.5, -2.0, 1.0, 1.0)) == pytest.approx(-0.5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phi", "fn", "share"), GENERIC, ids=[row[0] for row in GENERIC])
def test_generic_is_near_the_best_and_never_worse_than_staying(name, phi, fn, share):
    for decades in (2, 6):
        random, n = np.random.default_rng(decades), 60
        s0 = 10 ** random.uniform(-3, 1.3, n) * (1 if name in ("log", "sqrt") else random.choice([-1, 1], n))
        residual = 10 ** random.uniform(-decades, min(decades, 3), n) * random.choice([-1, 1], n)
        problem = rounded_problem(s0, residual, *(10 ** random.uniform(-decades, decades, (2, n))))
        s0, mu, kappa, sigma = problem
        lam = solve(name, *problem)
        assert np.all(np.isfinite(lam))
        cost, stay = objective(fn, s0 + sigma * lam, *problem), mu**2 / kappa
        assert np.all(cost <= stay * (1 + 1e-4))
        edges = np.arange(-60, 61.0)
        extra = [*(edges - 1e-9), *(edges[edges != 0]), *(edges + 1e-9)]
        best = np.asarray([brute_force(fn, *p, extra=extra) for p in zip(*problem, strict=True)])
        assert np.mean(cost <= best * (1 + 1e-3) + 1e-6 * stay) >= share
        # Where there is something to gain, most of it is gained in all but a few problems.
        worthwhile = stay - best > 0.01 * stay
        assert np.mean((stay - cost > 0.9 * (stay - best))[worthwhile]) >= (0.75 if share < 0.8 else 0.9)


SMOOTH = ["tanh", "sigmoid", "softplus", "gelu", "silu", "mish", "sin", "square", "exp"]
SMALL = [(1e-20, 1e30, 1e-30, 1e-6), (-1e-20, 1.0, 1e-6, 1e-6), (1e-5, 1.0, 1e-6, 1e-6), (1e-4, 1e3, 1e-6, 1e-3)]


@pytest.mark.parametrize("name", [*SMOOTH, "log", "sqrt", "relu", "exact square"])
def test_small_steps_are_gradients(name):
    s0 = np.asarray([1e-3, 0.02, 0.3, 0.8, 1.1, 2.3, 3.0], np.float32)
    s0 = s0 if name in ("log", "sqrt") else np.concatenate([s0, -s0, [0.0] if name in SMOOTH else []])
    fn = jnp.square if name == "exact square" else FUNCTIONS[name]
    slope = np.asarray(jax.vmap(jax.grad(fn))(jnp.asarray(s0, jnp.float32)), np.float64)
    mu, kappa, sigma, q = np.asarray(SMALL).T[:, :, None]
    lam = solve(name, np.tile(s0, (len(mu), 1)), mu * np.ones(s0.shape), kappa, sigma, q)
    np.testing.assert_allclose(lam / mu, slope / (1 + slope**2 * q), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*FUNCTIONS, *("exact " + row[0] for row in EXACT)])
def test_always_finite(name):
    scales = np.asarray([0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6])
    s0, mu = np.concatenate([scales, -scales, [0.5]]), np.concatenate([scales, -scales, [1e-38, -1e-20, 1e30]])
    s0, mu, kappa, sigma, factor = (
        x.ravel() for x in np.meshgrid(s0, mu, [1e-6, 1.0, 1e6, 1e30], [1e-30, 1e-6, 1.0, 1e6], [1.0, 1e-6])
    )
    assert np.all(np.isfinite(solve(name, s0, mu, kappa, sigma, kappa * sigma * factor)))


@pytest.mark.parametrize("name", ["tanh", "exact square", "exact round"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype_and_transformations(name, dtype):
    with enable_x64():
        solver = compiled(name)
        s0 = jnp.linspace(-3, 3, 24).reshape(4, 6).astype(dtype)
        mu = jnp.full((4, 6), 0.7, dtype)
        lam = solver(s0, mu, jnp.ones((4, 1), dtype), jnp.ones((6,), dtype))
        assert lam.dtype == dtype and lam.shape == (4, 6) and bool(jnp.all(jnp.isfinite(lam)))
        mapped = jax.vmap(lambda s, m: solver(s, m, 1.0, 1.0))(s0, mu)
        tolerance = 1e-5 if dtype != "bfloat16" else 0.05
        np.testing.assert_allclose(np.float64(lam), np.float64(mapped), rtol=tolerance, atol=tolerance)


def test_generic_evaluates_few_times():
    calls = 0

    def count(s):
        nonlocal calls
        calls += s.size
        return np.tanh(s)

    def phi(s):
        return jax.pure_callback(count, jax.ShapeDtypeStruct(s.shape, s.dtype), s)

    one = jnp.ones((1,))
    jax.block_until_ready(generic_dual(phi, one, one, 1.0, 1.0))
    assert calls <= 45
    calls = 0
    jax.block_until_ready(generic_dual(phi, one, 1e-9 * one, 1e-3, 1e-3))
    assert calls <= 18


def wave(s, frequency, shift, numpy):
    return numpy.where(s < -2, numpy.nan, numpy.sin(frequency * s) + numpy.floor(s + shift))


@jax.jit
def _solve_wave(frequency, shift, s0, mu, kappa, sigma):
    return generic_dual(lambda s: wave(s, frequency, shift, jnp), s0, mu, sigma, kappa * sigma)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(frequency=st.floats(0.1, 30), shift=st.floats(-3, 3), residual=signed(-3, 1))
def test_any_function_is_never_worse_than_staying(frequency, shift, residual):
    s0, mu, kappa, sigma = rounded_problem(shift / 2, residual, 2.0, 0.5)
    frequency, shift = float(np.float32(frequency)), float(np.float32(shift))
    lam = np.float64(_solve_wave(*(jnp.asarray(x, jnp.float32) for x in (frequency, shift, s0, mu, kappa, sigma))))
    cost = objective(lambda s: wave(s, frequency, shift, np), s0 + sigma * lam, s0, mu, kappa, sigma)
    assert cost <= mu**2 / kappa * (1 + 1e-4) + 1e-10
