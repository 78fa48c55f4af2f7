"""The models of `compile_time.py`: each a loss, a model, and the further arguments of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from shared import classification

Case = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def residual(depth: int) -> Case:
    """A chain of residual layers of 8 units."""
    keys = jax.random.split(jax.random.key(0), depth)

    def loss(weights, x, y):
        for w in weights:
            x = x + jnp.tanh(x @ w)
        return jnp.mean((x - y) ** 2)

    return loss, [jax.random.normal(k, (8, 8)) / 3 for k in keys], (jnp.ones((5, 8)), jnp.zeros((5, 8)))


class Recurrent(eqx.Module):
    """A GRU cell along a sequence, and a linear layer at its end."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __call__(self, x):
        state = jax.lax.scan(lambda h, xt: (self.cell(xt, h), None), jnp.zeros(self.cell.hidden_size), x)[0]
        return self.last(state)


def gru(steps: int) -> Case:
    """A GRU of 64 units over a batch of 8 sequences."""
    k1, k2 = jax.random.split(jax.random.key(0))
    model = Recurrent(eqx.nn.GRUCell(16, 64, key=k1), eqx.nn.Linear(64, 10, key=k2))
    return (lambda *args: classification(*args)), model, (jnp.zeros((8, steps, 16)), jnp.zeros(8, int))


class Translator(eqx.Module):
    """An LSTM that reads a sequence, and one that writes another from the state that it ends in."""

    reader: eqx.nn.LSTMCell
    writer: eqx.nn.LSTMCell
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.reader, self.writer = eqx.nn.LSTMCell(4, 16, key=k1), eqx.nn.LSTMCell(4, 16, key=k2)
        self.last = eqx.nn.Linear(16, 4, key=k3)

    def __call__(self, x, y):
        zero = jnp.zeros(16)
        state = jax.lax.scan(lambda c, xt: (self.reader(xt, c), None), (zero, zero), x)[0]

        def write(state, yt):
            state = self.writer(yt, state)
            return state, self.last(state[0])

        return jax.lax.scan(write, state, y)[1]


def seq2seq() -> Case:
    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x, y)[:, :-1] - y[:, 1:]) ** 2)

    return loss, Translator(jax.random.key(0)), (jnp.ones((4, 12, 4)), jnp.zeros((4, 12, 4)))


class Block(eqx.Module):
    """Two convolutions with batch normalization, added to what they are given."""

    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]

    def __init__(self, channels, key):
        keys = jax.random.split(key)
        self.convolutions = [eqx.nn.Conv2d(channels, channels, 3, padding=1, key=k) for k in keys]
        self.norms = [eqx.nn.BatchNorm(channels, "batch", mode="batch") for _ in keys]

    def __call__(self, x, state):
        h, state = self.norms[0](self.convolutions[0](x), state)
        h, state = self.norms[1](self.convolutions[1](jax.nn.relu(h)), state)
        return jax.nn.relu(x + h), state


class ResNet(eqx.Module):
    """A convolution, six residual blocks of 8 channels, and a linear layer on the mean over space."""

    first: eqx.nn.Conv2d
    blocks: list[Block]
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, *keys = jax.random.split(key, 8)
        self.first, self.last = eqx.nn.Conv2d(3, 8, 3, padding=1, key=k1), eqx.nn.Linear(8, 10, key=k2)
        self.blocks = [Block(8, k) for k in keys]

    def __call__(self, x, state):
        x = self.first(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.last(jnp.mean(x, (1, 2))), state


def resnet() -> Case:
    model, state = eqx.nn.make_with_state(ResNet)(jax.random.key(0))

    def loss(model, state, x, y):
        out, _ = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1))

    return loss, model, (state, jnp.ones((4, 3, 8, 8)), jnp.arange(4))


def flow(kind: str) -> Case:
    """A normalizing flow of flowjax, a package that has to be installed for it."""
    import flowjax.distributions
    import flowjax.flows
    import flowjax.train.losses
    import paramax

    make = getattr(flowjax.flows, kind)
    sizes = dict(flow_layers=2, nn_width=8) if kind == "coupling_flow" else dict(nn_block_dim=4)
    model = make(jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(2)), nn_depth=1, **sizes)
    parameters, static = eqx.partition(
        model, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    likelihood = flowjax.train.losses.MaximumLikelihoodLoss()
    x = jax.random.normal(jax.random.key(1), (32, 2))
    return (lambda parameters, x: likelihood(parameters, static, x)), parameters, (x,)


MODELS: dict[str, Callable[[], Case]] = {
    **{f"residual-{depth}": partial(residual, depth) for depth in (25, 50, 100, 200)},
    **{f"gru-{steps}": partial(gru, steps) for steps in (8, 512)},
    "seq2seq": seq2seq,
    "resnet": resnet,
    "coupling-flow": partial(flow, "coupling_flow"),
    "bnaf": partial(flow, "block_neural_autoregressive_flow"),
}
