r"""One constraint $Z = A W^T$ for a whole matrix product: its nearest point by two eigendecompositions.

With weights $\alpha, \omega, \kappa$ and a multiplier $\Lambda$ the minimizer of
$\alpha|A-A_0|^2 + \omega|W-W_0|^2 + \kappa|AW^T-Z_0|^2$ has $\alpha(A-A_0) = \Lambda W$,
$\omega(W-W_0) = \Lambda^T A$ and $\Lambda = \kappa(Z_0 - AW^T)$. With $\mu = \kappa(Z_0 - A_0W_0^T)$ and the moves
$\delta A, \delta W$ that is

$$\Lambda + \frac{\kappa}{\omega} A A^T \Lambda + \frac{\kappa}{\alpha} \Lambda W W^T
= \mu + \kappa\,\delta A\,\delta W^T .$$

At $A_0, W_0$ the left side is inverted exactly by the eigenvectors of $W_0W_0^T$ and of $A_0A_0^T$ or $A_0^TA_0$,
whichever is smaller. As $A, W$ move, that inverse corrects $\Lambda$ until the equation holds. Limits: `dot_general` in
float32 or float64, sizes up to a few hundred; where a step is so large that the corrections do not end, the local
solver answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Context
from ._copies import Copies
from ._local import nearest_locally

_LARGEST = 512
"""Rows of the largest matrix whose eigenvectors are looked for."""
_CORRECTIONS = 12
_CLOSE = 1e-4
"""Of the right side: what may be left of the equation."""


def is_small(layout: Copies) -> bool:
    """Whether the eigenvectors of a product of two unknowns are worth looking for."""
    inner = layout.inner
    return max(min(layout.rows, inner), layout.columns) <= _LARGEST


def nearest_whole(ctx: Context, layout: Copies, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
    """The duals of both operands of a product."""
    a, w = (layout.matrix(i, x) for i, x in enumerate(inputs))
    mu = layout.from_output(duals[0]).astype(a.dtype)
    of_a, of_w = (jnp.asarray(r, a.dtype) for r in ctx.ratios[0])
    alpha, omega = (jnp.asarray(x, a.dtype) for x in ctx.weights)
    inverse = _inverse(a, w, of_a, of_w)

    def moved(multiplier: Array, a1: Array, w1: Array) -> tuple[Array, Array]:
        return multiplier @ w1, _transposed(multiplier) @ a1

    def lacking(multiplier: Array, nu_a: Array, nu_w: Array) -> Array:
        """What is left of the equation at these moves."""
        da, dw = nu_a / alpha, nu_w / omega
        a1, w1 = a + da, w + dw
        left = multiplier + of_w * (a1 @ (_transposed(a1) @ multiplier)) + of_a * ((multiplier @ w1) @ _transposed(w1))
        # kappa da dw^T, with each factor in its own ratio: nothing overflows in a stiff metric
        return mu + (of_a * nu_a) @ _transposed(dw) - left

    def correct(carry):
        multiplier, nu_a, nu_w, rest, before, count = carry
        new = multiplier + inverse(rest)
        nu_a, nu_w = moved(new, a + nu_a / alpha, w + nu_w / omega)
        return new, nu_a, nu_w, lacking(new, nu_a, nu_w), _size(rest), count + 1

    def goes_on(carry):
        _, _, _, rest, before, count = carry
        size = _size(rest)
        return (size > _CLOSE * _size(mu)) & (count < _CORRECTIONS) & (size < 0.7 * before)

    first = inverse(mu)
    nu_a, nu_w = moved(first, a, w)
    start = (first, nu_a, nu_w, lacking(first, nu_a, nu_w), _size(mu), jnp.asarray(0))
    _, nu_a, nu_w, rest, _, _ = jax.lax.while_loop(goes_on, correct, start)
    found = [layout.from_matrix(i, x) for i, x in enumerate((nu_a, nu_w))]
    is_close = _size(rest) <= 10.0 * _CLOSE * _size(mu)
    return jax.lax.cond(is_close, lambda: found, lambda: nearest_locally(ctx, inputs, duals))


def _inverse(
    a: Float[Array, "group rows inner"], w: Float[Array, "group columns inner"], of_a: Array, of_w: Array
) -> Callable[[Float[Array, "group rows columns"]], Float[Array, "group rows columns"]]:
    r"""The inverse of the left side of the equation at two matrices.

    With $WW^T = V S V^T$ and $c = 1 + \kappa/\alpha\, S$, column by column: where the inner length is the smaller one,
    $(c + \rho AA^T)^{-1} = c^{-1} - \rho A\,(c\,(c + \rho A^TA))^{-1} A^T$.
    """
    s, v = jnp.linalg.eigh(w @ _transposed(w))
    c = 1.0 + of_a * jnp.maximum(s, 0.0)[..., None, :]
    tall = a.shape[-2] > a.shape[-1]
    d, u = jnp.linalg.eigh(_transposed(a) @ a if tall else a @ _transposed(a))
    both = c + of_w * jnp.maximum(d, 0.0)[..., :, None]
    basis = a @ u if tall else u

    def apply(right: Array) -> Array:
        turned = right @ v
        inside = _transposed(basis) @ turned
        solved = turned / c - of_w * (basis @ (inside / (c * both))) if tall else basis @ (inside / both)
        return solved @ _transposed(v)

    return apply


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _size(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0.0)
