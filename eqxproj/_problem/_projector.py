"""The projection of a state onto the constraints of some of the nodes.

This is where the nodes' rules, which speak of their own operands and outputs alone, meet the graph: what the consumers
of a value want of it is gathered, the rule answers, and its answer is written to the edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._metric import clamped_output
from . import _published
from ._problem import FeasibilityProblem
from ._readers import collapsed, context, expanded, kappa_of, operand, value_of
from ._state import State


def _wishes(problem: FeasibilityProblem, state: State, value: int, cache: dict[int, tuple[Array, ...]]) -> Array | None:
    r"""What the consumers of a value want of it: $\kappa$ times the wanted change, `None` for nothing.

    That is the sum of their duals, through the transposes of their views.
    """
    if problem.as_published:
        return _published.wish(problem, state, value)
    total = None
    for edge in problem.graph.readers[value]:
        spec = problem.graph.edges[edge]
        dual = collapsed(problem, state, edge)
        if dual is None:
            continue
        if edge not in cache:
            cache[edge] = spec.view.transpose(problem.known, dual)
        part = cache[edge][spec.sources.index(value)]
        total = part if total is None else total + part
    return total


def project(problem: FeasibilityProblem, state: State, nodes: Iterable[int]) -> State:
    """Projects onto the constraints of `nodes`, no two of which share an edge. The order is of no account."""
    values, shifts, duals = list(state.values), list(state.shifts), list(state.duals)
    up_to_date = list(state.up_to_date)
    graph = problem.graph
    cache: dict[int, tuple[Array, ...]] = {}
    cleared: set[int] = set()
    for node in nodes:
        spec = graph.nodes[node]
        wishes = [_wishes(problem, state, v, cache) for v in spec.outputs]
        if spec.kind in ("parameter", "data"):
            (value,) = spec.outputs
            if spec.kind == "parameter" and wishes[0] is not None:
                shift = state.shifts[value]
                shifts[value] = wishes[0] if shift is None else shift + wishes[0]
                _outdate(problem, up_to_date, value)
            cleared.add(value)
            continue
        moved = _move(problem, state, node, wishes)
        if moved is None:
            cleared.update(spec.outputs)
            continue
        nus, outputs = moved
        for edge, nu in zip(spec.edges, nus, strict=True):
            old = state.duals[edge]
            duals[edge] = nu if old is None else old + nu
        for value, output in zip(spec.outputs, outputs, strict=True):
            values[value] = output
            cleared.add(value)
            _outdate(problem, up_to_date, value)
        up_to_date[node] = True
    _clear(problem, state, duals, cleared)
    if state.store_copies or not any(state.up_to_date):
        up_to_date = [False] * len(up_to_date)
    return State(tuple(values), tuple(shifts), tuple(duals), tuple(up_to_date), state.store_copies)


def _move(problem: FeasibilityProblem, state: State, node: int, wishes: Sequence[Array | None]):
    """The duals and outputs of one node's projection; `None` where it has nothing to do."""
    spec = problem.graph.nodes[node]
    assert spec.rule is not None
    if spec.kind != "objective" and state.up_to_date[node] and all(w is None for w in wishes):
        return None
    ctx = replace(context(problem, node, state.store_copies), unmoved=_is_unmoved(problem, state, node))
    inputs = [operand(problem, state, e) for e in spec.edges]
    duals = []
    # In a steep metric a leap would be a gap, times its weight, to the node and to what reads it: neither minds it.
    leaps = problem.metric.is_steep and not problem.as_published and spec.rule.leaps
    current = state.up_to_date[node] or not spec.outputs or leaps
    outputs = None if current else spec.rule.evaluate(ctx, inputs)
    for i, value in enumerate(spec.outputs):
        wish = wishes[i]
        dual = jnp.zeros(problem.graph.values[value].shape, problem.graph.values[value].dtype) if wish is None else wish
        if outputs is not None:
            scale, share = kappa_of(problem, value)
            gap = value_of(problem, state, value) - outputs[i]
            if problem.as_published:
                gap = gap * _published.share_of_readers(problem, value)
            elif problem.metric.is_steep:
                gap = _above_rounding(gap, outputs[i])
            dual = dual + gap * jnp.asarray(share * clamped_output(scale), gap.dtype)
        duals.append(dual)
    nus, moved = spec.rule.project(ctx, inputs, duals)
    return nus, [value_of(problem, state, v) for v in spec.outputs] if leaps else moved


def _above_rounding(gap: Array, output: Array) -> Array:
    """A gap between a value and what its producer now computes, without what two evaluations differ by from rounding.

    Times the weights of a steep metric, that is no small number any more: next to the duals of a gradient's size it is
    everything. A gap that comes from moves of the operands is as small there, and the duals tell of them.
    """
    size = jnp.max(jnp.abs(output), initial=0.0)
    return jnp.where(jnp.abs(gap) > _ROUNDING * jnp.finfo(gap.dtype).eps * size, gap, jnp.zeros_like(gap))


_ROUNDING = 32.0
"""In units of the precision of the largest output."""


def _is_unmoved(problem: FeasibilityProblem, state: State, node: int) -> bool:
    """Whether a node's operands are known to be, while tracing, those of the forward pass."""
    for edge in problem.graph.nodes[node].edges:
        sources = problem.graph.edges[edge].sources
        written = all(state.values[v] is problem.forward[v] and state.shifts[v] is None for v in sources)
        if not written or state.duals[edge] is not None:
            return False
    return True


def _clear(problem: FeasibilityProblem, state: State, duals: list[Array | None], values: set[int]) -> None:
    """Producers have written `values`: the copies of their edges equal them, where an edge shows them."""
    for edge in {e for value in values for e in problem.graph.readers[value]}:
        sources, dual = problem.graph.edges[edge].sources, duals[edge]
        if dual is None or all(v in values for v in sources):
            duals[edge] = None
            continue
        for value in sources:
            if value in values:
                dual = dual * (1.0 - _mask(problem, state, edge, value)).astype(dual.dtype)
        duals[edge] = dual


def _mask(problem: FeasibilityProblem, state: State, edge: int, value: int) -> Array:
    """Ones where an edge shows `value`. What shows no value (known constants) belongs to the first source."""
    spec = problem.graph.edges[edge]

    def copies(*sources):
        u = spec.view.show(problem.known, sources)
        return expanded(problem, edge, u) if state.store_copies else u

    arrays = [problem.graph.values[v] for v in spec.sources]
    zeros = tuple(jnp.zeros(v.shape, v.dtype) for v in arrays)
    first = spec.sources[0] == value
    ones = tuple(
        jnp.full(v.shape, float((source == value) != first), v.dtype)
        for source, v in zip(spec.sources, arrays, strict=True)
    )
    seen = jax.jvp(copies, zeros, ones)[1]
    return 1.0 - seen if first else seen


def _outdate(problem: FeasibilityProblem, up_to_date: list[bool], value: int) -> None:
    for edge in problem.graph.readers[value]:
        up_to_date[problem.graph.edges[edge].consumer] = False


def project_layer(problem: FeasibilityProblem, state: State, nodes: Sequence[int]) -> State:
    """`project`, for solvers that go through layers one after another."""
    new = project(problem, state, nodes)
    return _published.write_back(problem, state, new, nodes) if problem.as_published else new
