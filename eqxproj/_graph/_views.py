"""From a variable to the values that it shows: the view of an edge.

Transforms a variable into the equations of a view and its sources. Limits: the way back ends at what fusion keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._program._equations import Equation, Variable
from .._program._fragment import View
from ._fusion import Fusion
from ._live import LiveProgram


@dataclass(frozen=True, eq=False)
class Shown:
    """What an edge shows: `sources` through `view`. `late` are the sources that are shown in a delayed way alone."""

    view: View
    sources: tuple[Variable, ...]
    late: frozenset[int]


def shown(variable: Variable, program: LiveProgram, fusion: Fusion) -> Shown:
    """The view through which a variable shows values of the graph."""
    before: list[Equation] = []
    sources: dict[int, Variable] = {}
    prompt: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    stack = [(variable, False)]
    while stack:
        v, late = stack.pop()
        if (v.index, late) in seen or v.index not in program.unknown:
            continue
        seen.add((v.index, late))
        if v.index in program.delayed:
            found = program.delayed[v.index]
            made = {w.index for e in found.equations for w in e.outputs}
            before.extend(found.equations)
            reads = [w for e in found.equations for w in e.inputs if w.index not in made]
            stack.extend((w, late or w.index == found.leaving) for w in reads)
        elif v.index in fusion.views:
            before.append(fusion.makers[v.index])
            stack.extend((w, late) for w in fusion.makers[v.index].inputs)
        else:
            sources[v.index] = v
            if not late:
                prompt.add(v.index)
    view = View(_ordered(before), tuple(sources.values()), (variable,))
    return Shown(view, view.operands, frozenset(sources) - prompt)


def _ordered(equations: Sequence[Equation]) -> tuple[Equation, ...]:
    """Equations after the ones that they read from, each once."""
    makers = {v.index: e for e in equations for v in e.outputs}
    done: dict[int, Equation] = {}
    stack = [(e, False) for e in equations]
    while stack:
        equation, ready = stack.pop()
        if ready:
            done.setdefault(id(equation), equation)
        elif id(equation) not in done:
            stack.append((equation, True))
            stack.extend((makers[v.index], False) for v in equation.inputs if v.index in makers)
    return tuple(done.values())
