"""The picture of a run: gap and violation over its steps, and where constraints are violated at its end.

Transforms the measures of a solution, and the state with its problem, into a figure of matplotlib. Limits: a logarithm
has no zero, so that a measure of zero is a gap in its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
import numpy as np

from .._errors import described
from .._problem._measures import violations
from .._problem._problem import FeasibilityProblem
from .._problem._state import State

_NAMES = ("gap", "violation")
_MOST = 30
"""Kinds of nodes that have room in the picture: those with the largest violations."""


def check_plotted(stats: Mapping[str, Any], state: State, problem: Any) -> None:
    """Raises a `ValueError` or `TypeError` for what cannot be plotted."""
    if any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves((dict(stats), state))):
        raise ValueError("`plot` needs the values of a solution, which is traced here. Call it outside of `jit`.")
    if problem is None:
        return
    if not isinstance(problem, FeasibilityProblem):
        raise TypeError(f"`problem` must be the one that was solved, got {described(problem)}.")
    if np.ndim(stats["steps"]):
        raise ValueError(
            f"`problem` is for one run, and this solution has {np.size(stats['steps'])}. Plot one of them, such as "
            "`jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, solution)`, or leave `problem` out."
        )
    shapes = [None if x is None else x.shape for x in state.values]
    wanted = [None if x is None else x.shape for x in problem.forward]
    if shapes != wanted or len(state.duals) != len(problem.graph.edges):
        raise ValueError("`problem` must be the one that was solved: its graph is not that of the solution's state.")


def plotted(stats: Mapping[str, Any], state: State, problem: FeasibilityProblem | None) -> Any:
    """A figure of checked arguments. It belongs to no window, and to nothing that is open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if problem is None else 11.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if problem is None else 2, squeeze=False)[0]
    _draw_measures(axes[0], stats)
    if problem is not None:
        _draw_kinds(axes[1], eqx.filter_jit(violations)(problem, state))
    return figure


def _draw_measures(axes: Any, stats: Mapping[str, Any]) -> None:
    """One line a measure and run, of several runs pale ones."""
    step = _runs(stats["step"])
    for name, color in zip(_NAMES, ("tab:blue", "tab:orange"), strict=True):
        for number, (x, y) in enumerate(zip(step, _runs(stats[name]), strict=True)):
            shown = x >= 0  # behind the last entry, there are none
            positive = np.where(y[shown] > 0, y[shown], np.nan)
            axes.plot(
                x[shown],
                positive,
                color=color,
                label=None if number else name,
                alpha=1.0 if len(step) == 1 else 0.4,
                marker="." if shown.sum() < 50 else None,
                lw=1.2,
            )
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
    axes.legend()


def _runs(measure: Any) -> np.ndarray:
    """One row a run."""
    array = np.asarray(measure)
    return array.reshape(-1, array.shape[-1])


def _draw_kinds(axes: Any, found: Mapping[str, Any]) -> None:
    """A bar for each kind of node, the largest on top; where nothing is violated, a zero."""
    ranked = sorted(((float(x), name) for name, x in found.items()), key=lambda pair: (-pair[0], pair[1]))[:_MOST]
    values, names = [value for value, _ in ranked], [_short(name) for _, name in ranked]
    positive = [value for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.1, 1.0)
    for place, value in enumerate(values):
        if value > 0:
            axes.barh(place, value, color="tab:orange", height=0.7)
        axes.text(max(value, low / 3), place, f" {value:.2g}", va="center", ha="left", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(low / 3, high * 6)
    axes.set_xlabel("largest violation at the end")


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
