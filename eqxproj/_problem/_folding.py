"""From a factor graph to what a picture shows of it: boxes in rows, with edges between them.

The row of a box is its longest way from the objective, which stands at the bottom. A parameter that one node alone
reads stands beside it. In a large graph, equal branches side by side become one box, and blocks of rows that repeat are
shown once. Every edge of the graph is an edge of the picture. Limits: nothing is folded inside of a block.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

from .._graph._graph import Graph, Kind

LARGE = 40
"""Nodes from which on a picture is folded."""
_BESIDE = 2
"""Parameters that have room beside the node that reads them."""
_TITLE, _SHAPES = 34, 50  # characters

Link = Literal["plain", "delayed", "next"]
"""`"delayed"`: one time step late. `"next"`: to the next repetition of a block."""
_Edges = Mapping[tuple[int, int, bool], None]  # from, to, whether delayed; in order
_Members = Mapping[int, tuple[int, ...]]  # the nodes that a node stands for, itself among them


class Box(NamedTuple):
    """One node, or several that are alike; `beside`, parameters that it alone reads."""

    title: str
    shapes: str
    kind: Kind
    color: int
    row: int
    beside: tuple[Box, ...] = ()


class Block(NamedTuple):
    """Rows that repeat, the first and the last included."""

    first: int
    last: int
    times: int


class Picture(NamedTuple):
    """Boxes, edges between them by their positions, and the rows that stand for several."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int, Link], ...]
    blocks: tuple[Block, ...]


def picture_of(graph: Graph) -> Picture:
    """What is shown of a graph."""
    beside = _beside(graph)
    hidden = {p for parameters in beside.values() for p in parameters}
    shown = [i for i in range(len(graph.nodes)) if i not in hidden]
    owner = {p: node for node, parameters in beside.items() for p in parameters}
    edges: dict[tuple[int, int, bool], None] = {}
    for edge in graph.edges:
        for value in edge.sources:
            producer = graph.producers[value]
            if producer not in owner:
                edges[producer, edge.consumer, value in edge.delayed] = None
    labels = {i: tuple(_label(graph, n) for n in (i, *beside.get(i, ()))) for i in shown}
    rows = {i: max(graph.depth) - graph.depth[i] for i in shown}
    alike, members = {i: i for i in shown}, {i: (i,) for i in shown}
    runs: tuple[Block, ...] = ()
    same: dict[int, tuple[int, ...]] = {}
    if len(graph.nodes) > LARGE:
        alike, members = _alike(labels, rows, edges)
        edges = {(alike[u], alike[v], late): None for u, v, late in edges}
        counted = {i: (labels[i], len(group)) for i, group in members.items()}
        runs, same = _repeated(counted, {i: rows[i] for i in members}, edges)
    return _picture(graph, beside, edges, rows, members, runs, same)


