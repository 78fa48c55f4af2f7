"""Where boxes that stand in rows are drawn: few edges cross, and chains run straight down.

An edge over several rows gets a point in each row between, for which the boxes there make room. The order in the rows
starts from the layered layout of networkx. Then each row in turn is sorted by the mean place of its neighbours
(Sugiyama, Tagawa, Toda 1981), and lastly each row is the nearest one to its neighbours that keeps the order and the
gaps: a regression onto ordered numbers. Limits: it is a heuristic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_GAP = 0.22  # inches between what stands in one row
_LINE = 0.06  # half the room of an edge that passes by
_SWEEPS = 12


class Sizes(NamedTuple):
    """How far a box reaches to the left and to the right of the point that edges lead to."""

    left: float
    right: float


class Layout(NamedTuple):
    """The place of each box, and for each edge those of its points in the rows between, from the upper row down."""

    places: tuple[float, ...]
    points: tuple[tuple[float, ...], ...]


def laid_out(rows: Sequence[int], sizes: Sequence[Sizes], edges: Sequence[tuple[int, int]]) -> Layout:
    """The layout of boxes.

    **Arguments:**

    - `rows`: the row of each box. There is a box in each row.
    - `sizes`: of each box.
    - `edges`: pairs of an upper and a lower box, or of two boxes in one row, which are no matter here.

    **Returns:** The [`Layout`][], in inches.
    """
    rows, sizes, below = list(rows), list(sizes), []
    chains: list[list[int]] = []
    for upper, lower in edges:
        between = range(rows[upper] + 1, rows[lower])
        chain = list(range(len(rows), len(rows) + len(between)))
        rows += between
        sizes += [Sizes(_LINE, _LINE)] * len(between)
        chains.append(chain)
        if rows[upper] < rows[lower]:
            way = [upper, *chain, lower]
            below += zip(way[:-1], way[1:], strict=True)
    levels = _ordered(rows, below)
    places = _placed(levels, sizes, below)
    boxes = len(rows) - sum(map(len, chains))
    return Layout(tuple(places[:boxes]), tuple(tuple(places[i] for i in chain) for chain in chains))


def _neighbours(count: int, below: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """For each item, those in the row above and in the row below that it is joined to."""
    up: list[list[int]] = [[] for _ in range(count)]
    down: list[list[int]] = [[] for _ in range(count)]
    for upper, lower in below:
        up[lower].append(upper)
        down[upper].append(lower)
    return up, down


def _ordered(rows: Sequence[int], below: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The items of each row in the order in which the fewest edges were found to cross."""
    import networkx

    levels: list[list[int]] = [[] for _ in range(max(rows) + 1)]
    for item, row in enumerate(rows):
        levels[row].append(item)
    graph = networkx.Graph(below)
    graph.add_nodes_from(range(len(rows)))
    start = networkx.multipartite_layout(graph, subset_key=dict(enumerate(levels)), align="horizontal")
    levels = [sorted(level, key=lambda i: float(start[i][0])) for level in levels]
    up, down = _neighbours(len(rows), below)
    best, least = levels, _crossings(levels, down)
    for sweep in range(_SWEEPS):
        towards = up if sweep % 2 == 0 else down
        for row in range(len(levels)) if sweep % 2 == 0 else reversed(range(len(levels))):
            near = {i for item in levels[row] for i in towards[item]}
            place = {i: p / len(level) for level in _around(levels, row) for p, i in enumerate(level) if i in near}
            own = {i: p / len(levels[row]) for p, i in enumerate(levels[row])}
            mean = {i: _mean([place[n] for n in towards[i]], own[i]) for i in levels[row]}
            levels = [*levels[:row], sorted(levels[row], key=mean.__getitem__), *levels[row + 1 :]]
        if (crossings := _crossings(levels, down)) < least:
            best, least = levels, crossings
    return best


def _around(levels: Sequence[list[int]], row: int) -> list[list[int]]:
    return [levels[r] for r in (row - 1, row + 1) if 0 <= r < len(levels)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(levels: Sequence[Sequence[int]], down: Sequence[Sequence[int]]) -> int:
    """How many pairs of edges cross."""
    count = 0
    for upper, lower in zip(levels[:-1], levels[1:], strict=True):
        place = {i: p for p, i in enumerate(lower)}
        ends = [place[n] for i in upper for n in sorted(down[i], key=place.__getitem__)]
        count += sum(a > b for k, a in enumerate(ends) for b in ends[k + 1 :])
    return count


def _placed(levels: Sequence[Sequence[int]], sizes: Sequence[Sizes], below: Sequence[tuple[int, int]]) -> list[float]:
    """The place of each item, from the leftmost edge of all of them."""
    up, down = _neighbours(len(sizes), below)
    is_line = [size.left == _LINE for size in sizes]
    places = [0.0] * len(sizes)

    def put(level: Sequence[int], wanted: Callable[[int], float], weight: Callable[[int], float]) -> None:
        for item, place in zip(level, _nearest(level, sizes, wanted, weight), strict=True):
            places[item] = place

    for level in levels:
        put(level, lambda _: 0.0, lambda _: 1.0)
    for sweep in range(2 * _SWEEPS):
        for level in levels if sweep % 2 == 0 else reversed(levels):
            pulls: Mapping[int, list[tuple[int, float]]] = {
                i: [(n, 8.0 if is_line[i] and is_line[n] else 1.0) for n in (*up[i], *down[i])] for i in level
            }
            put(
                level,
                lambda i: _weighted([(places[n], w) for n, w in pulls[i]], places[i]),  # noqa: B023 - called at once
                lambda i: sum(w for _, w in pulls[i]) or 0.1,  # noqa: B023
            )
    left = min(places[i] - sizes[i].left for i in range(len(sizes)))
    return [place - left for place in places]


def _weighted(values: Sequence[tuple[float, float]], otherwise: float) -> float:
    total = sum(w for _, w in values)
    return sum(x * w for x, w in values) / total if values else otherwise


def _nearest(
    level: Sequence[int],
    sizes: Sequence[Sizes],
    wanted: Callable[[int], float],
    weight: Callable[[int], float],
) -> list[float]:
    """The places nearest to those that are wanted, in order and with gaps: neighbours that are too near are pooled."""
    offsets = [0.0]
    for before, after in zip(level[:-1], level[1:], strict=True):
        offsets.append(offsets[-1] + sizes[before].right + _GAP + sizes[after].left)
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of items
    for item, offset in zip(level, offsets, strict=True):
        pools.append((wanted(item) - offset, weight(item), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, v, m), (b, w, n) = pools[-2:]
            pools[-2:] = [((a * v + b * w) / (v + w), v + w, m + n)]
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
