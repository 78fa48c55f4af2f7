r"""The scalar node $y = \phi(s)$ for smooth functions, where a step is moderate: Newton's method on a convex problem.

It solves the problem of `_scalar.py`, with the same arguments, in single or double precision. Let $|\phi'| \le L$ and
$|\phi''| \le B$. At the minimum the residual is at most that of $s_0$, $|\mu|/\kappa$. The move alone costs no more
than that, so that it is no longer than $\sigma|\mu|/\sqrt q$. As $\lambda = \kappa\phi'(s)(y_0 - \phi(s))$ there, it is
no longer than $\sigma|\mu|L$ either. Let $r$ be the shorter of the two. Half of the second derivative of the objective,
times $\sigma$, is $1 + q\phi'^2 + q(\phi - y_0)\phi''$. Within $r$ the residual is at most $|\mu|/\kappa + Lr$, and so
that is at least $1 - \sigma|\mu|B(1 + \min(L\sqrt q, L^2q))$. Where this is positive, the objective is convex on all of
the interval that the minimum lies in, and has no other there. Where $\phi$ rises or falls throughout, the residual
between $s_0$ and a better point is at most $|\mu|/\kappa$, and $1 - \sigma|\mu|B$ is enough.

Limits: the bounds are found on a grid of 1/128 between -32 and 32, and hold there only, for functions without finer
structure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._newton import bracketed_root

_RANGE, _GRID = 32.0, 128
_KINK = 1e-5  # how far a slope may be from the integral of its derivative, relative to one or to the largest slope
_CONVEX = 0.5  # how much of the one in the objective's second derivative may be lost: Newton's steps converge anyway
_STEPS = 8
_SHORT = 0.05  # up to this length of a step the rise is integrated; the error, of the fourth power, is below rounding


class Bounds(NamedTuple):
    """What is known of a smooth function between -32 and 32."""

    slope: float  # bounds the size of its slope
    bend: float  # bounds the size of its second derivative
    monotone: bool  # whether it rises or falls throughout


def bounds_of(phi: Callable[[Array], Array], dtype: Any) -> Bounds | None:
    """The bounds of a smooth elementwise function, with a tenth to spare; `None` of all others.

    `None` also where the function has no second derivative in JAX, or one that is not finite.
    """
    # Between the points where functions written with cases have their seams.
    grid = (np.arange(int(2 * _RANGE * _GRID)) + 0.5) / _GRID - _RANGE
    with jax.ensure_compile_time_eval():
        s = jnp.asarray(grid, dtype)
        try:
            value, slope, bend = (np.asarray(x, float) for x in jax.jit(functools.partial(_derivatives, phi))(s))
        except Exception:  # what a primitive without a derivative raises is its own choice
            return None
    if not all(np.all(np.isfinite(x)) for x in (value, slope, bend)):
        return None
    steepest = max(1.0, float(np.max(np.abs(slope))))
    # Of a smooth function, the values rise by the integral of the slope, and the slope by that of its derivative.
    for x, derivative in ((value, slope), (slope, bend)):
        gap = np.diff(x) - (derivative[1:] + derivative[:-1]) / (2 * _GRID)
        rounding = 4 * float(jnp.finfo(s.dtype).eps) * np.max(np.abs(x))
        if np.max(np.abs(gap)) > _KINK * steepest + rounding:
            return None
    monotone = bool(np.all(slope >= 0) or np.all(slope <= 0))
    return Bounds(1.1 * float(np.max(np.abs(slope))), 1.1 * float(np.max(np.abs(bend))), monotone)


def _derivatives(phi: Callable[[Array], Array], s: Array) -> tuple[Array, Array, Array]:
    """An elementwise function, its slope, and its second derivative."""
    one = jnp.ones_like(s)
    (value, slope), (_, bend) = jax.jvp(lambda s: jax.jvp(phi, (s,), (one,)), (s,), (one,))
    return value, slope, bend


def smooth_dual(
    phi: Callable[[Array], Array],
    bounds: Bounds,
    s0: Float[Array, "*shape"],
    mu: Float[Array, "*shape"],
    sigma: Float[Array, "*#shape"],
    q: Float[Array, "*#shape"],
    otherwise: Callable[[], Float[Array, "*shape"]],
) -> Float[Array, "*shape"]:
    r"""The dual, to rounding, where every element's problem is convex by the bounds; else what `otherwise` answers."""
    gain = bounds.slope * jnp.sqrt(q)
    least = sigma * jnp.abs(mu) * bounds.bend * (1.0 if bounds.monotone else 1.0 + jnp.minimum(gain, gain * gain))
    most = jnp.abs(mu) * (bounds.slope / jnp.maximum(gain, 1.0))
    easy = jnp.all((least < _CONVEX) & (jnp.abs(s0) + sigma * most < _RANGE))
    lam, found = jax.lax.cond(
        easy,
        lambda: _newton(phi, s0, mu, sigma, q, most, bounds.slope),
        lambda: (jnp.zeros_like(s0), jnp.asarray(False)),
    )
    return jax.lax.cond(found, lambda: lam, otherwise)


def _newton(
    phi: Callable[[Array], Array], s0: Array, mu: Array, sigma: Array, q: Array, most: Array, steepest: float
) -> tuple[Array, Array]:
    r"""The root of $\lambda - \phi'(s)(\mu - q d)$, $d = (\phi(s) - \phi(s_0))/\sigma$, and whether it was found.

    Beyond `most` there may be other roots; no slope is above `steepest`. The rise over a short step is Hermite's
    quadrature of the slope, where nothing cancels. The difference of two values would be lost to rounding, and the
    error be multiplied with $\kappa$.
    """
    value0, slope0, bend0 = _derivatives(phi, s0)
    eps = float(jnp.finfo(s0.dtype).eps)

    def stationarity(lam):
        delta = sigma * lam
        value, slope, bend = _derivatives(phi, s0 + delta)
        short = jnp.abs(delta) < _SHORT
        quadrature = lam * ((slope0 + slope) / 2 - delta * (bend - bend0) / 12)
        left = mu - q * jnp.where(short, quadrature, (value - value0) / sigma)
        # Where the function is nearly flat, only rounding is left: of its slope, relative to the largest one, and of
        # its values.
        values = jnp.where(short, 0.0, jnp.abs(slope * value) * (q / sigma))
        error = 4.0 * eps * (steepest * jnp.abs(left) + values)
        return lam - slope * left, 1.0 + q * slope * slope - sigma * bend * left, error

    start = (slope0 * mu / (1.0 + q * slope0 * slope0)).astype(s0.dtype)
    most = jnp.broadcast_to(most, start.shape).astype(start.dtype)
    # A Newton step shorter than the square root of the accuracy wanted leaves an error below it.
    lam, found = bracketed_root(stationarity, start, -most, most, rtol=0.1 * eps**0.5, max_steps=_STEPS)
    return lam, found & jnp.all(jnp.isfinite(lam))
