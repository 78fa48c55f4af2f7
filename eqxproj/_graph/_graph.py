"""The factor graph of a loss: nodes constrain values, which edges show to them through views.

A *value* is a parameter, a pinned datum, or the output of a node. An *edge* shows one or several values to one operand
of a node. To make two colors, which alternate breadth-first from the objective, an identity node is put on each edge
that joins equal ones. Limits: every node must lead to the objective.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

from .._program._equations import Equation, Program, Variable
from .._program._fragment import Fragment, View
from ..rules._base import AbstractRule

Kind = Literal["parameter", "data", "operation", "objective", "identity"]
T = TypeVar("T", bound=Hashable)


def after_sources(ends: Iterable[T], sources: Callable[[T], Iterable[T]]) -> tuple[T, ...]:
    """`ends` and what leads to them, each once and after its sources."""
    done: dict[T, None] = {}
    stack = [(end, False) for end in ends]
    while stack:
        item, is_ready = stack.pop()
        if is_ready:
            done[item] = None
        elif item not in done:
            stack.append((item, True))
            stack.extend((source, False) for source in sources(item))
    return tuple(done)


@dataclass(frozen=True, eq=False)
class Edge:
    """One operand of one node. `sources` are the values that it shows; `view` is the map from them to the operand."""

    variable: Variable
    view: View
    sources: tuple[int, ...]
    consumer: int
    is_parameter: bool
    delayed: frozenset[int] = frozenset()
    """The sources that are shown one time step late. They close the cycles of a recurrence."""


@dataclass(frozen=True, eq=False)
class Node:
    """One constraint: `function` leads from what the edges show to the outputs.

    A parameter or pinned datum has no operands. A node of one primitive has its `equation`; `unknown` tells which
    operands are edges, and `read` which outputs are values. `scale` is the coefficient of an objective in units of the
    largest one.
    """

    kind: Kind
    operation: str
    source: str
    rule: AbstractRule | None
    function: Fragment | None = None
    edges: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    equation: Equation | None = None
    unknown: tuple[bool, ...] = ()
    read: tuple[bool, ...] = ()
    scale: float = 1.0

    def describe_rule(self) -> str:
        """How the node is projected, in a few words."""
        if self.rule is not None:
            return self.rule.describe(self.equation)
        return "all copies equal" if self.kind == "parameter" else "held in place"


@dataclass(frozen=True, eq=False)
class Graph:
    """The graph of a program. Values, edges and nodes refer to one another by position."""

    program: Program
    values: tuple[Variable, ...]
    edges: tuple[Edge, ...]
    nodes: tuple[Node, ...]
    parameters: tuple[int | None, ...]
    """For each parameter of the trace its value, or `None` where the loss does not depend on it."""
    largest: float = 1.0
    """The largest coefficient of a term of the loss: one over the batch size, where the loss is a mean."""
    hard: bool = False
    """Whether the objective is nothing but sets, which do not use tau."""
    variant: Hashable = ()
    """What beside its program the graph was built from."""

    @cached_property
    def producers(self) -> tuple[int, ...]:
        """For each value, the node that it belongs to."""
        owner = {value: i for i, node in enumerate(self.nodes) for value in node.outputs}
        return tuple(owner[i] for i in range(len(self.values)))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the edges that show it."""
        found: list[list[int]] = [[] for _ in self.values]
        for i, edge in enumerate(self.edges):
            for value in edge.sources:
                found[value].append(i)
        return tuple(tuple(edges) for edges in found)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes whose values it reads."""
        return self._predecessors(with_delayed=True)

    @cached_property
    def prompt_predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the nodes whose values it reads without delay. These relations have no cycle."""
        return self._predecessors(with_delayed=False)

    def _predecessors(self, with_delayed: bool) -> tuple[tuple[int, ...], ...]:
        shown = [[v for v in edge.sources if with_delayed or v not in edge.delayed] for edge in self.edges]
        reads = [[self.producers[v] for e in node.edges for v in shown[e]] for node in self.nodes]
        return tuple(tuple(dict.fromkeys(nodes)) for nodes in reads)

    @cached_property
    def objectives(self) -> tuple[int, ...]:
        """The nodes of the objective."""
        return tuple(i for i, node in enumerate(self.nodes) if node.kind == "objective")

    @cached_property
    def forward_order(self) -> tuple[int, ...]:
        """Every node after those that it reads from."""
        return after_sources(range(len(self.nodes))[::-1], lambda node: self.prompt_predecessors[node])

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """The longest way from the objective to each node. Along edges that are not delayed, it falls."""
        depth = [0] * len(self.nodes)
        for node in reversed(self.forward_order):
            for p in self.prompt_predecessors[node]:
                depth[p] = max(depth[p], depth[node] + 1)
        return tuple(depth)

    @cached_property
    def behind(self) -> tuple[int, ...]:
        """For each node, the nodes that it is computed from without delay, as the bits of a number."""
        found = [0] * len(self.nodes)
        for node in self.forward_order:
            for p in self.prompt_predecessors[node]:
                found[node] |= found[p] | 1 << p
        return tuple(found)

    @cached_property
    def ahead(self) -> tuple[int, ...]:
        """For each node, the nodes that are computed from it without delay, as the bits of a number."""
        found = [0] * len(self.nodes)
        for node in reversed(self.forward_order):
            for p in self.prompt_predecessors[node]:
                found[p] |= found[node] | 1 << node
        return tuple(found)

    @cached_property
    def cyclic_depth(self) -> int | float:
        """The least depth of a node whose value is read with a delay; infinite in a graph without cycles."""
        late = {self.producers[v] for edge in self.edges for v in edge.delayed}
        return min((self.depth[node] for node in late), default=math.inf)

    @cached_property
    def distance(self) -> tuple[int, ...]:
        """The shortest way from the objective to each node, its breadth-first layer."""
        distance = dict.fromkeys(self.objectives, 0)
        queue = deque(self.objectives)
        while queue:
            node = queue.popleft()
            for p in self.predecessors[node]:
                if p not in distance:
                    distance[p] = distance[node] + 1
                    queue.append(p)
        return tuple(distance[i] for i in range(len(self.nodes)))

    @cached_property
    def colors(self) -> tuple[int, ...]:
        """0 for the color of the objective (A), 1 for the other (B)."""
        return tuple(d % 2 for d in self.distance)

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The nodes from the objective back, by depth: every node follows all its consumers."""
        layers: list[list[int]] = [[] for _ in range(max(self.depth) + 1)]
        for node, d in enumerate(self.depth):
            layers[d].append(node)
        if any(edge.delayed for edge in self.edges):  # which may join nodes of one layer, but never of one color
            layers = [[n for n in layer if self.colors[n] == color] for layer in layers for color in (0, 1)]
        return tuple(tuple(layer) for layer in layers if layer)

    def color(self, color: int) -> tuple[int, ...]:
        """The nodes of one color."""
        return tuple(i for i, c in enumerate(self.colors) if c == color)

    @cached_property
    def conflicts(self) -> tuple[int, ...]:
        """The edges that join two nodes of one color."""
        color = [self.colors[producer] for producer in self.producers]
        joins = [any(color[v] == self.colors[edge.consumer] for v in edge.sources) for edge in self.edges]
        return tuple(i for i, bad in enumerate(joins) if bad)


def with_identities(graph: Graph, identity: AbstractRule) -> Graph:
    """Puts an identity node on every edge that joins two nodes of one color, until there is none.

    Where only some of the values that an edge shows conflict, the others stay as they are.
    """
    for _ in range(len(graph.edges) + 1):
        if not graph.conflicts:
            return graph
        index = graph.conflicts[0]
        color = graph.colors[graph.edges[index].consumer]
        same = {value for value, producer in enumerate(graph.producers) if graph.colors[producer] == color}
        graph = _split(graph, index, identity, same)
    raise AssertionError("two-coloring did not end")


def with_concurrence(graph: Graph, identity: AbstractRule) -> Graph:
    """Puts an identity node on every edge from one operation to another.

    So all operations have one color. The other holds the objective, and what makes copies equal.
    """
    operations = {v for node in graph.nodes if node.kind == "operation" for v in node.outputs}
    for index in [i for i, edge in enumerate(graph.edges) if graph.nodes[edge.consumer].kind == "operation"]:
        graph = _split(graph, index, identity, operations)
    return graph


def _split(graph: Graph, index: int, identity: AbstractRule, split: Container[int]) -> Graph:
    """Puts an identity node on each value of an edge that is to be `split`."""
    edge = graph.edges[index]
    source = graph.nodes[edge.consumer].source
    values, edges, nodes = list(graph.values), list(graph.edges), list(graph.nodes)
    sources: list[int] = []
    for value in edge.sources:
        if value not in split:
            sources.append(value)
            continue
        variable = graph.values[value]
        sources.append(len(values))
        values.append(variable)
        plain = View((), (variable,), (variable,))
        nodes.append(Node("identity", "identity", source, identity, plain, (len(edges),), (sources[-1],)))
        edges.append(Edge(variable, plain, (value,), len(nodes) - 1, edge.is_parameter, edge.delayed & {value}))
    edges[index] = replace(edge, sources=tuple(sources), delayed=edge.delayed & set(sources))
    return replace(graph, values=tuple(values), edges=tuple(edges), nodes=tuple(nodes))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
