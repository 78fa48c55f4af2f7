"""How far a state is from a solution, and how far it has moved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._problem import FeasibilityProblem
from ._readers import context, operand, value_of
from ._state import State


class Measures(NamedTuple):
    """What is measured of a step.

    - `change`: the largest change of any copy or parameter.
    - `gap`: the distance of the two projections that the step is made of: the root of the squared changes of all
        copies, in the mean over the constraints (the elements of all outputs), over the solver's `gap_scale`.
    - `violation`: the largest distance of any node's output copies from the function of its input copies.
    """

    change: Float[Array, ""]
    gap: Float[Array, ""]
    violation: Float[Array, ""]


def measured(problem: FeasibilityProblem, old: State, new: State, gap_scale: float) -> Measures:
    """The measures of a step from one state to the next."""
    graph, copies = problem.graph, _copy_moves(problem, old, new)
    count = sum(math.prod(graph.values[v].shape) for node in graph.nodes if node.rule is not None for v in node.outputs)
    squares = sum((jnp.sum(jnp.square(x), dtype=jnp.float32) for x in copies), start=jnp.asarray(0.0))
    gap = jnp.sqrt(squares / max(count, 1)) / gap_scale
    largest = _largest([*copies, *_parameter_moves(problem, old, new)])
    return Measures(largest, gap, violation(problem, new))


def _copy_moves(problem: FeasibilityProblem, old: State, new: State) -> list[Array]:
    return [operand(problem, new, e) - operand(problem, old, e) for e in range(len(problem.graph.edges))]


def _parameter_moves(problem: FeasibilityProblem, old: State, new: State) -> list[Array]:
    parameters = [v for v in problem.graph.parameters if v is not None]
    return [value_of(problem, new, v) - value_of(problem, old, v) for v in parameters]


def violation(problem: FeasibilityProblem, state: State) -> Float[Array, ""]:
    r"""The largest violation of any constraint: $|y - f(x)|$ over the nodes, with every copy of $y$ that there is."""
    return _largest(x for node in range(len(problem.graph.nodes)) for x in _violations(problem, state, node))


def violations(problem: FeasibilityProblem, state: State) -> dict[str, Float[Array, ""]]:
    """The largest violation of the constraints of each operation, by its name."""
    found: dict[str, list[Array]] = {}
    for number, node in enumerate(problem.graph.nodes):
        found.setdefault(node.operation, []).extend(_violations(problem, state, number))
    return {name: _largest(gaps) for name, gaps in found.items() if gaps}


def _violations(problem: FeasibilityProblem, state: State, number: int) -> list[Array]:
    """The violations of one node's constraint, and of the equality of its outputs' copies."""
    graph, gaps = problem.graph, []
    spec = graph.nodes[number]
    for edge in [e for v in spec.outputs for e in graph.readers[v]]:
        dual = state.duals[edge]
        if dual is not None:
            gaps.append(jnp.max(jnp.abs(dual), initial=0.0) / problem.edge_weight(edge))
    if spec.kind in ("operation", "identity") and not state.up_to_date[number]:
        assert spec.rule is not None
        inputs = [operand(problem, state, e) for e in spec.edges]
        outputs = spec.rule.evaluate(context(problem, number, state.store_copies), inputs)
        gaps += [value_of(problem, state, v) - y for v, y in zip(spec.outputs, outputs, strict=True)]
    return gaps


def change(problem: FeasibilityProblem, old: State, new: State) -> Float[Array, ""]:
    """The largest change of any copy or parameter between two states."""
    return _largest([*_copy_moves(problem, old, new), *_parameter_moves(problem, old, new)])


def _largest(gaps: Iterable[Array]) -> Float[Array, ""]:
    worst = jnp.asarray(0.0)
    for gap in gaps:
        worst = jnp.maximum(worst, jnp.max(jnp.abs(gap), initial=0.0).astype(worst.dtype))
    return worst
