r"""Nearest points where a scalar product reaches a margin from below.

Given $a$, $w$ with unit weights, and a further term $b$ whose move by $\rho t$ costs $\rho t^2$, the nearest point with
$a.w + b = m$ is found from $u = a + w$ and $v = a - w$: the multiplier $t$ moves them to $u/(1 - t)$ and $v/(1 + t)$,
and $b$ by $\rho t$. As $4\,a.w = |u|^2 - |v|^2$, with $U = |u|^2$ and $V = |v|^2$

$$\frac{U}{(1-t)^2} - \frac{V}{(1+t)^2} + 4\rho t = 4 (m - b) =: g ,$$

whose left side increases from $U - V$ at $t = 0$. In $s = 1/(1 - t)$, divided by $Z = g + V \ge U$, that is

$$\frac{U}{Z} s^2 + \frac{V}{Z} \left(1 - \frac{s^2}{(2s-1)^2}\right) + \frac{4\rho}{Z}\left(1 - \frac1s\right) = 1 ,$$

three increasing terms. Without further terms and for $g \ge 0$ the root is known to a factor of two, and a few Newton
steps reach rounding. Where $U = 0$ the product cannot grow along $u$: every direction of $u'$ costs the same then, and
that of $v$ is taken, or where that is zero too, the one of the vector of ones. Limits: single precision at least.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._newton import bracketed_root

_STEPS, _MOST = (4, 5), 60  # in single and in double precision; and inside a bracket
_LEAST = 1e-12  # part of Z below which U counts as zero


class Reached(NamedTuple):
    r"""How $u$ and $v$ move: $u' = s u + f v + h\,(1, \dots, 1)$ and $v' = v s/(2s - 1)$, with what that costs.

    Here $f, h$ are `along_v` and `along_ones`, and `cost` is $|da|^2 + |dw|^2 + \rho t^2$, where $|da|^2 + |dw|^2 =
    \tfrac12 (|u'-u|^2 + |v'-v|^2)$.
    """

    s: Array
    along_v: Array
    along_ones: Array
    cost: Array


def reach_margin(
    square_u: Float[Array, "*shape"],
    square_v: Float[Array, "*shape"],
    goal: Float[Array, "*shape"],
    rho: Float[Array, "*#shape"] | None,
    terms: Float[Array, "*#shape"] | float,
) -> Reached:
    r"""The nearest point where a scalar product, with its further terms, is at least a margin; elementwise.

    **Arguments:**

    - `square_u`, `square_v`: $U$ and $V$.
    - `goal`: $g$. Without further terms it is at least zero.
    - `rho`: $\rho$, or `None` where there are no further terms, known or unknown.
    - `terms`: how many products each of the scalar products adds up.
    """
    short = square_u - square_v < goal
    z = jnp.where(short, goal + square_v, 1.0)
    z = jnp.where(z > 0, z, 1.0)  # all is zero, and so is the goal
    u, v = jnp.where(short, square_u / z, 1.0), jnp.where(short, square_v / z, 0.0)
    r = None if rho is None else jnp.where(short, 4.0 * rho / z, 0.0)
    s = _root(jnp.maximum(u, _LEAST), v, r)
    grown, shrunk = s - 1.0, (s - 1.0) / (2.0 * s - 1.0)
    missing = jnp.where(u < _LEAST, s * s * (_LEAST - u) * z, 0.0)  # of the square of u'
    along = v * z > _LEAST * missing
    along_v = jnp.where(along, jnp.sqrt(missing / jnp.where(along, v * z, 1.0)), 0.0)
    along_ones = jnp.where(along, 0.0, jnp.sqrt(missing / terms))
    cost = 0.5 * (square_u * grown * grown + missing + square_v * shrunk * shrunk)
    cost = cost if rho is None else cost + rho * jnp.square(grown / s)
    return Reached(s, along_v, along_ones, cost)


def _root(u: Array, v: Array, r: Array | None) -> Array:
    """The root s of the equation above, between one and the root of 1/u."""

    def function(s):
        slow = 1.0 / (2.0 * s - 1.0)
        value, slope = u * s * s + v * (1.0 - (s * slow) ** 2) - 1.0, 2.0 * s * (u + v * slow**3)
        if r is None:
            return value, slope, 0.0
        return value + r * (1.0 - 1.0 / s), slope + r / (s * s), 0.0

    low, high = jnp.ones_like(u), jnp.maximum(1.0 / jnp.sqrt(u), 1.0)
    first = 1.0 + (1.0 - u) / (2.0 * (u + v) + (0.0 if r is None else r))
    far = jnp.sqrt(jnp.maximum((1.0 - 0.6 * v) / u, 1.0))
    s = jnp.clip(jnp.where(first < 1.3, first, far), low, high)
    if r is not None:
        rtol = 0.1 * float(jnp.finfo(u.dtype).eps) ** 0.5
        return bracketed_root(function, s, low, high, rtol=rtol, max_steps=_MOST)[0]
    for _ in range(_STEPS[u.dtype.itemsize > 4]):
        value, slope, _ = function(s)
        s = jnp.clip(s - value / slope, low, high)
    return s
