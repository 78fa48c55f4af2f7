"""The picture of training: the loss and each evaluation, over steps and over seconds, of one run or of several.

Transforms histories into a figure of matplotlib. A loss is shown on a logarithmic scale where all of it is positive.
Limits: seconds are those of training, without compilation and evaluation; what is not finite is a gap in its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.core
import jax.tree_util as jtu
import numpy as np

from .._errors import described

_OVER = {"step": "steps", "seconds": "seconds of training"}
_PREFIX = "eval_"
_LOSSES = ("loss", _PREFIX + "loss")
_LINES = ("-", "--", "-.", ":")


def checked_runs(name: str, run: Any, others: Any) -> dict[str, dict[str, np.ndarray]]:
    """The curves of a run and of others, by their names; of histories, or of what has one as its `history`.

    **Raises:** `TypeError` and `ValueError` for what is no history with a record, and for unusable names.
    """
    if others is not None and not isinstance(others, Mapping):
        raise TypeError(f'`others` must map names to results, as in {{"Adam": result}}; got {described(others)}.')
    for given in (name, *(others or ())):
        if not isinstance(given, str):
            raise TypeError(f"The names of runs must be strings, which stand in the legend; got {described(given)}.")
    if name in (others or ()):
        raise ValueError(f"`others` has a run of the name {name!r}, which is this run's. Give it another by `name`.")
    runs = {name: run, **(others or {})}
    return {given: _curves(given, getattr(one, "history", one)) for given, one in runs.items()}


def _curves(run: str, history: Any) -> dict[str, np.ndarray]:
    wanted = "a `TrainResult`, or its `history`, with one entry a record of step, loss and seconds"
    if not isinstance(history, Mapping) or not {"step", "seconds", "loss"} <= set(history):
        raise TypeError(f"The run {run!r} must be {wanted}; got {described(history)}.")
    shown = {n: x for n, x in history.items() if n in ("loss", *_OVER) or str(n).startswith(_PREFIX)}
    if any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(shown)):
        raise ValueError(f"The history of the run {run!r} is traced here. Call `plot` outside of `jit`.")
    try:
        curves = {str(name): np.asarray(values, float) for name, values in shown.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"The run {run!r} must be {wanted}, of real numbers: {error}.") from None
    if len({values.shape for values in curves.values()}) > 1 or curves["step"].ndim != 1:
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in curves.items())
        raise ValueError(f"The run {run!r} must be {wanted}; it has arrays of the shapes {shapes}.")
    if not len(curves["step"]):
        raise ValueError(f"The run {run!r} has no records: it ended before the first one. Leave it out.")
    return curves


def plotted(runs: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """A figure of checked runs: a row for the loss and for each evaluation, a column for steps and for seconds.

    It belongs to no window, and to nothing that is open.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(name for curves in runs.values() for name in curves if name not in _OVER))
    figure = Figure(figsize=(10.0, 0.6 + 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(_OVER), squeeze=False, sharex="col", sharey="row")
    for name, row in zip(rows, grid, strict=True):
        for over, axes in zip(_OVER, row, strict=True):
            _draw(axes, name, over, runs)
        row[0].set_ylabel(name.removeprefix(_PREFIX) + (" (evaluated)" if name.startswith(_PREFIX) else ""))
        shown = np.concatenate([curves[name] for curves in runs.values() if name in curves])
        shown = shown[np.isfinite(shown)]
        if name in _LOSSES and len(shown) and (shown > 0).all():
            row[0].set_yscale("log")
    for axes, text in zip(grid[-1], _OVER.values(), strict=True):
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
    if len(runs) > 1:
        handles = {line.get_label(): line for axes in grid[:, 0] for line in axes.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(runs)))
    return figure


def _draw(axes: Any, name: str, over: str, runs: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """The lines of one measure, of those runs that have it. A run has one color and one line in all axes."""
    for number, (run, curves) in enumerate(runs.items()):
        if name in curves:
            values = np.where(np.isfinite(curves[name]), curves[name], np.nan)
            few = np.isfinite(values).sum() < 50
            style = {"color": f"C{number % 10}", "ls": _LINES[number // 10 % len(_LINES)], "lw": 1.2}
            axes.plot(curves[over], values, label=run, marker="." if few else None, **style)
    axes.grid(alpha=0.3)
