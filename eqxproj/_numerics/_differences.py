"""Slopes of elementwise functions by central differences, for functions of which JAX knows no derivative.

Limits: next to a kink or a jump the slope is that on the scale of the resolution of the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_RUNGS = 4  # steps that are tried


class WideFunction(NamedTuple):
    """A function of a dtype, on arrays of the dtype that is computed in."""

    phi: Callable[[Array], Array]  # rounds its argument
    snap: Callable[[Array], Array]  # that rounding
    eps: float  # the rounding error of its own dtype

    @classmethod
    def of(cls, phi: Callable[[Array], Array], dtype: Any) -> WideFunction:
        """The function `phi` of arrays of this dtype, on arrays of float32 at least."""
        work = jnp.promote_types(dtype, jnp.float32)
        return cls(
            lambda s: phi(s.astype(dtype)).astype(work),
            lambda s: s.astype(dtype).astype(work),
            float(jnp.finfo(dtype).eps),
        )


def difference_slope(phi: Callable[[Array], Array], s0: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The slope of an elementwise function, from eleven evaluations; a side on which it is not finite is left out."""
    f = WideFunction.of(phi, s0.dtype)
    wide = s0.astype(jnp.promote_types(s0.dtype, jnp.float32))
    return slope_and_step(f, wide, f.phi(wide))[0].astype(s0.dtype)


def differences(f: WideFunction, s: Array, value: Array, h: Array) -> tuple[Array, Array, Array]:
    """First and second difference quotients at `s`, and the rounding error of the first.

    They are one-sided where the other side is not finite; `value` is that of the function at `s`, and `h` the step.
    """
    right, left = f.snap(s + h), f.snap(s - h)
    above, below = f.phi(right), f.phi(left)
    ok_right, ok_left = jnp.isfinite(above), jnp.isfinite(below)
    right, above = jnp.where(ok_right, right, s), jnp.where(ok_right, above, value)
    left, below = jnp.where(ok_left, left, s), jnp.where(ok_left, below, value)
    width = right - left
    safe = jnp.where(width > 0, width, jnp.inf)
    first, half = (above - below) / safe, safe / 2
    second = jnp.where(ok_right & ok_left, ((above - value) - (value - below)) / half / half, 0)
    error = f.eps * jnp.maximum(jnp.abs(above), jnp.abs(below)) / safe
    error = jnp.where(width > 0, error, jnp.inf)
    return jnp.where(jnp.isfinite(first), first, 0), jnp.where(jnp.isfinite(second), second, 0), error


def slope_and_step(f: WideFunction, s: Array, value: Array) -> tuple[Array, Array]:
    """The slope at `s` by extrapolated differences with the step that promises the smallest error, and that step."""
    size = jnp.maximum(jnp.abs(s), 1)
    top = f.eps**0.2 * size
    bottom = f.eps**0.2 * jnp.maximum(jnp.minimum(jnp.abs(s), size / 256), 1e-6)
    ratio = (top / bottom) ** (1 / (_RUNGS - 1))
    nothing = jnp.full_like(s, jnp.inf)

    def rung(_, carry):
        h, coarse, best, best_h, best_error = carry
        fine, bend, noise = differences(f, s, value, h)
        change, kink = jnp.abs(fine - coarse), jnp.abs(bend) * h
        extrapolated = fine + (fine - coarse) / (ratio * ratio - 1)
        # Extrapolation is credible where the slope changes little, with the step and from one side to the other.
        credible = (change <= 0.5 * jnp.abs(fine)) & (kink <= 0.5 * jnp.abs(fine))
        extrapolated = jnp.where(credible, extrapolated, fine)
        error = noise + jnp.where(credible, change / (ratio * ratio - 1), change + kink)
        better = error < best_error
        best, best_h = jnp.where(better, extrapolated, best), jnp.where(better, h, best_h)
        return h / ratio, fine, best, best_h, jnp.where(better, error, best_error)

    start = (top, nothing, jnp.zeros_like(s), top, nothing)
    _, _, best, best_h, best_error = jax.lax.fori_loop(0, _RUNGS, rung, start)
    # Next to a kink or a jump all of them disagree: the slope on the scale of the resolution decides.
    least = 64 * f.eps * jnp.maximum(jnp.abs(s), 1e-6)
    local, _, _ = differences(f, s, value, least)
    doubtful = best_error > 0.2 * jnp.abs(best)
    return jnp.where(doubtful, local, best), jnp.where(doubtful, least, best_h)
