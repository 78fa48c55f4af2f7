"""Bilinear nodes: `dot_general`, `conv_general_dilated`, and `mul` of two unknowns, by one rule.

The rule uses the primitive itself, its two transposes, and its values with one operand replaced by ones (`_forms.py`);
no copy that equals another is ever stored. How many copies a node owns is the choice `copies=`:

- `"neuron"`: every scalar product owns its two operands: the closed form of `_multiplier.py`, elementwise, and three
  products;
- `"none"`: one constraint for the whole product, by the local solver, or where it is affine and small by a direct one.

An operand that is known makes the node affine. With `ctx.memory` the operands hold one entry per copy, as algorithms
that do not return to consensus need; then the same code runs on the product of copies (`CopyForm`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._numerics._multiplier import published_multiplier, solve_multiplier
from .._program._equations import Equation
from ._base import AbstractRule, Context, is_negligible, step
from ._bilinear_forms import BilinearForm, ConvForm, CopyForm, DotForm, ElementForm
from ._copies import Copies
from ._local import LocalSolver


def _form(ctx: Context, a: Array, w: Array) -> BilinearForm:
    equation = ctx.equation
    assert equation is not None

    def f(a, w):
        return equation.bind(a, w)[0]

    if equation.name == "dot_general":
        return DotForm(f, a, w, ctx.params["dimension_numbers"])
    if equation.name == "conv_general_dilated":
        return ConvForm(f, a, w, ctx.params)
    return ElementForm(f, a, w)


class Bilinear(AbstractRule):
    """The projection onto the graph of a bilinear primitive."""

    label: ClassVar[str] = "bilinear"

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return equation.name != "mul" or all(unknown)

    def _rows(self, ctx: Context) -> Copies | None:
        """How the copies are laid out, `None` where the operands are their own copies."""
        assert ctx.equation is not None
        if ctx.equation.name == "mul" or ctx.copies == "none":
            return None
        return Copies(ctx.equation)

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        rows = self._rows(ctx)
        return value if rows is None else rows.expand(_position(ctx.unknown, operand), value)

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        if equation is None or equation.name == "mul" or copies == "none":
            return 1.0
        return Copies(equation).counts(_position(unknown, operand))

    def _operands(self, ctx: Context, inputs: Sequence[Array]) -> tuple[BilinearForm, Copies | None, Array, Array]:
        values = ctx.operands(inputs)
        rows = self._rows(ctx) if ctx.memory else None
        if rows is not None:
            values = [
                v if is_unknown else rows.expand(i, v)
                for i, (v, is_unknown) in enumerate(zip(values, ctx.unknown, strict=True))
            ]
            return CopyForm(values[0], values[1]), rows, values[0], values[1]
        return _form(ctx, values[0], values[1]), None, values[0], values[1]

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        form, rows, a, w = self._operands(ctx, inputs)
        out = form.f(a, w)
        return [out if rows is None else rows.to_output(out)]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
        if ctx.copies == "none" and ctx.equation is not None and ctx.equation.name != "mul":
            return _whole(ctx, inputs, duals)
        form, rows, a, w = self._operands(ctx, inputs)
        dual = duals[0] if rows is None else rows.from_output(duals[0])
        kappa, ratio_a, ratio_w = _scales(ctx, rows)
        if not all(ctx.unknown):
            nus, out = _affine(ctx, form, a, w, dual, ratio_a + ratio_w)
        else:
            nus, out = _neuron(ctx, form, a, w, dual, kappa, ratio_a, ratio_w)
        return nus, [out if rows is None else rows.to_output(out)]


def _position(unknown: Sequence[bool], operand: int) -> int:
    """The position among all operands of the primitive of one of its unknown operands."""
    return [i for i, is_unknown in enumerate(unknown) if is_unknown][operand]


def _scales(ctx: Context, rows: Copies | None):
    def lay(x):
        return x if rows is None or jnp.ndim(x) == 0 else rows.from_output(x)

    ratios = iter(ctx.ratios[0])
    ratio_a, ratio_w = (lay(next(ratios)) if is_unknown else 0.0 for is_unknown in ctx.unknown)
    return lay(ctx.kappa[0]), ratio_a, ratio_w


def _affine(ctx: Context, form: BilinearForm, a: Array, w: Array, dual: Array, ratio):
    r"""One operand is known: $\lambda = \mu/(1 + \kappa|x|^2/w)$, $x$ the known one, with a copy a product."""
    p = form.f(a, w)
    moves_a = ctx.unknown[0]
    square = form.sum_w(w * w) if moves_a else form.sum_a(a * a)
    multiplier = dual if is_negligible((ratio,)) else dual / (1.0 + ratio * square).astype(dual.dtype)
    back = form.back_a(multiplier, w) if moves_a else form.back_w(a, multiplier)
    return [back], p + (multiplier * step(ctx.weights[0], square)).astype(p.dtype)


def _followed(ctx: Context, form: BilinearForm, a: Array, w: Array, p: Array, multiplier: Array):
    """The dual of the one unknown operand, and the product, `p` before, where the operand has moved by that."""
    moves_a = ctx.unknown[0]
    back = form.back_a(multiplier, w) if moves_a else form.back_w(a, multiplier)
    change = step(ctx.weights[0], form.f(back, w) if moves_a else form.f(a, back))
    return [back], p + change.astype(p.dtype)


def _whole(ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
    r"""One constraint for the whole product: the local solver, or a direct one of a `dot_general` that is affine.

    With $G$ the matrix of the scalar products of the known operand's rows, $(1 + \kappa/w\, G)\lambda = \mu$ by its
    Cholesky factor. It does not fail for rounding: the sum of the eigenvalues, times the precision, is added to the
    diagonal. In a steep metric, where it is next to the identity, the local solver is faster.
    """
    a, w = ctx.operands(inputs)
    form, moves_a = _form(ctx, a, w), ctx.unknown[0]
    known = w if moves_a else a
    plain = jnp.ndim(ctx.ratios[0][0]) == 0 and known.dtype in (jnp.float32, jnp.float64)
    if all(ctx.unknown) or not plain or ctx.metric.is_steep or not isinstance(form, DotForm):
        return LocalSolver().project(ctx, inputs, duals)
    if form.rows(known, first=not moves_a) > _DIRECT:
        return LocalSolver().project(ctx, inputs, duals)
    gram = form.gram(known, first=not moves_a) * ctx.ratios[0][0]
    total = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    matrix = gram + (1.0 + jnp.finfo(known.dtype).eps * total) * jnp.eye(gram.shape[-1], dtype=known.dtype)
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)[0]
    multiplier = form.along(
        lambda mu: jax.scipy.linalg.cho_solve((factor, True), mu), duals[0].astype(known.dtype), first=not moves_a
    )
    nus, out = _followed(ctx, form, a, w, form.f(a, w), multiplier)
    return nus, [out]


_DIRECT = 1024
"""Copies of a known operand up to which their scalar products are factorized."""


def _neuron(ctx: Context, form: BilinearForm, a: Array, w: Array, dual: Array, kappa, ratio_a, ratio_w):
    """Every scalar product owns copies of both operands (`_multiplier.py`); returns the sums of the copies' duals."""
    alpha, omega = ctx.weights
    dtype = dual.dtype
    p, square_a, square_w = form.f(a, w), form.sum_a(a * a), form.sum_w(w * w)
    q = jnp.broadcast_to((ratio_a * square_w + ratio_w * square_a).astype(dtype), dual.shape)
    unit, tilt = math.sqrt(alpha) * math.sqrt(omega), ctx.relative(0, 1) ** 0.5
    both = (jnp.sqrt(jnp.asarray(r, dtype)) for r in (ratio_a, ratio_w))
    hp = math.prod(both, start=jnp.where(dual < 0, -p, p))
    if ctx.as_published:
        return _published(ctx, form, a, w, p, hp, q, dual, (unit, tilt))

    steep = unit * min(tilt, 1.0 / tilt)
    if steep >= (_STEEP_ENOUGH if ctx.metric.is_steep else _STEEP):
        multiplier = dual if is_negligible((ratio_a, ratio_w)) else dual / (1.0 + q)
        nu_a, nu_w = form.back_a(multiplier, w), form.back_w(a, multiplier)
        return [nu_a, nu_w], p + step(kappa, dual - multiplier).astype(p.dtype)
    # Only elementwise work stands inside the branches: XLA runs convolutions inside them far slower on a CPU, unless
    # the whole program is laid out (`_convolutions.py`), which only our own compiled functions are.
    sizes = jnp.sqrt(jnp.stack([jnp.max(square_a, initial=0.0), jnp.max(square_w, initial=0.0)]))
    small = jnp.max(jnp.abs(dual), initial=0.0) * jnp.max(sizes) < _SMALL * steep * jnp.min(sizes)
    opposed = jnp.where(dual < 0, -1.0, 1.0).astype(dtype) / tilt
    multiplier = jax.lax.cond(
        small,
        lambda: dual / (1.0 + q),
        lambda: _multiplier(hp, q, dual, unit, ratio_w * form.square_of_sum(a, w, opposed, (p, square_a, square_w))),
    )
    part = multiplier / unit
    rest = 1.0 - part * part
    stuck = rest <= 0
    scaled = jnp.where(stuck, 0.0, multiplier / jnp.where(stuck, 1.0, rest))
    out = p + step(kappa, dual - multiplier).astype(p.dtype)
    zero = (jnp.zeros_like(form.spread_a(dual)),) * 2 + (jnp.zeros_like(form.spread_w(dual)),) * 2
    along_a, apart_a, along_w, apart_w = jax.lax.cond(
        jnp.any(stuck), lambda: _degenerate(form, a, square_a, out, dual, stuck, tilt), lambda: zero
    )
    second = scaled * part
    nu_a = form.back_a(scaled, w) + a * (form.spread_a(second * tilt) + alpha * along_a) + alpha * apart_a
    nu_w = form.back_w(a, scaled) + w * (form.spread_w(second / tilt) + omega * along_w) + omega * apart_w
    return [nu_a.astype(a.dtype), nu_w.astype(w.dtype)], out


