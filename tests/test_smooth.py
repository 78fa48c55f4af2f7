"""The quick way to the projection of smooth scalar nodes, against a brute-force search; and when it is taken."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from test_piecewise import brute_force, objective

from eqxproj._numerics._smooth import bounds_of, smooth_dual
from eqxproj._program._fragment import Fragment, OfOne
from eqxproj._program._normal_form import normal_form
from eqxproj.rules._scalar import Scalar


def sigmoid(s):
    return (1 + np.tanh(s / 2)) / 2


def gelu(s):
    return s * (1 + erf(s / np.sqrt(2))) / 2


# function, the same in float64, its largest slope and second derivative, whether monotone
FUNCTIONS: dict[str, tuple[Any, Any, float, float, bool]] = {
    "tanh": (jnp.tanh, np.tanh, 1.0, 4 / np.sqrt(27), True),
    "sigmoid": (jax.nn.sigmoid, sigmoid, 0.25, 1 / np.sqrt(108), True),
    "minus sigmoid": (lambda s: 1 - jax.nn.sigmoid(s), lambda s: 1 - sigmoid(s), 0.25, 1 / np.sqrt(108), True),
    "sin": (jnp.sin, np.sin, 1.0, 1.0, False),
    "faster cos": (lambda s: jnp.cos(3 * s), lambda s: np.cos(3 * s), 3.0, 9.0, False),
    "atan": (jnp.arctan, np.arctan, 1.0, 9 / np.sqrt(192), True),
    "silu": (jax.nn.silu, lambda s: s * sigmoid(s), 1.0998, 0.5, False),
    "softplus": (jax.nn.softplus, lambda s: np.logaddexp(0, s), 1.0, 0.25, True),
    "mish": (jax.nn.mish, lambda s: s * np.tanh(np.logaddexp(0, s)), 1.0885, 0.6442, False),
    "gelu": (lambda s: jax.nn.gelu(s, approximate=False), gelu, 1.1290, 2 / np.sqrt(2 * np.pi), False),
}
ROUGH = {
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "bent a little": lambda s: jnp.tanh(s) + 1e-3 * jnp.abs(s - 0.123),
    "with a step": lambda s: jnp.tanh(s) + jnp.where(s > 1, 1e-3, 0.0),
    "fast": lambda s: jnp.sin(100 * s),
    "floor": jnp.floor,
    "sign": jnp.sign,
    "log": jnp.log,
    "one over": lambda s: 1 / s,
}


def fragment(function) -> tuple[Fragment, dict[int, float]]:
    program = normal_form(jax.make_jaxpr(function)(jnp.zeros(5)))
    static = {i: float(x) for i, x in program.static.items()}
    return Fragment(program.equations, program.inputs, program.outputs), static


def found_bounds(function):
    """The bounds, of the function as a rule knows it."""
    phi, static = fragment(function)
    return bounds_of(OfOne.of(phi, static), phi.operands[0].dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_are_those_of_the_function_with_a_tenth_to_spare(name):
    function, _, slope, bend, monotone = FUNCTIONS[name]
    found = found_bounds(function)
    assert found is not None and found.monotone == monotone
    np.testing.assert_allclose(found[:2], (1.1 * slope, 1.1 * bend), rtol=2e-3)


@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_bounds_are_numbers_while_tracing(name):
    found = []

    @jax.jit
    @jax.vmap
    def traced(x):
        found.append(found_bounds(FUNCTIONS[name][0]))
        return x

    traced(jnp.zeros(2))
    assert isinstance(found[0].bend, float)


@pytest.mark.parametrize("name", ROUGH)
def test_functions_that_are_not_smooth_have_no_bounds(name):
    assert found_bounds(ROUGH[name]) is None


def test_a_function_of_known_arrays_has_no_bounds():
    scale = jnp.arange(1.0, 6.0)
    phi, static = fragment(lambda s: jnp.tanh(s * scale))
    assert Scalar((), phi, phi, static)._bounds is None


@functools.cache
def solver(name):
    function = FUNCTIONS[name][0]
    bounds = found_bounds(function)
    assert bounds is not None

    def solve(s0, mu, sigma, q):
        return smooth_dual(function, bounds, s0, mu, sigma, q, lambda: jnp.full_like(s0, jnp.nan))

    return jax.jit(solve)


def easy_problems(name, seed=0, count=200):
    """As hard as they may be: the most that is taken from the one of a convex objective is just under a half."""
    rng = np.random.default_rng(seed)
    bounds = found_bounds(FUNCTIONS[name][0])
    assert bounds is not None
    sigma, kappa = (np.float32(10.0 ** rng.uniform(-3, 3, count)).astype(float) for _ in range(2))
    s0 = np.float32(rng.uniform(-8, 8, count)).astype(float)
    gain = bounds.slope * np.sqrt(kappa * sigma)
    most = 0.5 / (sigma * bounds.bend * (1 if bounds.monotone else 1 + np.minimum(gain, gain**2)))
    share = 10.0 ** rng.uniform(-4, 0, count) * rng.choice([-0.999, 0.999], count)
    return s0, np.float32(share * most).astype(float), kappa, sigma


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_point_is_better(name):
    phi = FUNCTIONS[name][1]
    s0, mu, kappa, sigma = easy_problems(name)
    lam = np.asarray(solver(name)(*(jnp.asarray(x, jnp.float32) for x in (s0, mu, sigma, kappa * sigma))))
    assert np.all(np.isfinite(lam))  # the quick way was taken
    for args in zip(lam.astype(float), s0, mu, kappa, sigma, strict=True):
        best = brute_force(phi, *args[1:])
        start = objective(phi, args[1], *args[1:])
        cost = objective(phi, args[1] + args[4] * args[0], *args[1:])
        assert cost - best <= 1e-5 * start + 1e-3 * max(start - best, 0)


@pytest.mark.usefixtures("optimized")  # the slopes on both sides are to be rounded alike
@pytest.mark.parametrize("sigma, mu", [(1e-12, 1e-2), (1e-30, 1e-12)])
@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_small_steps_are_exact(name, sigma, mu):
    """A move below the resolution of the point, where the difference of two values is nothing but rounding."""
    function = FUNCTIONS[name][0]
    s0 = jnp.linspace(-3, 3, 50)
    sigma, q = jnp.float32(sigma), jnp.float32(1e3)
    mu = jnp.full_like(s0, mu)
    slope = jax.vmap(jax.grad(function))(s0)
    np.testing.assert_allclose(solver(name)(s0, mu, sigma, q), slope * mu / (1 + slope**2 * q), rtol=1e-5)


def test_one_hard_element_takes_the_other_way():
    s0, mu = jnp.zeros(4) + 0.5, jnp.array([1e-3, 1e-3, 10.0, 0.0])
    one = jnp.float32(1.0)
    assert np.all(np.isnan(solver("tanh")(s0, mu, one, one)))
    assert np.all(np.isfinite(solver("tanh")(s0, mu.at[2].set(0.0), one, one)))


@pytest.mark.parametrize("s0, mu", [(jnp.nan, 0.1), (0.1, jnp.nan), (jnp.inf, 0.1), (100.0, 0.1)])
def test_what_the_bounds_do_not_hold_for_takes_the_other_way(s0, mu):
    one = jnp.float32(1.0)
    assert np.all(np.isnan(solver("tanh")(jnp.full(4, s0), jnp.full(4, mu), one, one)))
