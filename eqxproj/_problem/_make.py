"""From a traced loss to its feasibility problem: graph, colours, weights and the values of the forward pass.

`feasibility_problem` is where a loss, a model and a batch become a problem that any solver of the library can be run
on.
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._graph._build import build
from .._graph._graph import Graph, with_identities
from .._graph._weights import edge_logs, reader_logs
from .._metric import Metric, check_metric
from .._program._equations import Variable
from .._program._fragment import forward
from .._program._primitives import AT_MOST_ONCE, ONE_TO_ONE
from .._program._trace import Trace, trace
from ..rules._loss import integer_labels
from ..rules._scalar import identity
from ._problem import Copies, FeasibilityProblem


def _count(
    graph: Graph, known: Mapping[int, Any], copies: Copies, edge: int, value: int
) -> tuple[float | Array, float]:
    """How many copies of each element of a value its reader owns, and a number that this is not above."""
    spec = graph.edges[edge]
    node = graph.nodes[spec.consumer]
    assert node.rule is not None
    copies_each = node.rule.copy_counts(node.equation, node.unknown, node.edges.index(edge), copies)
    largest = float(np.max(copies_each, initial=0.0))
    times, uniform = _times(spec.view, value, spec.sources)
    if uniform and isinstance(copies_each, float):
        return times * copies_each, times * copies_each
    full = jnp.broadcast_to(jnp.asarray(copies_each, spec.variable.dtype), spec.variable.shape)
    found = spec.view.transpose(known, full)[spec.sources.index(value)]
    return found, times * largest


def _times(view, value: int, sources: Sequence[int]) -> tuple[float, bool]:
    """A number that a view shows no element of a value more often than, and whether it shows each just so often."""
    times = {view.operands[sources.index(value)].index: 1.0}
    readers = Counter(v.index for e in view.equations for v in e.inputs)
    uniform = True
    for equation in view.equations:
        reads = [v for v in equation.inputs if v.index in times]
        for out in equation.outputs if reads else ():
            factor = float(np.prod(out.shape, dtype=float))
            if equation.name == "broadcast_in_dim":
                factor = factor / max(float(np.prod(reads[0].shape, dtype=float)), 1.0)
            elif equation.name in AT_MOST_ONCE:
                factor = 1.0
            times[out.index] = factor * sum(times[v.index] for v in reads)
        if reads:
            plain = equation.name == "broadcast_in_dim" or equation.name in ONE_TO_ONE
            uniform &= plain and len(equation.outputs) == 1 and all(readers[v.index] == 1 for v in reads)
    return times.get(view.outputs[0].index, 0.0), uniform


def _shares(
    graph: Graph, known, copies: Copies, metric: Metric, log_weights
) -> tuple[tuple[float | Array, ...], tuple[float, ...]]:
    """The share of each value, and what its entries are not above."""
    shares: list[float | Array] = []
    most: list[float] = []
    for value in range(len(graph.values)):
        logs = reader_logs(graph, metric, log_weights, value)
        top = max(logs, default=0.0)
        share: float | Array = 0.0
        largest = 0.0
        for edge, log in zip(graph.readers[value], logs, strict=True):
            times, bound = _count(graph, known, copies, edge, value)
            part = float(np.exp(max(log - top, -80.0)))
            share, largest = share + part * times, largest + part * bound
        shares.append(float(share) if isinstance(share, (int, float)) else share)
        most.append(largest)
    return tuple(shares), tuple(most)


def check_copies(copies: str) -> None:
    if copies not in ("neuron", "none"):
        raise ValueError(f'`copies` must be "neuron" or "none", got {copies!r}.')


def check_tau(tau: Any) -> None:
    if isinstance(tau, bool) or not isinstance(tau, numbers.Real) or not 0 < float(tau) < float("inf"):
        raise ValueError(f"`tau` must be a positive finite number, the factor of one sample's loss; got {tau!r}.")


def make_problem(
    traced: Trace,
    metric: Metric,
    copies: Copies,
    tau: float,
    data: str,
    two_colored: bool,
    offset: float = 0.0,
    composites: bool = True,
    recalled: Sequence[Array] = (),
) -> FeasibilityProblem:
    """The problem of a traced loss.

    Without `two_colored` it gets no identity nodes, as cyclic sweeps need none, and recurrences stay one node each,
    which goes through time in order. With `composites`, softmax, normalization and the like are one node each.
    `recalled` are the results of products of the forward pass that are known already, `offset` is the logarithm of the
    weight of the objective's own edges.
    """
    graph = build(traced, data, not two_colored, composites)
    if two_colored:
        graph = with_identities(graph, identity(graph.values[0]))
    env = forward(graph.program, [*traced.parameters, *traced.arguments], recalled)
    needed = {i for n in graph.nodes if n.function is not None for i in n.function.known}
    needed |= {i for e in graph.edges for i in e.view.known}
    needed |= {i for n in graph.nodes if n.equation is not None for i in _known_inputs(n)}
    needed |= {v.index for n in graph.nodes if n.equation is not None for v in n.equation.residuals}
    needed |= {v.index for n in graph.nodes for v, _ in _factors(n.rule)}
    known = {i: jnp.asarray(env[i]) for i in sorted(needed)}
    kinds = [graph.nodes[p].kind for p in graph.producers]
    at = [env[v.index] for v in graph.values]  # what an identity node puts out is its operand's variable
    initial = tuple(jnp.asarray(x) if k in ("parameter", "data") else None for x, k in zip(at, kinds, strict=True))
    states = tuple(None if k in ("parameter", "data") else jnp.asarray(x) for x, k in zip(at, kinds, strict=True))
    logs = edge_logs(graph, metric, offset)
    shares, largest = _shares(graph, known, copies, metric, logs)
    value, *rest = (env[v.index] for v in graph.program.outputs)
    auxiliary = traced.auxiliary(rest)
    value = jnp.asarray(value)
    return FeasibilityProblem(
        traced, known, initial, states, value, auxiliary, shares, graph, metric, copies, float(tau), logs, largest
    )


RAW_TAU = 0.1
"""Of a problem that is solved for its own sake, in the unit metric by default."""


def _known_inputs(node) -> list[int]:
    return [v.index for v, unknown in zip(node.equation.inputs, node.unknown, strict=True) if not unknown]


def _factors(rule) -> list[tuple[Variable, int]]:
    found: list[tuple[Variable, int]] = list(getattr(rule, "factors", ()))
    for term in getattr(rule, "terms", ()):
        found.extend(term.factors)
    for _, factors in getattr(rule, "parts", ()):
        found.extend(factors)
    return found


def feasibility_problem(
    loss: Callable[..., Any],
    model: PyTree,
    *args: Any,
    copies: Copies = "neuron",
    metric: Metric | None = None,
    data: Literal["constant", "pinned"] = "constant",
    tau: float = RAW_TAU,
    has_aux: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> FeasibilityProblem:
    """The feasibility problem of `loss(model, *args)`.

    **Arguments:**

    - `loss`: the function that is given to `equinox.filter_value_and_grad` otherwise.
    - `model`: its inexact arrays are the unknown parameters.
    - `args`: the further arguments of the loss, such as a batch.
    - `copies`: how many copies a bilinear operation owns: `"neuron"` (every scalar product its own, as in the paper),
        or `"none"` (one constraint for the whole product).
    - `metric`: a [`Metric`][]; the unit metric by default.
    - `data`: `"constant"`, or `"pinned"` for data as variables held in place.
    - `tau`: factor of one sample's loss in the prox of the objective. Losses that are sets do not use it.
    - `has_aux`: whether the loss returns `(value, auxiliary)`.
    - `kwargs`: keyword arguments of the loss.

    **Returns:**

    A [`FeasibilityProblem`][].

    **Raises:** `ValueError` for a loss that is no scalar or does not depend on the model, and for unknown options;
    `UnsupportedPrimitiveError` for operations without a rule.
    """
    check_copies(copies)
    check_tau(tau)
    metric = Metric() if metric is None else metric
    check_metric(metric)
    traced = trace(loss, model, args, kwargs, has_aux=has_aux)
    problem = make_problem(traced, metric, copies, tau, data, two_colored=True)
    check_labels(problem, args)
    return problem


def check_labels(problem: FeasibilityProblem, data: PyTree) -> None:
    """Raises a `ValueError` where integer labels of a loss of this library are out of range.

    Labels that are an argument of the loss as they stand are looked up in `data`, the whole of it; others are read
    from the problem's own batch.
    """
    leaves = [x for x in jtu.tree_leaves(data) if eqx.is_array_like(x)]
    arguments = problem.trace.program.inputs[len(problem.trace.parameters) :]
    for node in problem.graph.nodes:
        found = integer_labels(node.equation) if node.kind == "objective" and node.equation is not None else None
        if found is None:
            continue
        index, classes = found
        positions = [i for i, v in enumerate(arguments) if v.index == index]
        labels = leaves[positions[0]] if positions and positions[0] < len(leaves) else problem.known[index]
        if isinstance(labels, jax.core.Tracer):
            continue
        low, high = int(np.min(labels)), int(np.max(labels))
        if low < 0 or high >= classes:
            raise ValueError(
                f"The labels must be integers from 0 to {classes - 1}, since the logits have {classes} "
                f"classes on their last axis, but they run from {low} to {high}."
            )
