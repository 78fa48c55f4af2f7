"""The picture of a factor graph: from the data at the top down to the objective.

What the boxes say is `_folding`'s, where they stand `_layout`'s; here they are drawn, with matplotlib. Limits: png, svg
and pdf. A picture grows with the graph: text keeps its size, so that large ones are to be zoomed into.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

from .._graph._graph import Graph
from ._folding import Block, Box, Link, Picture, picture_of
from ._layout import Layout, Sizes, laid_out

_PITCH, _HEIGHT = 0.74, 0.42  # inches: from row to row, and of a box
_PAD, _BESIDE, _MARGIN = 0.1, 0.16, 0.25
_TITLE, _SMALL, _TIMES = 8.5, 6.5, 11.0  # points
_DPI, _PIXELS = 150, 60_000  # matplotlib draws up to 65,535 pixels a side
_FILLS = ("#d6e6f5", "#fbe3c6")
_LINES = ("#1f5a93", "#a65a10")
_STYLES: dict[Link, tuple[str, Any]] = {
    "plain": ("#555555", "solid"),
    "delayed": ("#8a1f6a", "dashed"),
    "next": ("#555555", "dotted"),
}
_WORDS: dict[Link, str] = {
    "plain": "",
    "delayed": "one time step late",
    "next": "to the next repetition",
}


def drawn(graph: Graph, suffix: str) -> bytes:
    """The picture of a graph, in the format of a suffix such as `".png"`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = picture_of(graph)
    sizes = [_sizes(box) for box in picture.boxes]
    rows = [box.row for box in picture.boxes]
    downward = [(u, v) if rows[u] <= rows[v] else (v, u) for u, v, _ in picture.edges]
    layout = laid_out(rows, sizes, downward)
    ends = [x + size.right for x, size in zip(layout.places, sizes, strict=True)]
    passing = [x for points in layout.points for x in points]
    room = max([_text_width(_times(block), _TIMES) for block in picture.blocks], default=0.0)
    width, height = max([*ends, *passing, 3.6]) + room, (max(rows) + 1) * _PITCH
    legend = 0.7 if any(_WORDS[link] for _, _, link in picture.edges) else 0.45
    whole = (width + 2 * _MARGIN + 0.5, height + legend + 2 * _MARGIN)
    figure = Figure(figsize=whole)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-_MARGIN - 0.25, width + _MARGIN + 0.25)
    axes.set_ylim(-height - _MARGIN, legend + _MARGIN)
    axes.set_axis_off()
    _draw_blocks(axes, picture, layout, sizes)
    _draw_edges(axes, picture, layout)
    for box, x in zip(picture.boxes, layout.places, strict=True):
        _draw_unit(axes, box, x)
    title = f"{len(graph.nodes)} nodes, {len(graph.edges)} edges; types are float32 where none is named"
    axes.text(0, legend + 0.05, title, fontsize=_SMALL + 1, va="bottom", ha="left")
    _draw_legend(axes, picture, legend)
    content = io.BytesIO()
    dpi = min(_DPI, _PIXELS / max(whole))
    figure.savefig(content, format=suffix.removeprefix(".").lower(), dpi=dpi)
    return content.getvalue()


# --- sizes ---


@functools.lru_cache(maxsize=4096)  # it takes a millisecond
def _text_width(text: str, points: float) -> float:
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=points).get_extents().width / 72 if text.strip() else 0.0


def _width(box: Box) -> float:
    return max(_text_width(box.title, _TITLE), _text_width(box.shapes, _SMALL), 0.4) + 2 * _PAD


def _sizes(box: Box) -> Sizes:
    """The first of the parameters beside a box stands on its right, the second on its left."""
    half, besides = _width(box) / 2, [_width(one) + _BESIDE for one in box.beside]
    return Sizes(half + sum(besides[1:2]), half + sum(besides[:1]))


def _middle(row: int) -> float:
    return -(row + 0.5) * _PITCH


# --- what is drawn ---


