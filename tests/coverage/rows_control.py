"""Control flow: loops, branches, rematerialization and custom derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from ._row import Case, Row, around, regression, squared

GROUP = "control flow"


class Sequence(eqx.Module):
    """A function of a sequence's inputs and of a cell's weights, and a linear layer of what it gives."""

    weight: jax.Array
    inner: jax.Array
    last: eqx.nn.Linear
    run: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, xs):
        return self.last(jnp.ravel(self.run(self.weight, self.inner, xs)))


def sequence(run, width=4, length=5):
    """A regression on sequences; `run(weight, inner, xs)` is the loop."""

    def make(key):
        k1, k2, k3, k4 = jr.split(key, 4)
        weight = jr.normal(k1, (3, width)) / 3**0.5
        inner = jr.normal(k2, (width, width)) / (2 * width) ** 0.5
        size = jax.eval_shape(run, weight, inner, jnp.zeros((length, 3))).size
        model = Sequence(weight, inner, eqx.nn.Linear(size, 2, key=k3), run)
        return Case(model, regression(k4, (length, 3), 2, 16), squared)

    return make


def cell(weight, inner, h, x):
    return jnp.tanh(x @ weight + h @ inner)


def forward(weight, inner, xs):
    return lax.scan(lambda h, x: (cell(weight, inner, h, x), None), jnp.zeros(4), xs)[0]


def stacked(weight, inner, xs):
    def step(h, x):
        h = cell(weight, inner, h, x)
        return h, h

    return lax.scan(step, jnp.zeros(4), xs)[1]


def both(weight, inner, xs):
    def step(h, x):
        new = cell(weight, inner, h, x)
        return new, new * h

    last, outs = lax.scan(step, jnp.ones(4), xs)
    return jnp.concatenate([last, jnp.ravel(outs)])


def backward(weight, inner, xs):
    return lax.scan(lambda h, x: (cell(weight, inner, h, x), None), jnp.zeros(4), xs, reverse=True)[0]


def backward_stacked(weight, inner, xs):
    def step(h, x):
        h = cell(weight, inner, h, x)
        return h, h

    return lax.scan(step, jnp.zeros(4), xs, reverse=True)[1]


def bidirectional(weight, inner, xs):
    return jnp.concatenate([stacked(weight, inner, xs), backward_stacked(weight, inner, xs)], axis=1)


def two_layers(weight, inner, xs):
    hs = stacked(weight, inner, xs)
    return lax.scan(lambda h, x: (jnp.tanh(x @ inner + 0.5 * h), None), jnp.zeros(4), hs)[0]


def several_carries(weight, inner, xs):
    def step(carry, x):
        h, c, count = carry
        c = 0.5 * c + jnp.tanh(x @ weight)
        h = jnp.tanh(c + h @ inner)
        return (h, c, count + 1), None

    (h, c, count), _ = lax.scan(step, (jnp.zeros(4), jnp.zeros(4), 0), xs)
    return jnp.concatenate([h, c / count])


def as_inputs(weight, inner, xs):
    """The inputs of the loop are themselves functions of the weights."""
    return lax.scan(lambda h, z: (jnp.tanh(z + h @ inner), None), jnp.zeros(4), jnp.tanh(xs @ weight))[0]


def initial_carry(weight, inner, xs):
    """The first carry depends on the weights, and so does nothing else but the cell."""
    start = jnp.tanh(xs[0] @ weight)
    return lax.scan(lambda h, x: (jnp.tanh(h @ inner) + x.sum(), None), start, xs[1:])[0]


def stacked_weights(weight, inner, xs):
    """A scan over layers: each step takes its own matrix."""
    layers = jnp.stack([inner, 0.7 * inner.T, -inner])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.tanh(xs[0] @ weight), layers)[0]


def unrolled(weight, inner, xs):
    return lax.scan(lambda h, x: (cell(weight, inner, h, x), None), jnp.zeros(4), xs, unroll=2)[0]


def nested(weight, inner, xs):
    def outer(h, x):
        h, _ = lax.scan(lambda g, _: (jnp.tanh(x @ weight + g @ inner), None), h, None, length=2)
        return h, None

    return lax.scan(outer, jnp.zeros(4), xs)[0]


def in_a_jit(weight, inner, xs):
    return jax.jit(forward)(weight, inner, xs)


def linear_scan(weight, inner, xs):
    """No nonlinear function in the loop: a state space model."""
    return lax.scan(lambda h, x: (x @ weight + h @ inner, None), jnp.zeros(4), xs)[0]


def rematerialized(weight, inner, xs):
    step = jax.checkpoint(lambda h, x: (cell(weight, inner, h, x), None))
    return lax.scan(step, jnp.zeros(4), xs)[0]


def mapped(weight, inner, xs):
    return lax.map(lambda x: jnp.tanh(jnp.tanh(x @ weight) @ inner), xs)


def counted(weight, inner, xs):
    return lax.fori_loop(0, 5, lambda i, h: cell(weight, inner, h, xs[i]), jnp.zeros(4))


def repeated(weight, inner, xs):
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ inner), xs[0] @ weight)


class Branching(eqx.Module):
    """Two linear layers with a branch between them, for all samples at once."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear
    branch: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x):
        return jax.vmap(self.last)(self.branch(self.second, jax.vmap(self.first)(x), x))


