"""Convolutions as products of patches: the values, the constraint that remains, and what stays a convolution."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import conv_general_dilated_p
from scipy.optimize import minimize

import eqxproj
from eqxproj._program._patches import product_of_patches
from eqxproj.losses import squared_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYOUTS = [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW"), ("HWNC", "OIHW", "NHWC")]
PADDINGS = [((1, 1), (0, 2)), ((-1, 1), (2, 0))]
STRETCHES = [((1, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (1, 2)), ((1, 2), (2, 3), (2, 1))]


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_the_product_is_the_convolution(layout, groups):
    """Of JAX itself, with strides, dilations of both sides, paddings and croppings, and groups of channels."""
    image, kernel = dict(N=3, C=4, H=9, W=8), dict(O=6, I=4 // groups, H=3, W=2)
    x = random(0, *(image[c] for c in layout[0]))
    w = random(1, *(kernel[c] for c in layout[1]))
    for padding, (strides, between, apart) in itertools.product(PADDINGS, STRETCHES):

        def convolution(x, w, padding=padding, strides=strides, between=between, apart=apart):
            return jax.lax.conv_general_dilated(x, w, strides, padding, between, apart, layout, groups)

        params = jax.make_jaxpr(convolution)(x, w).jaxpr.eqns[-1].params
        np.testing.assert_allclose(product_of_patches(params, x, w), convolution(x, w), rtol=1e-4, atol=1e-4)


X, W = random(2, 1, 5), random(3, 1, 1, 2)
"""One image of five pixels; a kernel of two taps."""


def lines(model, target):
    """A convolution of two unknowns, along one axis."""
    out = jax.lax.conv_general_dilated(model["x"][:, None], model["w"], (1,), "VALID")
    return squared_error(out[:, 0], target).sum()


def problem(loss=lines, model=None, **options):
    model = {"x": X, "w": W} if model is None else model
    return eqxproj.feasibility_problem(loss, model, jnp.zeros((1, 4)), **{"copies": "none", **options})


def test_one_projection_is_the_nearest_point_with_a_copy_of_each_pixel_a_patch():
    """Against a minimizer over the copies: `solve` goes one step from a state whose output is far from the product."""
    target, tau = jnp.asarray([[1.0, -2.0, 0.5, 3.0]]), 1e6
    solved = eqxproj.solve(
        eqxproj.feasibility_problem(lines, {"x": X, "w": W}, target, copies="none", tau=tau),
        eqxproj.AlternatingProjections(),
        steps=1,
    )
    patches = np.stack([np.asarray(X[0])[i : i + 2] for i in range(4)])
    kernel = np.asarray(W[0, 0])

    def distance(free):
        a, w = free[:8].reshape(4, 2), free[8:]
        return np.sum((a - patches) ** 2) + np.sum((w - kernel) ** 2) + np.sum((a @ w - np.asarray(target[0])) ** 2)

    best = minimize(distance, np.concatenate([patches.ravel(), kernel]), tol=1e-12)
    a, w = best.x[:8].reshape(4, 2), best.x[8:]
    pixels = np.zeros((2, 5))
    for i, row in enumerate(a):
        pixels[:, i : i + 2] += [row, np.ones(2)]
    np.testing.assert_allclose(solved.model["w"][0, 0], w, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(solved.model["x"][0], pixels[0] / pixels[1], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [eqxproj.AlternatingProjections(), eqxproj.DifferenceMap()], ids=["AP", "DM"])
def test_a_network_of_convolutions_is_solved(solver):
    keys = jax.random.split(jax.random.key(0), 2)
    model = [eqx.nn.Conv2d(a, b, 3, padding=1, stride=s, key=k) for (a, b, s), k in zip([(1, 4, 2), (4, 2, 1)], keys)]
    x, y = random(4, 3, 1, 6, 6), random(5, 3, 2, 3, 3)

    def loss(model, x, y):
        h = jax.nn.relu(jax.vmap(model[0])(x))
        return squared_error(jax.vmap(model[1])(h), y).mean()

    made = eqxproj.feasibility_problem(loss, model, x, y, copies="none", metric=eqxproj.Metric(1.0, 10.0), tau=5.0)
    assert "local" not in made.explain() and "conv" not in made.explain()
    solved = eqxproj.solve(made, solver, steps=200)
    assert float(loss(solved.model, x, y)) < 0.5 * float(loss(model, x, y))


def test_what_stays_a_convolution():
    """In the gradient regime, with a copy a neuron, and where a user has registered a rule."""
    steep = eqxproj.Metric(1e18, 1e4)
    assert "dot_general" in problem().explain()
    for options in ({"metric": steep}, {"copies": "neuron"}):
        assert "conv_general_dilated" in problem(**options).explain()

    @eqxproj.register_projection(conv_general_dilated_p, form="duals")
    def frozen(ctx, inputs, dual):
        return tuple(0 * x for x in inputs)

    try:
        assert "registered" in problem().explain()
    finally:
        eqxproj.unregister_projection(conv_general_dilated_p)


def test_data_that_are_held_are_unknown_too():
    """A kernel that is known, and an image that is a variable held in place."""

    def loss(model, x):
        out = jax.lax.conv_general_dilated(x[:, None], W, (1,), "VALID")
        return squared_error(out[:, 0] * model, jnp.ones((1, 4))).sum()

    made = eqxproj.feasibility_problem(loss, jnp.ones(()), X, copies="none", data="pinned")
    assert "dot_general" in made.explain() and "local" not in made.explain()
