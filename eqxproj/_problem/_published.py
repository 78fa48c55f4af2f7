"""How the software of arXiv 2506.05878 departs from the projections, for parity with its iterates.

`Metric(fan_out="mean")` follows it. Beside the branch of a relu (`rules/scalar.py`), the ten plain Newton steps of a
product (`rules/_multiplier.py`) and the last of tied maxima that rises (`rules/maximum.py`):

- every reader of a value counts as one, for every element, also where its view does not show the element; there it
  proposes what the producer computes at present;
- through a gather, the last of equal indices decides;
- a cyclic algorithm goes through frontiers of nodes, some of them more than once, and after each sets all operands of
  every node that reads from the frontier to function values.

All of this was inferred from published iterates; none of it is used with any other metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._metric import clamped, clamped_output
from ._problem import FeasibilityProblem
from ._readers import collapsed, context, expanded, kappa_of, operand, shown, value_of
from ._state import State


def wish(problem: FeasibilityProblem, state: State, value: int) -> Array | None:
    """The plain mean over the readers of a value of what each wants, times the weight; `None` for nothing."""
    readers = problem.graph.readers[value]
    parts = []
    for edge in readers:
        dual = collapsed(problem, state, edge)
        if dual is not None:
            parts.append(_part(problem, state, edge, value, dual))
    if not parts:
        return None
    scale, _ = kappa_of(problem, value)
    return sum(parts[1:], start=parts[0]) / len(readers) * clamped_output(scale)


def _part(problem: FeasibilityProblem, state: State, edge: int, value: int, dual: Array) -> Array:
    """What one reader wants of each element that it shows: the mean over its copies."""
    spec = problem.graph.edges[edge]
    node = problem.graph.nodes[spec.consumer]
    assert node.rule is not None
    copies = node.rule.copy_counts(node.equation, node.unknown, node.edges.index(edge), problem.copies)
    deciding, position = _deciding(problem, edge, value), spec.sources.index(value)
    up = spec.view.transpose(problem.known, deciding * dual / copies)[position]
    count = spec.view.transpose(problem.known, deciding)[position]
    return up / jnp.maximum(count, 1.0) / clamped(problem.log_weights[edge])


def _deciding(problem: FeasibilityProblem, edge: int, value: int) -> Array:
    """Ones at the elements of an operand that decide: all, but of those gathered from one place the last."""
    spec = problem.graph.edges[edge]
    shape, dtype = spec.variable.shape, spec.variable.dtype
    if not any(e.name == "gather" for e in spec.view.equations):
        return jnp.ones(shape, dtype)
    arrays = [problem.graph.values[v] for v in spec.sources]
    zeros = tuple(jnp.zeros(v.shape, v.dtype) for v in arrays)
    numbers = tuple(
        (1.0 + jnp.arange(math.prod(v.shape), dtype=v.dtype)).reshape(v.shape) if source == value else zero
        for source, v, zero in zip(spec.sources, arrays, zeros, strict=True)
    )
    seen = jax.jvp(lambda *x: spec.view.show(problem.known, x), zeros, numbers)[1].ravel().astype(int)
    order = jnp.arange(seen.size)
    size = math.prod(problem.graph.values[value].shape)
    last = jnp.full((size + 1,), -1).at[seen].max(order)
    return (last[seen] == order).reshape(shape).astype(dtype)


def share_of_readers(problem: FeasibilityProblem, value: int) -> Array | float:
    """For each element of a value, the share of its readers that show it."""
    readers = problem.graph.readers[value]
    total: Array | float = 0.0
    for edge in readers:
        spec = problem.graph.edges[edge]
        ones = jnp.ones(spec.variable.shape, spec.variable.dtype)
        total = total + (spec.view.transpose(problem.known, ones)[spec.sources.index(value)] > 0)
    return total / max(len(readers), 1)


def write_back(problem: FeasibilityProblem, old: State, new: State, nodes: Sequence[int]) -> State:
    """Sets all operands of every node that reads from `nodes` to function values; outside them at `old`'s operands."""
    graph = problem.graph
    written = {v for n in nodes for v in graph.nodes[n].outputs}
    duals = list(new.duals)
    values: dict[int, Array] = {}

    def current(value: int) -> Array:
        producer = graph.producers[value]
        spec = graph.nodes[producer]
        if value in written or spec.rule is None:
            return value_of(problem, new, value)
        if value not in values:
            inputs = [operand(problem, old, e) for e in spec.edges]
            outputs = spec.rule.evaluate(context(problem, producer, old.store_copies), inputs)
            values.update(zip(spec.outputs, outputs, strict=True))
        return values[value]

    for node in graph.nodes:
        if node.rule is None or not any(v in written for e in node.edges for v in graph.edges[e].sources):
            continue
        for edge in node.edges:
            spec = graph.edges[edge]
            wanted = spec.view.show(problem.known, [current(v) for v in spec.sources])
            gap = wanted - shown(problem, new, edge)
            if new.store_copies:
                gap = expanded(problem, edge, gap)
            duals[edge] = gap * clamped(problem.log_weights[edge])
    return eqx.tree_at(lambda s: s.duals, new, tuple(duals), is_leaf=lambda x: x is None)
