r"""Functions with jumps, seen through noise: the slope of their expectation.

In the gradient regime no dual pays for a move across a jump: nothing would be learned. But the expectation
$\bar\phi(s) = \mathbb{E}\,\phi(s + t\varepsilon)$ under Gaussian noise $\varepsilon$ of unit variance is smooth, and to
a dual $\mu$ it answers $\bar\phi'(s)\,\mu$. By Stein's identity
$t\,\bar\phi'(s) = \mathbb{E}\,\varepsilon\,\phi(s + t\varepsilon)$, which has a closed form where $\phi$ is affine on
pieces. With slope $m$ before all breakpoints $b_j$, and changes $m_j$ of slope and jumps $h_j$ there, $\phi$ is a sum
of one part a breakpoint, and each is seen through noise of its own size $t_j$:

$$\bar\phi'(s) = m + \sum_j m_j\,\Phi(u_j) + \frac{h_j}{t_j}\,\varphi(u_j), \qquad u_j = \frac{s - b_j}{t_j},$$

where $\Phi$ and $\varphi$ are the normal distribution and density. The size $t_j$ is 0.4 times the root mean square of
the distances $s - b_j$ of all elements: a jump is seen from where the arguments are, in any unit of them, and the more
sharply the more of them are near.

Other functions with jumps are seen through noise of unit size, in the unit of their argument ([`expected_slope`][]).
Limits: jumps are looked for between -8 and 8, and at most eight are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from ._piecewise import PiecewiseAffine, at

_REACH, _POINTS = 4.0, 33  # of the quadrature
_RANGE, _SHIFT, _COARSE, _FINE, _SUSPECTS = 8.0, 1e-3, 4097, 513, 8  # of the search for jumps; off round numbers
_NOISE = 0.4  # size of the noise, relative to the distances from a breakpoint


def expected_slope_of_pieces(phi: PiecewiseAffine, s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The slope of the expectation of a function that is affine on pieces, in closed form."""
    total = jnp.full_like(s, phi.slopes[0])
    for i, point in enumerate(phi.breakpoints):
        size = _noise_size(s - point)
        before, after = phi.line(i), phi.line(i + 1)
        if after[0] != before[0]:
            total = total + (after[0] - before[0]) * norm.cdf((s - point) / size)
        jump = at(after, point) - at(before, point)
        if np.isfinite(jump) and jump:
            total = total + jump * norm.pdf((s - point) / size) / size
    return total


def _noise_size(distance: Array) -> Array:
    """The size of the noise that a breakpoint is seen through; one where all elements are on it."""
    finite = jnp.isfinite(distance)
    square = jnp.sum(jnp.where(finite, distance, 0.0) ** 2) / jnp.maximum(jnp.sum(finite), 1)
    return jnp.where(square > 0, _NOISE * jnp.sqrt(square), 1.0).astype(distance.dtype)


def expected_slope(phi: Callable[[Array], Array], s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The slope of the expectation of any function under noise of unit size, by quadrature of Stein's identity.

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


def within(jumps: Sequence[float], s: Float[Array, "*shape"]) -> Array:
    """Whether a jump that `jumps_of` found lies between the least and the largest finite argument, or may lie there."""
    if len(jumps) >= _SUSPECTS:
        return jnp.asarray(True)
    finite = jnp.isfinite(s)
    low, high = jnp.min(s, initial=jnp.inf, where=finite), jnp.max(s, initial=-jnp.inf, where=finite)
    places = jnp.asarray(jumps, s.dtype)
    return jnp.any((places >= low) & (places <= high))


def jumps_of(phi: Callable[[Array], Array], dtype: Any) -> tuple[float, ...]:
    """Where an elementwise function jumps between -8 and 8: where a rise does not shrink with the step.

    `phi` takes arrays of any length, of this `dtype`. It is compiled, for one length, and called twice at most. The
    places ascend, and are no more than eight.
    """
    compiled, length = jax.jit(phi), 4 * _SUSPECTS * _FINE

    def values(s: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            y = compiled(jnp.asarray(np.resize(s, length).astype(dtype)))
            return np.asarray(y, np.float64)[: s.size].reshape(s.shape)

    s = np.linspace(-_RANGE, _RANGE + _SHIFT, _COARSE)
    y = values(s)
    y = np.where(np.isfinite(y), y, 0.0)
    # A jump may be far from where the function is steep, but no smooth function has fourth differences like it.
    rough: list[int] = []
    for first in np.argsort(-np.abs(np.diff(y, 4)))[: 8 * _SUSPECTS]:  # one jump shows in four of them
        if len(rough) < _SUSPECTS and all(abs(first - other) > 4 for other in rough):
            rough.append(int(first))
    found = []
    cells = sorted({i for first in rough for i in range(first, first + 4)})
    places = np.stack([np.linspace(s[i], s[i + 1], _FINE) for i in cells])
    fine = np.abs(np.diff(values(places)))
    fine = np.where(np.isfinite(fine), fine, 0.0)
    rise = np.abs(np.diff(y))
    for row, i in enumerate(cells):
        around = np.max(rise[max(i - 1, 0) : i + 2])
        rounding = 1e3 * float(jnp.finfo(dtype).eps) * np.max(np.abs(y[i : i + 2]))
        if np.max(fine[row]) > max(0.25 * around, rounding):
            found.append(float(places[row, np.argmax(fine[row])]))
    return tuple(found)
