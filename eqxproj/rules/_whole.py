r"""One constraint $Z = A W^T$ for a whole matrix product: its nearest point by eigenvectors that are kept.

With weights $\alpha, \omega, \kappa$ and a multiplier $\Lambda$ the minimizer of
$\alpha|A-A_0|^2 + \omega|W-W_0|^2 + \kappa|AW^T-Z_0|^2$ has $\alpha\,\delta A = \Lambda W$,
$\omega\,\delta W = \Lambda^T A$ and, with $\mu = \kappa(Z_0 - A_0W_0^T)$,

$$\Lambda = \mu - \kappa\,(\delta A\,W^T + A_0\,\delta W^T) .$$

What a multiplier lacks of this is taken through an inverse of $\Lambda + \frac{\kappa}{\omega} A A^T \Lambda +
\frac{\kappa}{\alpha} \Lambda W W^T$ and added to it. The eigenvectors of this inverse are those of the forward pass as
long as that works, and else those of the point reached. Where $\kappa$ differs from entry to entry, since some outputs
have more readers than others, the inverse takes the middle of its range; the corrections make up for it.

Limits: `dot_general` in float32 or float64; eigenvectors of matrices of up to a few hundred rows; where a step is so
large that the corrections do not end, the local solver answers, preconditioned by this inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Context, Projected, Scale, step
from ._copies import Copies
from ._local import nearest_locally

_LARGEST = 512
"""Rows of the largest matrix whose eigenvectors are looked for."""
_CORRECTIONS = 16
_FASTER, _SLOWER = 0.5, 0.9
"""Of the error: with kept eigenvectors a correction must leave less than the first, with new ones less than the second.
Where more is missing than at the start, all that follows would be in vain."""
_THIN = 1e-4
"""Eigenvalues that are smaller than this part of the largest count as zero: rounding spoils their eigenvectors."""


class Basis(NamedTuple):
    """Eigenvalues and eigenvectors of $WW^T$ and of $AA^T$, both from the smaller Gram matrix.

    Where the inner length is smaller than the number of rows, `rows` are the products of $A$ with the eigenvectors of
    $A^TA$. Where it is smaller than both, `columns` are those eigenvectors of $WW^T$ whose eigenvalues are not zero.
    """

    of_columns: Float[Array, "group some"]
    columns: Float[Array, "group columns some"]
    of_rows: Float[Array, "group few"]
    rows: Float[Array, "group rows few"]

    @classmethod
    def of(cls, a: Float[Array, "group rows inner"], w: Float[Array, "group columns inner"]) -> Basis:
        inner = a.shape[-1]
        is_tall = a.shape[-2] > inner
        d, u = _eigenvectors(_transposed(a) @ a if is_tall else a @ _transposed(a))
        rows = a @ u if is_tall else u
        if not is_tall or w.shape[-2] <= inner:
            return cls(*_eigenvectors(w @ _transposed(w)), d, rows)
        s, v = _eigenvectors(_transposed(w) @ w)
        s = jnp.where(s > _THIN * jnp.max(s, axis=-1, keepdims=True), s, 0.0)
        return cls(s, (w @ v) * jnp.where(s > 0, 1.0 / jnp.sqrt(jnp.where(s > 0, s, 1.0)), 0.0)[..., None, :], d, rows)

    def inverse(self, right: Float[Array, "group rows columns"], of_a: Array, of_w: Array) -> Array:
        r"""The inverse of the left side above.

        With $c = 1 + \kappa/\alpha\, S$, $S$ the eigenvalues of $WW^T$, column by column: where the inner length is the
        smaller one, $(c + \rho AA^T)^{-1} = c^{-1} - \rho A\,(c\,(c + \rho A^TA))^{-1} A^T$. Where some columns have no
        eigenvector, $c = 1$ for them: all are solved with that, and to the others the difference is added.
        """
        c = 1.0 + of_a * self.of_columns[..., None, :]
        both = c + of_w * self.of_rows[..., :, None]
        turned = right @ self.columns
        if self.columns.shape[-1] < self.columns.shape[-2]:
            alone = 1.0 + of_w * self.of_rows[..., :, None]
            inside = _transposed(self.rows) @ right
            more = (inside @ self.columns) * (1.0 / (c * both) - 1.0 / alone)
            of_rows = self.rows @ (inside / alone + more @ _transposed(self.columns))
            return right + (turned * (1.0 / c - 1.0)) @ _transposed(self.columns) - of_w * of_rows
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
    r"""The equations of one product.

    `of_a` and `of_w` are the largest $\kappa/\alpha$ and $\kappa/\omega$, `parts` what each entry's is of the largest,
    and `middle` is the middle of the range of `parts`. `softer` is the operand of smaller weight.
    """

    def __init__(self, ctx: Context, factors: Factors, inputs: Sequence[Array], mu: Array):
        self.a, self.w = factors.of(inputs)
        self.mu = factors.from_output(mu).astype(self.a.dtype)
        ratios, weights, logs = (factors.ordered(x) for x in (ctx.ratios[0], ctx.weights, ctx.log_weights))
        self.of_a, self.of_w = (jnp.max(jnp.asarray(r, self.a.dtype)) for r in ratios)
        self.alpha, self.omega = (jnp.asarray(x, self.a.dtype) for x in weights)
        self.softer = 0 if logs[0] <= logs[1] else 1
        self.parts, self.middle = _parts(ctx.output_weights[0], factors, self.a.dtype)

    def start(self) -> _Point:
        """Nothing has moved, and all is missing. Where nothing is wanted, there is no error."""
        zero, nothing = jnp.zeros_like(self.mu), (jnp.zeros_like(self.a), jnp.zeros_like(self.w))
        error = jnp.where(_size(self.mu) == 0, 0.0, jnp.ones_like(self.alpha))
        return _Point(zero, *nothing, zero, self.mu, error, error, jnp.asarray(0))

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
        largest = (self.of_a * nu_a) @ _transposed(w1) + self.a @ _transposed(self.of_w * nu_w)
        return largest if self.parts is None else self.parts * largest

    def corrected(self, point: _Point, basis: Basis) -> _Point:
        multiplier = point.multiplier + self.inverse(basis, point.lacks)
        nu_a, nu_w, behind = self.moves(multiplier, point.nu_a, point.nu_w)
        moved = self.output_dual(nu_a, nu_w)
        lacks = self.mu - multiplier - moved
        error = jnp.maximum(_size(lacks) / _positive(_size(self.mu)), behind)
        return _Point(multiplier, nu_a, nu_w, moved, lacks, error, point.error, point.count + 1)

    def inverse(self, basis: Basis, right: Array) -> Array:
        return basis.inverse(right, self.middle * self.of_a, self.middle * self.of_w)

    def renewed(self, point: _Point) -> Basis:
        return Basis.of(self.a + point.nu_a / self.alpha, self.w + point.nu_w / self.omega)


class Factors:
    """The operands of a product, as $A$ and $W$ of the module's formulas.

    $A$ is the first one, or the second where that makes the matrices smaller whose eigenvectors are looked for: of $W$
    they have as many rows as it has, of $A$ as few as $A^TA$ or $AA^T$ has; of both as many as the inner length, where
    that is the smallest.
    """

    def __init__(self, layout: Copies):
        self.layout = layout
        rows, columns, inner = layout.rows, layout.columns, layout.inner
        sizes = [max(min(rows, inner), columns), max(min(columns, inner), rows)]
        if inner < min(rows, columns):
            sizes = [inner, inner]
        self.is_swapped = sizes[1] < sizes[0]
        self.is_small = min(sizes) <= _LARGEST

    def ordered(self, values: Sequence[Any]) -> list[Any]:
        """One value an operand, that of $A$ first; also the other way round."""
        return list(values)[::-1] if self.is_swapped else list(values)

    def of(self, inputs: Sequence[Array]) -> list[Array]:
        return self.ordered([self.layout.matrix(i, x) for i, x in enumerate(inputs)])

    def from_output(self, value: Array) -> Array:
        z = self.layout.from_output(value)
        return _transposed(z) if self.is_swapped else z

    def to_output(self, z: Array) -> Array:
        return self.layout.to_output(_transposed(z) if self.is_swapped else z)

    def to_operands(self, matrices: Sequence[Array]) -> list[Array]:
        return [self.layout.from_matrix(i, x) for i, x in enumerate(self.ordered(matrices))]


def _parts(weight: Scale, factors: Factors, dtype: Any) -> tuple[Array | None, Array | float]:
    """The weight of each entry of an output, as a part of the largest, and the middle of their range."""
    if jnp.ndim(weight) == 0:
        return None, 1.0
    parts = factors.from_output(jnp.asarray(weight / jnp.max(weight), dtype))
    return parts, (1.0 + jnp.min(parts)) / 2.0


def nearest_whole(ctx: Context, factors: Factors, inputs: Sequence[Array], duals: Sequence[Array]) -> Projected:
    """The duals of both operands of a product, and the output's move, to the accuracy that the context wants."""
    equations = _Equations(ctx, factors, inputs, duals[0])

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
        return goes_on(point) & helps

    start = equations.start()
    basis = Basis.of(equations.a, equations.w) if ctx.prepared is None else ctx.prepared
    kept = jax.lax.while_loop(lambda p: goes_on(p) & (p.count == 0), lambda p: corrected(p, basis), start)
    point, _ = jax.lax.while_loop(is_worth_it, again, (kept, kept.error <= start.error))

    def inverse_at(operands: Sequence[Array]) -> Callable[[list[Array]], list[Array]]:
        there = Basis.of(*factors.of(operands))
        return lambda m: [factors.to_output(equations.inverse(there, factors.from_output(m[0])))]

    def locally() -> tuple[Array, Array, Array]:
        nu_a, nu_w = factors.of(nearest_locally(ctx, inputs, duals, inverse_at))
        return nu_a, nu_w, equations.output_dual(nu_a, nu_w)

    is_close = point.error <= 10.0 * ctx.accuracy
    nu_a, nu_w, moved = jax.lax.cond(is_close, lambda: (point.nu_a, point.nu_w, point.moved), locally)
    move = step(ctx.output_weights[0], factors.to_output(moved).astype(duals[0].dtype))
    return Projected(factors.to_operands((nu_a, nu_w)), [move])


def _eigenvectors(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues, none of them negative, and eigenvectors."""
    d, u = jnp.linalg.eigh(gram)
    return jnp.maximum(d, 0.0), u


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _size(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0.0)


def _positive(x: Array) -> Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