def _draw_unit(axes: Any, box: Box, x: float) -> None:
    """A box with the parameters beside it."""
    from matplotlib.patches import FancyArrowPatch

    half, y = _width(box) / 2, _middle(box.row)
    _draw_box(axes, box, x)
    for side, one in zip((1, -1), box.beside, strict=False):
        inner = x + side * (half + _BESIDE)
        color, style = _STYLES["plain"]
        axes.add_patch(
            FancyArrowPatch(
                (inner, y), (x + side * half, y), arrowstyle="-|>", mutation_scale=6, shrinkA=0, shrinkB=0, lw=0.8,
                color=color, ls=style,
            )
        )  # fmt: skip
        _draw_box(axes, one, inner + side * _width(one) / 2)


def _draw_box(axes: Any, box: Box, x: float) -> None:
    """Round for parameters and data, with a heavy line for the objective, thin for an identity."""
    y, text = _middle(box.row), {"ha": "center", "va": "center", "zorder": 4}
    axes.add_patch(_patch(box.kind, box.color, x, y, _width(box), _HEIGHT))
    axes.text(x, y + 0.085, box.title, fontsize=_TITLE, color="black", **text)
    axes.text(x, y - 0.105, box.shapes, fontsize=_SMALL, color="#333333", **text)


def _patch(kind: str, color: int, x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import FancyBboxPatch

    is_round = kind in ("parameter", "data")
    style = f"round,pad=0,rounding_size={0.5 * height if is_round else 0.03}"
    weight = {"objective": 2.8, "identity": 0.5}.get(kind, 1.0)
    corner = (x - width / 2, y - height / 2)
    fill, line = _FILLS[color], _LINES[color]
    return FancyBboxPatch(corner, width, height, boxstyle=style, fc=fill, ec=line, lw=weight, zorder=3)


def _draw_edges(axes: Any, picture: Picture, layout: Layout) -> None:
    boxes, places = picture.boxes, layout.places
    shifts = _shifts(picture, layout)
    for number, (u, v, link) in enumerate(picture.edges):
        if boxes[u].row == boxes[v].row:
            _draw_arc(axes, boxes, places, u, v, link)
            continue
        sign = 1 if boxes[u].row < boxes[v].row else -1
        points = layout.points[number][::sign]
        way = [(places[u] + shifts[u, sign, None], _middle(boxes[u].row) - sign * _HEIGHT / 2)]
        for x, row in zip(points, range(boxes[u].row + sign, boxes[v].row, sign), strict=True):
            way += [(x, _middle(row) + sign * _HEIGHT / 2), (x, _middle(row) - sign * _HEIGHT / 2)]
        way.append((places[v] + shifts[v, -sign, number], _middle(boxes[v].row) + sign * _HEIGHT / 2))
        _draw_way(axes, way, link)


def _shifts(picture: Picture, layout: Layout) -> dict[tuple[int, int, int | None], float]:
    """How far from the middle of a box, on its lower side (1) or upper side (-1), an edge ends; `None`: all begin.

    They are spread along the side in the order in which they come, those upward on the right.
    """
    found: dict[tuple[int, int], set[tuple[bool, float, int | None]]] = {}
    for number, (u, v, _) in enumerate(picture.edges):
        if (rows := (picture.boxes[u].row, picture.boxes[v].row))[0] != rows[1]:
            sign = 1 if rows[0] < rows[1] else -1
            last = [layout.places[u], *layout.points[number][::sign]][-1]
            found.setdefault((u, sign), set()).add((sign < 0, layout.places[u], None))
            found.setdefault((v, -sign), set()).add((sign < 0, last, number))
    shifts = {}
    for (box, side), ends in found.items():
        step = min(0.22, 0.7 * _width(picture.boxes[box]) / len(ends))
        for k, (_, _, end) in enumerate(sorted(ends, key=lambda end: end[:2])):
            shifts[box, side, end] = (k - (len(ends) - 1) / 2) * step
    return shifts


def _draw_way(axes: Any, way: Sequence[tuple[float, float]], link: Link) -> None:
    """A line through points, upright where it passes a row, with an arrow at its end."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    corners, codes = [way[0]], [int(Path.MOVETO)]
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(way[:-1], way[1:], strict=True)):
        if k % 2:
            corners, codes = [*corners, (x1, y1)], [*codes, int(Path.LINETO)]
        else:
            middle = (y0 + y1) / 2
            corners += [(x0, middle), (x1, middle), (x1, y1)]
            codes += [int(Path.CURVE4)] * 3
    color, style = _STYLES[link]
    path = Path(corners, codes)
    line = {"color": color, "ls": style, "lw": 0.9, "zorder": 2}
    axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-", **line))
    (x0, y0), (x1, y1) = corners[-2], corners[-1]
    tip = {**line, "ls": "solid", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch((x1, y1 + (0.05 if y0 > y1 else -0.05)), (x1, y1), arrowstyle="-|>", **tip))


def _draw_arc(axes: Any, boxes: Sequence[Box], places: Sequence[float], u: int, v: int, link: Link) -> None:
    """An edge between two boxes of one row, or from a box to itself: around their lower sides."""
    from matplotlib.patches import FancyArrowPatch

    y = _middle(boxes[u].row) - _HEIGHT / 2
    apart = 0.3 * min(_width(boxes[u]), _width(boxes[v])) if u == v else 0.0
    start, end = (places[u] + apart, y), (places[v] - apart, y)
    bend = -0.4 if end < start else 0.25  # so that one there and one back are two
    color, style = _STYLES[link]
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=7, shrinkA=0, shrinkB=0,
            color=color, ls=style, lw=0.9, zorder=2,
        )
    )  # fmt: skip


def _draw_blocks(axes: Any, picture: Picture, layout: Layout, sizes: Sequence[Sizes]) -> None:
    """A frame around the rows of each block that repeats, with the number of its repetitions."""
    from matplotlib.patches import FancyBboxPatch

    for block in picture.blocks:
        within = [i for i, box in enumerate(picture.boxes) if block.first <= box.row <= block.last]
        left = min(layout.places[i] - sizes[i].left for i in within) - 0.15
        right = max(layout.places[i] + sizes[i].right for i in within) + 0.15
        top, bottom = -block.first * _PITCH - 0.05, -(block.last + 1) * _PITCH + 0.05
        style = "round,pad=0,rounding_size=0.08"
        frame = FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=style, fc="#f4f4f4", ec="#999999")
        frame.set(linewidth=0.8, zorder=0)
        axes.add_patch(frame)
        axes.text(right + 0.06, (top + bottom) / 2, _times(block), fontsize=_TIMES, ha="left", va="center", zorder=1)


def _times(block: Block) -> str:
    return f"× {block.times}"


def _draw_legend(axes: Any, picture: Picture, top: float) -> None:
    """What the fills, outlines and lines mean, of those that occur; two lines of it."""
    boxes = [one for box in picture.boxes for one in (box, *box.beside)]
    kinds = {box.kind for box in boxes}
    x, y = 0.0, top - 0.1
    for color, words in enumerate(("color A, with the objective", "color B")):
        axes.add_patch(_patch("operation", color, x + 0.14, y, 0.28, 0.16))
        axes.text(x + 0.35, y, words, fontsize=_SMALL, va="center")
        x += 0.55 + _text_width(words, _SMALL)
    names = {"objective": "objective", "parameter": "parameter", "data": "datum", "identity": "identity"}
    x, y = 0.0, y - 0.25
    for kind, words in names.items():
        if kind in kinds:
            color = next(box.color for box in boxes if box.kind == kind)
            axes.add_patch(_patch(kind, color, x + 0.14, y, 0.28, 0.16))
            axes.text(x + 0.35, y, words, fontsize=_SMALL, va="center")
            x += 0.55 + _text_width(words, _SMALL)
    x, y = 0.0, y - 0.25
    found: list[Link] = sorted({link for _, _, link in picture.edges if _WORDS[link]})
    for link in found:
        color, style = _STYLES[link]
        axes.plot([x, x + 0.28], [y, y], color=color, ls=style, lw=1.0)
        axes.text(x + 0.35, y, _WORDS[link], fontsize=_SMALL, va="center")
        x += 0.55 + _text_width(_WORDS[link], _SMALL)
