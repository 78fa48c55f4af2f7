"""The slope of the expectation of functions with jumps, against numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from eqxproj import filter_displacement
from eqxproj._numerics._noise import expected_slope, expected_slope_of_pieces, jumps_of, within
from eqxproj._program._equations import dependents
from eqxproj._program._fragment import Fragment, OfOne
from eqxproj._program._normal_form import normal_form
from eqxproj.rules._scalar import recognize

FUNCTIONS = {
    "sign": (jnp.sign, {0.0: jnp.sign}),
    "step": (lambda s: jnp.where(s > 0.3, 2.0, -1.0), {0.3: lambda s: jnp.where(s > 0.3, 2.0, -1.0)}),
    "three levels": (
        lambda s: jnp.where(s > 0.5, 1.0, jnp.where(s < -0.5, -1.0, 0.0)),
        {0.5: lambda s: jnp.where(s > 0.5, 1.0, 0.0), -0.5: lambda s: jnp.where(s < -0.5, -1.0, 0.0)},
    ),
    "jump and slope": (
        lambda s: jnp.where(s > 0, s + 1.0, 0.5 * s),
        {0.0: lambda s: jnp.where(s > 0, s + 1.0, 0.5 * s)},
    ),
    "band": (
        lambda s: jnp.where(jnp.abs(s) < 1, s, 0.0),
        {-1.0: lambda s: jnp.where(s > -1, s, 0.0), 1.0: lambda s: jnp.where(s > 1, -s, 0.0)},
    ),
}
"""Functions, and their parts by breakpoint."""
POINTS = np.array([-3.0, -1.0, -0.2, 0.0, 0.3, 0.7, 2.5])


def fragment(f):
    program = normal_form(jax.make_jaxpr(f)(jnp.zeros(3)))
    unknown = dependents(program.equations, program.inputs)
    equations = tuple(e for e in program.equations if any(v.index in unknown for v in e.outputs))
    return Fragment(equations, program.inputs, program.outputs), program


def found_jumps(f):
    phi, program = fragment(f)
    return jumps_of(OfOne.of(phi, program.static), phi.operands[0].dtype)


def slope_by_integration(f, s, size):
    def integrand(e):
        return e * float(f(jnp.float32(s + size * e))) * norm.pdf(e) / size

    breaks = [(b - s) / size for b in (-1.0, -0.5, 0.0, 0.3, 0.5, 1.0)]
    return quad(integrand, -6, 6, points=[b for b in breaks if -6 < b < 6], limit=200)[0]


def pieces_of(f):
    phi, program = fragment(f)
    pieces = recognize(phi, program.static)
    assert pieces is not None and pieces.has_jumps
    return pieces


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slope_of_the_expectation(name):
    f, parts = FUNCTIONS[name]
    sizes = {b: 0.4 * np.sqrt(np.mean((POINTS - b) ** 2)) for b in parts}
    wanted = np.array([sum(slope_by_integration(g, s, sizes[b]) for b, g in parts.items()) for s in POINTS])
    closed = expected_slope_of_pieces(pieces_of(f), jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(closed, wanted, atol=4e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_quadrature_sees_functions_through_noise_of_unit_size(name):
    f = FUNCTIONS[name][0]
    wanted = np.array([slope_by_integration(f, s, 1.0) for s in POINTS])
    np.testing.assert_allclose(expected_slope(f, jnp.asarray(POINTS, jnp.float32)), wanted, atol=0.15)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_a_jump_is_seen_alike_in_any_unit(unit):
    s = jnp.asarray(POINTS, jnp.float32)
    changed = pieces_of(lambda s: jnp.where(s > 0.3 * unit, 2.0, -1.0))
    expected = expected_slope_of_pieces(pieces_of(FUNCTIONS["step"][0]), s)
    np.testing.assert_allclose(unit * expected_slope_of_pieces(changed, unit * s), expected, rtol=1e-3)


def test_a_jump_is_seen_where_all_or_none_are_near_it():
    sign = pieces_of(jnp.sign)
    np.testing.assert_allclose(expected_slope_of_pieces(sign, jnp.zeros(3)), 2 * norm.pdf(0.0), rtol=1e-5)
    assert np.all(expected_slope_of_pieces(sign, jnp.full(3, 50.0)) > 1e-4)
    masked = expected_slope_of_pieces(sign, jnp.array([1.0, -1.0, jnp.inf, -jnp.inf]))
    np.testing.assert_allclose(masked, [*[2 * norm.pdf(2.5) / 0.4] * 2, 0.0, 0.0], rtol=1e-4)


@pytest.mark.parametrize("f", [lambda s: 2 * s + 1, lambda s: s], ids=["affine", "identity"])
def test_quadrature_is_exact_for_affine_functions(f):
    np.testing.assert_allclose(expected_slope(f, jnp.asarray(POINTS, jnp.float32)), f(1.0) - f(0.0), rtol=1e-4)


@pytest.mark.parametrize(
    "f, jumps",
    [
        (lambda s: jnp.where(s > 0, s**2, -1.0), [0.0]),
        (lambda s: jnp.sign(s) * jnp.exp(-s), [0.0]),
        (lambda s: jnp.where(jnp.abs(s) > 2.7, jnp.cos(s), 2.0), [-2.7, 2.7]),
        (jax.nn.elu, []),
        (jnp.tanh, []),
        (lambda s: jnp.tanh(50 * s), []),
        (lambda s: jnp.where(s > 2.7, jnp.exp(s), 0.1 + jnp.exp(s)), [2.7]),
        (lambda s: jnp.where(s > 0, jnp.log1p(s), 1 - jnp.exp(-s)), []),
    ],
)
def test_jumps_are_found(f, jumps):
    np.testing.assert_allclose(found_jumps(f), jumps, atol=1e-4)


def test_of_many_jumps_some_are_found():
    """And since there may be more, any arguments may have one between them."""
    found = found_jumps(jnp.round)
    assert len(found) >= 8 and np.allclose(np.abs(np.subtract(found, np.round(found))), 0.5, atol=1e-4)
    assert within(found, jnp.array([0.1, 0.2]))


@pytest.mark.parametrize("s, jumps", [([0.1, 3.0], False), ([-0.1, 3.0], True), ([-1.0, -jnp.inf, jnp.nan], False)])
def test_jumps_between_the_arguments(s, jumps):
    assert bool(within((0.0,), jnp.asarray(s))) is jumps


NEAR = jnp.array([[0.5, 1.5], [2.5, 0.7]])


@pytest.mark.parametrize(
    "f, noisy",
    [
        (lambda s: jnp.where(s > -1, jnp.exp(s), 5.0), False),
        (lambda s: jnp.where(s > 1, jnp.exp(s), 5.0), True),
        (lambda s: jnp.where(s > -1, 1.0, jnp.exp(s)), True),
        (lambda s: jnp.round(s) + jnp.exp(s), True),
    ],
    ids=["no jump near", "a jump near", "flat", "everywhere"],
)
def test_a_displacement_sees_the_jumps_that_are_near(f, noisy):
    def loss(p, x):
        return jnp.square(f(x * p["w"]) @ p["v"] - 1).mean()

    model = {"w": jnp.ones(2), "v": 0.1 * jnp.ones((2, 2))}
    moved = filter_displacement(loss, noise="everywhere")(model, NEAR)
    gradient = jax.grad(loss)(model, NEAR)
    assert np.allclose(moved["w"], gradient["w"], rtol=1e-3) is not noisy
    assert np.all(np.abs(moved["w"]) > 0)
