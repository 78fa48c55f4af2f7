"""What all rules share: which of their two answers a metric asks for."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import primitives

import eqxproj

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (5, 6, 8))
W = jax.random.normal(KEYS[1], (8, 8)) / 3


def product(m, x):
    return jnp.tanh(x @ m) @ m


def affine(m, x):
    return x @ m


def elementwise(m, x):
    return jnp.tanh(m) * jnp.sin(m) + x[0, 0]


def softmax(m, x):
    return jax.nn.softmax(x @ m)


def normalization(m, x):
    return jax.vmap(jax.vmap(eqx.nn.LayerNorm(8)))(x @ m)


def attention(m, x):
    q, k = x @ m, x @ m.T
    return jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ x


def convolution(m, x):
    return jax.lax.conv_general_dilated(maximum(m, x), jnp.ones((3, 6, 2)) * m[0, 0], (1,), "SAME")


def windows(m, x):
    return jax.lax.reduce_window(maximum(m, x), -jnp.inf, jax.lax.max, (1, 1, 3), (1, 1, 2), "SAME")


def maximum(m, x):
    return jnp.maximum(x @ m, jnp.flip(x) @ m)


def read_twice(m, x):
    h = x @ m
    return jnp.concatenate([h, h[:, :2]], 1) @ m + (h @ m)[:, jnp.array([0, 0, 0, 1, 2, 3, 4, 5])]


CLOSED_FORM = [affine, windows]  # a known product is linear, and up to four candidates are enumerated
SMOOTH = [product, elementwise, softmax, normalization, attention, read_twice]
FUNCTIONS = [*CLOSED_FORM, *SMOOTH, convolution]
STEEP = [(100.0, 1.0), (1e3, 1e6), (1e18, 1.0)]


def loss_of(function):
    def loss(m, x):
        out = function(m, x)
        wanted = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.mean(eqxproj.losses.squared_error(out, wanted))

    return loss


def moved(function, grade, parameter=1.0):
    metric = eqxproj.Metric(grade, parameter)
    return lambda m: eqxproj.filter_displacement(loss_of(function), metric=metric, tau=0.01)(m, X)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_any_steep_metric_gives_the_gradient_and_solves_for_nothing(function):
    gradient = jax.grad(loss_of(function))(W, X)
    assert float(jnp.linalg.norm(gradient)) > 1e-3
    found = [moved(function, *metric) for metric in STEEP]
    for one in found:
        assert "while" not in list(primitives(jax.make_jaxpr(one)(W).jaxpr))
    first, *others = (one(W) for one in found)
    np.testing.assert_allclose(first, gradient, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(gradient))))
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_below_a_grade_of_a_hundred_nodes_are_solved(function):
    """So that the displacement is another than the gradient, and nears it as the grade grows."""
    steep, less = moved(function, 100.0), moved(function, 99.0)
    count, more = (list(primitives(jax.make_jaxpr(f)(W).jaxpr)) for f in (steep, less))
    assert len(count) < len(more)
    assert ("while" in more) is (function not in CLOSED_FORM)
    gradient = steep(W)
    size = float(jnp.linalg.norm(gradient))
    far, near = (float(jnp.linalg.norm(moved(function, g)(W) - gradient)) / size for g in (1.0, 99.0))
    assert 1e-6 < near < far


@pytest.mark.parametrize("function", SMOOTH, ids=lambda f: f.__name__)
def test_rules_do_not_choose_the_regime(function):
    """In every metric, a node that is asked for its pullback answers by it."""
    for metric in (eqxproj.Metric(), eqxproj.Metric(1e6, 1e6)):
        problem = eqxproj.feasibility_problem(loss_of(function), W, X, metric=metric)
        for i, node in enumerate(problem.graph.nodes):
            if node.kind != "operation" or node.rule is None:
                continue
            ctx = eqxproj.readers.context(problem, i, False)
            state = problem.start(False)
            inputs = [eqxproj.readers.operand(problem, state, e) for e in node.edges]
            outputs, back = jax.vjp(lambda *x, ctx=ctx: ctx.function(*x), *inputs)
            duals = [jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) for y in outputs]
            for nu, want in zip(node.rule.pullback(ctx, inputs, duals), back(duals), strict=True):
                np.testing.assert_allclose(nu, want, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(want))))
