"""Which recurrences can be one constraint: those whose derivative says how they move.

Transforms nothing. Limits: what jumps in one branch of a `cond` counts, whichever branch is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jax.extend.core import ClosedJaxpr

from .._program._equations import Equation, Program, dependents, live
from .._program._normal_form import normal_form
from .._program._primitives import OWN_DERIVATIVE
from .._program._recurrence import Recurrence
from ._fusion import takes_precedence
from ._reach import JUMPS

Recurrences = Literal["apart", "smooth", "whole"]
"""Which recurrences are one node: none, so that each time step has nodes of its own, the smooth ones, or all."""
Stays = Callable[[Recurrence, Sequence[bool]], bool]
"""From a recurrence, and which of its operands are unknown, to whether it is one node."""

_NOT_SMOOTH = JUMPS.union(OWN_DERIVATIVE, ("while",))
"""Operations that make a body not smooth. A loop of unknown length has no derivative backward."""


def is_smooth(recurrence: Recurrence, unknown: Sequence[bool]) -> bool:
    """Whether nothing that reads unknowns in a body jumps, or has a rule or a derivative of its own.

    Such a rule would be passed over by the derivative of the whole, and across a jump a derivative leads nowhere.
    """
    constants, carries, slices = recurrence.unknowns(unknown)
    return _is_smooth(normal_form(recurrence.jaxpr), [*constants, *carries, *slices])


def stays(recurrences: Recurrences) -> Stays:
    """Which recurrences are one node, as a function of one."""
    choices: dict[Recurrences, Stays] = {"apart": lambda *_: False, "smooth": is_smooth, "whole": lambda *_: True}
    return choices[recurrences]


def _is_smooth(program: Program, unknown: Sequence[bool]) -> bool:
    equations = live(program.equations, program.outputs)
    found = dependents(equations, [v for v, is_unknown in zip(program.inputs, unknown, strict=True) if is_unknown])
    moved = [e for e in equations if any(v.index in found for v in e.inputs)]
    if any(e.name in _NOT_SMOOTH or takes_precedence(e) for e in moved):
        return False
    return all(_is_smooth(*inner) for e in moved for inner in _inner(e, [v.index in found for v in e.inputs]))


def _inner(equation: Equation, unknown: Sequence[bool]) -> Iterator[tuple[Program, Sequence[bool]]]:
    """The programs that an operation runs, as the body of a loop, and which of their inputs are unknown."""
    if equation.name == "scan":
        recurrence = Recurrence.of(equation)
        unknown = [u for flags in recurrence.unknowns(unknown) for u in flags]
    programs = [p for x in equation.params.values() for p in (x if isinstance(x, tuple) else (x,))]
    for program in (normal_form(p) for p in programs if isinstance(p, ClosedJaxpr)):
        # The first operand of a `cond` says which branch is taken; elsewhere all inputs are taken to be unknown.
        own = unknown[1:] if equation.name == "cond" else unknown
        yield program, own if equation.name in ("scan", "cond") else [True] * len(program.inputs)
