"""From a traced loss to its factor graph.

Transforms a trace into a [`Graph`][], from the objective back: views become the maps of edges, elementwise operations
are fused, and what remains is one node for each equation. What depends on no parameter, or is the result of a
`stop_gradient`, is evaluated once, on the forward pass. Limits: the graph is not two-colored yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import jax

from .._errors import Unsupported, UnsupportedPrimitiveError
from .._program._composites import with_composites
from .._program._effects import check_derivative
from .._program._equations import Variable, dependents, live
from .._program._neurons import with_neurons
from .._program._trace import Trace
from ._fusion import Fusion, is_view, takes_precedence
from ._graph import Edge, Graph, Node
from ._live import LiveProgram, live_program
from ._nodes import Draft, draft_of
from ._objective_region import Objective, pin, split_objective
from ._recurrences import Recurrences, stays
from ._views import shown

Thresholds = Literal["apart", "sums", "products"]
"""What is joined with a `threshold`."""


def check_dependence(trace: Trace) -> None:
    """Raises a `ValueError` where the value of the loss depends on no parameter."""
    program = trace.program
    found = dependents(live(program.equations, program.outputs[:1]), program.inputs[: len(trace.parameters)])
    if program.outputs[0].index not in found:
        raise ValueError(
            "`loss` does not depend on any floating-point array of `model`, so that there is nothing to train. "
            "Check that the loss uses the model that it is given, and that nothing stops the gradient on the way."
        )


def _check_effects(program: LiveProgram) -> None:
    """Raises JAX's own error for side effects of unknowns that it refuses under a gradient."""
    unknown = dependents(program.program.equations, program.parameters)
    for equation in program.program.equations:
        if equation.acts:
            shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs]
            check_derivative(equation.bind, equation.params, shapes, [v.index in unknown for v in equation.inputs])


def build(
    trace: Trace, data: str = "constant", recurrences: Recurrences = "apart", *, thresholds: Thresholds = "apart"
) -> Graph:
    """Builds the factor graph of a traced loss, which is not two-colored yet.

    `data` is `"constant"` (known), or `"pinned"` (a variable that is held in place). `recurrences` says which of them
    are one node; the steps of others are nodes. What leads to a `threshold` stays apart, as in the gradient regime, or
    is joined with it: `"sums"`, or `"products"` too. Raises an `UnsupportedPrimitiveError` naming every operation
    without a rule.
    """
    if data not in ("constant", "pinned"):
        raise ValueError(f'`data` must be "constant" or "pinned", got {data!r}.')
    check_dependence(trace)
    program = live_program(trace, data == "pinned", stays(recurrences))
    _check_effects(program)
    objective = split_objective(program)
    if data == "pinned":
        program = pin(program, objective)
    builder = _Builder(trace, program, _fused(program, objective, thresholds))
    for draft in objective.drafts(program):
        builder.add(draft)
    builder.add_producers()
    if builder.missing:
        raise UnsupportedPrimitiveError(builder.missing)
    return Graph(
        program=program.program,
        values=tuple(builder.values),
        edges=tuple(builder.edges),
        nodes=tuple(builder.nodes),
        parameters=tuple(builder.position.get(v.index) for v in program.parameters),
        largest=objective.largest,
        hard=objective.is_hard,
    )


def _fused(program: LiveProgram, objective: Objective, thresholds: Thresholds) -> Fusion:
    """The fusion of what lies before the objective."""
    ends = objective.boundary(program.unknown)
    ends += [v for e in objective.custom_equations for v in program.unknown_inputs(e)]
    ends += [v for v in program.fed if v.index in program.unknown]
    custom = set(objective.custom_equations)
    before = [e for e in program.equations if e not in custom]
    equations = with_composites(live(before, ends), program.unknown, ends, takes_precedence)
    if thresholds != "apart":
        static, products = program.program.static, thresholds == "products"
        equations = with_neurons(equations, program.unknown, static, ends, takes_precedence, products)
    views = {v.index for e in equations if is_view(e, program.unknown) for v in e.outputs}
    kept = frozenset(v.index for v in (*ends, *program.parameters, *program.pinned))
    return Fusion(program.program, equations, program.unknown, kept - views, ends)


class _Builder:
    """Numbers values, edges and nodes in the order in which they are met, from the objective back."""

    def __init__(self, trace: Trace, program: LiveProgram, fusion: Fusion):
        self.program, self.fusion = program, fusion
        self.names = {v.index: name for v, name in zip(program.parameters, trace.names, strict=True)}
        self.parameters = {v.index for v, picked in zip(program.parameters, trace.is_parameter, strict=True) if picked}
        self.values: list[Variable] = []
        self.position: dict[int, int] = {}
        self.edges: list[Edge] = []
        self.nodes: list[Node] = []
        self.missing: list[Unsupported] = []

    def add(self, draft: Draft) -> None:
        """Adds a node, with its edges, and the values that it reads and writes."""
        edges = tuple(self._edge(v) for v in draft.operands)
        outputs = tuple(self._value(v) for v in draft.outputs)
        self.missing.extend(draft.missing)
        self.nodes.append(replace(draft.node, edges=edges, outputs=outputs))

    def add_producers(self) -> None:
        """Adds the nodes that compute the values, which bring further values, until all have one."""
        done: set[int] = set()
        for variable in self.values:  # each node may add to them
            index = variable.index
            if index in self.names:
                self.add(Draft(Node("parameter", self.names[index], "", None), (), (variable,)))
            elif variable in self.program.pinned:
                self.add(Draft(Node("data", "data", "", None), (), (variable,)))
            elif index not in done:
                done |= {v.index for v in self.fusion.makers[index].outputs}
                self.add(draft_of(variable, self.fusion))

    def _value(self, variable: Variable) -> int:
        if variable.index not in self.position:
            self.position[variable.index] = len(self.values)
            self.values.append(variable)
        return self.position[variable.index]

    def _edge(self, variable: Variable) -> int:
        """A new edge of the next node, which shows a variable."""
        view, late = shown(variable, self.program, self.fusion)
        delayed = frozenset(self._value(v) for v in view.operands if v.index in late)
        sources = tuple(self._value(v) for v in view.operands)
        is_parameter = all(v.index in self.parameters for v in view.operands)
        self.edges.append(Edge(variable, view, sources, len(self.nodes), is_parameter, delayed))
        return len(self.edges) - 1
