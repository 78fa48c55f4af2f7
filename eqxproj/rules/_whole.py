r"""One constraint $Z = A W^T$ for a whole matrix product: its nearest point by eigenvectors that are kept.

With weights $\alpha, \omega, \kappa$ and a multiplier $\Lambda$ the minimizer of
$\alpha|A-A_0|^2 + \omega|W-W_0|^2 + \kappa|AW^T-Z_0|^2$ has $\alpha\,\delta A = \Lambda W$,
$\omega\,\delta W = \Lambda^T A$ and, with $\mu = \kappa(Z_0 - A_0W_0^T)$,

$$\Lambda = \mu - \kappa\,(\delta A\,W^T + A_0\,\delta W^T) .$$

What a multiplier lacks of this is taken through an inverse of $\Lambda + \frac{\kappa}{\omega} A A^T \Lambda +
\frac{\kappa}{\alpha} \Lambda W W^T$ and added to it. The eigenvectors of this inverse are those of the forward pass as
long as that works, and else those of the point reached. Limits: `dot_general` in float32 or float64, sizes up to a few
hundred; where a step is so large that the corrections do not end, the local solver answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Context, Projected, step
from ._copies import Copies
from ._local import nearest_locally

_LARGEST = 512
"""Rows of the largest matrix whose eigenvectors are looked for."""
_CORRECTIONS = 16
_FASTER, _SLOWER, _ASTRAY = 0.5, 0.9, 10.0
"""Of the error: with kept eigenvectors a correction must leave less than the first, with new ones less than the second.
Where more than the last is left of the first error, all that follows would be in vain."""


class Basis(NamedTuple):
    """Eigenvalues and eigenvectors of $WW^T$, and of $A^TA$ or $AA^T$, whichever is smaller."""

    of_columns: Float[Array, "group columns"]
    columns: Float[Array, "group columns columns"]
    of_rows: Float[Array, "group some"]
    rows: Float[Array, "group rows some"]

    @classmethod
    def of(cls, a: Float[Array, "group rows inner"], w: Float[Array, "group columns inner"]) -> Basis:
        s, v = jnp.linalg.eigh(w @ _transposed(w))
        is_tall = a.shape[-2] > a.shape[-1]
        d, u = jnp.linalg.eigh(_transposed(a) @ a if is_tall else a @ _transposed(a))
        return cls(jnp.maximum(s, 0.0), v, jnp.maximum(d, 0.0), a @ u if is_tall else u)

    def inverse(self, right: Float[Array, "group rows columns"], of_a: Array, of_w: Array) -> Array:
        r"""The inverse of the left side above.

        With $c = 1 + \kappa/\alpha\, S$, $S$ the eigenvalues of $WW^T$, column by column: where the inner length is the
        smaller one, $(c + \rho AA^T)^{-1} = c^{-1} - \rho A\,(c\,(c + \rho A^TA))^{-1} A^T$.
        """
        c = 1.0 + of_a * self.of_columns[..., None, :]
        both = c + of_w * self.of_rows[..., :, None]
        turned = right @ self.columns
        inside = _transposed(self.rows) @ turned
        if self.rows.shape[-1] < self.rows.shape[-2]:
            solved = turned / c - of_w * (self.rows @ (inside / (c * both)))
        else:
            solved = self.rows @ (inside / both)
        return solved @ _transposed(self.columns)


class _Point(NamedTuple):
    r"""A multiplier, the duals of both operands, $\kappa$ times the output's move, and what the multiplier lacks.

    `error` is what is left of the equations, as a part of the right side; `before` that of the point before.
    """

    multiplier: Array
    nu_a: Array
    nu_w: Array
    moved: Array
    lacks: Array
    error: Array
    before: Array
    count: Array


class _Equations:
    """The equations of one product; `softer` is the operand of smaller weight."""

    def __init__(self, ctx: Context, a: Array, w: Array, mu: Array):
        self.a, self.w, self.mu = a, w, mu
        self.of_a, self.of_w = (jnp.asarray(r, a.dtype) for r in ctx.ratios[0])
        self.alpha, self.omega = (jnp.asarray(x, a.dtype) for x in ctx.weights)
        self.softer = 0 if ctx.log_weights[0] <= ctx.log_weights[1] else 1

    def start(self) -> _Point:
        """Nothing has moved. Where nothing is wanted, there is no error."""
        zero = jnp.zeros_like(self.mu)
        infinite = jnp.asarray(jnp.inf, self.mu.dtype)
        error = jnp.where(_size(self.mu) == 0, 0.0, infinite)
        nothing = jnp.zeros_like(self.a), jnp.zeros_like(self.w)
        return _Point(zero, *nothing, zero, self.mu, error, infinite, jnp.asarray(0))

    def moves(self, multiplier: Array, nu_a: Array, nu_w: Array) -> tuple[Array, Array, Array]:
        """New duals of both operands, each from the newest of the other, and by how much the softer one was behind."""
        turned = _transposed(multiplier)

        def of_first(nu_w: Array) -> Array:
            return multiplier @ (self.w + nu_w / self.omega)

        def of_second(nu_a: Array) -> Array:
            return turned @ (self.a + nu_a / self.alpha)

        if self.softer == 0:
            early = of_first(nu_w)
            nu_w = of_second(early)
            nu_a = of_first(nu_w)
            return nu_a, nu_w, _size(nu_a - early) / _positive(_size(nu_a))
        early = of_second(nu_a)
        nu_a = of_first(early)
        nu_w = of_second(nu_a)
        return nu_a, nu_w, _size(nu_w - early) / _positive(_size(nu_w))

    def output_dual(self, nu_a: Array, nu_w: Array) -> Array:
        r"""$\kappa\,(\delta A\,W^T + A_0\,\delta W^T)$, each factor in its own ratio: no overflow in a stiff metric."""
        w1 = self.w + nu_w / self.omega
        return (self.of_a * nu_a) @ _transposed(w1) + self.a @ _transposed(self.of_w * nu_w)

    def corrected(self, point: _Point, basis: Basis) -> _Point:
        multiplier = point.multiplier + basis.inverse(point.lacks, self.of_a, self.of_w)
        nu_a, nu_w, behind = self.moves(multiplier, point.nu_a, point.nu_w)
        moved = self.output_dual(nu_a, nu_w)
        lacks = self.mu - multiplier - moved
        error = jnp.maximum(_size(lacks) / _positive(_size(self.mu)), behind)
        return _Point(multiplier, nu_a, nu_w, moved, lacks, error, point.error, point.count + 1)

    def renewed(self, point: _Point) -> Basis:
        return Basis.of(self.a + point.nu_a / self.alpha, self.w + point.nu_w / self.omega)


def is_small(layout: Copies) -> bool:
    """Whether the eigenvectors of a product of two unknowns are worth looking for."""
    inner = layout.inner
    return max(min(layout.rows, inner), layout.columns) <= _LARGEST


def nearest_whole(ctx: Context, layout: Copies, inputs: Sequence[Array], duals: Sequence[Array]) -> Projected:
    """The duals of both operands of a product, and the output's move, to the accuracy that the context wants."""
    a, w = (layout.matrix(i, x) for i, x in enumerate(inputs))
    equations = _Equations(ctx, a, w, layout.from_output(duals[0]).astype(a.dtype))

    def goes_on(point: _Point) -> Array:
        return (point.error > ctx.accuracy) & (point.count < _CORRECTIONS)

    def corrected(point: _Point, basis: Basis) -> _Point:
        def is_fast(point: _Point) -> Array:
            return goes_on(point) & (point.error <= _FASTER * point.before)

        first = equations.corrected(point, basis)
        return jax.lax.while_loop(is_fast, lambda point: equations.corrected(point, basis), first)

    def again(carry: tuple[_Point, Array]) -> tuple[_Point, Array]:
        point, _ = carry
        new = corrected(point, equations.renewed(point))
        return new, new.error <= _SLOWER * point.error

    def is_worth_it(carry: tuple[_Point, Array]) -> Array:
        point, helps = carry
        return goes_on(point) & helps & (point.error <= _ASTRAY)

    start = equations.start()
    basis = Basis.of(a, w) if ctx.prepared is None else ctx.prepared
    kept = jax.lax.while_loop(lambda p: goes_on(p) & (p.count == 0), lambda p: corrected(p, basis), start)
    point, _ = jax.lax.while_loop(is_worth_it, again, (kept, jnp.asarray(True)))

    def locally() -> tuple[Array, Array, Array]:
        found = nearest_locally(ctx, inputs, duals)
        nu_a, nu_w = (layout.matrix(i, x) for i, x in enumerate(found))
        return nu_a, nu_w, equations.output_dual(nu_a, nu_w)

    is_close = point.error <= 10.0 * ctx.accuracy
    nu_a, nu_w, moved = jax.lax.cond(is_close, lambda: (point.nu_a, point.nu_w, point.moved), locally)
    move = step(ctx.output_weights[0], layout.to_output(moved).astype(duals[0].dtype))
    return Projected([layout.from_matrix(i, x) for i, x in enumerate((nu_a, nu_w))], [move])


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _size(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0.0)


def _positive(x: Array) -> Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
