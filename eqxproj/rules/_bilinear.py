r"""Bilinear operations: `dot_general`, `conv_general_dilated`, and `mul` of two unknowns.

Their pullback is the operation's own two transposes. Their projection depends on how many copies of its operands a
node owns, the choice `copies=`:

- `"neuron"`: every scalar product owns its two operands. The multiplier of each has a closed form
  (`_numerics/_multiplier.py`), and three products lead from the multipliers to the duals. Copies that are equal are not
  held, unless the solver stores copies.
- `"none"`: one constraint for the whole product. Where one operand is known it is a small linear system, solved
  directly; where both are unknown, by eigenvectors and corrections (`_whole.py`). Else the local solver answers.

Limits: with two unknown operands the minimum of the whole product is a local one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array

from .._numerics._multiplier import solve_multiplier
from .._program._equations import Equation
from ._base import AbstractRule, Context, Projected, Scale, step, transposed
from ._bilinear_forms import BilinearForm, ConvForm, CopyForm, DotForm, ElementForm
from ._copies import Copies
from ._local import nearest_locally
from ._whole import Basis, Factors, nearest_whole


class Bilinear(AbstractRule):
    """The projection onto the graph of a bilinear primitive."""

    label: ClassVar[str] = "bilinear"

    @property
    def has_slope(self) -> bool:
        return True

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return equation.name != "mul" or all(unknown)

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        layout = _layout(ctx.equation, ctx.copies)
        return value if layout is None else layout.expand(_position(ctx.unknown, operand), value)

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        layout = _layout(equation, copies)
        return 1.0 if layout is None else layout.counts(_position(unknown, operand))

    def gathered(self, ctx: Context, copies: Sequence[Array], outputs: Sequence[Array]) -> Array:
        """One constraint a scalar product."""
        layout = _layout(ctx.equation, ctx.copies)
        if layout is None:
            return super().gathered(ctx, copies, outputs)
        return sum((x.sum(-1) for x in copies), start=layout.from_output(outputs[0]))

    def gathered_alike(
        self, ctx: Context, operand: int, value: Array, copies: Sequence[Array], outputs: Sequence[Array]
    ) -> Array:
        layout = _layout(ctx.equation, ctx.copies)
        if layout is None:
            return super().gathered_alike(ctx, operand, value, copies, outputs)
        return layout.totals(_position(ctx.unknown, operand), value)

    def prepare(self, ctx: Context, inputs: Sequence[Array]) -> Array | Basis | None:
        if ctx.copies != "none" or not _is_plain(ctx):
            return None
        if not all(ctx.unknown):
            return _known_inverse(ctx, inputs)
        assert ctx.equation is not None
        factors = Factors(Copies(ctx.equation))
        return Basis.of(*factors.of(inputs)) if factors.is_small else None

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        form, stored, a, w = _read(ctx, inputs)
        out = form.f(a, w)
        return [out if stored is None else stored.to_output(out)]

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        equation = ctx.equation
        assert equation is not None
        if ctx.store_copies:
            return transposed(self, ctx, inputs, duals)
        operands, dual = ctx.operands(inputs), duals[0].astype(equation.outputs[0].dtype)
        params = tuple(equation.params.items())
        both = zip(ctx.unknown, reversed(operands), equation.inputs, strict=True)
        return [
            _transpose(equation.primitive, params, i, v.shape, v.dtype)(other, dual)
            for i, (is_unknown, other, v) in enumerate(both)
            if is_unknown
        ]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array] | Projected:
        if ctx.copies == "none" and ctx.equation is not None and ctx.equation.name != "mul":
            return _whole(ctx, inputs, duals)
        form, stored, a, w = _read(ctx, inputs)
        if stored is not None:
            dual, kappa, ratios = _in_rows(ctx, stored, duals[0])
        else:
            dual, kappa, ratios = duals[0], ctx.output_weights[0], ctx.ratios[0]
        if all(ctx.unknown):
            input_duals, multiplier = self.both(ctx, form, a, w, dual, kappa, ratios)
        else:
            multiplier = _of_affine(form, a, w, dual, ratios[0], first=ctx.unknown[0])
            input_duals = [_back(form, a, w, multiplier, first=ctx.unknown[0])]
        holds_all = stored is not None or _layout(ctx.equation, ctx.copies) is None
        return input_duals if holds_all else Projected(input_duals, [step(kappa, dual - multiplier)])

    def both(
        self, ctx: Context, form: BilinearForm, a: Array, w: Array, dual: Array, kappa: Scale, ratios: Sequence[Scale]
    ) -> tuple[list[Array], Array]:
        r"""The duals of two unknown operands, each the sum of its copies' duals, and the multipliers.

        With $t = \lambda/\sqrt{\alpha\omega}$ every product moves its copies, in duals, by
        $(\lambda w_0 + t^2 \alpha a_0)/(1-t^2)$ and $(\lambda a_0 + t^2 \omega w_0)/(1-t^2)$. Where $|t|$ reaches one,
        see `_parted`.
        """
        alpha, omega = ctx.weights
        unit, tilt = math.sqrt(alpha) * math.sqrt(omega), ctx.relative(0, 1) ** 0.5
        p, square_a, square_w = form.f(a, w), form.sum_a(a * a), form.sum_w(w * w)
        hp, q = scaled_products(p, square_a, square_w, dual, ratios)
        opposed = jnp.where(dual < 0, -1.0, 1.0).astype(dual.dtype) / tilt
        apart = ratios[1] * form.square_of_sum(a, w, opposed, (p, square_a, square_w))
        # Operands whose squared distance is below this part of their squares count as equal.
        tau = jnp.abs(dual) / unit
        ratio, stuck = solve_multiplier(hp, q, tau, jnp.where(apart < 1e-6 * q, 0.0, apart))
        multiplier = ratio * dual
        out = p + step(kappa, dual - multiplier).astype(p.dtype)
        part = multiplier / unit
        rest = 1.0 - part * part
        stuck = stuck | (rest <= 0)
        scaled = jnp.where(stuck, 0.0, multiplier / jnp.where(stuck, 1.0, rest))
        zero = (jnp.zeros_like(form.spread_a(dual)),) * 2 + (jnp.zeros_like(form.spread_w(dual)),) * 2
        # Only elementwise work stands inside the branch: XLA runs convolutions inside of branches far slower on a CPU.
        along_a, apart_a, along_w, apart_w = jax.lax.cond(
            jnp.any(stuck), lambda: _parted(form, a, square_a, out, dual, stuck, tilt), lambda: zero
        )
        second = scaled * part
        nu_a = form.back_a(scaled, w) + a * (form.spread_a(second * tilt) + alpha * along_a) + alpha * apart_a
        nu_w = form.back_w(a, scaled) + w * (form.spread_w(second / tilt) + omega * along_w) + omega * apart_w
        return [nu_a.astype(a.dtype), nu_w.astype(w.dtype)], multiplier


@functools.lru_cache(256)
def _transpose(
    primitive: Primitive, params: tuple[tuple[str, Any], ...], position: int, shape: tuple[int, ...], dtype: Any
) -> Callable[[Array, Array], Array]:
    """The transpose of a product to one of its operands, of this shape, traced once for all that are alike."""

    def transpose(other: Array, dual: Array) -> Array:
        def product(x):
            return primitive.bind(*((x, other) if position == 0 else (other, x)), **dict(params))

        return jax.linear_transpose(product, jax.ShapeDtypeStruct(shape, dtype))(dual)[0]

    return jax.jit(transpose)


def scaled_products(
    p: Array, square_a: Array, square_w: Array, dual: Array, ratios: Sequence[Scale]
) -> tuple[Array, Array]:
    r"""$h p$, with the sign of the dual, and $q = h Q$ of every product (`_numerics/_multiplier.py`)."""
    q = ratios[0] * square_w + ratios[1] * square_a
    roots = (jnp.sqrt(jnp.asarray(r, dual.dtype)) for r in ratios)
    return math.prod(roots, start=jnp.where(dual < 0, -p, p)), jnp.broadcast_to(q.astype(dual.dtype), dual.shape)


def _layout(equation: Equation | None, copies: str) -> Copies | None:
    """How the copies of a node are laid out; `None` where the operands are their own copies."""
    return None if equation is None or equation.name == "mul" or copies == "none" else Copies(equation)


def _position(unknown: Sequence[bool], operand: int) -> int:
    """The position among all operands of the primitive of one of its unknown operands."""
    return [i for i, is_unknown in enumerate(unknown) if is_unknown][operand]


def _read(ctx: Context, inputs: Sequence[Array]) -> tuple[BilinearForm, Copies | None, Array, Array]:
    """The bilinear map, the layout of its copies where they are stored, and its two operands."""
    equation = ctx.equation
    assert equation is not None
    a, w = ctx.operands(inputs)
    stored = _layout(equation, ctx.copies) if ctx.store_copies else None
    if stored is not None:
        a, w = (x if u else stored.expand(i, x) for i, (x, u) in enumerate(zip((a, w), ctx.unknown, strict=True)))
    return form_of(equation, a, w, is_stored=stored is not None), stored, a, w


def form_of(equation: Equation, a: Array, w: Array, *, is_stored: bool) -> BilinearForm:
    """The bilinear map of an equation, on its two operands; where they are stored, on their copies."""
    if is_stored:
        return CopyForm(a, w)

    def f(a, w):
        return equation.bind(a, w)[0]

    if equation.name == "dot_general":
        return DotForm(f, a, w, equation.params["dimension_numbers"])
    if equation.name == "mul":
        return ElementForm(f, a, w)
    grouped = equation.params["batch_group_count"] != 1
    return BilinearForm(f, a, w) if grouped else ConvForm(f, a, w, equation.params)


def _in_rows(ctx: Context, stored: Copies, dual: Array) -> tuple[Array, Scale, list[Scale]]:
    """The dual, the output's weight and the ratios as (group, row, column), like the products of stored copies."""

    def rows(x: Any) -> Any:
        return x if jnp.ndim(x) == 0 else stored.from_output(x)

    return stored.from_output(dual), rows(ctx.output_weights[0]), [rows(r) for r in ctx.ratios[0]]


