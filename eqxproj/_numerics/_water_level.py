r"""The level of water in basins, and the projection onto the graph of the maximum, $\{(x, y) : y = \max_i x_i\}$.

[`water_level`][] is what the projection onto a simplex, the hinge and the maximum have in common. Of a maximum
([`max_dual`][]), the largest entries sink together to a common level; upward, one entry rises alone. Time and memory
are linear in the size of the input: no sort. The answer comes as duals, the weights times the displacements, from an
incoming dual. Where the step is small only the ratio of output to input weight enters, so that a step of 1e-20 on
entries of size 1 is not lost to rounding.

Limits: the set is not convex. Upward, ties at the maximum have several nearest points, and the first is returned. The
incoming dual must be finite. The while-loop cannot be differentiated in reverse mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Num

_ENUMERATE_UP_TO = 4  # up to this size, `water_level` tries every active set, which fuses into one pass over the array


@jax.jit  # a loop traced anew in every call would be compiled anew
def water_level(
    depths: Float[Array, "*batch n"],
    rate: Num[ArrayLike, "*#batch"] = 0.0,
    areas: Float[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The level at which one unit of water stands in a set of basins.

    Solves $\rho L + \sum_i a_i \max(L - e_i, 0) = 1$ for $L > 0$, with $\rho, a_i, e_i \ge 0$ and finite, and at
    least one depth zero with a positive area. Without `areas`, all are one.

    The left side is convex and increases in $L$, and it is the largest of the lines
    $\rho L + \sum_{i \in S} a_i (L - e_i)$ over all sets $S$, so the root is the smallest of theirs,
    $L_S = (1 + \sum_S a_i e_i) / (\rho + \sum_S a_i)$. Newton's method from above, $S = \{i : e_i < L\}$ and then
    $L = L_S$, descends to it and is exact as soon as $S$ stops shrinking. With $f$ the excess and $k$ the slope,
    convexity gives $f_{j+1}/f_j + k_{j+1}/k_j \le 1$, so that $f k$ falls at least by a factor of 4 in each
    iteration: $O(\log(n / \epsilon))$ iterations of $O(n)$, usually 2 to 6.
    """
    n = depths.shape[-1]
    rate = jnp.broadcast_to(jnp.asarray(rate, depths.dtype), depths.shape[:-1])
    areas = jnp.ones_like(depths) if areas is None else areas
    # No level is above that of the basins of depth zero alone. Basins at or above it stay dry: taking them out here
    # leaves the rounding of the level to the basins that count.
    level = 1 / (rate + jnp.max(jnp.where(depths == 0, areas, 0), axis=-1))
    areas = jnp.where(depths < level[..., None], areas, 0)
    volumes = jnp.where(areas > 0, areas * depths, 0)

    if n <= _ENUMERATE_UP_TO:
        for size in range(1, n + 1):
            for chosen in itertools.combinations(range(n), size):
                volume = sum((volumes[..., i] for i in chosen), start=jnp.ones_like(level))
                area = sum((areas[..., i] for i in chosen), start=rate)
                level = jnp.where(area > 0, jnp.minimum(level, volume / jnp.where(area > 0, area, 1)), level)
        return level

    def lower(state):
        level, _ = state
        wet = depths < level[..., None]
        volume = 1 + jnp.sum(jnp.where(wet, volumes, 0), axis=-1)
        area = rate + jnp.sum(jnp.where(wet, areas, 0), axis=-1)
        new = jnp.minimum(level, volume / area)
        return new, jnp.any(new < level)

    return jax.lax.while_loop(lambda state: state[1], lower, (level, jnp.array(True)))[0]


def max_dual(
    x0: Float[Array, "*batch n"],
    mu: Num[ArrayLike, "*#batch"],
    weights: float | tuple[float, ...],
    ratio: Num[ArrayLike, "*#batch"] | Sequence[Num[ArrayLike, "*#batch"]],
) -> Float[Array, "*batch n"]:
    r"""The duals of the projection onto $y = \max_i x_i$.

    Minimizes $\sum_i w_i (x_i - x^0_i)^2 + \kappa (\max_i x_i - y_0)^2$, given the dual
    $\mu = \kappa (y_0 - \max_i x^0_i)$ and the ratio $\kappa / w_i$, and returns $w_i (x_i - x^0_i)$. `weights` and
    `ratio` are each one for all entries, or one for each. Entries that are not finite are padding, and stay.

    Where the maximum is unique and the dual small, the answer is $\mu / (1 + \kappa / w)$ at the largest entry and zero
    elsewhere.
    """
    work = jnp.promote_types(x0.dtype, jnp.float32)
    n = x0.shape[-1]
    x = x0.astype(work)
    finite = jnp.isfinite(x)
    top = jnp.max(jnp.where(finite, x, -jnp.inf), axis=-1, keepdims=True)
    gaps = jnp.where(finite, top - x, jnp.inf)  # the top itself is at zero
    mu = jnp.broadcast_to(jnp.asarray(mu, work), x.shape[:-1])[..., None]
    size = jnp.where(mu == 0, 1, jnp.abs(mu))
    if isinstance(weights, tuple):
        ratios = _stack(weights, ratio, x.shape, work)
        up = _raise_cheapest(_relative(gaps, size, jnp.asarray(weights, work)), ratios)
        down = _sink(_relative(gaps, size, max(weights)), ratios)
    else:
        if isinstance(ratio, Sequence):
            raise ValueError(f"`ratio` must be one number or array where `weights` is, got {len(ratio)} of them.")
        ratios = jnp.broadcast_to(_clip(ratio, work), x.shape[:-1])[..., None]
        # With equal weights the first of the largest entries is the cheapest to raise.
        first = jnp.argmin(gaps, axis=-1, keepdims=True) == jnp.arange(n)
        up = jnp.where(first, 1 / (1 + ratios), 0)
        down = _sink(_relative(gaps, size, weights), ratios)
    dual = jnp.where(mu > 0, up, -down) * jnp.abs(mu)
    return jnp.where(finite & (mu != 0), dual, 0).astype(x0.dtype)


