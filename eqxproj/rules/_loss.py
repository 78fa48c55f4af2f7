r"""The objective: what the loss wants of the values that it reads.

An objective has no outputs and receives no duals. Its operands have weight one. Its pullback is $-\tau\nabla L$, its
projection the displacement of the prox, $\mathrm{prox}_{\tau L}(z) - z$; for a loss that stands for a set, the
displacement to the set.

A loss with a closed form is asked for it ([`CustomObjective`][]). Any other ([`GenericObjective`][]) goes through
Newton steps with conjugate gradients on $\tfrac12|d|^2 + \tau L(z + d)$: derivatives of this one node. Limits: of a
loss that is not convex the minimum is a local one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._numerics._conjugate_gradients import conjugate_gradients, inner
from .._numerics._losses import check_classes, check_signs
from .._numerics._newton import descend
from .._program._equations import Equation, Variable
from ._base import AbstractRule, Context, in_duals

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

    def _factors(self, ctx: Context, predictions: Array) -> Array:
        """What multiplies the loss of each sample: the factor of the prox times known factors of the loss."""
        assert ctx.equation is not None
        factor = jnp.asarray(ctx.scale * _factor(self.factors, ctx), predictions.dtype)
        return jnp.broadcast_to(factor, ctx.equation.outputs[0].shape)

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        predictions, targets = ctx.operands(inputs)
        (losses,), back = jax.vjp(lambda z: ctx.params["call"].function(z, targets), predictions)
        tau = self._factors(ctx, predictions)
        return [-back([tau.astype(losses.dtype)])[0]]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        predictions, targets = ctx.operands(inputs)
        tau, call = self._factors(ctx, predictions), ctx.params["call"]
        displacement = call.rule([predictions, targets], tau)
        if call.hard and self.factors:
            displacement = jnp.where(_like(tau, displacement) > 0, displacement, 0.0)
        return [displacement.astype(predictions.dtype)]

    def known_variables(self) -> list[int]:
        return [v.index for v, _ in self.factors]


def _like(tau: Array, moved: Array) -> Array:
    return tau.reshape(tau.shape + (1,) * (moved.ndim - tau.ndim))


class GenericObjective(AbstractRule):
    """The prox of any differentiable loss, found by damped Newton steps."""

    label: ClassVar[str] = "local prox"

    def __init__(self, parts: tuple[tuple[float, Factors], ...]):
        self.parts = parts

    def _value(self, ctx: Context, inputs: Sequence[Array]) -> Array:
        total = jnp.asarray(0.0)
        for (coefficient, factors), term in zip(self.parts, ctx.function(*inputs), strict=True):
            total = total + coefficient * jnp.sum(_factor(factors, ctx) * term)
        return total

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        # Thresholds, as of the tolerance of a linear solver, are in units of the loss.
        gradient = jax.grad(lambda values: ctx.scale / ctx.unit * self._value(ctx, values))(list(inputs))
        return [-in_duals(ctx.unit, g) for g in gradient]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        start = list(inputs)
        return _prox(lambda d: ctx.scale * self._value(ctx, jtu.tree_map(jnp.add, start, d)), start)

    def known_variables(self) -> list[int]:
        return [v.index for _, factors in self.parts for v, _ in factors]


# All samples are one system. Their curvatures may nearly cancel along a step, which is then far too long.
_OUTER, _INNER, _HALVINGS, _ROUNDING = 30, 50, 30, 1e-6


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

        step = conjugate_gradients(hessian, r, tol=1e-3, max_steps=_INNER)
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


_WITH_CLASSES = ("margin_value", "cross_entropy_value", "hinge_value")


def checked_labels(equation: Equation) -> tuple[int, Callable[[Any], None]] | None:
    """The variable of the labels of a loss of this library, and what checks their values; `None` elsewhere."""
    predictions, labels = equation.inputs
    name, kind = equation.params["call"].name, np.dtype(labels.dtype).kind
    if name in _WITH_CLASSES and kind in "iu" and len(labels.shape) == len(predictions.shape) - 1:
        return labels.index, lambda found: check_classes(found, predictions.shape[-1])
    if name == "hinge_value" and kind in "biuf" and labels.shape == predictions.shape:
        return labels.index, check_signs
    return None