def _of_affine(form: BilinearForm, a: Array, w: Array, dual: Array, ratio: Scale, first: bool) -> Array:
    r"""$\lambda = \mu/(1 + \kappa|x|^2/w)$ of every product, $x$ its known operand."""
    square = form.sum_w(w * w) if first else form.sum_a(a * a)
    return dual / (1.0 + ratio * square).astype(dual.dtype)


def _back(form: BilinearForm, a: Array, w: Array, multiplier: Array, first: bool) -> Array:
    """The dual of the one unknown operand."""
    return form.back_a(multiplier, w) if first else form.back_w(a, multiplier)


_DIRECT = 1024
"""Rows of the largest matrix that is factorized for a known operand."""


def _whole(ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array] | Projected:
    """One constraint for the whole product: by eigenvectors (`_whole.py`), by [`_known_inverse`][], or locally."""
    assert ctx.equation is not None
    layout = Copies(ctx.equation)
    factors = Factors(layout)
    if all(ctx.unknown) and _is_plain(ctx) and factors.is_small:
        return nearest_whole(ctx, factors, inputs, duals)
    inverse = ctx.prepared if ctx.prepared is not None else _known_inverse(ctx, inputs)
    if inverse is None:
        return nearest_locally(ctx, inputs, duals)
    return _affine(ctx, layout, inputs, duals[0], inverse)


