"""From a variable to the values that it shows: the view of an edge.

Transforms a variable into the equations of a view and its sources. Limits: the way back ends at what fusion keeps.
"""

from __future__ import annotations

from .._program._equations import Equation, Variable
from .._program._fragment import View
from ._fusion import Fusion
from ._graph import after_sources
from ._live import LiveProgram


def shown(variable: Variable, program: LiveProgram, fusion: Fusion) -> tuple[View, frozenset[int]]:
    """The view through which a variable shows values of the graph, and the ones that it shows only with a delay."""
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
    makers = {v.index: e for e in before for v in e.outputs}
    equations = after_sources(before, lambda e: [makers[v.index] for v in e.inputs if v.index in makers])
    return View(equations, tuple(sources.values()), (variable,)), frozenset(sources) - prompt
