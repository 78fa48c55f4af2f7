"""The slope of the expectation of functions with jumps, against numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from eqxproj._fusion import dependents
from eqxproj._interpreter import Fragment
from eqxproj._normal_form import normal_form
from eqxproj.rules._noise import expected_slope, expected_slope_of_pieces, has_jump
from eqxproj.rules.scalar import recognize

FUNCTIONS = {
    "sign": jnp.sign,
    "step": lambda s: jnp.where(s > 0.3, 2.0, -1.0),
    "three levels": lambda s: jnp.where(s > 0.5, 1.0, jnp.where(s < -0.5, -1.0, 0.0)),
    "jump and slope": lambda s: jnp.where(s > 0, s + 1.0, 0.5 * s),
    "band": lambda s: jnp.where(jnp.abs(s) < 1, s, 0.0),
}
POINTS = np.array([-3.0, -1.0, -0.2, 0.0, 0.3, 0.7, 2.5])


def fragment(f):
    program = normal_form(jax.make_jaxpr(f)(jnp.zeros(3)))
    unknown = dependents(program.equations, program.inputs)
    equations = tuple(e for e in program.equations if any(v.index in unknown for v in e.outputs))
    return Fragment(equations, program.inputs, program.outputs), program


def slope_by_integration(f, s):
    def integrand(e):
        return e * float(f(jnp.float32(s + e))) * norm.pdf(e)

    breaks = [b - s for b in (-1.0, -0.5, 0.0, 0.3, 0.5, 1.0)]
    return quad(integrand, -6, 6, points=breaks, limit=100)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slope_of_the_expectation(name):
    f = FUNCTIONS[name]
    phi, program = fragment(f)
    pieces = recognize(phi, program.static)
    assert pieces is not None and pieces.has_jumps
    wanted = np.array([slope_by_integration(f, s) for s in POINTS])
    closed = expected_slope_of_pieces(pieces, jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(closed, wanted, atol=2e-4)
    np.testing.assert_allclose(expected_slope(f, jnp.asarray(POINTS, jnp.float32)), wanted, atol=0.15)


@pytest.mark.parametrize("f", [lambda s: 2 * s + 1, lambda s: s], ids=["affine", "identity"])
def test_quadrature_is_exact_for_affine_functions(f):
    np.testing.assert_allclose(expected_slope(f, jnp.asarray(POINTS, jnp.float32)), f(1.0) - f(0.0), rtol=1e-4)


@pytest.mark.parametrize(
    "f, jumps",
    [
        (lambda s: jnp.where(s > 0, s**2, -1.0), True),
        (lambda s: jnp.sign(s) * jnp.exp(-s), True),
        (jnp.round, True),
        (jax.nn.elu, False),
        (jnp.tanh, False),
        (lambda s: jnp.tanh(50 * s), False),
        (lambda s: jnp.where(s > 2.7, jnp.exp(s), 0.1 + jnp.exp(s)), True),
        (lambda s: jnp.where(s > 0, jnp.log1p(s), 1 - jnp.exp(-s)), False),
    ],
)
def test_jumps_are_found(f, jumps):
    phi, program = fragment(f)
    assert has_jump(phi, program.static) is jumps