def _affine(ctx: Context, layout: Copies, inputs: Sequence[Array], dual: Array, inverse: Array) -> Projected:
    r"""The dual of the unknown operand, and the output's move: $(\mu - \Lambda)/\kappa$, or $X\nu^T/w$ if shorter.

    Nothing is computed where nothing is wanted, as in sweeps that do not reach the node yet.
    """
    known, x = _known(ctx, layout, inputs)

    def turned(z: Array) -> Array:
        return jnp.swapaxes(z, -1, -2) if known == 0 else z

    mu = turned(layout.from_output(dual).astype(x.dtype))

    def answer() -> tuple[Array, Array]:
        if _is_tall(x):
            nu = (mu @ x) @ inverse
            return nu, (nu * ctx.ratios[0][0]) @ jnp.swapaxes(x, -1, -2)
        multiplier = mu @ inverse
        return multiplier @ x, mu - multiplier

    nothing = jnp.zeros((*mu.shape[:-1], x.shape[-1]), x.dtype), jnp.zeros_like(mu)
    nu, moved = jax.lax.cond(jnp.any(dual != 0), answer, lambda: nothing)
    move = step(ctx.output_weights[0], layout.to_output(turned(moved)).astype(dual.dtype))
    return Projected([layout.from_matrix(1 - known, nu).astype(inputs[0].dtype)], [move])


