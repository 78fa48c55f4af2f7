"""The exact projection of a scalar node whose function is affine on pieces.

Limits: isolated values at a breakpoint (that of the sign function at 0) are evaluated but never chosen as a
destination.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ._piecewise import PiecewiseAffine, at

Elements = Float[Array, "*shape"]
Weights = Float[ArrayLike, "*#shape"]


def piecewise_affine_dual(phi: PiecewiseAffine, s0: Elements, mu: Elements, sigma: Weights, q: Weights) -> Elements:
    r"""Solves the problem of `_scalar.py` exactly, for a piecewise affine $\phi$.

    On piece $j$, $\phi(s) = m s + c$, hence $d = m \lambda + g/\sigma$ with $g = m s_0 + c - \phi(s_0)$, and $E$ is
    smallest at

    $$\lambda_j = m (\mu - q g/\sigma)/(1 + m^2 q), \qquad l \le s_0 + \sigma \lambda_j \le h,$$

    clipped to the ends $l$, $h$ of the piece, since $E$ is convex there. Where $s_0$ lies in the piece, $g$ is exactly
    zero: $\lambda = m \mu/(1 + m^2 q)$ at any magnitude. The answer is the $\lambda_j$ of lowest $E$; they are compared
    after division by $\mu^2$, so that nothing underflows. At an end where $\phi$ jumps, the bound lies inside the piece
    by a few units in the last place of $s_0$ and of the end, and by at least 1e-12: rounding does not undo the jump.
    """
    dtype = jnp.result_type(s0)
    work = jnp.promote_types(dtype, jnp.float32)
    eps = float(jnp.finfo(dtype).eps)
    s0, mu, sigma, q = (jnp.asarray(x, work) for x in (s0, mu, sigma, q))
    tiny = float(jnp.finfo(work).tiny)
    unit = jnp.where(jnp.abs(mu) < tiny, tiny, mu)
    now = _evaluate(phi, s0)
    best = None if _covers(phi) else (jnp.zeros_like(now + mu), jnp.zeros_like(now + mu))
    for j, intercept in enumerate(phi.intercepts):
        if math.isfinite(intercept):
            lam, cost = _candidate(phi, j, s0, mu, sigma, q, now, unit, eps)
            if best is not None:
                better = (cost < best[1]) | ((cost == best[1]) & (jnp.abs(lam) < jnp.abs(best[0])))
                lam, cost = jnp.where(better, lam, best[0]), jnp.where(better, cost, best[1])
            best = lam, cost
    return finite_cast(best[0] if best else jnp.zeros_like(s0), dtype)


def _covers(phi: PiecewiseAffine) -> bool:
    """Whether every point lies in the closure of a finite piece that is continuous there: one of them can stay put."""
    finite = all(math.isfinite(x) for x in (*phi.intercepts, *phi.values))
    return finite and not any(all(phi.jumps(i)) for i in range(len(phi.breakpoints)))


def _evaluate(phi: PiecewiseAffine, s: Array) -> Array:
    out = jnp.zeros_like(s) + at(phi.line(0), s)
    for i, point in enumerate(phi.breakpoints):
        left, right = phi.jumps(i)
        out = jnp.where(s > point if right else s >= point, at(phi.line(i + 1), s), out)
        if left and right:
            out = jnp.where(s == point, phi.values[i], out)
    return out


def _candidate(
    phi: PiecewiseAffine, j: int, s0: Array, mu: Array, sigma: Array, q: Array, now: Array, unit: Array, eps: float
) -> tuple[Array, Array]:
    """The best dual on piece `j`, and its excess cost over $\\mu^2$."""
    slope, intercept = phi.line(j)
    large = float(jnp.finfo(jnp.result_type(s0)).max) / 4
    ends = [(i, side) for i, side in ((j - 1, 1), (j, 0)) if 0 <= i < len(phi.breakpoints)]
    # Whether s0 is in the piece, or at an end of it that belongs to it: then the piece passes through phi(s0).
    own = jnp.asarray(True)
    for i, side in ends:
        gap = s0 - phi.breakpoints[i] if side else phi.breakpoints[i] - s0
        own = own & (gap > 0 if phi.jumps(i)[side] else gap >= 0)
    offset = jnp.where(own, 0.0, at((slope, intercept), s0) - now) if ends else jnp.zeros_like(s0)
    # Saturated before any further division: the compiler turns x/a/b into x/(a b), which is 0/0 where a b underflows.
    offset = jnp.clip(offset / sigma, -large, large)
    lam = jnp.zeros_like(s0 + mu)
    if slope:
        lam = slope * (mu - jnp.clip(q * offset, -large, large)) / (1 + slope**2 * q)
    bounds = []
    for i, side in ends:
        point = phi.breakpoints[i]
        bound = point - s0
        if any(phi.jumps(i)):
            margin = jnp.maximum(8 * eps * jnp.maximum(jnp.abs(s0), abs(point)), 1e-12)
            inner = jnp.minimum(bound + margin, 0) if side else jnp.maximum(bound - margin, 0)
            bound = jnp.where(own, inner, bound + margin if side else bound - margin)
        bounds.append(bound)
        lam = jnp.maximum(lam, bound / sigma) if side else jnp.minimum(lam, bound / sigma)
    step = jnp.clip(lam / unit, -1e18, 1e18)
    rise = jnp.clip(offset / unit, -1e18, 1e18)
    rise = slope * step + rise if slope else rise
    cost = step * step + rise * (q * rise - 2)
    if len(ends) == 2 and any(any(phi.jumps(i)) for i, _ in ends):
        cost = jnp.where(bounds[0] <= bounds[1], cost, jnp.inf)  # too narrow to land in
    return lam, cost


def finite_cast(lam: Elements, dtype: Any) -> Elements:
    """Casts to a floating dtype, saturating where the value exceeds its range."""
    large = float(jnp.finfo(dtype).max)
    return jnp.clip(lam, -large, large).astype(dtype)
