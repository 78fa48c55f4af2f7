r"""The threshold neuron: $y \in \{-1, 1\}$ and $y\,s \ge m$ for a sum $s = c\, a.w + \sum_j c_j b_j + d$.

The pullback is that of a sign: the slope of its expectation under noise, times the derivative of the sum.

The projection tries both signs, and takes the nearer one: $y$ goes there, at the cost of $\kappa (y - y_0)^2$, and
where $y\,s$ is short of the margin the operands move until it is there. With two unknown operands of the product that
is the root of `_numerics/_margin.py` for $q a$ and $w/q$, where $q^4 = \alpha/\omega$ makes their weights equal; else
the sum is affine in the unknowns $x_i$, which move by $c_i \lambda/w_i$ with $\lambda = y (m - y s)/\sum_i c_i^2/w_i$.
Every scalar product owns its operands, as in `_bilinear.py`. The constraint is that of Elser and Lal, arXiv 2602.17493,
with weights and further terms added. Limits: with `copies="none"` a product is a node of its own, and the sum has one
term; a sum that nothing can move, as that of inputs that are zero, stays short of the margin.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._numerics._margin import Reached, reach_margin
from .._numerics._noise import expected_slope_of_pieces
from .._numerics._piecewise import PiecewiseAffine
from .._program._equations import Equation
from .._program._neurons import Neuron
from ._base import AbstractRule, Context, Projected, step
from ._bilinear import form_of
from ._bilinear_forms import BilinearForm
from ._copies import Copies

_NEVER = 1e30  # the cost of a side that nothing reaches
_SIGN = PiecewiseAffine((0.0,), (0.0, 0.0), (-1.0, 1.0), (1.0,))


class ThresholdNeuron(AbstractRule):
    """The two answers of a `threshold` with the sum that leads to it."""

    label: ClassVar[str] = "threshold"
    wants_concurrence: ClassVar[bool] = True

    @property
    def is_discontinuous(self) -> bool:
        return True

    @property
    def has_slope(self) -> bool:
        return False

    def describe(self, equation: Equation | None) -> str:
        return "threshold neuron" if isinstance(equation, Neuron) and equation.product is not None else self.label

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        copies, position = _copies(ctx.equation, ctx.copies), _places(ctx.unknown)[operand]
        return value if copies is None or position > 1 else copies.expand(position, value)

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        layout, position = _copies(equation, copies), _places(unknown)[operand]
        return 1.0 if layout is None or position > 1 else layout.counts(position)

    def gathered(self, ctx: Context, copies: Sequence[Array], outputs: Sequence[Array]) -> Array:
        """One constraint a sum."""
        neuron, layout = _neuron(ctx), _copies(ctx.equation, ctx.copies)
        own = outputs[0] + _in_place(ctx, copies) if neuron.coefficients else outputs[0]
        if layout is None:
            return own
        of_products = (x for x, i in zip(copies, _places(ctx.unknown), strict=True) if i < 2)
        return layout.from_output(neuron.to_products(own)) + jnp.sum(sum(of_products, start=jnp.zeros(())), -1)

    def gathered_alike(
        self, ctx: Context, operand: int, value: Array, copies: Sequence[Array], outputs: Sequence[Array]
    ) -> Array:
        layout, position = _copies(ctx.equation, ctx.copies), _places(ctx.unknown)[operand]
        if layout is None or position > 1:
            return super().gathered_alike(ctx, operand, value, copies, outputs)
        return layout.totals(position, value)

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        return [_Sums(ctx, inputs).step()]

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        s, back = jax.vjp(lambda *unknown: _Sums(ctx, unknown).total(), *inputs)
        slope = jnp.zeros_like(s) if ctx.noise == "never" else expected_slope_of_pieces(_SIGN, s)
        return list(back(slope * duals[0].astype(s.dtype)))

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> Projected:
        sums = _Sums(ctx, inputs)
        y = sums.step()
        wanted = sums.rows(y + step(ctx.output_weights[0], duals[0]))
        sides = sums.sides()
        # The costs of y, kappa (1 - wanted)^2 and kappa (1 + wanted)^2, have a plain difference.
        rises = sides.cost[0] - sides.cost[1] <= 4.0 * sums.rows(ctx.output_weights[0]) * wanted
        chosen = jtu.tree_map(lambda x: jnp.where(rises, x[0], x[1]), sides)
        sign = sums.output(jnp.where(rises, 1.0, -1.0)).astype(y.dtype)
        return Projected(sums.input_duals(chosen), [sign - y])


def _neuron(ctx: Context) -> Neuron:
    assert isinstance(ctx.equation, Neuron)
    return ctx.equation


def _copies(equation: Equation | None, copies: str) -> Copies | None:
    """The layout of the copies of a neuron's product; `None` without one."""
    product = equation.product if isinstance(equation, Neuron) else None
    return None if product is None or copies == "none" else Copies(product)


