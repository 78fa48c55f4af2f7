"""How far a state is from a solution, and how far it has moved: one number each, the largest over all elements."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._problem import FeasibilityProblem
from ._readers import context, operand, value_of
from ._state import State


def violation(problem: FeasibilityProblem, state: State) -> Float[Array, ""]:
    r"""The largest violation of any constraint: $|y - f(x)|$ over the nodes, with every copy of $y$ that there is."""
    graph = problem.graph
    gaps: list[Array] = []
    for i, spec in enumerate(graph.nodes):
        for edge in [e for v in spec.outputs for e in graph.readers[v]]:
            dual = state.duals[edge]
            if dual is not None:
                gaps.append(jnp.max(jnp.abs(dual), initial=0.0) / problem.edge_weight(edge))
        if spec.kind in ("operation", "identity") and not state.up_to_date[i]:
            assert spec.rule is not None
            inputs = [operand(problem, state, e) for e in spec.edges]
            outputs = spec.rule.evaluate(context(problem, i, state.store_copies), inputs)
            gaps += [value_of(problem, state, v) - y for v, y in zip(spec.outputs, outputs, strict=True)]
    return _largest(gaps)


def change(problem: FeasibilityProblem, old: State, new: State) -> Float[Array, ""]:
    """The largest change of any copy or parameter between two states."""
    parameters = [v for v in problem.graph.parameters if v is not None]
    gaps = [operand(problem, new, e) - operand(problem, old, e) for e in range(len(problem.graph.edges))]
    return _largest([*gaps, *(value_of(problem, new, v) - value_of(problem, old, v) for v in parameters)])


def _largest(gaps: Iterable[Array]) -> Float[Array, ""]:
    worst = jnp.asarray(0.0)
    for gap in gaps:
        worst = jnp.maximum(worst, jnp.max(jnp.abs(gap), initial=0.0).astype(worst.dtype))
    return worst