def first_order_max_dual(
    x0: Float[Array, "*batch n"], mu: Num[ArrayLike, "*#batch"], weights: float | tuple[float, ...]
) -> Float[Array, "*batch n"]:
    r"""[`max_dual`][] in the gradient regime: $\kappa / w \to 0$, and no gap but zero is as small as a step.

    Upward the first of the largest entries gets all of $\mu$; downward they share it, in proportion to their weights.
    """
    work = jnp.promote_types(x0.dtype, jnp.float32)
    finite = jnp.isfinite(x0)
    tied = finite & (x0 == jnp.max(jnp.where(finite, x0, -jnp.inf), axis=-1, keepdims=True))
    mu = jnp.broadcast_to(jnp.asarray(mu, work), x0.shape[:-1])[..., None]
    areas = jnp.asarray(weights, work) / max(weights) if isinstance(weights, tuple) else jnp.ones((), work)
    shares = jnp.where(tied, areas, 0)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    first = jnp.argmax(tied, axis=-1, keepdims=True) == jnp.arange(x0.shape[-1])
    dual = jnp.where(mu > 0, first & finite, shares / jnp.where(total > 0, total, 1)) * mu
    return dual.astype(x0.dtype)


def _clip(ratio: ArrayLike, dtype: jnp.dtype) -> Array:
    """The ratio of weights within a range whose ends act as infinitely soft and infinitely stiff."""
    return jnp.clip(jnp.asarray(ratio, dtype), 1e-30, 1e30)


def _stack(
    weights: tuple[float, ...], ratio: ArrayLike | Sequence[ArrayLike], shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "*batch n"]:
    """One ratio per entry, along the last axis."""
    if not isinstance(ratio, Sequence) or not len(weights) == len(ratio) == shape[-1]:
        got = f"{len(ratio)} ratios" if isinstance(ratio, Sequence) else f"{type(ratio).__name__} for `ratio`"
        raise ValueError(
            f"`weights` and `ratio` must both have one entry for each of the {shape[-1]} entries of `x0`, "
            f"got {len(weights)} weights and {got}."
        )
    return jnp.stack([jnp.broadcast_to(_clip(r, dtype), shape[:-1]) for r in ratio], axis=-1)


def _relative(
    gaps: Float[Array, "*batch n"], size: Float[Array, "*batch 1"], weights: float | Float[Array, " n"]
) -> Float[Array, "*batch n"]:
    r"""$w g / |\mu|$. The quotient $w/|\mu|$ may overflow, and XLA may form it: a gap of zero must not become NaN."""
    return gaps / jnp.clip(size / weights, 1e-37, 1e37)


def _raise_cheapest(e: Float[Array, "*batch n"], ratios: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    r"""Upward: the duals in units of $\mu$.

    To have entry $i$ alone rise to $\max x^0 + d$ costs $w_i (g_i + d)^2 + \kappa (d - \mu / \kappa)^2$, with its gap
    $g_i$. With $e_i = w_i g_i / \mu$ and $\rho_i = \kappa / w_i$, the best $d$ is positive where $e_i < 1$; then the
    cost is $\frac{\mu^2}{\kappa} \frac{(1 + \rho_i e_i)^2}{1 + \rho_i}$ and the dual
    $\mu \frac{1 + \rho_i e_i}{1 + \rho_i}$. An entry with $e_i \ge 1$ does not pay: it would not pass the maximum.
    """
    e = jnp.minimum(e, 1)
    price = jnp.where(e < 1, (1 + ratios * e) / jnp.sqrt(1 + ratios), jnp.inf)
    chosen = jnp.argmin(price, axis=-1, keepdims=True) == jnp.arange(e.shape[-1])
    return jnp.where(chosen, (1 + ratios * e) / (1 + ratios), 0)


def _sink(e: Float[Array, "*batch n"], ratios: Float[Array, "*batch _"]) -> Float[Array, "*batch n"]:
    r"""Downward: the duals in units of $\mu$ (both are negative, so these are not).

    At $d$ below the maximum, $\sum_i w_i \max(d - g_i, 0) + \kappa d = |\mu|$. Divided by $|\mu|$, in terms of
    $L = w d / |\mu|$ and $e_i = w g_i / |\mu|$ for the largest weight $w$, with $a_i = w_i / w$ and
    $\rho = \kappa / w$: $\sum_i a_i \max(L - e_i, 0) + \rho L = 1$, and the duals are $a_i \max(L - e_i, 0)$.
    """
    rate = jnp.min(ratios, axis=-1, keepdims=True)
    areas = None if ratios.shape[-1] == 1 else rate / ratios
    stiffest = jnp.ones_like(rate) if areas is None else jnp.max(jnp.where(e == 0, areas, 0), axis=-1, keepdims=True)
    e = jnp.minimum(e, 1 / (rate + stiffest))  # all basins that stay dry are alike
    level = water_level(e, rate[..., 0], areas)[..., None]
    wet = jnp.maximum(level - e, 0)
    return wet if areas is None else areas * wet
