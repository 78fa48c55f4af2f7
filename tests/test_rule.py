"""What all rules share: when a node is known to answer by the dual of its output alone."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import primitives

import eqxproj
from eqxproj.rules._base import is_negligible

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


FUNCTIONS = [product, affine, elementwise, softmax, normalization, attention]


def moved(function, grade):
    def loss(m, x):
        out = function(m, x)
        wanted = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.mean(eqxproj.losses.squared_error(out, wanted))

    metric = eqxproj.Metric(grade, 1.0)
    return lambda m: eqxproj.filter_displacement(loss, metric=metric, tau=1e-6)(m, X)


@pytest.mark.parametrize(
    "ratios, expected",
    [
        ((), True),
        ((1e-13, 0.0), True),
        ((1e-13, 2e-13), False),
        ((1.0,), False),
        ((jnp.zeros(3),), False),  # an array is not looked at while tracing
    ],
)
def test_what_is_negligible(ratios, expected):
    assert is_negligible(ratios) is expected


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_nothing_is_lost_where_it_is_negligible_and_nothing_is_solved_for(function):
    """Beside a metric in which it is only nearly so, and where every node is solved."""
    steep, less = moved(function, 1e18), moved(function, 1e12)
    one, other = steep(W), less(W)
    assert float(jnp.linalg.norm(one)) > 1e-3
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(one))))
    (count, more) = (list(primitives(jax.make_jaxpr(f)(W).jaxpr)) for f in (steep, less))
    assert "while" not in count
    if function in (softmax, normalization, attention):
        assert "while" in more
    assert len(count) < len(more) or function is elementwise


def convolution(m, x):
    return jax.lax.conv_general_dilated(x @ m, jnp.ones((3, 6, 2)) * m[0, 0], (1,), "SAME")


def windows(m, x):
    return jax.lax.reduce_window(x @ m, -jnp.inf, jax.lax.max, (1, 1, 3), (1, 1, 2), "SAME")


def read_twice(m, x):
    h = x @ m
    return jnp.concatenate([h, h[:, :2]], 1) @ m + (h @ m)[:, jnp.array([0, 0, 0, 1, 2, 3, 4, 5])]


@pytest.mark.parametrize("function", [product, attention, convolution, windows, read_twice], ids=lambda f: f.__name__)
@pytest.mark.parametrize("copies", ["neuron", "sample"])
def test_the_largest_share_is_one(function, copies):
    """Shares that are arrays are not looked at while tracing: of each a number is known that it is not above."""

    def loss(m, x):
        return jnp.mean(eqxproj.losses.squared_error(out := function(m, x), jnp.zeros_like(out)))

    problem = eqxproj.feasibility_problem(loss, W, X, copies=copies, metric=eqxproj.Metric(2.0, 1.0))
    arrays = 0
    for shares, largest in zip(problem.shares, problem.largest_shares, strict=True):
        for share, most in zip(shares, largest, strict=True):
            arrays += not isinstance(share, float)
            assert np.max(share) <= most * (1 + 1e-6)
            assert function is read_twice or most <= (1 + 1e-6) * np.max(share)  # how often a gather reads is not known
    assert arrays or function in (product, attention)


@pytest.mark.parametrize("function", [convolution, windows], ids=lambda f: f.__name__)
def test_shares_that_differ_spare_what_is_negligible_too(function):
    def maximum(m, x):
        return function(m, jnp.maximum(x @ m, jnp.flip(x) @ m))

    steep, less = moved(maximum, 1e18), moved(maximum, 1e12)
    one, other = steep(W), less(W)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(one))))
    (count, more) = (list(primitives(jax.make_jaxpr(f)(W).jaxpr)) for f in (steep, less))
    assert len(count) < 0.8 * len(more)
