"""Steps without a gradient. Each model must learn what comes before its step, not only what comes after it."""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax, nn

import eqxproj

from ._row import Case, Row

GROUP = "discrete"


class Stepped(eqx.Module):
    """A linear layer, a step, and a linear layer; `table` is what a step may look up."""

    first: eqx.nn.Linear
    table: jax.Array
    last: eqx.nn.Linear
    step: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x, stopped: bool = False):
        h = self.first(x)
        h = lax.stop_gradient(h) if stopped else h
        return self.last(jnp.ravel(self.step(h, self.table, x)))


def _model(step, width, inputs, outputs, key, scale):
    k1, k2, k3 = jr.split(key, 3)
    table = jr.normal(k2, (width, 3, inputs))
    like = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((width,), table.shape, (inputs,))]
    size = jax.eval_shape(step, *like).size
    first = eqx.nn.Linear(inputs, width, key=k1)
    first = eqx.tree_at(lambda m: (m.weight, m.bias), first, (scale * first.weight, scale * first.bias))
    return Stepped(first, table, eqx.nn.Linear(size, outputs, key=k3), step)


def stepped(step, width=4, inputs=3, outputs=2, scale=2.0, samples=64):
    """A regression on what a random teacher of the same kind gives."""

    def make(key):
        k1, k2, k3 = jr.split(key, 3)
        teacher = _model(step, width, inputs, outputs, k1, scale)
        x = jr.normal(k3, (samples, inputs))
        y = jax.vmap(teacher)(x)
        y = (y - y.mean(0)) / y.std(0)
        return Case(
            _model(step, width, inputs, outputs, k2, scale), (x, y), loss, frozen=ft.partial(loss, stopped=True)
        )

    def loss(model, x, y, stopped=False):
        return jnp.mean((jax.vmap(lambda v: model(v, stopped))(x) - y) ** 2)

    return make


def top_k_mask(h, table, x):
    chosen = lax.top_k(h, 2)[1]
    return h * nn.one_hot(chosen, h.size).sum(0)


def top_k_gate(h, table, x):
    """The two best experts, weighted by a softmax of their own scores."""
    values, chosen = lax.top_k(h, 2)
    return jnp.einsum("k,kij,j->i", nn.softmax(values), table[chosen], x)


def top_1_gate(h, table, x):
    return table[jnp.argmax(h)] @ x


def dispatched(h, table, x):
    """The same as a sum over all experts, with the choice as a one-hot vector."""
    return jnp.einsum("e,eij,j->i", nn.one_hot(jnp.argmax(h), h.size), table, x)


STEPS = {
    "sign": lambda h, table, x: jnp.sign(h),
    "threshold": lambda h, table, x: eqxproj.threshold(h, margin=0.5),
    "round": lambda h, table, x: jnp.round(h),
    "floor": lambda h, table, x: jnp.floor(h),
    "ceil": lambda h, table, x: jnp.ceil(h),
    "heaviside": lambda h, table, x: jnp.heaviside(h, 0.5),
    "comparison": lambda h, table, x: (h > 0).astype(h.dtype),
    "comparison of two unknowns": lambda h, table, x: (h > jnp.roll(h, 1)).astype(h.dtype),
    "comparison in where": lambda h, table, x: jnp.where(h > 0, 1.0, -1.0),
    "three levels": lambda h, table, x: jnp.where(h > 0.5, 1.0, jnp.where(h < -0.5, -1.0, 0.0)),
    "one_hot of argmax": lambda h, table, x: nn.one_hot(jnp.argmax(h), h.size),
    "one_hot of argmin": lambda h, table, x: nn.one_hot(jnp.argmin(h), h.size),
    "top_k mask": top_k_mask,
    "top_k values": lambda h, table, x: lax.top_k(h, 2)[0],
    "sort": lambda h, table, x: jnp.sort(h),
    "argsort": lambda h, table, x: nn.one_hot(jnp.argsort(h), h.size),
    "top-1 gate": top_1_gate,
    "top-1 gate by one_hot": dispatched,
    "top-2 gate": top_k_gate,
    "table at argmax": lambda h, table, x: table[jnp.argmax(h), :, 0],
}

FEWER_LEVELS = {"scale": 1.0, "inputs": 8, "width": 2, "samples": 48}
"""For steps of many levels: with four units the layer after the step does so well without the one before that to train
this one gains 40 to 50 % of what is left, not more."""

OPTIONS = {name: FEWER_LEVELS for name in ("round", "floor", "ceil")}
TRAINING = {name: {"steps": 1500, "rate": 3e-2} for name in ("top-1 gate", "top-1 gate by one_hot", "top-2 gate")}
"""Gates that gradients reach learn by these alone, and take longer."""


def row(name, step):
    training = {"steps": 400, "rate": 1e-2, **TRAINING.get(name, {})}
    return Row(name, GROUP, stepped(step, **OPTIONS.get(name, {})), kind="discrete", **training)


ROWS = [row(name, step) for name, step in STEPS.items()]
