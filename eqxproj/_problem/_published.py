"""The software of arXiv 2506.05878 where it departs from the projections, for parity with its published iterates.

`as_published` transforms a problem into one that follows it, by subclasses of rules, graph and projector. Limits: the
unit metric, and no recurrences.

- A product takes ten plain Newton steps, the branch of a relu is chosen by the whole line, and of tied maxima the last
  rises.
- Every reader of a value counts as one, for every element, also where its view does not show the element; there it
  proposes what the producer computes at present. Through a gather, the last of equal indices decides.
- A cyclic algorithm goes through frontiers of nodes, some of them more than once, and after each sets all operands of
  every node that reads from the frontier to function values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._errors import described
from .._graph._graph import Graph
from .._metric import clamped, clamped_output
from .._numerics._multiplier import published_multiplier
from ..rules._base import AbstractRule, Context, Scale
from ..rules._bilinear import Bilinear, scaled_products
from ..rules._bilinear_forms import BilinearForm
from ..rules._maximum import Maximum
from ..rules._scalar import Scalar
from ._problem import FeasibilityProblem
from ._projector import Incoming, Projector
from ._readers import collapsed, context, expanded, operand, output_weight, shown, shown_marks, value_of
from ._state import State


def as_published(problem: FeasibilityProblem) -> FeasibilityProblem:
    """The same problem, projected as the software of arXiv 2506.05878 does.

    **Arguments:**

    - `problem`: in the unit metric, with a copy a neuron and `data="pinned"`.

    **Returns:**

    A problem whose iterates by any solver are those of that software.
    """
    if not isinstance(problem, FeasibilityProblem):
        raise TypeError(f"`problem` must come from `eqxproj.feasibility_problem`, got {described(problem)}.")
    if problem.metric.grade != 1 or problem.metric.parameter != 1:
        raise ValueError(f"`problem` must be in the unit metric, got {problem.metric}.")
    parts = {field.name: getattr(problem.graph, field.name) for field in fields(Graph)}
    parts["nodes"] = tuple(replace(node, rule=_published_rule(node.rule)) for node in problem.graph.nodes)
    counts = (1.0,) * len(problem.copy_counts)
    return replace(problem, copy_counts=counts, graph=PublishedGraph(**parts), projector=PublishedProjector())


def _published_rule(rule: AbstractRule | None) -> AbstractRule | None:
    if isinstance(rule, Bilinear):
        return PublishedBilinear()
    if isinstance(rule, Maximum):
        return PublishedMaximum()
    if isinstance(rule, Scalar) and rule.pieces is not None and rule.pieces.describe() == "relu":
        return PublishedRelu(rule.terms, rule.head, rule.phi, rule.static)
    return rule


class PublishedBilinear(Bilinear):
    """Ten Newton steps from zero for every product, wherever they end."""

    def both(
        self, ctx: Context, form: BilinearForm, a: Array, w: Array, dual: Array, kappa: Scale, ratios: Sequence[Scale]
    ) -> tuple[list[Array], Array]:
        alpha, omega = ctx.weights
        unit, tilt = math.sqrt(alpha) * math.sqrt(omega), ctx.relative(0, 1) ** 0.5
        hp, q = scaled_products(form.f(a, w), form.sum_a(a * a), form.sum_w(w * w), dual, ratios)
        t = published_multiplier(hp, q, jnp.abs(dual) / unit)
        multiplier = jnp.where(dual < 0, -unit, unit).astype(dual.dtype) * t
        first, second = multiplier / (1.0 - t * t), unit * t * t / (1.0 - t * t)
        nu_a = form.back_a(first, w) + a * form.spread_a(second * tilt)
        nu_w = form.back_w(a, first) + w * form.spread_w(second / tilt)
        return [nu_a, nu_w], multiplier


class PublishedMaximum(Maximum):
    """Of tied maxima the last rises."""

    def nearest(self, x: Array, mu: Array, weights, ratio) -> Array:
        order = slice(None, None, 1 if isinstance(weights, tuple) else -1)
        return super().nearest(x[..., order], mu, weights, ratio)[..., order]


class PublishedRelu(Scalar):
    """The rising half-line, clipped, where the *whole* line is nearer than the flat half-line."""

    def nearest(self, ctx: Context, s0: Array, dual: Array, q: Array, sigma: Array) -> Array:
        kappa = jnp.asarray(ctx.output_weights[0], sigma.dtype)
        y0 = jnp.maximum(s0, 0) + dual / kappa
        rising = (s0 / sigma + kappa * y0) / (1.0 / sigma + kappa)
        flat = jnp.minimum(s0, 0)
        to_line = jnp.square(s0 - y0) / (sigma + 1.0 / kappa)
        to_flat = jnp.square(flat - s0) / sigma + kappa * y0 * y0
        return (jnp.where(to_line < to_flat, jnp.maximum(rising, 0), flat) - s0) / sigma


@dataclass(frozen=True, eq=False)
class PublishedGraph(Graph):
    """A graph whose layers are the frontiers of a breadth-first walk that does not remember where it has been."""

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The objective, then again and again what the last nodes read from: a node stands wherever it is met."""
        found = [self.objectives]
        while found[-1]:
            found.append(tuple(dict.fromkeys(p for n in found[-1] for p in self.predecessors[n])))
        return tuple(found[:-1])


