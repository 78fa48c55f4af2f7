r"""Functions with jumps, seen through noise: the slope of their expectation.

In a steep metric no wish is worth a move across a jump, and on the flat parts of a sign or a rounding the nearest
point answers nothing. But the expectation $\bar\phi(s) = \mathbb{E}\,\phi(s + \varepsilon)$ under Gaussian noise
$\varepsilon$ of unit variance is smooth, and to a dual $\mu$ it answers $\bar\phi'(s)\,\mu$. No derivative of $\phi$ is
needed: by Stein's identity $\bar\phi'(s) = \mathbb{E}\,\varepsilon\,\phi(s + \varepsilon)$, which has a closed form
where $\phi$ is affine on pieces: with slopes $m_j$ between breakpoints $b_j$ and jumps $h_j$ at them,

$$\bar\phi'(s) = \sum_j m_j \big(\Phi(b_j - s) - \Phi(b_{j-1} - s)\big) + \sum_j h_j\,\varphi(b_j - s),$$

where $\Phi$ and $\varphi$ are the normal distribution and density. For the sign that is twice the density, and for
rounding it is one to eight digits. The noise has the unit of the function's argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from .._interpreter import Fragment
from ._piecewise import PiecewiseAffine

_REACH, _POINTS = 4.0, 33  # of the quadrature
_RANGE, _COARSE, _FINE = 8.0, 4097, 513  # of the search for jumps


def expected_slope_of_pieces(phi: PiecewiseAffine, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The slope of the expectation of a function that is affine on pieces, in closed form."""
    edges = [-np.inf, *phi.breakpoints, np.inf]
    total = jnp.zeros_like(s)
    for slope, low, high in zip(phi.slopes, edges, edges[1:], strict=False):
        if slope:
            total = total + slope * (norm.cdf(high - s) - norm.cdf(low - s))
    for i, point in enumerate(phi.breakpoints):
        left, right = (m * point + c if m else c for m, c in ((phi.slopes[k], phi.intercepts[k]) for k in (i, i + 1)))
        if np.isfinite(right - left):
            total = total + (right - left) * norm.pdf(point - s)
    return total


def expected_slope(phi: Callable[[Array], Array], s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The slope of the expectation of any function, by quadrature of Stein's identity.

    Values that are not finite are left out.
    """
    nodes = np.linspace(-_REACH, _REACH, _POINTS)
    weights = np.exp(-(nodes**2) / 2)
    weights = weights * nodes / np.sum(weights * nodes**2)  # exact for an affine function
    now = phi(s)

    def add(total: Array, node: tuple[Array, Array]) -> tuple[Array, None]:
        rise = phi(s + node[0]) - now
        return total + node[1] * jnp.where(jnp.isfinite(rise), rise, 0), None

    return jax.lax.scan(add, jnp.zeros_like(s), (jnp.asarray(nodes, s.dtype), jnp.asarray(weights, s.dtype)))[0]


def has_jump(phi: Fragment, known: Mapping[int, Any]) -> bool:
    """Whether a function of one number jumps between -8 and 8: its steepest rise does not shrink with the step."""
    operand = phi.operands[0]
    with jax.ensure_compile_time_eval():
        if any(isinstance(known[i], jax.core.Tracer) for i in phi.known):
            return False

        def values(low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
            s = np.linspace(low, high, count)
            return s, np.asarray(phi(known, [jnp.asarray(s, operand.dtype)])[0], np.float64)

        s, y = values(-_RANGE, _RANGE, _COARSE)
        rise = np.abs(np.diff(y))
        if not np.isfinite(rise).any() or not np.nanmax(np.where(np.isfinite(rise), rise, -1.0)) > 0:
            return False
        top = int(np.nanargmax(np.where(np.isfinite(rise), rise, -1.0)))
        fine = np.abs(np.diff(values(s[top], s[top + 1], _FINE)[1]))
    return bool(np.nanmax(fine) > 0.5 * rise[top])
