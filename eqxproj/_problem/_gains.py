r"""Weights that move while a solver runs: a factor $g$ of the weights of the copies of each constraint.

Transforms gaps into gains, and duals into what makes copies with gains equal: with the copies $u_c$ of a value, of
gains $g_c$, their mean $\sum g_c u_c / \sum g_c$. Limits: the unit metric, every copy stored, and a graph in which all
operations have one color, so that no rule of an operation sees copies of unlike gains. A constraint does not feel a
factor that all of its copies share.

Source: Elser, Lal, "Learning with Boolean threshold functions" (arXiv 2602.17493), on the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._errors import described
from ..rules._base import in_duals, step
from ._problem import FeasibilityProblem
from ._readers import collapsed, context, copies_of, operand, parameter_weight
from ._state import State


def check_gains(problem: FeasibilityProblem, name: str) -> None:
    """Raises a `ValueError` where a problem has no place for gains; `name` is what asks for them."""
    graph, metric = problem.graph, problem.metric
    if not (metric.grade == metric.parameter == 1.0):
        raise ValueError(f"`{name}` needs the unit metric, but `problem` has {metric}. Make it without `metric`.")
    if problem.copies == "none":
        raise ValueError(f'`{name}` moves the weights of copies. Make `problem` with copies="neuron".')
    mixed = [n for n, color in zip(graph.nodes, graph.colors, strict=True) if n.kind == "operation" and color == 0]
    if mixed:
        raise ValueError(
            f"`{name}` needs all operations in one color, but {described(mixed[0].operation)} has the color of the "
            "objective. Make `problem` with `concurrence=True`."
        )
    if not graph.hard:
        raise ValueError(f"`{name}` needs a loss that is a set, such as `eqxproj.losses.equal` or `margin`.")


def unit_gains(problem: FeasibilityProblem) -> tuple[Array | None, ...]:
    """Gains of one for every constraint of the operations, and `None` for other nodes."""

    def ones(node: int) -> Array | None:
        if problem.graph.colors[node] == 0 or problem.graph.nodes[node].rule is None:
            return None
        shape = jax.eval_shape(lambda: _gathered(problem, node, *_blank(problem, node)))
        return jnp.ones(shape.shape, shape.dtype)

    return tuple(map(ones, range(len(problem.graph.nodes))))


def reweighted(problem: FeasibilityProblem, state: State, on_a: State, on_b: State, rate: float) -> State:
    r"""The state with gains moved by $g \leftarrow g + \rho\,(\mathrm{gap}^2 / \overline{\mathrm{gap}^2} - g)$.

    The gap of a constraint is the distance of its copies between the two projections. The mean is that of all
    constraints; gains add up to their number.
    """
    squares = [None if g is None else _squares(problem, n, on_a, on_b) for n, g in enumerate(state.gains)]
    found = [x for x in squares if x is not None]
    mean = sum((x.sum() for x in found), start=jnp.asarray(0.0)) / sum(x.size for x in found)
    mean = jnp.where(mean > 0, mean, 1.0)

    def moved(g: Array | None, x: Array | None) -> Array | None:
        return None if g is None or x is None else g + rate * (x / mean.astype(g.dtype) - g)

    return replace(state, gains=tuple(map(moved, state.gains, squares)))


def consensus(problem: FeasibilityProblem, state: State, value: int) -> tuple[Array, Array]:
    """How far a value is to move to the mean of its readers' copies, and the sum of these copies' gains."""
    total: Array | float = 0.0
    count: Array | float = 0.0
    for edge in problem.graph.readers[value]:
        spec, gain = problem.graph.edges[edge], _edge_gain(problem, state, edge)
        position = spec.sources.index(value)
        count = count + spec.view.transpose(problem.known, _total(problem, state, edge))[position]
        if (dual := state.duals[edge]) is not None:
            wanted = _summed(problem, edge, gain * step(problem.edge_weight(edge), dual))
            total = total + spec.view.transpose(problem.known, wanted)[position]
    count = jnp.asarray(count)
    return total / jnp.where(count > 0, count, 1.0), count


def moved_parameter(problem: FeasibilityProblem, state: State, value: int) -> Array:
    """The dual, in the plain weights, that takes a parameter to the mean of its copies."""
    return in_duals(parameter_weight(problem, value), consensus(problem, state, value)[0])


def moved_identity(problem: FeasibilityProblem, state: State, node: int) -> tuple[list[Array], list[Array]]:
    """The duals of the operand of an identity node, and its output: the mean of all of their copies."""
    spec = problem.graph.nodes[node]
    (edge,), (value,) = spec.edges, spec.outputs
    own, x, written = _edge_gain(problem, state, edge), operand(problem, state, edge), state.values[value]
    further, count = consensus(problem, state, value)
    new = x + count / (own + count) * (written + further - x)
    return [in_duals(problem.edge_weight(edge), new - x)], [new.astype(written.dtype)]


def _edge_gain(problem: FeasibilityProblem, state: State, edge: int) -> Array:
    """The gains of the copies that an edge holds: those of the operation at one of its ends."""
    graph, spec = problem.graph, problem.graph.edges[edge]
    if (gain := state.gains[spec.consumer]) is not None:
        place = graph.nodes[spec.consumer].edges.index(edge)
        return _spread(problem, spec.consumer, gain)[0][place]
    shown = []
    for value in spec.sources:
        producer = graph.producers[value]
        gain, like = state.gains[producer], graph.values[value]
        if gain is None:
            shown.append(jnp.ones(like.shape, like.dtype))
        else:
            shown.append(_spread(problem, producer, gain)[1][graph.nodes[producer].outputs.index(value)])
    return spec.view.show(problem.known, shown)


def _total(problem: FeasibilityProblem, state: State, edge: int) -> Array:
    """The sum of the gains of an edge's copies, in the shape of its operand: what gathers equal copies, transposed."""
    spec = problem.graph.edges[edge]
    gain, node = state.gains[spec.consumer], problem.graph.nodes[spec.consumer]
    if gain is None or node.rule is None:
        return _summed(problem, edge, _edge_gain(problem, state, edge))
    rule, ctx, place = node.rule, context(problem, spec.consumer, True), node.edges.index(edge)
    like = jax.ShapeDtypeStruct(spec.variable.shape, spec.variable.dtype)

    def gathered(u: Array) -> Array:
        return rule.gathered_alike(ctx, place, u, *_blank(problem, spec.consumer))

    return jax.linear_transpose(gathered, like)(gain)[0]