@dataclass(frozen=True)
class PublishedProjector(Projector):
    """Plain means over readers; every copy is stored, since what is written back leaves copies that differ."""

    stores_copies: bool = True

    def incoming(self, problem: FeasibilityProblem, state: State, nodes: Iterable[int]) -> Incoming:
        """The plain mean over the readers of a value of what each wants, times the weight; `None` for nothing."""
        found: Incoming = {}
        for value in (v for n in nodes for v in problem.graph.nodes[n].outputs):
            readers = problem.graph.readers[value]
            duals = [(edge, collapsed(problem, state, edge)) for edge in readers]
            parts = [_part(problem, edge, value, dual) for edge, dual in duals if dual is not None]
            weight = clamped_output(output_weight(problem, value)[0])
            found[value] = sum(parts[1:], start=parts[0]) / len(readers) * weight if parts else None
        return found

    def residual(self, problem: FeasibilityProblem, value: int, written: Array, output: Array) -> Array:
        """The gap, for each element times the share of the value's readers that show it."""
        readers = problem.graph.readers[value]
        seen: Array | float = 0.0
        for spec in (problem.graph.edges[edge] for edge in readers):
            ones = jnp.ones(spec.variable.shape, spec.variable.dtype)
            seen = seen + (spec.view.transpose(problem.known, ones)[spec.sources.index(value)] > 0)
        return (written - output) * (seen / max(len(readers), 1))

    def settled(self, problem: FeasibilityProblem, state: State, solution: Callable[[State], State]) -> State:
        """The state as it is: parameters are read where they were last written."""
        return state

    def project_layer(self, problem: FeasibilityProblem, state: State, nodes: Sequence[int]) -> State:
        return _written_back(problem, state, self.project(problem, state, nodes), nodes)


def _part(problem: FeasibilityProblem, edge: int, value: int, dual: Array) -> Array:
    """What one reader wants of each element that it shows: the mean over its copies."""
    spec = problem.graph.edges[edge]
    node = problem.graph.nodes[spec.consumer]
    assert node.rule is not None
    counts = node.rule.copy_counts(node.equation, node.unknown, node.edges.index(edge), problem.copies)
    deciding, position = _deciding(problem, edge, value), spec.sources.index(value)
    up = spec.view.transpose(problem.known, deciding * dual / counts)[position]
    count = spec.view.transpose(problem.known, deciding)[position]
    return up / jnp.maximum(count, 1.0) / clamped(problem.log_weights[edge])


def _deciding(problem: FeasibilityProblem, edge: int, value: int) -> Array:
    """Ones at the elements of an operand that decide: all, but of those gathered from one place the last."""
    spec = problem.graph.edges[edge]
    shape, dtype = spec.variable.shape, spec.variable.dtype
    if not any(e.name == "gather" for e in spec.view.equations):
        return jnp.ones(shape, dtype)
    variables = [problem.graph.values[v] for v in spec.sources]
    marks = [jnp.zeros(v.shape, v.dtype) for v in variables]
    position = spec.sources.index(value)
    size = math.prod(variables[position].shape)
    marks[position] = (1.0 + jnp.arange(size, dtype=marks[position].dtype)).reshape(marks[position].shape)
    seen = shown_marks(problem, edge, marks, store_copies=False).ravel().astype(int)
    order = jnp.arange(seen.size)
    last = jnp.full((size + 1,), -1).at[seen].max(order)
    return (last[seen] == order).reshape(shape).astype(dtype)


def _written_back(problem: FeasibilityProblem, old: State, new: State, nodes: Sequence[int]) -> State:
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
            gap = spec.view.show(problem.known, [current(v) for v in spec.sources]) - shown(problem, new, edge)
            gap = expanded(problem, edge, gap) if new.store_copies else gap
            duals[edge] = gap * clamped(problem.log_weights[edge])
    return eqx.tree_at(lambda s: s.duals, new, tuple(duals), is_leaf=lambda x: x is None)