def _places(unknown: Sequence[bool]) -> list[int]:
    """The positions of the unknown operands among all of them."""
    return [i for i, is_unknown in enumerate(unknown) if is_unknown]


def _in_place(ctx: Context, copies: Sequence[Array]) -> Array:
    """The sum of arrays of the shapes of the terms, with each element where the sum of the neuron has it."""
    neuron, operands = _neuron(ctx), ctx.operands(copies)
    first, count = 0 if neuron.product is None else 2, len(neuron.coefficients)
    terms, known = operands[first : first + count], operands[first + count :]
    products = [jnp.zeros(v.shape, v.dtype) for v in neuron.reads[: len(neuron.reads) - count - len(known)]]
    plain = tuple(x / c for x, c in zip(terms, neuron.coefficients, strict=True))
    zeros = tuple(map(jnp.zeros_like, terms))
    return jax.jvp(lambda *x: neuron.head([*products, *x, *known]), zeros, plain)[1]


class _Nearest(NamedTuple):
    """The nearest points on a side of the step, with one entry a sum in each array; or on both, first where it is one.

    - `cost`: the weighted square of its distance. `multiplier`: that of the sum.
    - `turn`, `reached`: of a product of two unknowns, the sign of what it has to become, and how its operands move.
    """

    cost: Array
    multiplier: Array
    turn: Array | None = None
    reached: Reached | None = None


