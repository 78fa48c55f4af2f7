"""Where a solver starts: at the forward pass, or at random copies.

Transforms a problem and a key into a state. Limits: an algorithm that returns to consensus before each projection has
no copies of its own, so that for it the values are random, and all copies of one are equal.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._problem._problem import FeasibilityProblem
from .._problem._readers import copies_of, expanded, parameter_weight, shown
from .._problem._state import State
from ..rules._base import in_duals


def random_start(problem: FeasibilityProblem, key: Array, store_copies: bool) -> State:
    """A state whose copies are drawn at random, uniformly from [-1, 1]; values, where copies are not stored."""
    graph, state = problem.graph, problem.start(store_copies)
    count = len(graph.edges) if state.store_copies else len(graph.values)
    keys = jax.random.split(key, max(count, 1))
    stale = (False,) * len(graph.nodes)
    if state.store_copies:
        duals = tuple(_random_dual(problem, state, edge, keys[edge]) for edge in range(count))
        return replace(state, duals=duals, up_to_date=stale)
    values, shifts = list(state.values), list(state.shifts)
    for value, node in enumerate(graph.producers):
        old, start = state.values[value], problem.initial[value]
        if old is not None:
            values[value] = _uniform(keys[value], old)
        elif graph.nodes[node].kind == "parameter":
            assert start is not None
            moved = _uniform(keys[value], start) - start
            shifts[value] = in_duals(parameter_weight(problem, value), moved)
    return replace(state, values=tuple(values), shifts=tuple(shifts), up_to_date=stale)


def _random_dual(problem: FeasibilityProblem, state: State, edge: int, key: Array) -> Array:
    """The dual that makes the copies of an edge random."""
    copies = _uniform(key, copies_of(problem, edge))
    return in_duals(problem.edge_weight(edge), copies - expanded(problem, edge, shown(problem, state, edge)))


def _uniform(key: Array, like: Array | jax.ShapeDtypeStruct) -> Array:
    return (
        jax.random.uniform(key, like.shape, like.dtype, -1.0, 1.0) if like.size else jnp.zeros(like.shape, like.dtype)
    )
