"""Which part of a program becomes the objective: its terms, and what lies downstream of the last parameter.

Transforms a live program into an [`Objective`][]. Terms whose loss has a prox of its own become one node each; all
others become one node together, with the equations downstream of the last use of a parameter. Limits: what has a rule
that takes precedence, is flat, or gives positions is never part of the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .._program._equations import Equation, Variable, live
from .._program._fragment import Fragment
from .._program._primitives import FLAT
from .._program._terms import Term, terms
from ..rules._local import has_derivative
from ..rules._loss import CustomObjective, GenericObjective
from ..rules._registry import RULES
from ..rules._selection import POSITIONS
from ._fusion import takes_precedence
from ._graph import Node
from ._live import LiveProgram
from ._nodes import Draft


@dataclass(frozen=True, eq=False)
class Objective:
    """The end of a loss: its terms, and the `equations` of the generic ones from the last use of a parameter on.

    `custom` terms have a prox of their own, given by an equation. `largest` is the largest coefficient of a term.
    """

    custom: tuple[tuple[Term, Equation], ...]
    generic: tuple[Term, ...]
    equations: tuple[Equation, ...]
    largest: float

    @property
    def custom_equations(self) -> tuple[Equation, ...]:
        return tuple(equation for _, equation in self.custom)

    @property
    def is_hard(self) -> bool:
        """Whether the objective is nothing but sets."""
        return not self.generic and all(e.params["call"].hard for e in self.custom_equations)

    def boundary(self, unknown: frozenset[int]) -> list[Variable]:
        """What the generic terms read from outside of their equations."""
        made = {v.index for e in self.equations for v in e.outputs}
        reads = [v for e in self.equations for v in e.inputs] + [t.variable for t in self.generic]
        return list(dict.fromkeys(v for v in reads if v.index in unknown and v.index not in made))

    def drafts(self, program: LiveProgram) -> list[Draft]:
        """The nodes of the objective: one for each custom term, and one for all generic ones."""
        found = [self._custom(term, equation, program) for term, equation in self.custom]
        return [*found, self._generic(program)] if self.generic else found

    def _custom(self, term: Term, equation: Equation, program: LiveProgram) -> Draft:
        operands = tuple(program.unknown_inputs(equation))
        rule, function = CustomObjective(term.factors), Fragment((equation,), operands, equation.outputs)
        unknown = tuple(v.index in program.unknown for v in equation.inputs)
        scale = term.coefficient / self.largest
        node = Node("objective", "objective", equation.source, rule, function, (), (), equation, unknown, scale=scale)
        return Draft(node, operands, ())

    def _generic(self, program: LiveProgram) -> Draft:
        operands = tuple(self.boundary(program.unknown))
        source = self.equations[-1].source if self.equations else "the value of the loss"
        rule = GenericObjective(tuple((t.coefficient / self.largest, t.factors) for t in self.generic))
        function = Fragment(self.equations, operands, tuple(t.variable for t in self.generic))
        return Draft(Node("objective", "objective", source, rule, function), operands, ())


def split_objective(program: LiveProgram) -> Objective:
    """Splits the objective off a live program, in which the parameters alone are unknown."""
    names = [name for name, rule in RULES.items() if isinstance(rule, CustomObjective)]
    found = terms(program.program, program.program.outputs[0], program.unknown, program.of_data, names)
    found = [t for t in found if t.variable.index in program.unknown]
    custom = tuple((t, t.custom) for t in found if t.custom is not None and _has_prox(t, t.custom, program.unknown))
    with_prox = [t for t, _ in custom]
    generic = tuple(replace(t, custom=None) for t in found if t not in with_prox)
    plain = [abs(t.coefficient) for t in found if t.coefficient != 0 and np.isfinite(t.coefficient)]
    inside = _region(program, [t.variable for t in generic], [equation for _, equation in custom])
    equations = tuple(e for e in program.equations if e.outputs[0].index in inside)
    return Objective(custom, generic, equations, max(plain, default=1.0))


def _has_prox(term: Term, equation: Equation, unknown: frozenset[int]) -> bool:
    """A prox needs a positive coefficient, and the unknowns where it expects them."""
    return term.coefficient > 0 and CustomObjective.has_prox(equation, [v.index in unknown for v in equation.inputs])


def pin(program: LiveProgram, objective: Objective) -> LiveProgram:
    """Data that reaches a node becomes a variable, held in place. Data that reaches the objective alone stays known."""
    own = {*objective.equations, *objective.custom_equations}
    outside = [e for e in program.equations if e not in own]
    outside = live(outside, [v for e in outside for v in e.outputs if v.index in program.unknown])
    read = {v.index for e in outside for v in e.inputs}
    return program.with_unknowns([v for v in program.arguments if v.is_float and v.index in read])


def _region(program: LiveProgram, ends: Sequence[Variable], custom: Sequence[Equation]) -> frozenset[int]:
    """The equations downstream of the last one that holds a parameter, each given by its first output.

    What they read from outside is real: complex numbers, predicates and positions are no values of the graph.
    """
    scope = live(program.equations, list(ends))
    makers = {v.index: e.outputs[0].index for e in scope for v in e.outputs}
    readers = _readers([*scope, *custom], program.unknown)
    staying = _staying(scope, program.unknown)
    while True:
        inside = _downstream(program, scope, ends, readers, staying)
        odd = [(e, v) for e in scope for v in program.unknown_inputs(e) if not v.is_float]
        more = {id(e) for e, v in odd if e.outputs[0].index in inside and makers.get(v.index) not in inside}
        found = [e for e in scope if e.outputs[0].index in inside]
        more |= {id(e) for e in found if not has_derivative(e, program.unknown)}  # as nodes, these are errors
        if not more:
            return inside
        staying |= more


def _readers(equations: Sequence[Equation], unknown: frozenset[int]) -> dict[int, list[Equation]]:
    """For each variable the equations that read it and have an unknown result. A stopped result is known."""
    found: dict[int, list[Equation]] = {}
    for equation in equations:
        if any(v.index in unknown for v in equation.outputs):
            for v in equation.inputs:
                found.setdefault(v.index, []).append(equation)
    return found


def _downstream(
    program: LiveProgram,
    scope: Sequence[Equation],
    ends: Sequence[Variable],
    readers: Mapping[int, Sequence[Equation]],
    staying: frozenset[int],
) -> frozenset[int]:
    """The region of a scope, without the equations that stay nodes and without what leads to these.

    A term that depends on no data, such as a penalty of the parameters, is in the region as a whole.
    """
    final, fed = {v.index for v in ends}, {v.index for v in program.fed}
    pure = final - program.of_data
    inside: set[int] = set()
    idle: set[int] = set()  # equations that only lead to stopped values
    for equation in reversed(scope):
        outputs = [v.index for v in equation.outputs if v.index in program.unknown]
        after = [r for i in outputs for r in readers.get(i, ()) if id(r) not in idle]
        if not after and not any(i in final for i in outputs):
            idle.add(id(equation))
            continue
        follows = all(r.outputs[0].index in inside for r in after) or all(i in final for i in outputs)
        is_pure = all(i in pure for i in outputs)
        is_last = any(i in fed for i in outputs) or _is_last(program, equation)
        if follows and (is_pure or not is_last) and id(equation) not in staying:
            inside.add(equation.outputs[0].index)
            if is_pure:
                pure.update(v.index for v in equation.inputs)
    return frozenset(inside)


def _is_last(program: LiveProgram, equation: Equation) -> bool:
    """Whether an equation holds a parameter, or stays a node of its own though no parameter comes after it."""
    unknown = program.unknown_inputs(equation)
    is_product = equation.name in ("dot_general", "conv_general_dilated")
    stays = len(unknown) == len(equation.inputs) if is_product else _stays(equation)
    return stays or any(v.index not in program.of_data for v in unknown)


def _stays(equation: Equation) -> bool:
    """Whether an equation is never part of the objective: a local solver is blind to it, or there is a better rule."""
    return equation.name in (*FLAT, *POSITIONS) or takes_precedence(equation)


def _staying(equations: Sequence[Equation], unknown: frozenset[int]) -> frozenset[int]:
    """The equations that stay, and what reads their positions up to the next floating-point values."""
    staying: set[int] = set()
    positions: set[int] = set()
    for equation in equations:
        if _stays(equation) or any(v.index in positions for v in equation.inputs):
            staying.add(id(equation))
            positions |= {v.index for v in equation.outputs if v.index in unknown and not v.is_float}
    return frozenset(staying)