class _Sums:
    """The sums of a neuron, and how its unknowns move them.

    What is computed for each sum is laid out in *rows*, as the products are: (group, row, column) where the copies are
    stored.
    """

    def __init__(self, ctx: Context, inputs: Sequence[Array]):
        self.ctx, self.neuron, self.inputs = ctx, _neuron(ctx), list(inputs)
        self.operands = ctx.operands(inputs)
        self.form: BilinearForm | None = None
        self.stored: Copies | None = None
        self.first = 0
        if self.neuron.product is not None:
            self.first = 2
            self.stored = _copies(self.neuron, ctx.copies) if ctx.store_copies else None
            both = zip(self.operands[:2], ctx.unknown, strict=False)
            spread = self.stored.expand if self.stored is not None else lambda i, x: x
            self.a, self.w = (x if is_unknown else spread(i, x) for i, (x, is_unknown) in enumerate(both))
            self.form = form_of(self.neuron.product, self.a, self.w, is_stored=self.stored is not None)
        self.weights = dict(zip(_places(ctx.unknown), ctx.weights, strict=True))

    @property
    def is_bilinear(self) -> bool:
        """Whether the sums hold products of two unknowns."""
        return self.form is not None and all(self.ctx.unknown[:2])

    def total(self) -> Array:
        """The sums, in the shape of the output."""
        if self.form is None:
            return self.neuron.head(self.operands)
        z = self.form.f(self.a, self.w)
        return self.head(z if self.stored is None else self.stored.to_output(z))

    def step(self) -> Array:
        """The outputs. Of stored copies, from what the projection needs too, so that they are read once for both."""
        if self.stored is None or not self.is_bilinear:
            return self.neuron.step(self.total())
        u, v = self._squares
        return self.neuron.step(self.head(self.stored.to_output((0.25 * (u - v)).astype(self.a.dtype))))

    def head(self, z: Array) -> Array:
        """The sums, from the products."""
        return self.neuron.head([z, *self.operands[2:]])

    def rows(self, value: Any) -> Array:
        """An array of the shape of the output, or a number, in rows, in single precision at least."""
        value = jnp.asarray(value)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        if self.form is None or value.ndim == 0:
            return value
        value = self.neuron.to_products(value)
        return value if self.stored is None else self.stored.from_output(value)

    def output(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        if self.form is None:
            return rows
        return self.neuron.from_products(rows if self.stored is None else self.stored.to_output(rows))

    def sides(self) -> _Nearest:
        """The nearest points with the margin on both sides."""
        return self._bilinear() if self.is_bilinear else self._affine()

    def _signs(self, ndim: int, dtype: Any) -> Array:
        """Of the two sides, along a first axis."""
        return jnp.asarray([1.0, -1.0], dtype).reshape(2, *(1,) * ndim)

    @property
    def _looseness(self) -> Any:
        """How far the terms beside the product move a sum, by a multiplier of one."""
        own = zip(self.neuron.coefficients, range(self.first, len(self.operands)), strict=False)
        return sum((c * c / self.weights[i] for c, i in own), start=0.0)

    def _affine(self) -> _Nearest:
        s, loose = self.rows(self.total()), self._looseness
        if self.form is not None:
            of_a = self.ctx.unknown[0]
            square = self.form.sum_w(self.w * self.w) if of_a else self.form.sum_a(self.a * self.a)
            loose = loose + self.neuron.factor**2 * square.astype(s.dtype) / self.weights[0 if of_a else 1]
        loose = jnp.broadcast_to(jnp.asarray(loose, s.dtype), s.shape)
        side = self._signs(s.ndim, s.dtype)
        need, moves = jnp.maximum(self.neuron.margin - side * s, 0.0), loose > 0
        multiplier = jnp.where(moves, need / jnp.where(moves, loose, 1.0), 0.0)
        stuck = (need > 0) & ~moves
        return _Nearest(jnp.where(stuck, _NEVER, need * multiplier), side * multiplier)

    @functools.cached_property
    def _squares(self) -> tuple[Array, Array]:
        r"""$|q a + w/q|^2$ and $|q a - w/q|^2$, with $q^4 = \alpha/\omega$. Stored copies are read once, for both."""
        assert self.form is not None
        form, a, w, tilt = self.form, self.a, self.w, self._tilt
        wide = jnp.promote_types(a.dtype, jnp.float32)
        if self.stored is not None:
            a, w, zero = a.astype(wide), w.astype(wide) / tilt, jnp.zeros((), wide)
            squares = jnp.square(a + w), jnp.square(a - w)
            u, v = jax.lax.reduce(squares, (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (a.ndim - 1,))
            return tilt * u, tilt * v
        known, one = (form.f(a, w), form.sum_a(a * a), form.sum_w(w * w)), jnp.asarray(1.0 / tilt, a.dtype)
        u, v = (tilt * form.square_of_sum(a, w, c, known) for c in (one, -one))
        return u.astype(wide), v.astype(wide)

    @property
    def _tilt(self) -> Any:
        r"""$q^2$."""
        return (self.weights[0] / self.weights[1]) ** 0.5

    @property
    def _unit(self) -> Any:
        r"""$\sqrt{\alpha\omega}$."""
        return self.weights[0] ** 0.5 * self.weights[1] ** 0.5

    def _bilinear(self) -> _Nearest:
        form, neuron, (u, v) = self.form, self.neuron, self._squares
        assert form is not None
        side, factor, goal = self._signs(u.ndim, u.dtype), abs(neuron.factor), 4.0 * neuron.margin
        turn = side if neuron.factor > 0 else -side
        rho, both = None, jnp.stack((u, v) if neuron.factor > 0 else (v, u))
        if neuron.has_rest:
            rho = jnp.asarray(self._unit * self._looseness / factor**2, u.dtype)
            goal = goal - 4.0 * side * self.rows(self.head(self._no_products()))
        ones = self.a.shape[-1] if self.stored is not None else form.sum_a(jnp.ones_like(self.a))
        goal = jnp.broadcast_to(jnp.asarray(goal / factor, u.dtype), both.shape)
        reached = reach_margin(both, both[::-1], goal, rho, jnp.asarray(ones, u.dtype))
        multiplier = (1.0 - 1.0 / reached.s) * side * (self._unit / factor)
        return _Nearest(self._unit * reached.cost, multiplier, jnp.broadcast_to(turn, both.shape), reached)

    def _no_products(self) -> Array:
        """Zeros in the place of the products."""
        product = self.neuron.product
        assert product is not None
        return jnp.zeros(product.outputs[0].shape, product.outputs[0].dtype)

    def input_duals(self, nearest: _Nearest) -> list[Array]:
        """The duals of the unknown operands at a point."""
        count, duals = len(self.neuron.coefficients), {}
        if count:
            terms, known = self.operands[self.first : self.first + count], self.operands[self.first + count :]
            z = [] if self.form is None else [self._no_products()]
            back = jax.vjp(lambda *x: self.neuron.head([*z, *x, *known]), *terms)[1]
            duals.update(enumerate(back(self.output(nearest.multiplier).astype(self.neuron.sum.dtype)), self.first))
        if self.is_bilinear:
            duals.update(enumerate(self._of_products(nearest)))
        elif self.form is not None:
            scaled = (self.neuron.factor * nearest.multiplier).astype(self.a.dtype)
            of_a = self.ctx.unknown[0]
            duals[0 if of_a else 1] = self.form.back_a(scaled, self.w) if of_a else self.form.back_w(self.a, scaled)
        return [duals[i].astype(self.operands[i].dtype) for i in self.weights]

    def _of_products(self, nearest: _Nearest) -> tuple[Array, Array]:
        r"""The duals of the two operands of the product.

        With $u = q a + \sigma w/q$ and $v = q a - \sigma w/q$, $\sigma$ the `turn`, $q\,da = (du + dv)/2$ and
        $dw/q = \sigma (du - dv)/2$.
        """
        form, found, turn = self.form, nearest.reached, nearest.turn
        assert form is not None and found is not None and turn is not None
        (alpha, omega), tilt, dtype = (self.weights[0], self.weights[1]), self._tilt, self.a.dtype
        root, grown, end = tilt**0.5, found.s - 1.0, 2.0 * found.s - 1.0
        # A division stands last in each: so XLA computes it once, and not again for every copy.
        along, ones = 0.5 * end * found.along_v, 0.5 * end * found.along_ones
        even, odd = grown * grown, turn * found.s * grown
        factors = (
            (alpha * (even + along), alpha / tilt * (odd - turn * along), alpha / root * ones),
            (omega * (even - along), omega * tilt * (odd + turn * along), omega * root * turn * ones),
        )
        of_a, of_w = ([(x / end).astype(dtype) for x in of_one] for of_one in factors)
        (a_by_a, a_by_w, a_by_ones), (w_by_w, w_by_a, w_by_ones) = of_a, of_w
        nu_a = self.a * form.spread_a(a_by_a) + form.back_a(a_by_w, self.w) + form.spread_a(a_by_ones)
        nu_w = self.w * form.spread_w(w_by_w) + form.back_w(self.a, w_by_a) + form.spread_w(w_by_ones)
        return nu_a, nu_w