def _blank(problem: FeasibilityProblem, node: int) -> tuple[list[Array], list[Array]]:
    spec, graph = problem.graph.nodes[node], problem.graph
    copies = [jnp.zeros(s.shape, s.dtype) for s in (copies_of(problem, e) for e in spec.edges)]
    return copies, [jnp.zeros(graph.values[v].shape, graph.values[v].dtype) for v in spec.outputs]


def _gathered(problem: FeasibilityProblem, node: int, copies: Sequence[Array], outputs: Sequence[Array]) -> Array:
    rule = problem.graph.nodes[node].rule
    assert rule is not None
    return rule.gathered(context(problem, node, True), copies, outputs)


def _spread(problem: FeasibilityProblem, node: int, gain: Array) -> tuple[list[Array], list[Array]]:
    """The gains of the constraints of a node, for each of its copies and outputs."""
    shapes = jax.eval_shape(lambda: _blank(problem, node))
    back = jax.linear_transpose(lambda copies, outputs: _gathered(problem, node, copies, outputs), *shapes)
    return back(gain)


def _squares(problem: FeasibilityProblem, node: int, on_a: State, on_b: State) -> Array:
    """The squared distance of the copies of each constraint of a node between two states."""

    def apart(edge: int) -> Array:
        return jnp.square(operand(problem, on_b, edge) - operand(problem, on_a, edge))

    def read(value: int, edge: int) -> Array:
        spec = graph.edges[edge]
        return spec.view.transpose(problem.known, apart(edge))[spec.sources.index(value)]

    graph = problem.graph
    spec = graph.nodes[node]
    outputs = []
    for value in spec.outputs:  # the copies of an output are what its readers hold
        first, *others = (read(value, edge) for edge in graph.readers[value])
        outputs.append(sum(others, start=first))
    return _gathered(problem, node, [apart(e) for e in spec.edges], outputs)


def _summed(problem: FeasibilityProblem, edge: int, copies: Array) -> Array:
    """What is given for each copy of an edge, added up in the shape of its operand."""
    duals: list[Array | None] = [None] * len(problem.graph.edges)
    duals[edge] = copies
    nothing = (None,) * len(problem.graph.values)
    summed = collapsed(problem, State(nothing, nothing, tuple(duals), (), True), edge)
    assert summed is not None
    return summed
