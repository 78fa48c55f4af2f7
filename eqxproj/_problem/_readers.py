"""How copies, values, weights and the contexts of nodes are read from a problem and a state."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._graph._weights import reader_logs
from .._metric import clamped
from ..rules._base import Context, Scale, step
from ._problem import FeasibilityProblem
from ._state import State


def output_weight(problem: FeasibilityProblem, value: int) -> tuple[float, Scale]:
    """The weight of a value: the logarithm of its scale, and the weight in units of that scale."""
    logs = reader_logs(problem.graph, problem.metric, problem.log_weights, value)
    return max(logs, default=0.0), problem.copy_counts[value]


def _positive(count: Scale) -> Scale:
    """Ones where an element has no copies: nothing is wanted of it, so any weight will do."""
    return count if isinstance(count, float) else jnp.where(count > 0, count, 1.0)


def context(problem: FeasibilityProblem, node: int, store_copies: bool) -> Context:
    """What the rule of a node may know.

    **Arguments:**

    - `problem`, `node`: the problem and the number of one of its nodes.
    - `store_copies`: whether operands hold one entry a copy.
    """
    graph, spec = problem.graph, problem.graph.nodes[node]
    function, outputs = spec.function, [output_weight(problem, v) for v in spec.outputs]
    assert function is not None
    plain = Context(
        function=lambda *inputs: function(problem.known, inputs),
        known=problem.known,
        equation=spec.equation,
        unknown=spec.unknown,
        read=spec.read,
        copies=problem.copies,
        store_copies=store_copies,
        is_parameter=tuple(graph.edges[e].is_parameter for e in spec.edges),
        scale=spec.scale * problem.tau,
        metric=problem.metric,
        unit=problem.unit,
        noise=problem.noise,
        reached=tuple(problem.reach.reached[v] for v in spec.outputs),
        prepared=problem.prepared.get(node),
        accuracy=problem.accuracy,
    )
    logs = [problem.log_weights[e] for e in spec.edges]
    return plain.reweighted(logs, [log for log, _ in outputs], [_positive(count) for _, count in outputs])


def value_of(problem: FeasibilityProblem, state: State, value: int) -> Array:
    """A value as its producer last wrote it."""
    if (written := state.values[value]) is not None:
        return written
    start, moved = problem.initial[value], moved_by(problem, state, value)
    assert start is not None
    return start if moved is None else start + moved.astype(start.dtype)


def moved_by(problem: FeasibilityProblem, state: State, value: int) -> Array | None:
    """How far a parameter has moved since the start; `None` for not at all."""
    shift = state.shifts[value]
    if shift is None:
        return None
    return step(parameter_weight(problem, value), shift)


def parameter_weight(problem: FeasibilityProblem, value: int) -> Scale:
    """What leads from the dual of a parameter to how far it has moved."""
    scale, count = output_weight(problem, value)
    return _positive(count) * clamped(scale)


def shown(problem: FeasibilityProblem, state: State, edge: int) -> Array:
    """What an edge shows: its values through its view."""
    spec = problem.graph.edges[edge]
    return spec.view.show(problem.known, [value_of(problem, state, v) for v in spec.sources])


def expanded(problem: FeasibilityProblem, edge: int, u: Array) -> Array:
    """The copies that the consumer of an edge owns of an operand."""
    number = problem.graph.edges[edge].consumer
    node = problem.graph.nodes[number]
    assert node.rule is not None
    return node.rule.expand(context(problem, number, True), node.edges.index(edge), u)


def copies_of(problem: FeasibilityProblem, edge: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the copies that an edge holds where every copy is stored."""
    variable = problem.graph.edges[edge].variable
    like = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    return jax.eval_shape(lambda u: expanded(problem, edge, u), like)


def shown_marks(problem: FeasibilityProblem, edge: int, marks: Sequence[Array], store_copies: bool) -> Array:
    """What an edge shows of arrays in the place of its values, without the known constants of its view."""

    def copies(*sources: Array) -> Array:
        u = problem.graph.edges[edge].view.show(problem.known, sources)
        return expanded(problem, edge, u) if store_copies else u

    return jax.jvp(copies, tuple(map(jnp.zeros_like, marks)), tuple(marks))[1]


def operand(problem: FeasibilityProblem, state: State, edge: int) -> Array:
    """The copies that an edge holds; where copies are not stored, their common value and the sum of their duals."""
    u = shown(problem, state, edge)
    if state.store_copies:
        u = expanded(problem, edge, u)
    dual = state.duals[edge]
    return u if dual is None else u + step(clamped(problem.log_weights[edge]), dual).astype(u.dtype)


def collapsed(problem: FeasibilityProblem, state: State, edge: int) -> Array | None:
    """The sum of the duals of an edge's copies, in the shape of the operand."""
    dual = state.duals[edge]
    if dual is None or not state.store_copies:
        return dual
    variable = problem.graph.edges[edge].variable
    if copies_of(problem, edge).shape == variable.shape:
        return dual
    like = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    return jax.linear_transpose(lambda u: expanded(problem, edge, u), like)(dual)[0]