_STEEP, _STEEP_ENOUGH, _SMALL = 1e6, 1e3, 1e-4
"""Weights from which on, for duals of order one, and dual times weight up to which, what an operand moves by is too
little to change the other operand's dual: the first-order formula then holds to rounding, and in a steep metric, where
a step is the beginning of a gradient's and not a point to land on, well enough at the second weight."""


_EQUAL = 1e-6
"""Operands whose squared distance is less than this part of their squares count as equal."""


def _multiplier(hp: Array, q: Array, dual: Array, unit: float, apart: Array) -> Array:
    """The multiplier of every product; plus or minus `unit` where the operands must part."""
    t, no_root = solve_multiplier(hp, q, jnp.abs(dual) / unit, jnp.where(apart < _EQUAL * q, 0.0, apart))
    return jnp.where(dual < 0, -unit, unit).astype(dual.dtype) * jnp.where(no_root, 1.0, t)


def _published(ctx: Context, form: BilinearForm, a: Array, w: Array, p, hp, q, dual, scales):
    """As `_neuron`, with the multiplier as the software of arXiv 2506.05878 finds it."""
    unit, tilt = scales
    sign, tau = jnp.where(dual < 0, -1.0, 1.0).astype(dual.dtype), jnp.abs(dual) / unit
    h = jnp.sqrt(jnp.asarray(ctx.ratio(0))) * jnp.sqrt(jnp.asarray(ctx.ratio(1)))
    t = published_multiplier(hp, q, tau)
    s = 1.0 / (1.0 - t * t)
    first, second = sign * unit * t * s, unit * t * t * s
    nu_a = form.back_a(first, w) + a * form.spread_a(second * tilt)
    nu_w = form.back_w(a, first) + w * form.spread_w(second / tilt)
    return [nu_a, nu_w], ((1.0 + t * t) * p + sign * t * q / h) * s * s


def _degenerate(form: BilinearForm, a: Array, square_a: Array, out: Array, dual: Array, stuck: Array, tilt: float):
    r"""Moves of the products whose operands are equal or opposite, $a_0 = \mp r w_0$, and must part.

    With $t = \pm 1$ every point of the sphere $|a - a_0/2|^2 = rz + |a_0|^2/4$, $w = \pm(a - a_0)/r$, costs the same;
    the point along $a_0$ is taken, or along the vector of ones where $a_0 = 0$.

    **Returns:**

    What multiplies $a_0$, what is added to it, and the same for $w_0$.
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
