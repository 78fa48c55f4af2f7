r"""The objective: the prox of the loss at what it reads.

An objective has no outputs and receives no duals; with unit weight on its operands, the dual of an operand is the
displacement of the prox, $\mathrm{prox}_{\tau L}(z) - z$. For small tau that is $-\tau\nabla L$.

A loss with a closed form is asked for it ([`CustomObjective`][]). Any other ([`GenericObjective`][]) goes through
Newton steps with conjugate gradients on $\tfrac12|d|^2 + \tau L(z + d)$: derivatives of this one node, by the logits
alone. In a steep metric, where all steps are linear, and for a tau as small as the default one, the answer is
$-\tau\nabla L$: what is left of the prox then is its protection from curvatures of a million and more, and that is not
worth the compilation of its loops, which takes as long as all the rest of a small network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._numerics._conjugate_gradients import conjugate_gradients, inner
from .._numerics._newton import descend
from .._program._equations import Equation, Variable
from ._base import AbstractRule, Context

Factors = tuple[tuple[Variable, int], ...]


def _factor(factors: Factors, ctx: Context):
    value = 1.0
    for variable, power in factors:
        value = value * ctx.known[variable.index] if power > 0 else value / ctx.known[variable.index]
    return value


class CustomObjective(AbstractRule):
    """The prox, or the projection onto the zero set, of a loss that comes with one."""

    label: ClassVar[str] = "prox"

    def __init__(self, factors: Factors = ()):
        self.factors = factors

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return False  # as an operation inside a network, a loss is any other function

    @staticmethod
    def has_prox(equation: Equation, unknown: Sequence[bool]) -> bool:
        """Whether the unknown operand is the predictions, and they alone."""
        return tuple(unknown) == (True, False)

    def describe(self, equation: Equation | None) -> str:
        if equation is None:
            return self.label
        call = equation.params["call"]
        return f"{'projection' if call.hard else 'prox'} ({call.name.removesuffix('_value')})"

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
        predictions, targets = ctx.operands(inputs)
        assert ctx.equation is not None
        samples = ctx.equation.outputs[0].shape
        tau = ctx.scale * _factor(self.factors, ctx)
        if isinstance(tau, float) and math.prod(samples) <= _FEW:
            with jax.ensure_compile_time_eval():  # a number that is known while tracing may spare a rule its cases
                tau = jnp.full(samples, tau, predictions.dtype)
        tau = jnp.broadcast_to(jnp.asarray(tau, predictions.dtype), samples)
        call = ctx.params["call"]
        moved = call.rule([predictions, targets], tau)
        if call.hard and self.factors:
            moved = jnp.where(_like(tau, moved) > 0, moved, 0.0)
        return [moved.astype(predictions.dtype)], []


def _like(tau: Array, moved: Array) -> Array:
    return tau.reshape(tau.shape + (1,) * (moved.ndim - tau.ndim))


class GenericObjective(AbstractRule):
    """The prox of any differentiable loss, found by damped Newton steps; its slope by the defaults."""

    label: ClassVar[str] = "local prox"

    def __init__(self, parts: tuple[tuple[float, Factors], ...]):
        self.parts = parts

    def _value(self, ctx: Context, inputs: Sequence[Array]) -> Array:
        total = jnp.asarray(0.0)
        for (coefficient, factors), term in zip(self.parts, ctx.function(*inputs), strict=True):
            total = total + coefficient * jnp.sum(_factor(factors, ctx) * term)
        return total

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
        start = list(inputs)

        def loss(d):
            return ctx.scale * self._value(ctx, jtu.tree_map(jnp.add, start, d))

        largest = ctx.scale * max(abs(coefficient) for coefficient, _ in self.parts)
        if ctx.metric.is_steep and largest <= _TINY:
            gradient = jax.grad(loss)(jtu.tree_map(jnp.zeros_like, start))
            return jtu.tree_map(jnp.negative, gradient), []
        return _prox(loss, start), []


_TINY = 1e-5
"""Scale of the loss, known arrays among its factors aside, up to which in a steep metric its slope is the answer."""
_FEW = 1 << 16
"""Samples up to which a tau for each is known by value while tracing."""
_OUTER, _INNER, _HALVINGS, _ROUNDING = 12, 12, 8, 1e-6


def _prox(loss, start: list[Array]) -> list[Array]:
    r"""Minimizes $\tfrac12|d|^2 + l(d)$ over d, from d = 0.

    Where no Newton step lowers the cost, as where second derivatives are not finite, but $-\nabla l(0)$ does, the limit
    of a small $l$, that is the answer. It is also where it is not finite: that is for the caller to find out.
    """
    gradient = jax.grad(loss)

    def residual(d):
        return jtu.tree_map(lambda a, b: -(a + b), d, gradient(d))

    def size(d):
        return jtu.tree_reduce(jnp.maximum, jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0.0), d))

    def cost(d):
        value = 0.5 * inner(d, d) + loss(d)
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    def newton(d, r, memory):
        def hessian(v):
            return jtu.tree_map(jnp.add, v, jax.jvp(gradient, (d,), (v,))[1])

        step = conjugate_gradients(hessian, r, [1.0] * len(r), tol=1e-3, max_steps=_INNER)
        return jax.lax.cond(inner(r, step) > 0, lambda: step, lambda: list(r)), memory

    zero = [jnp.zeros_like(x) for x in start]
    r = residual(zero)
    scale = size(r)

    def is_done(r, _):
        return size(r) <= 1e-5 * scale

    limits = {"max_steps": _OUTER, "max_halvings": _HALVINGS, "rounding": _ROUNDING}
    found = descend(cost, residual, newton, is_done, zero, r, (), **limits)

    def first():
        before = cost(zero)
        return ~jnp.isfinite(scale) | (cost(r) <= before + _ROUNDING * jnp.abs(before))

    plain = jax.lax.cond(size(found) == 0, first, lambda: jnp.asarray(False))
    return jtu.tree_map(lambda a, b: jnp.where(plain, a, b), r, found)


def integer_labels(equation: Equation) -> tuple[int, int] | None:
    """The variable of the integer labels of a loss and the number of classes, where it is one of those."""
    predictions, labels = equation.inputs
    if np.dtype(labels.dtype).kind in "iu" and len(labels.shape) == len(predictions.shape) - 1:
        return labels.index, predictions.shape[-1]
    return None
