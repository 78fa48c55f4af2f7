"""Where a solver starts: at the forward pass, at random copies, or at a state of another run, which is checked here.

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


def fits(problem: FeasibilityProblem, state: State, like: State) -> bool:
    """Whether a state is one of this problem, and of a solver that starts from `like`."""
    graph, counts = problem.graph, (len(state.values), len(state.shifts), len(state.duals))
    if counts != (len(graph.values), len(graph.values), len(graph.edges)) or state.store_copies != like.store_copies:
        return False
    variables = [edge.variable for edge in graph.edges]
    copies = [copies_of(problem, e) for e in range(counts[2])] if state.store_copies else variables
    exact = [*zip(state.values, like.values, strict=True)]
    exact += zip(state.gains, like.gains, strict=False)
    moves = [*zip(state.shifts, graph.values, strict=True), *zip(state.duals, copies, strict=True)]
    return (
        len(state.gains) == len(like.gains)
        and all((x is None) == (y is None) for x, y in exact)
        and all(x.shape == y.shape for x, y in (*exact, *moves) if x is not None)
    )


def _random_dual(problem: FeasibilityProblem, state: State, edge: int, key: Array) -> Array:
    """The dual that makes the copies of an edge random."""
    copies = _uniform(key, copies_of(problem, edge))
    return in_duals(problem.edge_weight(edge), copies - expanded(problem, edge, shown(problem, state, edge)))


def _uniform(key: Array, like: Array | jax.ShapeDtypeStruct) -> Array:
    return (
        jax.random.uniform(key, like.shape, like.dtype, -1.0, 1.0) if like.size else jnp.zeros(like.shape, like.dtype)
    )
