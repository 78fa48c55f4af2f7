r"""Finds what is one operation though it is written as many: softmax, normalization, and the like.

Transforms equations: those between a variable and a junction become one [`Composite`][]. Limits: only elementwise
operations, views, reductions and cumulative ones are joined; products of two unknowns stay nodes, and parameters too.

A *junction* is an equation that brings together several functions of one variable $d$, its dominator. Where one of
them has passed through a reduction ($x - \bar x$, $e_i/\sum_j e_j$), all from $d$ to the junction is one function of
one array, with an exponential before the reduction. As a chain of constraints, their copies of the same array would
pull apart. A composite is one constraint, which the local solver projects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Primitive

from ._equations import Equation, Variable, live, ways
from ._fragment import evaluate
from ._primitives import ELEMENTWISE, REDUCTIONS, VIEWS

_composite_p = Primitive("composite")
_composite_p.multiple_results = True

_PREPARES = ("exp", "exp2", "sub", "add", "mul", "div", "neg")
"""Operations that belong to a composite right after them, if they read no other unknown and an exponential is there."""


@dataclass(frozen=True, eq=False)
class Composite(Equation):
    """One operation that is written as several equations, `inner`."""

    inner: tuple[Equation, ...] = field(kw_only=True)

    @property
    def name(self) -> str:
        names = {e.name for e in self.inner}
        if "exp" in names and "reduce_sum" in names:
            return "log_softmax" if "log" in names else "softmax"
        return "normalization" if names & {"rsqrt", "sqrt", "pow"} else "composite"

    def bind(self, *operands: Any) -> list[Any]:
        env = evaluate(self.inner, {v.index: x for v, x in zip(self.inputs, operands, strict=True)})
        return [env[v.index] for v in self.outputs]


def _dominators(
    equations: Sequence[Equation], unknown: frozenset[int], is_apart: Callable[[Equation], bool]
) -> dict[int, int]:
    """For each unknown result its dominator, as far as light equations reach."""
    parent: dict[int, int] = {}
    depth: dict[int, int] = {}
    for equation in equations:
        inputs = list(dict.fromkeys(v.index for v in equation.inputs if v.index in unknown))
        for index in inputs:
            depth.setdefault(index, 0)
        if equation.name not in (ELEMENTWISE | VIEWS | REDUCTIONS) or not inputs or is_apart(equation):
            continue
        common: int | None = inputs[0]
        for index in inputs[1:]:
            common = _common(common, index, parent, depth)
        if common is not None:
            for v in equation.outputs:
                parent[v.index], depth[v.index] = common, depth[common] + 1
    return parent


def _common(a: int | None, b: int | None, parent: Mapping[int, int], depth: Mapping[int, int]) -> int | None:
    """The nearest variable through which all ways to both lead; `None` where there is none."""
    while a is not None and b is not None and a != b:
        a, b = (parent.get(a), b) if depth[a] >= depth[b] else (a, parent.get(b))
    return a if a == b else None


def with_composites(
    equations: Sequence[Equation],
    unknown: frozenset[int],
    ends: Sequence[Variable],
    is_apart: Callable[[Equation], bool],
) -> tuple[Equation, ...]:
    """Equations that compute the same `ends`, with those joined that make one composite.

    `is_apart` tells which are never joined, such as operations with a rule that a user has registered.
    """
    makers = {v.index: e for e in equations for v in e.outputs}
    of_unknowns = {i: e for i, e in makers.items() if i in unknown}
    order = {e: i for i, e in enumerate(equations)}
    dominators = _dominators(equations, unknown, is_apart)
    readers = Counter(index for e in equations for index in {v.index for v in e.inputs})

    def joined(equation: Equation) -> Equation:
        out, inputs = equation.outputs[0], {v.index for v in equation.inputs if v.index in unknown}
        if len(inputs) < 2 or equation.name not in ELEMENTWISE or out.index not in dominators or not out.is_float:
            return equation
        start = _prepared(dominators[out.index], makers, readers, unknown, is_apart)
        return _joined(equation, start, of_unknowns, order) or equation

    return live([joined(e) for e in equations], ends)


def _prepared(
    start: int,
    makers: Mapping[int, Equation],
    readers: Counter[int],
    unknown: frozenset[int],
    is_apart: Callable[[Equation], bool],
) -> int:
    """The start of a composite, moved back through what prepares its reduction."""
    exponential, at = False, start
    while at in makers and makers[at].name in _PREPARES and not is_apart(makers[at]):
        inputs = [v for v in makers[at].inputs if v.index in unknown]
        if len(inputs) != 1 or not inputs[0].is_float or (readers[at] > 1 and at != start):
            break
        exponential = exponential or makers[at].name in ("exp", "exp2")
        at = inputs[0].index
    return at if exponential else start


def _joined(
    junction: Equation, start: int, makers: Mapping[int, Equation], order: Mapping[Equation, int]
) -> Composite | None:
    """The composite from a variable to a junction; `None` where no reduction lies between.

    `makers` are those of the unknowns; `order` are the places of the equations.
    """
    inner = ways(makers, order, [v.index for v in junction.outputs], {start})
    if not any(e.name in REDUCTIONS for e in inner):
        return None
    made = {v.index for e in inner for v in e.outputs}
    reads = tuple({v.index: v for e in inner for v in e.inputs if v.index not in made}.values())
    return Composite(_composite_p, {}, reads, junction.outputs, junction.source, inner=inner)
