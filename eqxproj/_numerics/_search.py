r"""The scalar node $y = \phi(s)$ for any elementwise function, by a search without derivatives.

It solves the problem of `_scalar.py`. In units of what it costs to stay, $\mu^2/\kappa$, and with the step
$t = (s - s_0)/\sigma\mu$ and the rise $\rho = (\phi(s) - \phi(s_0))\,\kappa/\mu$ (one if $y_0$ is reached), the
objective exceeds that of $s_0$ by

$$D = q t^2 + \rho(\rho - 2) \ge -1 .$$

Limits: it is never worse than staying, and exact in the limit of small steps where the function is smooth. It may miss
a narrow or distant minimum of a function that oscillates, and a jump that pays only slightly. It lands up to a percent
beyond a jump, and approaches a singularity (that of the logarithm at 0) to about a percent of the distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ._differences import WideFunction, differences, slope_and_step
from ._piecewise_dual import Elements, Weights, finite_cast
from ._scalar import widen

_SCANNED = 8  # points on each side
_SECTIONS = 8
_GOLDEN = 0.381966
_FAR = 1e18  # saturation of quantities that are squared afterwards

_Point = tuple[Array, Array, Array]  # the step t, an upper bound on D, and the value of the function


class _Problem(NamedTuple):
    """One scalar problem an element, in the working precision."""

    f: WideFunction
    s0: Array
    now: Array  # the value at s0
    mu: Array
    sigma: Array
    q: Array
    reach: Array  # sigma mu, not zero
    wanted: Array  # y0 - phi(s0), not zero

    def point(self, t: Array) -> Array:
        return self.s0 + self.sigma * (self.mu * t)

    def excess(self, t: Array, value: Array, blur: ArrayLike = 0.0) -> tuple[Array, Array, Array]:
        """D, its rounding error and the rise; `blur` is a further error of the value."""
        bad = ~jnp.isfinite(value)
        rise = jnp.clip(jnp.where(bad, 0, value - self.now) / self.wanted, -_FAR, _FAR)
        noise = jnp.minimum((self.noise(value) + blur + 1e-30) / jnp.abs(self.wanted), _FAR)
        error = jnp.where(bad, 0, noise * (2 * jnp.abs(rise - 1) + noise))
        return jnp.where(bad, jnp.inf, self.q * t * t + rise * (rise - 2)), error, rise

    def noise(self, value: Array) -> Array:
        """A bound on the rounding error of the rise from `phi(s0)` to `value`."""
        return 2 * self.f.eps * (jnp.abs(self.now) + jnp.where(jnp.isfinite(value), jnp.abs(value), 0))


def generic_dual(phi: Callable[[Array], Array], s0: Elements, mu: Elements, sigma: Weights, q: Weights) -> Elements:
    r"""The dual for any elementwise function, from about 45 evaluations of it and no derivative.

    1. The slope $m$ at $s_0$, by differences, gives the linear step $t = m/(1 + m^2 q)$, exact where steps are small.
    2. A point that beats $s_0$ lies within $|\mu|\sqrt{\sigma/\kappa}$ of it: beyond, the move alone costs more than
       staying. Points up to there are scanned. Where $y_0$ was passed on the way, as by a jump, bisection finds where;
       else golden sections refine the best point. Where all of this is below the resolution of $s_0$, it is skipped.
    3. Two Newton steps on the stationarity condition $t = \phi'(s)(1 - \rho)$, with differences for derivatives.
    4. The answer is dropped where it does not pay. Costs are compared with a bound on their rounding errors.

    Values that are not finite count as infinitely bad; where `phi(s0)` is not finite, $s_0$ stays. `phi` is called on
    arrays of the shape and dtype of `s0`.
    """
    dtype, s0, mu, sigma, q = widen(s0, mu, sigma, q)
    f, tiny = WideFunction.of(phi, dtype), float(jnp.finfo(s0.dtype).tiny)
    q = jnp.maximum(q, 1e-30)
    now, reach, wanted = f.phi(s0), sigma * mu, sigma * mu / q
    reach, wanted = (jnp.where(jnp.abs(x) < tiny, tiny, x) for x in (reach, wanted))
    p = _Problem(f, s0, now, mu, sigma, q, reach, wanted)
    slope, h = slope_and_step(f, s0, now)
    t = slope / (1 + slope * slope * q)
    value = f.phi(p.point(t))
    measured, error, _ = p.excess(t, value, f.eps * jnp.abs(slope * s0))
    # What the slope predicts, unless the measurement contradicts it: below the rounding error only the slope knows.
    predicted = jnp.clip(-1 / (1 + 1 / (q * slope * slope)), measured - error, measured + error)
    best = t, jnp.where(jnp.isfinite(measured), predicted, jnp.inf), value
    radius = jnp.minimum(jnp.abs(reach) / jnp.sqrt(q), _FAR)
    resolvable = jnp.any(radius > 4 * f.eps * jnp.maximum(jnp.abs(s0), 1e-6))
    found = jax.lax.cond(resolvable, lambda: _search(p, radius, slope), lambda: (t, jnp.full_like(s0, jnp.inf), now))
    best = _better(found, best)
    t, excess, _ = jax.lax.fori_loop(0, 2, lambda _, best: _polish(p, best, h), best)
    pays = jnp.isfinite(now) & (excess < 0) & jnp.isfinite(t)
    return finite_cast(jnp.where(pays, t * mu, 0), dtype)


def _better(new: tuple, old: tuple) -> tuple:
    """The point of lower cost, elementwise."""
    return tuple(jnp.where(new[1] < old[1], x, y) for x, y in zip(new, old, strict=True))


def _search(p: _Problem, radius: Array, slope: Array) -> _Point:
    """The best point found on both sides of `s0` up to a radius, on a scale that is even in the log of the distance."""
    size = jnp.abs(p.s0)
    least = jnp.minimum(jnp.maximum(1e-6 * radius, 16 * p.f.eps * size), 0.01 * jnp.maximum(size, 1))
    least = jnp.maximum(jnp.minimum(least, radius), 1e-30)
    bottom, top = jnp.log(least), jnp.log(jnp.maximum(radius, least))
    gap = (top - bottom) / (_SCANNED - 1)

    def probe(place, side, best):
        """Tries one point: its cost, whether it reaches the wanted value, and the best point, with place and side."""
        s = p.f.snap(p.s0 + side * jnp.exp(jnp.minimum(place, top)))
        t, value = jnp.clip((s - p.s0) / p.reach, -_FAR, _FAR), p.f.phi(s)
        excess, error, rise = p.excess(t, value)
        # Where the function ends, it is taken to have gone on as it began.
        reached = jnp.where(jnp.isfinite(value), rise >= 1, side * slope * p.reach > 0)
        return excess + error, reached, _better((t, excess + error, value, place, side), best)

    def scan(k, carry):
        best, crossing, side_of = carry
        place, side = bottom + gap * (k // 2), jnp.where(k % 2, -ahead, ahead)
        _, reached, best = probe(place, side, best)
        first = reached & jnp.isinf(crossing)
        return best, jnp.where(first, place, crossing), jnp.where(first, side, side_of)

    zero, nowhere = jnp.zeros_like(p.s0), jnp.full_like(p.s0, jnp.inf)
    ahead = jnp.where(slope * p.reach < 0, zero - 1, zero + 1)  # the side to which the slope points
    start = (zero, nowhere, p.now, zero + top, ahead), nowhere, ahead
    best, crossing, side = jax.lax.fori_loop(0, 2 * _SCANNED, scan, start)
    # Bisect for the place where the wanted value is reached, if that promises most; else refine the best point.
    nearest = jnp.exp(jnp.minimum(crossing, top) - gap / 2) / radius
    bisect = jnp.isfinite(crossing) & (nearest * nearest - 1 < best[1])
    low, high = jnp.where(bisect, crossing, best[3]) - gap, jnp.where(bisect, crossing, best[3] + gap)
    side, inner = jnp.where(bisect, side, best[4]), low + _GOLDEN * (high - low)
    cost, _, best = probe(inner, side, best)

    def section(_, carry):
        low, high, inner, cost, best = carry
        # Of an interval with one golden point, the mirror image is the other one.
        place = jnp.where(bisect, (low + high) / 2, low + high - inner)
        new, reached, best = probe(place, side, best)
        inner = jnp.where(bisect, place, inner)
        first, second = jnp.minimum(place, inner), jnp.maximum(place, inner)
        nearer = jnp.where(bisect, reached, (new < cost) == (place < inner))
        low, high = jnp.where(nearer, low, first), jnp.where(nearer, second, high)
        return low, high, jnp.where(new < cost, place, inner), jnp.minimum(new, cost), best

    return jax.lax.fori_loop(0, _SECTIONS, section, (low, high, inner, cost, best))[-1][:3]


def _polish(p: _Problem, point: _Point, h: Array) -> _Point:
    """One Newton step on the stationarity condition, where it does not raise the cost."""
    t, excess, value = point
    delta = p.sigma * (p.mu * t)
    s = p.f.snap(p.s0 + delta)
    h = jnp.maximum(jnp.maximum(h, 0.03 * jnp.abs(delta)), 64 * p.f.eps * jnp.abs(s))
    slope, bend, _ = differences(p.f, s, value, h)
    # The rise as the slope gives it, unless the measured one differs by more than its rounding error.
    rest = (value - p.now) - slope * (s - p.s0)
    rest = jnp.sign(rest) * jnp.maximum(jnp.abs(rest) - p.noise(value), 0)
    left = 1 - (slope * p.q * t + jnp.clip(rest / p.wanted, -_FAR, _FAR))
    gauss = 1 + slope * slope * p.q
    newton = gauss - bend * p.reach * left
    new = t - (t - slope * left) / jnp.where(newton > 0.1 * gauss, newton, gauss)
    new_value = p.f.phi(p.point(new))
    cost, error, _ = p.excess(new, new_value, p.f.eps * jnp.abs(slope * p.s0))
    accepted = jnp.isfinite(new) & (cost <= excess + error)
    excess = jnp.where(accepted, jnp.minimum(excess, cost + error), excess)
    return jnp.where(accepted, new, t), excess, jnp.where(accepted, new_value, value)
