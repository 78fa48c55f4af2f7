"""Whether a run keeps the solver's state for each minibatch, and the room for these states.

Transforms a run into one whose minibatches stay the same, with room for a state at each. Limits: one process must have
all samples of a minibatch, and the loss must draw no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._errors import check_flag
from ..solvers import AbstractSolver
from ._direction import AbstractDirection, Displacement, takes_key
from ._displacement import Options
from ._persistence import Left, nothing_left
from ._regime import comes_to_rest
from ._source import AbstractSource, RowSource
from ._step import Extras, transformed


def persisting(
    persist: Any,
    options: Options,
    projects: bool,
    source: AbstractSource,
    loss: Callable[..., Any],
    extras: Extras,
    is_divided: bool,
) -> Options:
    """The options of a displacement, which say whether states are to be kept.

    `projects` says whether the run is one of the projection regime.

    **Raises:** `TypeError` for no flag, `ValueError` where states are asked for that cannot be kept.
    """
    check_flag("persist", persist)
    if not persist:
        return options
    hindrance = _hindrance(options.solver if projects else None, source, loss, extras, is_divided)
    if hindrance is not None:
        raise ValueError(f"`persist=True` {hindrance}")
    return replace(options, persists=True)


def _hindrance(
    solver: AbstractSolver | None,
    source: AbstractSource,
    loss: Callable[..., Any],
    extras: Extras,
    is_divided: bool,
) -> str | None:
    """Why states cannot be kept; `None` where they can. There is a `solver` in the projection regime alone."""
    if solver is None:
        return "needs the projection regime: give a `solver`, such as `eqxproj.DouglasRachford()`."
    if not comes_to_rest(solver):
        return (
            "needs a solver with a memory, which comes to rest, such as `eqxproj.DouglasRachford()` or "
            f"`eqxproj.DifferenceMap()`; got {type(solver).__name__}."
        )
    if not isinstance(source, RowSource):
        return "needs minibatches that stay the same: give arrays or a data set with a length in place of an iterable."
    for name, function in (("loss", loss), ("transform", extras.transform)):
        if function is not None and takes_key(function):
            return f"needs a minibatch to be the same problem at each visit, but `{name}` draws new random numbers."
    if extras.parts > 1:
        return "needs whole minibatches: leave `accumulate` out."
    if is_divided or jax.process_count() > 1:
        return "needs all samples of a minibatch on one device: leave `sharding` out."
    return None


def kept_states(
    direction: AbstractDirection,
    model: PyTree,
    source: AbstractSource,
    extras: Extras,
    layers: PyTree,
) -> tuple[Extras, AbstractSource, PyTree]:
    """Extras and data of a run, and the room for its states, `None` where it keeps none."""
    if not (isinstance(direction, Displacement) and direction.options.persists and isinstance(source, RowSource)):
        return extras, source, None
    left = nothing_left(_shapes(direction, model, source, extras, layers), source.period)
    return extras._replace(period=source.period), source.fixed(), left


def _shapes(direction: Displacement, model: PyTree, source: RowSource, extras: Extras, layers: PyTree) -> Left:
    """What is left at one minibatch, without its values."""

    def shaped(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((source.batch_size, *x.shape[1:]), x.dtype)

    key = jax.random.key(0)

    def first(model: PyTree, layers: PyTree, batch: tuple[PyTree, ...]) -> Left:
        batch = transformed(extras.transform, batch, key)
        return direction.left_at_first(model, (layers, *batch) if extras.has_layers else batch, key)

    return eqx.filter_eval_shape(first, model, layers, jtu.tree_map(shaped, source.first()))
