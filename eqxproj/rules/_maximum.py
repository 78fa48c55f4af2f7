"""Maxima: `max` and `min` of two unknowns, `reduce_max`, `reduce_min`, `reduce_window_max`, `reduce_window_min`.

All are the water level of `_water_level.py` over a last axis. A minimum is the maximum of the negatives. Windows that
overlap own copies of the elements that they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._numerics._water_level import first_order_max_dual, max_dual
from .._numerics._windows import reads
from .._program._equations import Equation
from ._base import AbstractRule, Context, Projected


def _windows(x: Array, params, fill: float) -> Array:
    """The elements of every window on a last axis: strided slices, one an offset in the window."""
    padded = jax.lax.pad(
        x,
        jnp.asarray(fill, x.dtype),
        [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["base_dilation"], strict=True)],
    )
    sizes, strides, dilations = params["window_dimensions"], params["window_strides"], params["window_dilation"]
    spans = [(size - 1) * d + 1 for size, d in zip(sizes, dilations, strict=True)]
    steps = [(n - span) // s for n, span, s in zip(padded.shape, spans, strides, strict=True)]
    slices = []
    for offset in itertools.product(*(range(size) for size in sizes)):
        start = [o * d for o, d in zip(offset, dilations, strict=True)]
        limit = [a + n * s + 1 for a, n, s in zip(start, steps, strides, strict=True)]
        slices.append(jax.lax.slice(padded, start, limit, strides))
    return jnp.stack(slices, -1)


def _tile(params) -> bool:
    """Whether no two windows overlap, so that each element is in one window at most."""
    plain = all(d == 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    return plain and tuple(params["window_dimensions"]) == tuple(params["window_strides"])


def _spread(windows: Array, params, shape: Sequence[int], fill: float | int) -> Array:
    """For each element what its window has; `fill` for elements of none. Windows do not overlap."""
    for axis, size in enumerate(params["window_dimensions"]):
        windows = jnp.repeat(windows, size, axis) if size > 1 else windows
    ends = [(-low, n + low - m, 0) for (low, _), n, m in zip(params["padding"], shape, windows.shape, strict=True)]
    return jax.lax.pad(windows, jnp.asarray(fill, windows.dtype), ends)


def _tiled_dual(x: Array, mu: Array, params) -> Array:
    """[`first_order_max_dual`][] on windows that do not overlap, in the shape of the elements.

    Each compares what its window has, the maximum, how often it is there and where first, with its own, so that nothing
    needs to be scattered back.
    """
    slices = jnp.moveaxis(_windows(x, params, -float(jnp.finfo(x.dtype).max)), -1, 0)
    work = jnp.promote_types(x.dtype, jnp.float32)
    top = jnp.max(slices, 0)
    tied = slices == top
    count, first = jnp.sum(tied, 0, dtype=work), jnp.argmax(tied, 0)
    place = jnp.zeros((), int)
    for axis, (size, (low, _)) in enumerate(zip(params["window_dimensions"], params["padding"], strict=True)):
        along = (jnp.arange(x.shape[axis]) + low) % size
        place = place * size + along.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    mu = mu.astype(work)
    up = jnp.where(_spread(first, params, x.shape, -1) == place, _spread(jnp.maximum(mu, 0), params, x.shape, 0), 0)
    share = _spread(jnp.minimum(mu, 0) / count, params, x.shape, 0)
    down = jnp.where(x == _spread(top, params, x.shape, jnp.nan), share, 0)
    return jnp.where(jnp.isfinite(x), up + down, 0).astype(x.dtype)


class Maximum(AbstractRule):
    """The projection onto the graph of a maximum or minimum."""

    label: ClassVar[str] = "maximum"

    @property
    def has_slope(self) -> bool:
        return True

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return all(unknown)

    def _sign(self, ctx: Context) -> float:
        assert ctx.equation is not None
        return -1.0 if "min" in ctx.equation.name else 1.0

    def _is_window(self, ctx: Context) -> bool:
        assert ctx.equation is not None
        return ctx.equation.name.startswith("reduce_window")

    def _fill(self, ctx: Context, dtype) -> float:
        return -self._sign(ctx) * float(jnp.finfo(dtype).max)

    def _last(self, ctx: Context, inputs: Sequence[Array], fill: float | None = None) -> Array:
        """The candidates on a last axis: a linear map of the operands, but for what pads windows."""
        if self._is_window(ctx):
            fill = self._fill(ctx, inputs[0].dtype) if fill is None else fill
            return inputs[0] if ctx.store_copies else _windows(inputs[0], ctx.params, fill)
        if len(inputs) == 2:
            return jnp.stack(inputs, -1)
        axes = tuple(ctx.params["axes"])
        moved = jnp.moveaxis(inputs[0], axes, tuple(range(-len(axes), 0)))
        return moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)

    def _back(self, ctx: Context, nu: Array, inputs: Sequence[Array]) -> list[Array]:
        """The transpose of `_last`, for duals: copies of one element add up."""
        shapes = [jax.ShapeDtypeStruct(x.shape, nu.dtype) for x in inputs]
        return list(jax.linear_transpose(lambda *values: self._last(ctx, values, 0.0), *shapes)(nu))

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        return _windows(value, ctx.params, self._fill(ctx, value.dtype)) if self._is_window(ctx) else value

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        if equation is None or not equation.name.startswith("reduce_window"):
            return 1.0
        names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
        shape = equation.inputs[0].shape
        return np.broadcast_to(reads(shape, equation.outputs[0].shape, *(equation.params[n] for n in names)), shape)

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        if self._is_window(ctx) and ctx.store_copies:
            return [self._sign(ctx) * jnp.max(self._sign(ctx) * inputs[0], -1)]
        return ctx.function(*inputs)

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        sign = self._sign(ctx)
        if self._is_window(ctx) and not ctx.store_copies and _tile(ctx.params):
            return [sign * _tiled_dual(sign * inputs[0], sign * duals[0], ctx.params)]
        weights = ctx.weights if len(inputs) == 2 else ctx.weights[0]
        nu = first_order_max_dual(sign * self._last(ctx, inputs), sign * duals[0], weights)
        return self._back(ctx, sign * nu, inputs)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array] | Projected:
        sign, two = self._sign(ctx), len(inputs) == 2
        weights = ctx.weights if two else ctx.weights[0]
        ratio = tuple(ctx.ratios[0]) if two else ctx.ratios[0][0]
        x = sign * self._last(ctx, inputs)
        nu = self.nearest(x, sign * duals[0], weights, ratio)
        input_duals = self._back(ctx, sign * nu, inputs)
        if not self._is_window(ctx) or ctx.store_copies:
            return input_duals
        change = jnp.max(x + nu / ctx.weights[0], -1) - jnp.max(x, -1)
        return Projected(input_duals, [sign * change])

    def nearest(self, x: Array, mu: Array, weights, ratio) -> Array:
        """The duals of the candidates on the last axis. Of tied maxima the first rises."""
        return max_dual(x, mu, weights, ratio)
