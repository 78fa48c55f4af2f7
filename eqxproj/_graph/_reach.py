"""Where a gradient reaches, and where operations with jumps answer under noise instead.

Transforms a graph into a [`Reach`][]. A value is *reached* when a way of derivatives leads from it to the objective. An
edge *carries* a gradient where its consumer has a derivative by that operand in an output that is reached. What is
reached takes the duals of such edges alone, so that its dual is the gradient; what is not takes all that come. What a
user's rule answers counts as a gradient, as the answer of `jax.custom_vjp` does. A penalty, an operand of the objective
that reads no data, sends its gradient, but does not reach: weights with a decay still hear what jumps behind them say.
Limits: this is structure, seen once and for all: a derivative that happens to be zero reaches too. Of a user's rule
that is part of a recurrence or branch with jumps in it, JAX's derivative says whether it carries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Jaxpr

from .._program._effects import inner_programs
from .._program._equations import Variable, dependents
from .._program._primitives import FLAT, OWN_DERIVATIVE
from .._program._slopes import slopes_of
from ..rules._base import Noise
from ..rules._registry import is_registered
from ..rules._scalar import MAY_JUMP
from ..rules._selection import POSITIONS
from ._graph import Graph, Node

JUMPS = frozenset((*FLAT, *POSITIONS, *MAY_JUMP))
"""Operations that jump, or may."""


@dataclass(frozen=True)
class Reach:
    """What gradients and answers under noise do on a graph.

    - `carries`: for each edge, whether it carries a gradient. `reached`: for each value, whether a gradient reaches it.
    - `noisy`: for each value, whether it takes answers under noise.
    - `edges`: for each edge, whether its consumer answers it under noise.
    """

    carries: tuple[bool, ...]
    reached: tuple[bool, ...]
    noisy: tuple[bool, ...]
    edges: tuple[bool, ...]

    def counts(self, edge: int, value: int) -> bool:
        """Whether a value takes the dual of an edge that shows it."""
        return self.carries[edge] or self.noisy[value]


def reach_of(graph: Graph, noise: Noise, data: Sequence[Variable], stopped: Collection[int] = ()) -> Reach:
    """The reach of a graph's gradients, where `data` are the inputs of the program that are no parameters.

    Terms of the objective whose targets are `stopped` variables send none.
    """
    edges, values = len(graph.edges), len(graph.values)
    if noise == "everywhere":
        return Reach((False,) * edges, (False,) * values, (True,) * values, (True,) * edges)
    if noise == "never" or not any(map(jumps, graph.nodes)):
        return Reach((True,) * edges, (True,) * values, (False,) * values, (False,) * edges)
    shapes = _shapes(graph)
    slopes = [_slopes(node, shapes) for node in graph.nodes]
    carries, reached = _gradients(graph, slopes, frozenset(stopped), frozenset())
    penalties = _penalties(graph, data)
    by_data = _gradients(graph, slopes, frozenset(stopped), penalties)[1] if penalties else reached
    noisy = _noisy(graph, by_data)
    heard = [not c and any(noisy[v] for v in e.sources) for c, e in zip(carries, graph.edges, strict=True)]
    return Reach(tuple(carries), tuple(reached), tuple(noisy), tuple(heard))


def jumps(node: Node) -> bool:
    """Whether a node may answer under noise: it jumps, or something in it does. A user's answer is no such answer."""
    if node.rule is None or node.kind == "objective" or _is_asked(node):
        return False
    programs = () if node.equation is None else inner_programs(node.equation.params)
    return node.rule.is_discontinuous or any(name in JUMPS for program in programs for name in _names(program))


def _is_asked(node: Node) -> bool:
    """Whether a node answers as an author says, by a rule or a derivative of the operation's own."""
    name = "" if node.equation is None else node.equation.name
    return _is_users(name) or name in OWN_DERIVATIVE


def _is_users(name: str) -> bool:
    return name == "custom_projection" or is_registered(name)


def _names(program: Jaxpr) -> Iterator[str]:
    """The operations of a program, and of those in it."""
    for equation in program.eqns:
        yield equation.primitive.name
        for inner in inner_programs(equation.params):
            yield from _names(inner)


def _penalties(graph: Graph, data: Sequence[Variable]) -> frozenset[int]:
    """The edges of the objective that show no data, where others do; those that the loss closes over are data too."""
    edges = [e for node in graph.nodes if node.kind == "objective" for e in node.edges]
    constants = (v for e in graph.program.equations for v in e.inputs if v.index in graph.program.constants)
    for seeds in (data, [v for v in constants if v.shape]):
        found = dependents(graph.program.equations, seeds)
        if shown := {e for e in edges if graph.edges[e].variable.index in found}:
            return frozenset(edges) - shown
    return frozenset()


def _gradients(
    graph: Graph, slopes: Sequence[Sequence[int]], stopped: frozenset[int], silent: frozenset[int]
) -> tuple[list[bool], list[bool]]:
    """Which edges carry a gradient, and which values it reaches: the least that agree with each other.

    `slopes` are those of all nodes; no gradient comes through `silent` edges.
    """
    carries, reached = [False] * len(graph.edges), [False] * len(graph.values)
    is_new = True
    while is_new:  # once from the objective back, and once more for each way back through time
        is_new = False
        for number in reversed(graph.forward_order):
            node = graph.nodes[number]
            ends = _sends(node, stopped) if node.kind == "objective" else [reached[v] for v in node.outputs]
            bits = sum(1 << i for i, is_reached in enumerate(ends) if is_reached)
            for edge, through in zip(node.edges, slopes[number], strict=True):
                if through & bits and not carries[edge] and edge not in silent:
                    carries[edge] = is_new = True
                    for value in graph.edges[edge].sources:
                        reached[value] = True
    return carries, reached


def _sends(node: Node, stopped: frozenset[int]) -> list[bool]:
    """Which terms of an objective send a gradient back."""
    assert node.function is not None
    reads = () if node.equation is None else node.equation.inputs
    return [not any(v.index in stopped for v in reads)] * len(node.function.outputs)


def _shapes(graph: Graph) -> dict[int, Any]:
    """The shape of each variable of the program."""
    program = graph.program
    variables = [*program.inputs, *(v for e in program.equations for v in (*e.inputs, *e.outputs))]
    return {v.index: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables}


def _slopes(node: Node, shapes: dict[int, Any]) -> list[int]:
    """For each operand of a node the outputs with a derivative by it, as bits."""
    if node.function is None:
        return []
    if node.rule is not None and node.rule.has_slope is not None:
        return [-1 if node.rule.has_slope else 0] * len(node.edges)
    if node.equation is not None and not jumps(node):
        inner = [name for program in inner_programs(node.equation.params) for name in _names(program)]
        if any(map(_is_users, (node.equation.name, *inner))):
            return [-1] * len(node.edges)
    operands = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in node.function.operands]
    return slopes_of(node.function, operands, {i: shapes[i] for i in node.function.known})


def _noisy(graph: Graph, reached: list[bool]) -> list[bool]:
    """The values that no gradient reaches, and that depend on such a parameter: elsewhere no answer is needed."""
    noisy = [False] * len(graph.values)
    is_new = True
    while is_new:
        is_new = False
        for number in graph.forward_order:
            node = graph.nodes[number]
            wants = node.kind == "parameter" or any(noisy[v] for e in node.edges for v in graph.edges[e].sources)
            for value in node.outputs if wants else ():
                if not reached[value] and not noisy[value]:
                    noisy[value] = is_new = True
    return noisy
