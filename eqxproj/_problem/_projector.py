r"""The projection of a state onto the constraints of some of the nodes.

Here rules, which speak of their own operands and outputs alone, meet the graph: the duals of a value's consumers are
gathered, the rule answers by its pullback or its projection, the operands move, and the outputs are evaluated. Limits:
no two of the nodes may share an edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._metric import clamped_output
from ..rules._base import SOLVING, AbstractRule, Context, Projected, as_duals, in_duals, outputs_after, step
from ._gains import moved_identity, moved_parameter
from ._problem import AbstractProjector, FeasibilityProblem
from ._readers import collapsed, context, operand, output_weight, parameter_weight, shown_marks, value_of
from ._state import State

Incoming = dict[int, Array | None]
"""The incoming dual of each value."""
Answer = tuple[Sequence[Array], Sequence[Array]]
"""The duals of a node's operands, and its outputs."""
_ROUNDING = 32.0
"""In units of the precision of the largest output."""


@dataclass(frozen=True)
class Projector(AbstractProjector):
    """The exact projector of both regimes."""

    stores_copies: bool = False

    def project(self, problem: FeasibilityProblem, state: State, nodes: Sequence[int]) -> State:
        weighted = {n for n in nodes if state.gains and problem.graph.colors[n] == 0}
        incoming = self.incoming(problem, state, [n for n in nodes if n not in weighted])
        for number in weighted:
            node = problem.graph.nodes[number]
            is_parameter = node.kind == "parameter"
            incoming |= {v: moved_parameter(problem, state, v) if is_parameter else None for v in node.outputs}
        found = {
            n: moved_identity(problem, state, n)
            if n in weighted and problem.graph.nodes[n].kind == "identity"
            else self._answer(problem, state, n, incoming)
            for n in nodes
        }
        answers = {n: answer for n, answer in found.items() if answer is not None}
        return _written(problem, state, nodes, incoming, answers)

    def incoming(self, problem: FeasibilityProblem, state: State, nodes: Iterable[int]) -> Incoming:
        r"""The incoming dual of every output of the nodes: the sum of its consumers' duals, through their views.

        It is $\kappa$ times the wanted change; `None` where nothing is wanted.
        """
        values = [v for n in nodes for v in problem.graph.nodes[n].outputs]
        found: dict[int, list[Array]] = {}
        for edge in dict.fromkeys(e for v in values for e in problem.graph.readers[v]):
            spec, dual = problem.graph.edges[edge], collapsed(problem, state, edge)
            counts = [problem.reach.counts(edge, value) for value in spec.sources]
            if dual is not None and any(counts):
                parts = spec.view.transpose(problem.known, dual)
                for value, part, is_counted in zip(spec.sources, parts, counts, strict=True):
                    if is_counted:
                        found.setdefault(value, []).append(part)
        return {v: sum(parts[1:], start=parts[0]) if (parts := found.get(v)) else None for v in values}

    def residual(self, problem: FeasibilityProblem, value: int, written: Array, output: Array) -> Array:
        """The gap between a value as it was last written and what its producer now computes.

        In the gradient regime without rounding, which the weights would make far larger than any gradient. A gap that
        comes from moves of the operands is as small, and the duals tell of it.
        """
        gap = written - output
        if not problem.metric.in_gradient_regime:
            return gap
        size = jnp.max(jnp.abs(output), initial=0.0)
        return jnp.where(jnp.abs(gap) > _ROUNDING * jnp.finfo(gap.dtype).eps * size, gap, jnp.zeros_like(gap))

    def _answer(self, problem: FeasibilityProblem, state: State, number: int, incoming: Incoming) -> Answer | None:
        """The duals of one node's operands, and its new outputs; `None` where it has nothing to do.

        The one place where the regime is decided: by the metric.
        """
        node, gradient_regime = problem.graph.nodes[number], problem.metric.in_gradient_regime
        if node.rule is None:
            return None
        wanted = [incoming[v] for v in node.outputs]
        if node.kind != "objective" and state.up_to_date[number] and all(mu is None for mu in wanted):
            return None
        ctx = replace(context(problem, number, state.store_copies), residuals_hold=_unmoved(problem, state, number))
        inputs = [operand(problem, state, e) for e in node.edges]
        written = [value_of(problem, state, v) for v in node.outputs]
        # In the gradient regime a jump would look like a huge violation: keep the old output, pass on duals only.
        keeps = gradient_regime and node.rule.is_discontinuous
        known = state.up_to_date[number] or keeps or not node.outputs
        outputs = written if known else node.rule.evaluate(ctx, inputs)
        duals = [jnp.zeros_like(y) if mu is None else mu for y, mu in zip(written, wanted, strict=True)]
        if not known:
            for i, value in enumerate(node.outputs):
                scale, count = output_weight(problem, value)
                gap = self.residual(problem, value, written[i], outputs[i])
                duals[i] = duals[i] + gap * jnp.asarray(count * clamped_output(scale), written[i].dtype)
        found = (
            _pulled_back(problem, number, node.rule, ctx, inputs, duals)
            if gradient_regime
            else _projected(node.rule, ctx, inputs, duals)
        )
        stays = keeps or state.is_last or not node.outputs
        return as_duals(found), written if stays else outputs_after(node.rule, ctx, inputs, outputs, found)


