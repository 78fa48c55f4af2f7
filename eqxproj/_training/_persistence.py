"""What a solver leaves at a minibatch, and goes on from when it meets the same minibatch again.

Transforms a state into the part of it that belongs to the minibatch: values and duals of what depends on the data. All
that depends on the parameters alone starts anew, since other minibatches have moved them. Limits: minibatches must stay
the same, and there is a state for each of them, of the size of all activations and their duals.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._problem._problem import FeasibilityProblem
from .._problem._state import State
from .._program._equations import dependents


class Left(eqx.Module):
    """What is left at a minibatch: for each value and each edge an array, or `None` where it starts anew."""

    values: tuple[Array | None, ...]
    duals: tuple[Array | None, ...]


def left_by(problem: FeasibilityProblem, state: State) -> Left:
    """What of a state belongs to the minibatch."""
    found = dependents(problem.trace.program.equations, problem.trace.data)
    of_data = [variable.index in found for variable in problem.graph.values]
    values = tuple(x if keep else None for x, keep in zip(state.values, of_data, strict=True))
    keeps = [any(of_data[v] for v in edge.sources) for edge in problem.graph.edges]
    return Left(values, tuple(x if keep else None for x, keep in zip(state.duals, keeps, strict=True)))


def taken_up(fresh: State, left: Left, is_first: Bool[Array, ""]) -> State:
    """A fresh state with what was left at its minibatch, unless this is the first visit."""

    def chosen(new: Array | None, old: Array | None) -> Array | None:
        return new if old is None or new is None else jnp.where(is_first, new, old)

    values, duals = (tuple(map(chosen, *pair)) for pair in ((fresh.values, left.values), (fresh.duals, left.duals)))
    return replace(fresh, values=values, duals=duals, up_to_date=(False,) * len(fresh.up_to_date))


def nothing_left(like: PyTree, period: int) -> PyTree:
    """Room for what is left at so many minibatches."""
    return jtu.tree_map(lambda x: jnp.zeros((period, *x.shape), x.dtype), like)


def at(stacked: PyTree, place: Any) -> PyTree:
    """One item of stacked arrays, such as what is left at one minibatch."""
    return jtu.tree_map(lambda x: jax.lax.dynamic_index_in_dim(x, place, 0, keepdims=False), stacked)


def put(left: PyTree, new: PyTree, place: Any, ok: Bool[Array, ""]) -> PyTree:
    """The same with something new at one minibatch, where all is well."""

    def written(stacked: Array, new: Array, old: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, jnp.where(ok, new, old), place, 0)

    return jtu.tree_map(written, left, new, at(left, place))
