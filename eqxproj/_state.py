"""The state of an algorithm, and how copies, values and weights are read from it.

The copy of a value $v$ that an edge holds is $u = S v + \\mu/w$: the value as its producer last wrote it, shown
through the edge's view, and the *dual* that its consumer has added. Nothing is lost to rounding when a dual is far
below the value. Parameters likewise are their initial value and an accumulated dual. A dual that is `None` is zero,
and a node whose operands have no dual and whose output is up to date (`fresh`) has nothing to do: both are known
while tracing, so that one sweep from the forward pass costs what it must.

Algorithms that return to consensus before each projection keep, for an operand with several copies, the sum of their
duals; `memory` marks a state that keeps every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._metric import clamped, clamped_output, ratio, reader_logs
from .rules._rule import Context, is_negligible, step

if TYPE_CHECKING:
    from ._problem import FeasibilityProblem


class State(eqx.Module):
    """Values, edges' duals, and what is known of them while tracing.

    - `values`: for each value that a node puts out, the array it last wrote; `None` for parameters and data.
    - `shifts`: for each parameter the dual accumulated since the start; `None` elsewhere, and where it is zero.
    - `duals`: for each edge its dual, in the shape of the operand, or with `memory` of its copies.
    - `fresh`: for each node, whether its output is the function of its operands.
    """

    values: tuple[Array | None, ...]
    shifts: tuple[Array | None, ...]
    duals: tuple[Array | None, ...]
    fresh: tuple[bool, ...] = eqx.field(static=True)
    memory: bool = eqx.field(static=True)


def conformed(state: State, like: State) -> State:
    """The state with zeros where it has `None` and `like` has an array."""

    def fill(x, y):
        return jnp.zeros(y.shape, y.dtype) if x is None and y is not None else x

    shifts, duals = (
        tuple(fill(x, y) for x, y in zip(mine, other, strict=True))
        for mine, other in ((state.shifts, like.shifts), (state.duals, like.duals))
    )
    return State(state.values, shifts, duals, (False,) * len(state.fresh), state.memory)


def settled(step: Callable[[State], State], state: State) -> State:
    """A state to start iterating from: what a step leaves at zero stays `None`, all else is an array from the start."""
    state = conformed(state, state)
    while True:
        more = conformed(state, jax.eval_shape(step, state))
        if jtu.tree_structure(more) == jtu.tree_structure(state):
            return state
        state = more


def combine(coefficients: Sequence[float], states: Sequence[State]) -> State:
    """The affine combination of states; the coefficients add up to one."""

    def mix(*leaves):
        parts = [jnp.asarray(c, x.dtype) * x for c, x in zip(coefficients, leaves, strict=True) if x is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    first = states[0]
    groups = zip(*((s.values, s.shifts, s.duals) for s in states), strict=True)
    values, shifts, duals = (jtu.tree_map(mix, *group, is_leaf=lambda x: x is None) for group in groups)
    return State(values, shifts, duals, (False,) * len(first.fresh), first.memory)


# Weights.


def kappa_of(problem: FeasibilityProblem, value: int, memory: bool) -> tuple[float, float | Array]:
    """The weight of a value: the logarithm of its scale, and the weight in units of that scale."""
    logs = reader_logs(problem.graph, problem.metric, problem.log_weights, value)
    share = 1.0 if problem.as_published else problem.shares[int(memory)][value]
    return max(logs, default=0.0), share


def _positive(share: float | Array) -> float | Array:
    """Ones where an element has no copies: nothing is wanted of it, and its weight is of no account."""
    return share if isinstance(share, float) else jnp.where(share > 0, share, 1.0)


def context(problem: FeasibilityProblem, node: int, memory: bool) -> Context:
    graph, spec = problem.graph, problem.graph.nodes[node]
    logs = tuple(problem.log_weights[e] for e in spec.edges)
    weights = tuple(clamped(x) for x in logs)
    kappa, ratios = [], []
    for value in spec.outputs:
        scale, share = kappa_of(problem, value, memory)
        share = _positive(share)
        kappa.append(share * clamped_output(scale))
        exact = [ratio(scale, x) for x in logs]
        most = [problem.largest_shares[int(memory)][value] * r for r in exact]  # where it does not matter, one number
        ratios.append(tuple(m if is_negligible([m]) else share * r for m, r in zip(most, exact, strict=True)))
    function = spec.function
    assert function is not None
    return Context(
        function=lambda *inputs: function(problem.known, inputs),
        known=problem.known,
        equation=spec.equation,
        unknown=spec.unknown,
        weights=weights,
        log_weights=logs,
        kappa=tuple(kappa),
        ratios=tuple(ratios),
        copies=problem.copies,
        memory=memory,
        weight_like=tuple(graph.edges[e].is_parameter for e in spec.edges),
        scale=spec.scale * problem.tau,
        metric=problem.metric,
        unit=problem.unit,
        as_published=problem.as_published,
    )


# Reading.


def value_of(problem: FeasibilityProblem, state: State, value: int) -> Array:
    """A value as its producer last wrote it."""
    written = state.values[value]
    if written is not None:
        return written
    start = problem.initial[value]
    assert start is not None
    moved = moved_by(problem, state, value)
    return start if moved is None else start + moved.astype(start.dtype)


def moved_by(problem: FeasibilityProblem, state: State, value: int) -> Array | None:
    """How far a parameter has moved since the start; `None` for not at all."""
    shift = state.shifts[value]
    if shift is None:
        return None
    scale, share = kappa_of(problem, value, state.memory)
    return step(_positive(share) * clamped(scale), shift)


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


def operand(problem: FeasibilityProblem, state: State, edge: int) -> Array:
    """The copies that an edge holds, without its dual expanded where the state has memory."""
    u = shown(problem, state, edge)
    if state.memory:
        u = expanded(problem, edge, u)
    dual = state.duals[edge]
    return u if dual is None else u + step(clamped(problem.log_weights[edge]), dual).astype(u.dtype)


def collapsed(problem: FeasibilityProblem, state: State, edge: int) -> Array | None:
    """The sum of the duals of an edge's copies, in the shape of the operand."""
    dual = state.duals[edge]
    if dual is None or not state.memory:
        return dual
    variable = problem.graph.edges[edge].variable
    like = jnp.zeros(variable.shape, variable.dtype)
    if jax.eval_shape(lambda u: expanded(problem, edge, u), like).shape == like.shape:
        return dual
    return jax.vjp(lambda u: expanded(problem, edge, u), like)[1](dual)[0]
