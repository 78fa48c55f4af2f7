r"""Finds what leads to each `threshold`: it is one constraint on the weights, the inputs and the output together.

Transforms equations: a `threshold` of $c\, a.w + \sum_j c_j b_j + d$ becomes one [`Neuron`][], of whose scalar products
$a.w$ there is at most one a sum; without one, it is a step of a sum. Limits: the coefficients are numbers known while
tracing, and a product that is read elsewhere too, or a second one, is a term $b_j$ like any other value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array

from ._affine import affine_terms
from ._equations import Equation, Variable, live, ways
from ._fragment import evaluate
from ._primitives import ONE_TO_ONE
from ._threshold import threshold_p

_neuron_p = Primitive("threshold_neuron")
_neuron_p.multiple_results = True

_PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True, eq=False)
class Neuron(Equation):
    """A `threshold` with what leads to it.

    Its inputs are the two operands of the `product`, if there is one, the unknown terms `b`, and known arrays.

    - `product`, `factor`: the product, and its coefficient.
    - `views`: the views between the product and the sum, in order; each element is shown once.
    - `coefficients`: those of the terms.
    - `inner`: the equations from the product and the terms to the operand `sum` of the step.
    - `reads`: what `inner` reads, in the order of the inputs: the product's output first, if there is one.
    """

    product: Equation | None = field(kw_only=True)
    factor: float = field(kw_only=True)
    views: tuple[Equation, ...] = field(kw_only=True)
    coefficients: tuple[float, ...] = field(kw_only=True)
    inner: tuple[Equation, ...] = field(kw_only=True)
    sum: Variable = field(kw_only=True)
    reads: tuple[Variable, ...] = field(kw_only=True)

    @property
    def margin(self) -> float:
        """How far from zero the sum has to be."""
        return self.params["margin"]

    @property
    def has_rest(self) -> bool:
        """Whether the sum is more than the product times its coefficient."""
        return self.product is None or any(e.name in ("add", "add_any", "sub") for e in self.inner)

    def head(self, values: Sequence[Any]) -> Array:
        """The operand of the step, from the values of `reads`."""
        return evaluate(self.inner, {v.index: x for v, x in zip(self.reads, values, strict=True)})[self.sum.index]

    def from_products(self, value: Array) -> Array:
        """An array of the shape of the product, with each element where the sum has it."""
        for equation in self.views:
            (value,) = equation.bind(value)
        return value

    def to_products(self, value: Array) -> Array:
        """The inverse of `from_products`."""
        product = self.product
        assert product is not None
        like = jax.ShapeDtypeStruct(product.outputs[0].shape, value.dtype)
        return jax.linear_transpose(self.from_products, like)(value)[0] if self.views else value

    def values(self, operands: Sequence[Any]) -> list[Any]:
        """The values of `reads`, from those of the inputs."""
        return list(operands) if self.product is None else [*self.product.bind(*operands[:2]), *operands[2:]]

    def step(self, s: Array) -> Array:
        """The step of a sum."""
        return threshold_p.bind(s, margin=self.margin)

    def bind(self, *operands: Any) -> list[Any]:
        return [self.step(self.head(self.values(operands)))]


def with_neurons(
    equations: Sequence[Equation],
    unknown: frozenset[int],
    static: Mapping[int, float],
    ends: Sequence[Variable],
    is_apart: Callable[[Equation], bool],
    joins_products: bool,
) -> tuple[Equation, ...]:
    """Equations that compute the same `ends`, with each `threshold` of unknowns joined with what leads to it.

    `static` holds the numbers that are known while tracing. `is_apart` tells which operations are never joined, such as
    those with a rule that a user has registered. Without `joins_products` a step is joined with its sum alone.
    """
    reader = _Reader(equations, unknown, static, ends, is_apart, _PRODUCTS if joins_products else ())
    return live([reader.joined(e) for e in equations], ends)


@dataclass(frozen=True)
class _Leaf:
    """A variable in a sum: its coefficient, and the views between it and the sum."""

    variable: Variable
    coefficient: float
    views: tuple[Equation, ...] = ()


class _Reader:
    """Reads the operands of steps as sums."""

    def __init__(self, equations, unknown, static, ends, is_apart, products):
        self.unknown, self.static, self.is_apart, self.products = unknown, static, is_apart, products
        self.makers = {v.index: e for e in equations for v in e.outputs}
        self.order = {e: i for i, e in enumerate(equations)}
        self.count = Counter([v.index for e in equations for v in e.inputs] + [v.index for v in ends])

    def joined(self, equation: Equation) -> Equation:
        (operand, *_), is_step = equation.inputs or (None,), equation.primitive is threshold_p
        if not is_step or operand is None or operand.index not in self.unknown or self.is_apart(equation):
            return equation
        leaves = self._leaves(operand, 1.0)
        found = [leaf for leaf in leaves if self._product(leaf.variable) is not None]
        first = found[0] if found else None
        merged: dict[Variable, float] = {}
        for leaf in leaves:
            if leaf is not first:
                merged[leaf.variable] = merged.get(leaf.variable, 0.0) + leaf.coefficient
        product = None if first is None else self._product(first.variable)
        starts = (() if first is None else (first.variable,)) + tuple(merged)
        inner = self._between(starts, operand)
        made = {v.index for e in inner for v in e.outputs} | {v.index for v in starts}
        known = tuple({v.index: v for e in inner for v in e.inputs if v.index not in made}.values())
        operands = (*(product.inputs if product else ()), *merged, *known)
        return Neuron(
            _neuron_p,
            equation.params,
            operands,
            equation.outputs,
            equation.source,
            product=product,
            factor=1.0 if first is None else first.coefficient,
            views=() if first is None else first.views[::-1],
            coefficients=tuple(merged.values()),
            inner=inner,
            sum=operand,
            reads=(*starts, *known),
        )

    def _between(self, starts: Sequence[Variable], end: Variable) -> tuple[Equation, ...]:
        """The equations from some variables to the operand of a step; what else they read is known."""
        unknown = {i: e for i, e in self.makers.items() if i in self.unknown}
        return ways(unknown, self.order, [end.index], {v.index for v in starts})

    def _leaves(self, variable: Variable, scale: float, views: tuple[Equation, ...] = ()) -> list[_Leaf]:
        """A variable as a sum of leaves: what is no sum, or is read elsewhere too, is one itself."""
        leaf, maker = [_Leaf(variable, scale, views)], self.makers.get(variable.index)
        if maker is None or self.count[variable.index] > 1 or self.is_apart(maker):
            return leaf
        if maker.name in ONE_TO_ONE and len(maker.inputs) == len(maker.outputs) == 1:
            found = self._leaves(maker.inputs[0], scale, (*views, maker))
            # A view is read through for a product behind it alone; an edge shows any other variable through it.
            return found if any(self._product(x.variable) is not None for x in found) else leaf
        terms = affine_terms(maker, self.unknown, self.static)
        if not terms or not all(_is_plain(t) and t.variable.is_float for t in terms):
            return leaf
        found = [x for t in terms for x in self._leaves(t.variable, scale * t.scale, views)]
        return found if _is_regular(found) else leaf

    def _product(self, variable: Variable) -> Equation | None:
        """The product that a leaf is, where nothing else reads it."""
        maker = self.makers.get(variable.index)
        if maker is None or maker.name not in self.products or self.count[variable.index] > 1 or self.is_apart(maker):
            return None
        return None if maker.params.get("batch_group_count", 1) > 1 else maker


def _is_plain(term: Any) -> bool:
    """Whether the coefficient of a term is a finite number other than zero."""
    return not term.factors and not term.axes and term.scale != 0 and bool(np.isfinite(term.scale))


def _is_regular(leaves: Sequence[_Leaf]) -> bool:
    """Whether every variable of a sum has one coefficient, and none is zero, as where it is subtracted from itself."""
    total: dict[Variable, float] = {}
    for leaf in leaves:
        total[leaf.variable] = total.get(leaf.variable, 0.0) + leaf.coefficient
    views = {(leaf.variable, leaf.views) for leaf in leaves}
    return len(views) == len(total) and all(c != 0 and bool(np.isfinite(c)) for c in total.values())