def _projected(
    rule: AbstractRule, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]
) -> Sequence[Array] | Projected:
    """A rule's projection. Its products are full ones: where a GPU rounds operands, equations would stay unsolved."""
    with jax.default_matmul_precision(SOLVING):
        return rule.project(ctx, inputs, duals)


def _pulled_back(
    problem: FeasibilityProblem,
    number: int,
    rule: AbstractRule,
    ctx: Context,
    inputs: Sequence[Array],
    duals: Sequence[Array],
) -> list[Array]:
    """The duals of a node's operands in the gradient regime.

    Operands that take answers under noise are answered with all duals, the others by the gradient alone.
    """
    heard = [problem.reach.edges[e] for e in problem.graph.nodes[number].edges]
    if all(heard) and heard:
        return list(rule.pullback(ctx, inputs, duals))
    gradients = [mu if is_reached else jnp.zeros_like(mu) for mu, is_reached in zip(duals, ctx.reached, strict=True)]
    plain = list(rule.pullback(replace(ctx, noise="never"), inputs, gradients))
    if not any(heard):
        return plain
    noisy = rule.pullback(ctx, inputs, duals)
    return [n if is_heard else p for n, p, is_heard in zip(noisy, plain, heard, strict=True)]


def _unmoved(problem: FeasibilityProblem, state: State, node: int) -> bool:
    """Whether a node's operands are known to be, while tracing, those of the forward pass."""
    edges = problem.graph.nodes[node].edges
    sources = [v for e in edges for v in problem.graph.edges[e].sources]
    written = all(state.values[v] is problem.forward[v] and state.shifts[v] is None for v in sources)
    return written and all(state.duals[e] is None for e in edges)


def _written(
    problem: FeasibilityProblem, state: State, nodes: Sequence[int], incoming: Incoming, answers: dict[int, Answer]
) -> State:
    """The state with the answers of the nodes written to it."""
    graph = problem.graph
    values, shifts, duals = list(state.values), list(state.shifts), list(state.duals)
    changed: set[int] = set()
    for number in nodes:
        node = graph.nodes[number]
        if node.kind == "parameter":
            (value,) = node.outputs
            shift = _in_set(problem, value, _added(state.shifts[value], incoming[value]))
            if shift is not state.shifts[value]:
                shifts[value] = shift
                changed.add(value)
        if number in answers:
            for edge, nu in zip(node.edges, answers[number][0], strict=True):
                duals[edge] = _added(state.duals[edge], nu)
            for value, output in zip(node.outputs, answers[number][1], strict=True):
                values[value] = output
                changed.add(value)
    cleared = _cleared(problem, state, duals, {v for n in nodes for v in graph.nodes[n].outputs})
    stale = {graph.edges[e].consumer for v in changed for e in graph.readers[v]}
    tracked = not state.store_copies and any(state.up_to_date)
    up_to_date = list(state.up_to_date) if tracked else [False] * len(graph.nodes)
    for number, is_new in ((n, tracked and n not in stale) for n in {*answers, *stale}):
        up_to_date[number] = is_new
    return replace(state, values=tuple(values), shifts=tuple(shifts), duals=cleared, up_to_date=tuple(up_to_date))


def _in_set(problem: FeasibilityProblem, value: int, shift: Array | None) -> Array | None:
    """The dual of a parameter that is held in sets: to the point of them nearest to where `shift` leads.

    Nearest in the weights of its copies, where these are the same for all entries.
    """
    held = problem.held.get(problem.graph.parameters.index(value))
    if held is None:
        return shift
    weight, start = parameter_weight(problem, value), problem.initial[value]
    assert start is not None
    moved = start if shift is None else start + step(weight, shift).astype(start.dtype)
    return in_duals(weight, held.alone(moved) - start)


def _added(before: Array | None, dual: Array | None) -> Array | None:
    return before if dual is None else dual if before is None else before + dual


def _cleared(
    problem: FeasibilityProblem, state: State, duals: Sequence[Array | None], values: set[int]
) -> tuple[Array | None, ...]:
    """The duals of all edges after producers wrote `values`: copies of these equal them, where an edge shows them."""
    found = list(duals)
    for edge in {e for value in values for e in problem.graph.readers[value]}:
        sources, dual = problem.graph.edges[edge].sources, found[edge]
        written = [v for v in sources if v in values]
        if dual is None or len(written) == len(sources):
            found[edge] = None
            continue
        for value in written:
            dual = dual * (1.0 - _mask(problem, state, edge, value)).astype(dual.dtype)
        found[edge] = dual
    return tuple(found)


def _mask(problem: FeasibilityProblem, state: State, edge: int, value: int) -> Array:
    """Ones where an edge shows `value`. What shows no value (known constants) belongs to the first source."""
    sources = problem.graph.edges[edge].sources
    first = sources[0] == value
    variables = [problem.graph.values[v] for v in sources]
    marks = [jnp.full(v.shape, float((s == value) != first), v.dtype) for s, v in zip(sources, variables, strict=True)]
    seen = shown_marks(problem, edge, marks, state.store_copies)
    return 1.0 - seen if first else seen