def _beside(graph: Graph) -> dict[int, tuple[int, ...]]:
    """For a node, the parameters and data that stand beside it."""
    found: dict[int, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        if node.kind in ("parameter", "data"):
            readers = {graph.edges[e].consumer for v in node.outputs for e in graph.readers[v]}
            if len(readers) == 1:
                found.setdefault(readers.pop(), []).append(i)
    return {node: tuple(all_) for node, all_ in found.items() if len(all_) <= _BESIDE}


def _label(graph: Graph, number: int) -> Hashable:
    """What nodes have in common that are alike: all but the names of parameters."""
    node = graph.nodes[number]
    name = "" if node.kind in ("parameter", "data") else node.operation
    return node.kind, name, _shapes(graph, number), graph.colors[number], node.describe_rule()


# --- grouping ---


def _alike(
    labels: Mapping[int, Hashable], rows: Mapping[int, int], edges: _Edges
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """Nodes of one row with one label, whose neighbours are alike too, by the first of them: branches side by side."""
    ways = [(u, ("out", late), v) for u, v, late in edges] + [(v, ("in", late), u) for u, v, late in edges]
    kinds = _numbered({i: (labels[i], rows[i]) for i in labels})
    while True:
        around: dict[int, set[Hashable]] = {i: set() for i in labels}
        for node, way, other in ways:
            around[node].add((way, kinds[other]))
        finer = _numbered({i: (kinds[i], frozenset(around[i])) for i in labels})
        if len(set(finer.values())) == len(set(kinds.values())):
            break
        kinds = finer
    groups: dict[int, list[int]] = {}
    for i in sorted(labels):
        groups.setdefault(kinds[i], []).append(i)
    alike = {i: group[0] for group in groups.values() for i in group}
    return alike, {group[0]: tuple(group) for group in groups.values()}


def _numbered(names: Mapping[int, Hashable]) -> dict[int, int]:
    """Equal numbers for equal names."""
    numbers: dict[Hashable, int] = {}
    return {i: numbers.setdefault(name, len(numbers)) for i, name in names.items()}


def _repeated(
    labels: Mapping[int, Hashable], rows: Mapping[int, int], edges: _Edges
) -> tuple[tuple[Block, ...], dict[int, tuple[int, ...]]]:
    """The blocks of rows that repeat, and for each node of the first of them the nodes in the same place."""
    kinds = _numbered(labels)
    levels: list[list[int]] = [[] for _ in range(max(rows.values()) + 1)]
    for i in sorted(rows, key=lambda i: (kinds[i], i)):
        levels[rows[i]].append(i)
    codes = list(_numbered({r: tuple(kinds[i] for i in level) for r, level in enumerate(levels)}).values())
    place = {i: (r, p) for r, level in enumerate(levels) for p, i in enumerate(level)}
    places = [(*place[u], *place[v], late) for u, v, late in edges]

    def inside(first: int, period: int) -> set[tuple[int, int, int, int, bool]]:
        """The edges inside of a block, with rows that count from its first."""
        last = first + period
        found = [e for e in places if first <= e[0] < last and first <= e[2] < last]
        return {(a - first, p, b - first, q, late) for a, p, b, q, late in found}

    def times(first: int, period: int, most: int) -> int:
        """How often a block stands below itself, with the same edges inside of it."""
        block, count = inside(first, period), 1
        while count < most and inside(first + count * period, period) == block:
            count += 1
        return count

    blocks, open_ = [], [(0, len(codes))]
    while open_:
        low, high = open_.pop()
        for first, period, most in _candidates(codes, low, high):
            if (count := times(first, period, most)) > 1:
                blocks.append(Block(first, first + period - 1, count))
                open_ += [(low, first), (first + count * period, high)]
                break
    same = {}
    for block in blocks:
        period = block.last - block.first + 1
        for row in range(block.first, block.last + 1):
            copies = [levels[row + k * period] for k in range(block.times)]
            same |= {nodes[0]: nodes for nodes in zip(*copies, strict=True)}
    return tuple(sorted(blocks)), same


def _candidates(codes: Sequence[int], low: int, high: int) -> list[tuple[int, int, int]]:
    """First row, period and repetitions of blocks with equal rows, those that save most rows first."""
    found = []
    for period in range(1, (high - low) // 2 + 1):
        length = 0  # of the rows from here on that equal those a period below
        for row in reversed(range(low, high - period)):
            length = length + 1 if codes[row] == codes[row + period] else 0
            begins = row == low or codes[row - 1] != codes[row - 1 + period]
            if begins and length >= period:
                found.append((row, period, 1 + length // period))
    return sorted(found, key=lambda block: (block[1] - block[1] * block[2], block[1], block[0]))


# --- what is written ---


def _picture(
    graph: Graph,
    beside: Mapping[int, tuple[int, ...]],
    edges: _Edges,
    rows: Mapping[int, int],
    members: _Members,
    blocks: Sequence[Block],
    same: _Members,
) -> Picture:
    """The picture of the nodes that are left, in rows that are counted anew."""
    first_of = {copy: node for node, copies in same.items() for copy in copies}
    round_of = {copy: k for copies in same.values() for k, copy in enumerate(copies)}
    kept = sorted(i for i in members if first_of.get(i, i) == i)
    levels = {row: number for number, row in enumerate(sorted({rows[i] for i in kept}))}
    position = {i: number for number, i in enumerate(kept)}

    def box(number: int) -> Box:
        group = members[number]
        every = [m for copy in same.get(number, (number,)) for m in members[copy]]
        sides = tuple(
            _box(graph, [beside[m][k] for m in every], len(group), levels[rows[number]])
            for k in range(len(beside.get(number, ())))
        )
        return _box(graph, every, len(group), levels[rows[number]])._replace(beside=sides)

    links: dict[tuple[int, int, Link], None] = {}
    for u, v, late in edges:
        ends = position[first_of.get(u, u)], position[first_of.get(v, v)]
        one_block = _block_of(blocks, rows, first_of.get(u, u)) == _block_of(blocks, rows, first_of.get(v, v))
        is_next = one_block and round_of.get(u, 0) != round_of.get(v, 0)
        links[(*ends, "delayed" if late else "next" if is_next else "plain")] = None
    counted = tuple(Block(levels[b.first], levels[b.last], b.times) for b in blocks)
    return Picture(tuple(map(box, kept)), tuple(links), counted)


def _block_of(blocks: Sequence[Block], rows: Mapping[int, int], node: int) -> Block | None:
    return next((b for b in blocks if b.first <= rows[node] <= b.last), None)


def _box(graph: Graph, nodes: Sequence[int], count: int, row: int) -> Box:
    """The box of nodes that are alike, `count` of which stand side by side."""
    node = graph.nodes[nodes[0]]
    is_named = node.kind in ("parameter", "data")
    title = _common_name([graph.nodes[i].operation for i in nodes]) if is_named else node.operation
    if node.kind == "objective":
        title = f"{title}: {node.describe_rule()}"
    if is_named and len(title) > _TITLE:  # the end of a name says most, and of an operation the beginning
        title = "…" + title[1 - _TITLE :].partition(".")[2]
    elif len(title) > _TITLE:
        title = title[: _TITLE - 1] + "…"
    times = f"{count} × " if count > 1 else ""
    return Box(times + title, _shapes(graph, nodes[0]), node.kind, graph.colors[nodes[0]], row)


def _common_name(names: Sequence[str]) -> str:
    """One name, with a star for each number in which several differ."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return f"{names[0]}, …"
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def _shapes(graph: Graph, number: int) -> str:
    """The shapes of operands and outputs; a type is named where it is not float32."""
    node = graph.nodes[number]
    ins = [graph.edges[e].variable.describe().removeprefix("float32") for e in node.edges]
    outs = ", ".join(graph.values[v].describe().removeprefix("float32") for v in node.outputs)
    long = f"{', '.join(ins)} → {outs}" if ins and outs else ", ".join(ins) or outs
    if len(long) <= _SHAPES:
        return long
    short = f"{len(ins)} operands → {outs}" if ins and outs else long
    return short if len(short) <= _SHAPES else short[: _SHAPES - 1] + "…"
