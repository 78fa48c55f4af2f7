"""Layers of Flax, of linen and of nnx, in small models. Flax layers take whole batches, and so do the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from flax import linen, nnx

from eqxproj.flax import from_linen, from_nnx

from ._row import Case, Row, regression

LINEN, NNX = "Flax linen", "Flax nnx"
SAMPLES, WIDTH, OUTPUTS, TOKENS = 16, 8, 3, 12
VECTOR, SEQUENCE, IMAGE = (5,), (4, 5), (6, 6, 2)


def batched(model: Any, x: Any, y: Any) -> jax.Array:
    """The mean squared error of a model of batches."""
    return jnp.mean((model(x) - y) ** 2)


def tokens(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sequences of tokens, and targets that depend on all of them."""
    k1, k2 = jr.split(key)
    x = jr.randint(k1, (SAMPLES, 4), 0, TOKENS)
    return x, jnp.tanh(jr.normal(k2, (TOKENS, OUTPUTS))[x].sum(1))


def samples(key: jax.Array, shape: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """A training set with inputs of a shape, or with tokens where that is `None`."""
    return tokens(key) if shape is None else regression(key, shape, OUTPUTS, SAMPLES)


def flat(x: jax.Array) -> jax.Array:
    """All but the batch as one axis."""
    return x.reshape(len(x), -1)


# --- linen ---


class Stack(linen.Module):
    """Layers one after another, and a linear layer after them."""

    layers: Callable[[], list[Callable[..., Any]]]

    @linen.compact
    def __call__(self, x):
        for layer in self.layers():
            x = layer(x)
        return linen.Dense(OUTPUTS)(flat(x))


def of_linen(shape: tuple[int, ...] | None, *layers: Callable[[], Callable[..., Any]]) -> Callable[[jax.Array], Case]:
    """A regression with linen layers; each is given by a function that makes it."""

    def make(key: jax.Array) -> Case:
        k1, k2 = jr.split(key)
        module = Stack(lambda: [layer() for layer in layers])
        data = samples(k2, shape)
        return Case(from_linen(module, module.init(k1, data[0])), data, batched)

    return make


class Normalized(linen.Module):
    """Batch normalization between two linear layers."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(WIDTH)(x))
        return linen.Dense(OUTPUTS)(linen.tanh(x))


def normalized(model: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
    """The mean squared error in training mode, and the new running statistics."""
    out, updates = model(x, train=True, mutable=["batch_stats"])
    return jnp.mean((out - y) ** 2), updates


def batch_norm(key: jax.Array) -> Case:
    k1, k2 = jr.split(key)
    data = samples(k2, VECTOR)
    module = Normalized()
    return Case(from_linen(module, module.init(k1, data[0], train=False)), data, normalized, has_aux=True)


def linen_rnn(cell: Callable[..., Any]) -> Callable[[jax.Array], Case]:
    return of_linen(SEQUENCE, lambda: linen.RNN(cell(WIDTH)))


def linen_pool(pool: Callable[..., Any]) -> Callable[[jax.Array], Case]:
    return of_linen(IMAGE, lambda: linen.Conv(4, (3, 3)), lambda: lambda x: pool(x, (2, 2), (2, 2)))


# --- nnx ---


class Layers(nnx.Module):
    """Layers one after another, and a linear layer after them."""

    def __init__(self, layers: list[Any], size: int, rngs: nnx.Rngs):
        self.layers = nnx.List(layers)
        self.last = nnx.Linear(size, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(flat(x))


def of_nnx(shape: tuple[int, ...] | None, size: int, layers: Callable[[nnx.Rngs], list[Any]]):
    """A regression with nnx layers, which leave `size` numbers of a sample."""

    def make(key: jax.Array) -> Case:
        k1, k2 = jr.split(key)
        rngs = nnx.Rngs(k1)
        return Case(from_nnx(Layers(layers(rngs), size, rngs)), samples(k2, shape), batched)

    return make


def nnx_rnn(cell: Callable[..., Any]) -> Callable[[jax.Array], Case]:
    return of_nnx(SEQUENCE, 4 * WIDTH, lambda r: [nnx.RNN(cell(5, WIDTH, rngs=r), rngs=r)])


def nnx_attention(rngs: nnx.Rngs) -> list[Any]:
    return [nnx.Linear(5, WIDTH, rngs=rngs), nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)]


def nnx_batch_norm(key: jax.Array) -> Case:
    make = of_nnx(VECTOR, WIDTH, lambda r: [nnx.Linear(5, WIDTH, rngs=r), nnx.BatchNorm(WIDTH, rngs=r), nnx.tanh])
    case = make(key)
    return Case(case.model, case.data, averaged, has_aux=True)


def averaged(model: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
    """The mean squared error, and the new running statistics."""
    out, updates = model(x, mutable=True)
    return jnp.mean((out - y) ** 2), updates


ROWS = [
    Row("Dense", LINEN, of_linen(VECTOR, lambda: linen.Dense(WIDTH), lambda: linen.relu)),
    Row("Conv", LINEN, of_linen(IMAGE, lambda: linen.Conv(4, (3, 3)), lambda: linen.relu)),
    Row("Embed", LINEN, of_linen(None, lambda: linen.Embed(TOKENS, WIDTH))),
    Row("LayerNorm", LINEN, of_linen(VECTOR, lambda: linen.Dense(WIDTH), linen.LayerNorm)),
    Row("BatchNorm", LINEN, batch_norm),
    Row(
        "MultiHeadDotProductAttention",
        LINEN,
        of_linen(SEQUENCE, lambda: linen.Dense(WIDTH), lambda: linen.MultiHeadDotProductAttention(2)),
    ),
    Row("LSTMCell in RNN", LINEN, linen_rnn(linen.LSTMCell)),
    Row("GRUCell in RNN", LINEN, linen_rnn(linen.GRUCell)),
    Row("SimpleCell in RNN", LINEN, linen_rnn(linen.SimpleCell)),
    Row("max_pool", LINEN, linen_pool(linen.max_pool)),
    Row("avg_pool", LINEN, linen_pool(linen.avg_pool)),
    Row("Linear", NNX, of_nnx(VECTOR, WIDTH, lambda r: [nnx.Linear(5, WIDTH, rngs=r), nnx.relu])),
    Row("Conv", NNX, of_nnx(IMAGE, 144, lambda r: [nnx.Conv(2, 4, (3, 3), rngs=r), nnx.relu])),
    Row("Embed", NNX, of_nnx(None, 4 * WIDTH, lambda r: [nnx.Embed(TOKENS, WIDTH, rngs=r)])),
    Row(
        "LayerNorm",
        NNX,
        of_nnx(VECTOR, WIDTH, lambda r: [nnx.Linear(5, WIDTH, rngs=r), nnx.LayerNorm(WIDTH, rngs=r)]),
    ),
    Row("BatchNorm", NNX, nnx_batch_norm),
    Row("MultiHeadAttention", NNX, of_nnx(SEQUENCE, 4 * WIDTH, nnx_attention)),
    Row("LSTMCell in RNN", NNX, nnx_rnn(nnx.LSTMCell)),
]
