"""Which recurrences can be one constraint: those whose derivative says how they move.

Transforms nothing. Limits: an operation that jumps counts wherever it stands in a body, also where only data pass it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from jax.extend.core import ClosedJaxpr

from .._program._equations import Program
from .._program._normal_form import normal_form
from .._program._primitives import FLAT, OWN_DERIVATIVE
from .._program._recurrence import Recurrence
from ..rules._selection import POSITIONS
from ._fusion import takes_precedence

Recurrences = Literal["apart", "smooth", "whole"]
"""Which recurrences are one node: none, so that each time step has nodes of its own, the smooth ones, or all."""

_JUMPS = frozenset((*FLAT, *POSITIONS, *OWN_DERIVATIVE, "while"))
"""Operations that make a body not smooth. A loop of unknown length has no derivative backward."""


def is_smooth(recurrence: Recurrence) -> bool:
    """Whether nothing in a body jumps, has a rule of its own or a derivative of its own.

    Such a rule would be passed over by the derivative of the whole, and across a jump a derivative leads nowhere.
    """
    return _is_smooth(normal_form(recurrence.jaxpr))


def stays(recurrences: Recurrences) -> Callable[[Recurrence], bool]:
    """Which recurrences are one node, as a function of one."""
    return {"apart": lambda _: False, "smooth": is_smooth, "whole": lambda _: True}[recurrences]


def _is_smooth(program: Program) -> bool:
    if any(e.name in _JUMPS or takes_precedence(e) for e in program.equations):
        return False
    return all(_is_smooth(normal_form(inner)) for e in program.equations for inner in _inner(e.params))


def _inner(params: Mapping[str, Any]) -> Iterator[ClosedJaxpr]:
    """The programs that an operation runs, as the body of a loop or the branches of a `cond`."""
    for value in params.values():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, ClosedJaxpr):
                yield x
