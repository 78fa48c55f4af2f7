r"""The scalar node $y = \phi(s)$ for functions that are not piecewise affine: the square, roundings, and any other.

Every function here solves, elementwise,

$$\min_s (s - s_0)^2/\sigma + \kappa (\phi(s) - y_0)^2$$

given $s_0$, the dual $\mu = \kappa (y_0 - \phi(s_0))$, the weights and their exact product $q = \kappa\sigma$, and
returns the dual $\lambda = (s - s_0)/\sigma$. With $d = (\phi(s) - \phi(s_0))/\sigma$, the objective minus its value at
$s_0$, over $\sigma$, is $E = \lambda^2 + q d^2 - 2 \mu d$: neither $y_0$ nor $\kappa$ is needed.

Limits: [`square_dual`][] and [`round_dual`][] are exact, the latter as long as half-integers are representable next
to $s_0$. [`generic_dual`][] is a search: never worse than staying put, exact in the limit of small steps where the
function is smooth, but it may miss a narrow or distant minimum of a function that oscillates and a jump that
pays only slightly, lands up to a percent beyond a jump, and approaches a singularity (that of the logarithm at 0) to
about a percent of the distance only.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ._piecewise_dual import finite_cast

Rounding = Literal["round", "floor", "ceil", "away"]
_SCAN_POINTS = 8  # points scanned on each side
_SECTIONS = 8  # golden sections of the best interval
_RUNGS = 4  # steps of the central differences
_GOLDEN = 0.6180339887498949
_FAR = 1e18  # saturation of quantities that are squared afterwards


def square_dual(
    s0: Float[Array, "*shape"],
    mu: Float[Array, "*shape"],
    sigma: Float[ArrayLike, "*#shape"],
    q: Float[ArrayLike, "*#shape"],
) -> Float[Array, "*shape"]:
    r"""The dual for $\phi(s) = s^2$, exactly.

    By symmetry the minimum lies on the side of $s_0$; let $s_0 \ge 0$. Stationarity reads
    $2 q s^3 + w s - s_0 = 0$ with $w = 1 - 2 q s_0^2 - 2 \sigma\mu$, which has one positive root where $s_0 > 0$. Of
    the bounds $s_0/w$ (if $w > 0$) and $\sqrt{\max(-w, 0)/2q} + \sqrt[3]{s_0/2q}$, the smaller lies above it, by a
    factor of at most two, and the cubic is convex: Newton's method descends to it monotonically. In terms of that root

    $$\lambda = 2 s \mu/(1 + 2 q s (s + s_0)),$$

    where nothing cancels. At $s_0 = 0$ the positive root is preferred.

    **Arguments:**

    - `s0`: the present points.
    - `mu`: the duals of the wanted values.
    - `sigma`: the weight.
    - `q`: their exact product.

    **Returns:**

    The duals $\lambda$, of the shape and dtype of `s0`.
    """
    dtype, s0, mu, sigma, q = _widen(s0, mu, sigma, q)
    start = jnp.abs(s0)
    scale = jnp.maximum(2 * q, 1)  # divides the equation: q may be enormous
    # The bounds keep the compiler from turning x/(a/b) into x b/a, which overflows.
    cube, end = jnp.clip(2 * q / scale, 1e-30, 1), start / scale
    w = (1 - 2 * jnp.clip(sigma * mu, -1e30, 1e30)) / scale - cube * start * start
    bound = jnp.sqrt(jnp.maximum(-w, 0)) / jnp.sqrt(cube) + jnp.cbrt(end / cube)
    bound = jnp.where(w > 0, jnp.minimum(bound, end / jnp.where(w > 0, w, 1)), bound)
    bound = jnp.maximum(bound, 1e-30)
    third, first, zeroth = cube * bound * bound, w, end / bound
    size = jnp.maximum(jnp.maximum(third, jnp.abs(first)), jnp.maximum(zeroth, 1e-8))
    third, first, zeroth = third / size, first / size, zeroth / size
    root = jnp.ones_like(s0)
    for _ in range(8):
        slope = 3 * third * root * root + first
        value = (third * root * root + first) * root - zeroth
        root = jnp.clip(root - value / jnp.where(slope > 0, slope, jnp.inf), 0, 1)
    s = bound * root
    lam = s * (2 * mu / (1 + 2 * q * s * (s + start)))
    return finite_cast(jnp.where(s0 < 0, -lam, lam), dtype)


def round_dual(
    s0: Float[Array, "*shape"],
    mu: Float[Array, "*shape"],
    sigma: Float[ArrayLike, "*#shape"],
    q: Float[ArrayLike, "*#shape"],
    method: Rounding = "round",
) -> Float[Array, "*shape"]:
    r"""The dual for a rounding to integers, exactly.

    Only the side to which $\mu$ points can pay. With $1 - f \in [0, 1]$ the distance from $s_0$ to the end of its cell
    on that side, the nearest point of the cell $j \ge 1$ steps away lies at the distance $j - f$, and the objective
    changes by $((j - f)^2 + q j^2 - 2 \sigma|\mu| j)/\sigma$. It is convex in $j$ and smallest at
    $j^* = (f + \sigma|\mu|)/(1 + q)$, so that $j$ is one of the two integers around $j^*$, at least one; or $s_0$
    stays. The new point lies inside its cell by a few units in the last place, so that rounding does not undo the step.

    **Arguments:**

    - `s0`: the present points.
    - `mu`: the duals of the wanted values.
    - `sigma`: the weight.
    - `q`: their exact product.
    - `method`: `"round"` (half to even, as `jnp.round`), `"away"` (half away from zero, as `jax.lax.round` by default),
        `"floor"` or `"ceil"`.

    **Returns:**

    The duals $\lambda$, of the shape and dtype of `s0`; zero where staying is best.
    """
    narrow = s0
    dtype, s0, mu, sigma, q = _widen(s0, mu, sigma, q)
    eps = float(jnp.finfo(dtype).eps)
    rounded, lowest = {
        "round": (jnp.round(narrow), -0.5),
        "away": (jax.lax.round(narrow, jax.lax.RoundingMethod.AWAY_FROM_ZERO), -0.5),
        "floor": (jnp.floor(narrow), 0.0),
        "ceil": (jnp.ceil(narrow), -1.0),
    }[method]
    edge = rounded.astype(s0.dtype) + lowest
    near = jnp.clip(jnp.where(mu > 0, (edge + 1) - s0, s0 - edge), 0, 1)
    f = 1 - near
    pull = jnp.clip(sigma * jnp.abs(mu), 0, 1e30)
    j = jnp.maximum(jnp.floor((f + pull) / (1 + q)), 1)
    j = jnp.where(2 * (j - f) + 1 + q * (2 * j + 1) < 2 * pull, j + 1, j)
    distance = (j - 1) + near
    distance = distance + jnp.clip(8 * eps * jnp.maximum(jnp.abs(s0), distance), 1e-12, 0.5)
    moves = distance * (distance / j) + q * j < 2 * pull
    return finite_cast(jnp.where(moves, jnp.sign(mu) * distance / sigma, 0), dtype)


class _Problem(NamedTuple):
    """One scalar problem an element, in the working precision."""

    phi: Callable[[Array], Array]  # rounds its argument to the dtype of s0
    snap: Callable[[Array], Array]  # that rounding
    s0: Array
    now: Array  # phi(s0)
    mu: Array
    unit: Array  # mu, not zero
    sigma: Array
    q: Array
    eps: float

    def relative(self, displacement: Array) -> Array:
        r"""A displacement over $\sigma\mu$, saturated; where it is zero, zero even if $\sigma\mu$ underflows."""
        # Saturated twice: the compiler turns x/a/b into x/(a b).
        dual = jnp.clip(displacement / self.sigma, -_FAR * _FAR, _FAR * _FAR)
        return jnp.clip(dual / self.unit, -_FAR, _FAR)

    def cost(self, lam: Array, value: Array, slope: ArrayLike = 0.0) -> tuple[Array, Array]:
        r"""The excess cost $E/\mu^2$ of the point with the dual `lam` and the value `value`, and its rounding error.

        `slope` is that of the function, where the point itself was rounded.
        """
        step = jnp.clip(jnp.clip(lam, -_FAR * _FAR, _FAR * _FAR) / self.unit, -_FAR, _FAR)
        bad = ~jnp.isfinite(value)
        rise = self.relative(jnp.where(bad, 0, value - self.now))
        noise = jnp.abs(self.relative(self.noise(value) + self.eps * jnp.abs(slope * self.s0) + 1e-30))
        cost = step * step + rise * (self.q * rise - 2)
        error = jnp.minimum(noise * 2 * (jnp.abs(self.q * rise - 1) + self.q * noise), _FAR * _FAR)
        return jnp.where(bad, jnp.inf, cost), jnp.where(bad, 0, error)

    def noise(self, value: Array) -> Array:
        """A bound on the rounding error of the rise from `phi(s0)` to `value`."""
        return 2 * self.eps * (jnp.abs(self.now) + jnp.where(jnp.isfinite(value), jnp.abs(value), 0))


def generic_dual(
    phi: Callable[[Array], Array],
    s0: Float[Array, "*shape"],
    mu: Float[Array, "*shape"],
    sigma: Float[ArrayLike, "*#shape"],
    q: Float[ArrayLike, "*#shape"],
    search: bool = True,
) -> Float[Array, "*shape"]:
    r"""The dual for any elementwise function, from about 45 evaluations of it and no derivative.

    1. The slope $m$ at $s_0$ by extrapolated central differences, with the step that promises the smallest error, gives
       the linear step $\lambda = m\mu/(1 + m^2 q)$, exact in the limit of small steps.
    2. A point that beats $s_0$ lies within $|\mu|\sqrt{\sigma/\kappa}$ of it: beyond, the move alone costs more than
       the whole residual at $s_0$. Points spread geometrically up to that radius on both sides are scanned, and the
       best is refined by golden sections of the logarithm of the distance, or, where the wanted value was passed on
       the way, by bisection towards it. Where that radius is below the resolution of $s_0$ everywhere, this is skipped.
    3. The better of the two is polished by two Newton steps on the stationarity condition
       $\lambda = \phi'(s)(\mu - q d)$, with differences for derivatives.
    4. It is dropped for $s_0$ where it does not pay. Costs are compared with a bound on their rounding errors.

    Non-finite values of `phi` count as infinitely bad; where `phi(s0)` is itself not finite, $s_0$ stays.

    **Arguments:**

    - `phi`: the function, called on arrays of the shape and dtype of `s0`.
    - `s0`: the present points.
    - `mu`: the duals of the wanted values.
    - `sigma`: the weight.
    - `q`: their exact product.
    - `search`: whether to look for points beyond the linear step, which pays where `q` is not small.

    **Returns:**

    The duals $\lambda$, of the shape and dtype of `s0`.
    """
    dtype, p = _problem(phi, s0, mu, sigma, q)
    s0, mu, sigma, q = p.s0, p.mu, p.sigma, p.q
    slope, h = _slope(p)
    lam = slope * mu / (1 + slope * slope * q)
    value = p.phi(s0 + sigma * lam)
    measured, error = p.cost(lam, value, slope)
    # What the slope predicts, unless the measurement contradicts it: below the rounding error only the slope knows.
    predicted = -slope * slope / (1 + slope * slope * q)
    cost = jnp.where(jnp.isfinite(measured), jnp.clip(predicted, measured - error, measured + error), jnp.inf)
    if not search:
        return finite_cast(jnp.where(jnp.isfinite(p.now) & (cost < 0) & jnp.isfinite(lam), lam, 0), dtype)
    radius = jnp.minimum(jnp.abs(mu) * (sigma / jnp.sqrt(jnp.maximum(q, 1e-30))), _FAR)
    resolvable = jnp.any(radius > 4 * p.eps * jnp.maximum(jnp.abs(s0), 1e-6))
    point = lam, cost, value
    found = jax.lax.cond(
        resolvable, lambda: _search(p, radius, slope), lambda: (lam, jnp.full_like(s0, jnp.inf), p.now)
    )
    point = tuple(jnp.where(found[1] < cost, new, old) for new, old in zip(found, point, strict=True))
    lam, cost, _ = jax.lax.fori_loop(0, 2, lambda _, point: _polish(p, point, h), point)
    pays = jnp.isfinite(p.now) & (cost < 0) & jnp.isfinite(lam)
    return finite_cast(jnp.where(pays, lam, 0), dtype)


def difference_slope(phi: Callable[[Array], Array], s0: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    zero = jnp.zeros_like(s0)
    dtype, p = _problem(phi, s0, zero, 1.0, 1.0)
    return _slope(p)[0].astype(dtype)


def _widen(s0: Array, mu: Array, sigma: ArrayLike, q: ArrayLike) -> tuple[Any, Array, Array, Array, Array]:
    """The dtype of `s0`, and everything in at least single precision; `mu` gets the shape of `s0`."""
    dtype = jnp.result_type(s0)
    work = jnp.promote_types(dtype, jnp.float32)
    mu = jnp.broadcast_to(jnp.asarray(mu, work), jnp.shape(s0))
    return dtype, jnp.asarray(s0, work), mu, jnp.asarray(sigma, work), jnp.asarray(q, work)


def _problem(phi: Callable[[Array], Array], s0: Array, mu: Array, sigma: ArrayLike, q: ArrayLike) -> tuple:
    """The dtype of `s0`, and the problem in at least single precision."""
    dtype, s0, mu, wide_sigma, wide_q = _widen(s0, mu, sigma, q)
    tiny = float(jnp.finfo(s0.dtype).tiny)

    def snap(s: Array) -> Array:
        return s.astype(dtype).astype(s0.dtype)

    def wide_phi(s: Array) -> Array:
        return phi(s.astype(dtype)).astype(s0.dtype)

    unit = jnp.where(jnp.abs(mu) < tiny, tiny, mu)
    return dtype, _Problem(wide_phi, snap, s0, wide_phi(s0), mu, unit, wide_sigma, wide_q, float(jnp.finfo(dtype).eps))


def _difference(p: _Problem, s: Array, value: Array, h: Array) -> tuple[Array, Array, Array]:
    """First and second difference quotients at `s`, one-sided where a side is not finite, and the rounding error."""
    right, left = p.snap(s + h), p.snap(s - h)
    above, below = p.phi(right), p.phi(left)
    ok_right, ok_left = jnp.isfinite(above), jnp.isfinite(below)
    right, above = jnp.where(ok_right, right, s), jnp.where(ok_right, above, value)
    left, below = jnp.where(ok_left, left, s), jnp.where(ok_left, below, value)
    width = right - left
    safe = jnp.where(width > 0, width, jnp.inf)
    first = (above - below) / safe
    half = safe / 2
    second = jnp.where(ok_right & ok_left, ((above - value) - (value - below)) / half / half, 0)
    noise = p.eps * jnp.maximum(jnp.abs(above), jnp.abs(below)) / safe
    noise = jnp.where(width > 0, noise, jnp.inf)
    return jnp.where(jnp.isfinite(first), first, 0), jnp.where(jnp.isfinite(second), second, 0), noise


def _slope(p: _Problem) -> tuple[Array, Array]:
    """The slope at `s0`, and the step of the differences that gave it."""
    size = jnp.maximum(jnp.abs(p.s0), 1)
    top = p.eps**0.2 * size
    bottom = p.eps**0.2 * jnp.maximum(jnp.minimum(jnp.abs(p.s0), size / 256), 1e-6)
    ratio = (top / bottom) ** (1 / (_RUNGS - 1))
    least = 64 * p.eps * jnp.maximum(jnp.abs(p.s0), 1e-6)
    nothing = jnp.full_like(p.s0, jnp.inf)

    def rung(_, carry):
        h, coarse, best, best_h, best_error = carry
        fine, bend, noise = _difference(p, p.s0, p.now, h)
        change, kink = jnp.abs(fine - coarse), jnp.abs(bend) * h
        extrapolated = fine + (fine - coarse) / (ratio * ratio - 1)
        # Extrapolation is credible where the slope changes little, with the step and from one side to the other.
        credible = (change <= 0.5 * jnp.abs(fine)) & (kink <= 0.5 * jnp.abs(fine))
        extrapolated = jnp.where(credible, extrapolated, fine)
        error = noise + jnp.where(credible, change / (ratio * ratio - 1), change + kink)
        better = error < best_error
        best, best_h = jnp.where(better, extrapolated, best), jnp.where(better, h, best_h)
        return h / ratio, fine, best, best_h, jnp.where(better, error, best_error)

    carry = (top, nothing, jnp.zeros_like(p.s0), top, nothing)
    _, _, best, best_h, best_error = jax.lax.fori_loop(0, _RUNGS, rung, carry)
    # Next to a kink or a jump all of them disagree: the slope on the scale of the resolution decides.
    local, _, _ = _difference(p, p.s0, p.now, least)
    doubtful = best_error > 0.2 * jnp.abs(best)
    return jnp.where(doubtful, local, best), jnp.where(doubtful, least, best_h)


def _search(p: _Problem, radius: Array, slope: Array) -> tuple[Array, Array, Array]:
    """The best dual found on both sides of `s0` up to a radius, an upper bound on its cost, and the value there."""
    size = jnp.abs(p.s0)
    least = jnp.minimum(jnp.maximum(1e-6 * radius, 16 * p.eps * size), 0.01 * jnp.maximum(size, 1))
    least = jnp.maximum(jnp.minimum(least, radius), 1e-30)
    top, bottom = jnp.log(jnp.maximum(radius, least)), jnp.log(least)
    gap = (top - bottom) / (_SCAN_POINTS - 1)

    def probe(place: Array, sign: ArrayLike, best: tuple) -> tuple[Array, Array, tuple]:
        """Tries one point: its cost, the part of the wanted rise it makes (all if it leaves the domain), the best."""
        s = p.snap(p.s0 + sign * jnp.exp(jnp.minimum(place, top)))
        value = p.phi(s)
        lam = (s - p.s0) / p.sigma  # s is chosen, and the difference of two floats so near is exact
        cost, error = p.cost(lam, value)
        cost = cost + error
        better = cost < best[1]
        part = p.q * p.relative(value - p.now)
        part = jnp.where(jnp.isfinite(value), part, jnp.where(sign * slope * p.unit > 0, 1.0, 0.0))
        new = (lam, cost, value, place, sign)
        return cost, part, tuple(jnp.where(better, x, y) for x, y in zip(new, best, strict=True))

    def scan(k, carry):
        best, crossing, side = carry
        place = bottom + gap * k
        _, right, best = probe(place, 1.0, best)
        _, left, best = probe(place, -1.0, best)
        first = (jnp.maximum(left, right) >= 1) & jnp.isinf(crossing)
        crossing, side = jnp.where(first, place, crossing), jnp.where(first & (left > right), -1.0, side)
        return best, crossing, side

    zero = jnp.zeros_like(p.s0)
    best = (zero, zero + jnp.inf, zero + p.now, zero + top, zero + 1)
    best, crossing, side = jax.lax.fori_loop(0, _SCAN_POINTS, scan, (best, zero + jnp.inf, zero + 1))
    # Bisect towards the wanted value where it was passed and reaching it promises most; else refine the best point.
    step = p.relative(jnp.exp(jnp.minimum(crossing, top) - gap / 2))
    bisect = jnp.isfinite(crossing) & (step * step - 1 / p.q < best[1])
    low = jnp.where(bisect, crossing, best[3]) - gap
    high = jnp.where(bisect, crossing, best[3] + gap)
    return _refine(probe, low, high, jnp.where(bisect, side, best[4]), bisect, best)


def _refine(probe: Callable, low: Array, high: Array, sign: Array, bisect: Array, best: tuple) -> tuple:
    """Narrows an interval: by bisection where asked for, else by golden sections. The best dual, cost and value."""
    low_cost, _, best = probe(high - _GOLDEN * (high - low), sign, best)
    high_cost, _, best = probe(low + _GOLDEN * (high - low), sign, best)

    def section(_, carry):
        low, high, low_cost, high_cost, best = carry
        left = low_cost < high_cost
        kept = _GOLDEN * (high - low)
        new_low, new_high = jnp.where(left, low, high - kept), jnp.where(left, low + kept, high)
        point = jnp.where(left, new_high - _GOLDEN * kept, new_low + _GOLDEN * kept)
        point = jnp.where(bisect, (low + high) / 2, point)
        cost, part, best = probe(point, sign, best)
        reached = part >= 1
        low = jnp.where(bisect, jnp.where(reached, low, point), new_low)
        high = jnp.where(bisect, jnp.where(reached, point, high), new_high)
        return low, high, jnp.where(left, cost, high_cost), jnp.where(left, low_cost, cost), best

    best = jax.lax.fori_loop(0, _SECTIONS, section, (low, high, low_cost, high_cost, best))[-1]
    return best[:3]


def _polish(p: _Problem, point: tuple, h: Array) -> tuple:
    """One Newton step on the stationarity condition, where it does not raise the cost: dual, cost and value."""
    lam, cost, value = point
    delta = p.sigma * lam
    s = p.snap(p.s0 + delta)
    h = jnp.maximum(jnp.maximum(h, 0.03 * jnp.abs(delta)), 64 * p.eps * jnp.abs(s))
    slope, bend, _ = _difference(p, s, value, h)
    # The rise, as the slope gives it, unless the measured one differs by more than its rounding error.
    excess = (value - p.now) - slope * (s - p.s0)
    excess = jnp.sign(excess) * jnp.maximum(jnp.abs(excess) - p.noise(value), 0)
    pull = p.mu - p.q * (slope * lam + excess / p.sigma)
    gauss = 1 + slope * slope * p.q
    newton = gauss - bend * (p.sigma * pull)
    new = lam - (lam - slope * pull) / jnp.where(newton > 0.1 * gauss, newton, gauss)
    new_value = p.phi(p.s0 + p.sigma * new)
    new_cost, error = p.cost(new, new_value, slope)
    accepted = jnp.isfinite(new) & (new_cost <= cost + error)
    cost = jnp.where(accepted, jnp.minimum(cost, new_cost + error), cost)
    return jnp.where(accepted, new, lam), cost, jnp.where(accepted, new_value, value)