def _is_plain(ctx: Context) -> bool:
    """Whether a product has a direct solver: of matrices, in a dtype that LAPACK knows."""
    equation = ctx.equation
    if equation is None or equation.name != "dot_general":
        return False
    return all(v.dtype in (jnp.float32, jnp.float64) for v in (*equation.inputs, *equation.outputs))


def _known(ctx: Context, layout: Copies, inputs: Sequence[Array]) -> tuple[int, Array]:
    """Which operand is known, and that as a matrix."""
    known = ctx.unknown.index(False)
    return known, layout.matrix(known, ctx.operands(inputs)[known])


def _is_tall(matrix: Array) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _known_inverse(ctx: Context, inputs: Sequence[Array]) -> Array | None:
    r"""The inverse of $1 + \rho XX^T$ or of $1 + \rho X^TX$, with $X$ the known operand and $\rho = \kappa/w$.

    The dual of the unknown operand is $X^T (1 + \rho XX^T)^{-1} \mu = (1 + \rho X^TX)^{-1} X^T \mu$; the smaller one is
    inverted. The sum of the eigenvalues, times the precision, is added to the diagonal, so that rounding does not make
    the Cholesky factor fail. `None` where both are large, or where the output's entries weigh differently.
    """
    if all(ctx.unknown) or not _is_plain(ctx) or jnp.ndim(ctx.ratios[0][0]) != 0:
        return None
    assert ctx.equation is not None
    _, x = _known(ctx, Copies(ctx.equation), inputs)
    if min(x.shape[-2:]) > _DIRECT:
        return None
    left, right = (jnp.swapaxes(x, -1, -2), x) if _is_tall(x) else (x, jnp.swapaxes(x, -1, -2))
    gram = (left @ right) * ctx.ratios[0][0]
    total = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=x.dtype), gram.shape)
    matrix = gram + (1.0 + jnp.finfo(x.dtype).eps * total) * eye
    return jax.scipy.linalg.cho_solve((jax.scipy.linalg.cho_factor(matrix, lower=True)[0], True), eye)


def _parted(
    form: BilinearForm, a: Array, square_a: Array, out: Array, dual: Array, stuck: Array, tilt: float
) -> tuple[Array, Array, Array, Array]:
    r"""Moves of the products whose operands are equal or opposite, $a_0 = \mp r w_0$, and must part.

    With $t = \pm 1$ every point of the sphere $|a - a_0/2|^2 = rz + |a_0|^2/4$, $w = \pm(a - a_0)/r$, costs the same.
    The point along $a_0$ is taken, or along the vector of ones where $a_0 = 0$. Returns what multiplies
    $a_0$, what is added to it, and the same for $w_0$.
    """
    sign = jnp.where(dual < 0, -1.0, 1.0).astype(dual.dtype)
    radius = jnp.sqrt(jnp.maximum(sign * out / tilt + square_a / 4.0, 0.0))
    length = jnp.sqrt(jnp.broadcast_to(square_a, stuck.shape))
    along = stuck & (length > 0)
    beta = jnp.where(along, 0.5 + radius / jnp.where(length > 0, length, 1.0), 0.0)
    terms = jnp.broadcast_to(form.sum_a(jnp.ones_like(a)), stuck.shape)
    apart = jnp.where(stuck & (length == 0), radius / jnp.sqrt(terms), 0.0)
    moves_a = form.spread_a(jnp.where(along, beta - 1.0, 0.0)), form.spread_a(apart)
    return *moves_a, form.spread_w(-beta), form.spread_w(sign * apart * tilt)
