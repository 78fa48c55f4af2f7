"""Every public layer of `equinox.nn`, in a small model."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from equinox import nn

from ._row import Case, Row, around, between, regression, squared

GROUP = "equinox"
SHAPES = {1: (2, 8), 2: (1, 6, 6), 3: (1, 4, 4, 4)}


def linear(key):
    return between(key, None, nn.Linear(5, 8, key=key), (5,), samples=32)


def mlp(key):
    return Case(nn.MLP(5, 3, 8, 2, key=key), regression(key, (5,)), squared)


def convolution(layer, n, **options):
    def make(key):
        shape = SHAPES[n]
        return between(key, layer(shape[0], 3, 3, key=key, **options), jax.nn.relu, shape)

    return make


def pool(layer, n, *args, **options):
    def make(key):
        shape = SHAPES[n]
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n](shape[0], 2, 3, padding=1, key=key)
        return between(key, conv, layer(*args, **options), shape)

    return make


class Recurrent(eqx.Module):
    """A recurrent cell over a sequence, and a linear layer of its last state."""

    cell: Any
    last: nn.Linear
    start: Any
    scan: bool = eqx.field(static=True)

    def __call__(self, xs):
        carry = jax.lax.stop_gradient(self.start)
        if self.scan:
            carry, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), carry, xs)
        else:
            for x in xs:
                carry = self.cell(x, carry)
        return self.last(jax.tree_util.tree_leaves(carry)[0])


def recurrent(cell, scan):
    def make(key):
        k1, k2, k3 = jr.split(key, 3)
        zeros = jnp.zeros(6)
        start = (zeros, zeros) if cell is nn.LSTMCell else zeros
        model = Recurrent(cell(3, 6, key=k1), nn.Linear(6, 2, key=k2), start, scan)
        return Case(model, regression(k3, (5, 3), 2, 16), squared)

    return make


def embedding(key):
    k1, k2, k3, k4 = jr.split(key, 4)
    tokens = jr.randint(k3, (32, 4), 0, 6)
    table = jr.normal(k4, (4, 6, 3)) / 2
    y = jnp.tanh(sum(table[i][tokens[:, i]] for i in range(4)))
    return Case(Tokens(nn.Embedding(6, 5, key=k1), nn.Linear(20, 3, key=k2)), (tokens, y), squared)


class Tokens(eqx.Module):
    """An embedding of each token, and a linear layer of all of them."""

    embedding: nn.Embedding
    last: nn.Linear

    def __call__(self, tokens):
        return self.last(jnp.ravel(jax.vmap(self.embedding)(tokens)))


class Dropped(eqx.Module):
    """Two linear layers with dropout between them."""

    first: nn.Linear
    dropout: nn.Dropout
    last: nn.Linear

    def __call__(self, x, key=None):
        return self.last(self.dropout(jax.nn.relu(self.first(x)), key=key))


def dropout(inference):
    def make(key):
        k1, k2, k3 = jr.split(key, 3)
        model = Dropped(nn.Linear(5, 8, key=k1), nn.Dropout(0.3, inference=inference), nn.Linear(8, 3, key=k2))
        return Case(model, regression(k3, (5,)), squared if inference else keyed)

    def keyed(model, x, y, key):
        return jnp.mean((jax.vmap(model)(x, jr.split(key, len(x))) - y) ** 2)

    return make


class Stateful(eqx.Module):
    """Two linear layers with a stateful layer between them."""

    first: nn.Linear
    middle: Any
    last: nn.Linear

    def __call__(self, x, state):
        h, state = self.middle(self.first(x), state)
        return self.last(jax.nn.relu(h)), state


class Centered(nn.StatefulLayer):
    """Subtracts the running mean of its inputs, and scales what remains by a parameter."""

    mean: nn.StateIndex
    scale: jax.Array

    def __init__(self, size: int):
        self.mean = nn.StateIndex(jnp.zeros(size))
        self.scale = jnp.ones(size)

    def __call__(self, x, state, *, key=None):
        old = state.get(self.mean)
        state = state.set(self.mean, 0.9 * old + 0.1 * jax.lax.stop_gradient(jax.lax.pmean(x, "batch")))
        return self.scale * (x - old), state


def stateful(middle, inference=False):
    """The state is closed over by the loss, and what it becomes is its auxiliary output."""

    def make(key):
        k1, k2, k3, k4 = jr.split(key, 4)

        def build():
            return Stateful(nn.Linear(5, 8, key=k1), middle(k2), nn.Linear(8, 3, key=k3))

        model, state = nn.make_with_state(build)()
        model = nn.inference_mode(model, inference)

        def loss(model, x, y):
            apply = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
            out, new = apply(x, state)
            return jnp.mean((out - y) ** 2), new

        return Case(model, regression(k4, (5,)), loss, has_aux=True)

    return make


class Attention(eqx.Module):
    """Self-attention over a sequence, and a linear layer of what it gives."""

    attention: nn.MultiheadAttention
    last: nn.Linear

    def __call__(self, x):
        return self.last(jnp.ravel(self.attention(x, x, x)))


def attention(key):
    k1, k2, k3 = jr.split(key, 3)
    model = Attention(nn.MultiheadAttention(2, 8, key=k1), nn.Linear(32, 3, key=k2))
    return Case(model, regression(k3, (4, 8), 3, 16), squared)


def rotary(key):
    rotate = nn.RotaryPositionalEmbedding(8)
    return around(key, lambda v: jnp.tanh(rotate(v.reshape(4, 8))), 32)


def sequential(key):
    k1, k2 = jr.split(key)
    layers = [nn.Linear(5, 8, key=k1), nn.Lambda(jax.nn.relu), nn.Linear(8, 3, key=k2)]
    return Case(nn.Sequential(layers), regression(key, (5,)), squared)


class Tied(eqx.Module):
    """An autoencoder whose two layers share one matrix."""

    layers: nn.Shared

    def __init__(self, key):
        k1, k2 = jr.split(key)
        pair = (nn.Linear(5, 4, key=k1), nn.Linear(4, 5, key=k2))
        self.layers = nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight.T)

    def __call__(self, x):
        down, up = self.layers()
        return up(jnp.tanh(down(x)))


def shared(key):
    x, _ = regression(key, (5,))
    return Case(Tied(key), (x, x), squared)


def middle(layer, width=8):
    return lambda key: around(key, layer, width)


def normalized(norm):
    """A norm of a vector, with a nonlinear function after it."""
    return lambda key: around(key, nn.Sequential([norm(), nn.Lambda(jnp.tanh)]))


def weight_norm(key):
    return around(key, nn.Sequential([nn.WeightNorm(nn.Linear(8, 6, key=key)), nn.Lambda(jnp.tanh)]))


def spectral_norm(key):
    k1, k2 = jr.split(key)
    return nn.SpectralNorm(nn.Linear(8, 8, key=k1), "weight", key=k2)


def batch_norm(mode):
    return lambda key: nn.BatchNorm(8, axis_name="batch", mode=mode)


def _rows():
    yield "Linear", linear
    yield "MLP", mlp
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for n, layer in enumerate(convs, 1):
        yield layer.__name__, convolution(layer, n, padding=1 if n < 3 else 0)
    for n, layer in enumerate(transposed, 1):
        yield layer.__name__, convolution(layer, n, **({"stride": 2, "padding": 1} if n < 3 else {}))
    for kind in ("AvgPool", "MaxPool"):
        for n in (1, 2, 3):
            yield f"{kind}{n}d", pool(getattr(nn, f"{kind}{n}d"), n, 2, 2)
    for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
        for n in (1, 2, 3):
            yield f"{kind}{n}d", pool(getattr(nn, f"{kind}{n}d"), n, 3)
    yield "GRUCell", recurrent(nn.GRUCell, True)
    yield "GRUCell (Python loop)", recurrent(nn.GRUCell, False)
    yield "LSTMCell", recurrent(nn.LSTMCell, True)
    yield "Embedding", embedding
    yield "LayerNorm", normalized(lambda: nn.LayerNorm(8))
    yield "RMSNorm", normalized(lambda: nn.RMSNorm(8))
    yield "GroupNorm", normalized(lambda: nn.GroupNorm(2, 8))
    yield "BatchNorm", stateful(batch_norm("batch"))
    yield "BatchNorm (ema)", stateful(batch_norm("ema"))
    yield "BatchNorm (inference)", stateful(batch_norm("batch"), inference=True)
    yield "Dropout", dropout(False)
    yield "Dropout (inference)", dropout(True)
    yield "MultiheadAttention", attention
    yield "RotaryPositionalEmbedding", rotary
    yield "PReLU", middle(nn.PReLU())
    yield "SpectralNorm", stateful(spectral_norm)
    yield "WeightNorm", weight_norm
    yield "Sequential", sequential
    yield "StatefulLayer", stateful(lambda key: Centered(8))
    yield "Lambda", middle(nn.Lambda(jnp.sin))
    yield "Shared", shared
    yield "Identity", middle(nn.Identity())


ROWS = [Row(name, GROUP, make) for name, make in _rows()]