def branching(branch):
    """A regression on whole batches; `branch(layer, hidden, x)` is what stands between the two layers."""

    def make(key):
        k1, k2, k3, k4 = jr.split(key, 4)
        layers = (eqx.nn.Linear(5, 8, key=k1), eqx.nn.Linear(8, 8, key=k2), eqx.nn.Linear(8, 3, key=k3))
        return Case(Branching(*layers, branch), regression(k4, (5,)), loss)

    def loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    return make


def known_cond(layer, h, x):
    return lax.cond(x[0, 0] > 10, jnp.sin, lambda h: jnp.tanh(jax.vmap(layer)(h)), h)


def unknown_cond(layer, h, x):
    return lax.cond(h.mean() > 0.0, lambda h: jnp.tanh(jax.vmap(layer)(h)), lambda h: jnp.tanh(0.5 * h), h)


def known_switch(layer, h, x):
    which = (x[:, 0] > 0).sum() % 3
    return lax.switch(which, [jnp.tanh, lambda h: jnp.tanh(jax.vmap(layer)(h)), jnp.sin], h)


def unknown_switch(layer, h, x):
    which = jnp.floor(4 * jax.nn.sigmoid(h.mean())).astype(int)
    return lax.switch(which, [jnp.sin, jnp.tanh, lambda h: jnp.tanh(jax.vmap(layer)(h)), jax.nn.relu], h)


def known_cond_of_each(layer, h, x):
    one = lambda h, x: lax.cond(x[0] > 0, lambda h: jnp.tanh(layer(h)), jnp.sin, h)  # noqa: E731
    return jax.vmap(one)(h, x)


def unknown_cond_of_each(layer, h, x):
    one = lambda h: lax.cond(h[0] > 0, lambda h: jnp.tanh(layer(h)), lambda h: 0.5 * h, h)  # noqa: E731
    return jax.vmap(one)(h)


@jax.custom_jvp
def with_jvp(x):
    return jnp.log1p(jnp.exp(x))


@with_jvp.defjvp
def _(primals, tangents):
    return with_jvp(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]


@jax.custom_vjp
def with_vjp(x):
    return jnp.tanh(x) * x


with_vjp.defvjp(
    lambda x: (with_vjp(x), x),
    lambda x, g: (g * (jnp.tanh(x) + x * (1 - jnp.tanh(x) ** 2)),),
)


@jax.checkpoint
def checkpointed(x):
    return jnp.sin(jnp.tanh(x) * x.sum())


LOOPS = {
    "scan": forward,
    "scan with stacked outputs": stacked,
    "scan with both": both,
    "reverse scan": backward,
    "reverse scan with stacked outputs": backward_stacked,
    "scan both ways": bidirectional,
    "scan of a scan's outputs": two_layers,
    "scan with several carries": several_carries,
    "scan over unknown inputs": as_inputs,
    "scan from an unknown carry": initial_carry,
    "scan over layers": stacked_weights,
    "scan with unroll": unrolled,
    "scan in a scan": nested,
    "scan in a jit": in_a_jit,
    "linear scan": linear_scan,
    "checkpoint in a scan": rematerialized,
    "map": mapped,
    "fori_loop": counted,
    "fori_loop of a carry alone": repeated,
}
BRANCHES = {
    "cond, known": known_cond,
    "cond, unknown": unknown_cond,
    "switch, known": known_switch,
    "switch, unknown": unknown_switch,
    "cond under vmap, known": known_cond_of_each,
    "cond under vmap, unknown": unknown_cond_of_each,
}
STEPS = {"scan from an unknown carry": 400}
"""Where 200 steps leave either method far from the end."""
FUNCTIONS = {"checkpoint": checkpointed, "custom_jvp": with_jvp, "custom_vjp": with_vjp}

ROWS = [
    *(Row(name, GROUP, sequence(run), steps=STEPS.get(name, 200)) for name, run in LOOPS.items()),
    *(Row(name, GROUP, branching(branch)) for name, branch in BRANCHES.items()),
    *(Row(name, GROUP, lambda key, f=f: around(key, f)) for name, f in FUNCTIONS.items()),
]
