"""The feasibility problem of a loss: its graph, its metric, and the values of the forward pass.

`feasibility_problem` is where a loss, a model and a batch become a problem that any solver of the library can be run
on. The problem is a pytree: it may be made inside a `jit`, or passed into one.
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
from jaxtyping import Array, Float, PyTree

from ._build import build
from ._graph import Graph, table, with_identities
from ._interpreter import forward
from ._metric import Metric, check_metric, clamped, edge_logs, reader_logs
from ._names import AT_MOST_ONCE, ONE_TO_ONE
from ._normal_form import Variable
from ._state import State, context
from ._trace import Trace, trace
from .rules._objective import integer_labels
from .rules.scalar import identity

Copies = Literal["neuron", "sample", "none"]


class FeasibilityProblem(eqx.Module):
    """Find parameters and states that satisfy the constraints of every operation.

    - `graph`: the constraints. `metric`, `copies`, `tau`: as given to [`feasibility_problem`][].
    - `known`: values of what depends on no parameter. `initial`: the start of each parameter and datum.
    - `forward`: the values of the nodes' outputs on the forward pass. `value`: the loss there.
    """

    trace: Trace
    known: dict[int, Array]
    initial: tuple[Array | None, ...]
    forward: tuple[Array | None, ...]
    value: Float[Array, ""]
    auxiliary: PyTree
    shares: tuple[tuple[float | Array, ...], tuple[float | Array, ...]]
    graph: Graph = eqx.field(static=True)
    metric: Metric = eqx.field(static=True)
    copies: Copies = eqx.field(static=True)
    tau: float = eqx.field(static=True)
    log_weights: tuple[float, ...] = eqx.field(static=True)
    """The logarithm of the weight of each edge."""
    largest_shares: tuple[tuple[float, ...], tuple[float, ...]] = eqx.field(static=True)
    """What no entry of `shares` is above."""
    outer_unit: float | None = eqx.field(static=True, default=None)
    """The unit of the duals, where the problem is part of another."""

    @property
    def as_published(self) -> bool:
        """Whether to follow the software of arXiv 2506.05878 where it departs from the projections."""
        return self.metric.fan_out == "mean"

    def edge_weight(self, edge: int) -> float:
        """The weight of an edge, clamped."""
        return clamped(self.log_weights[edge])

    @property
    def gradient_scale(self) -> float:
        """What divides an accumulated dual to give it the size of the gradient of the loss."""
        return (1.0 if self.graph.hard else self.tau) / self.graph.largest

    @property
    def unit(self) -> float:
        """What divides any dual to give it the size of a gradient of the loss."""
        return self.gradient_scale if self.outer_unit is None else self.outer_unit

    def start(self, memory: bool) -> State:
        """The state of the forward pass: every copy equals the value that it copies."""
        nothing = (None,) * len(self.initial)
        return State(self.forward, nothing, (None,) * len(self.graph.edges), (True,) * len(self.graph.nodes), memory)

    def describe(self, node: int) -> str:
        """A node in one line, for messages."""
        spec = self.graph.nodes[node]
        where = f" at {spec.source}" if spec.source else ""
        return f"{node} ({spec.operation}, {spec.kind}){where}"

    def explain(self) -> str:
        """The problem as a table: one line a node, from the objective back.

        **Returns:**

        Operation, rule, shapes of the operands and outputs, color, and the source line in the model. After the table
        stands which nodes go through the generic local solver, and how many parameters the loss does not depend on.
        """
        graph = self.graph
        rows = [["node", "operation", "rule", "shapes", "color", "source"]]
        for i in sorted(range(len(graph.nodes)), key=lambda i: (graph.depth[i], i)):
            spec = graph.nodes[i]
            ins = ", ".join(graph.edges[e].variable.describe() for e in spec.edges)
            outs = ", ".join(graph.values[v].describe() for v in spec.outputs)
            shapes = " -> ".join(x for x in (ins, outs) if x)
            color = "AB"[graph.colors[i]]
            rows.append([str(i), spec.operation, spec.describe_rule(), shapes, color, spec.source])
        local = [i for i, n in enumerate(graph.nodes) if n.rule is not None and "local" in n.rule.label]
        lines = [table(rows), ""]
        if local:
            lines.append(f"Through the generic local solver (derivatives of the node alone): nodes {local}.")
        unused = [n for n, v in zip(self.trace.names, graph.parameters, strict=True) if v is None]
        if unused:
            lines.append(f"Parameters that the loss does not depend on: {', '.join(unused)}.")
        lines.append("Operations without a rule: none.")
        return "\n".join(lines)


def _count(
    graph: Graph, known, copies, metric, log_weights, edge: int, value: int, memory: bool
) -> tuple[float | Array, float]:
    """How many copies of each element of a value its reader owns, and a number that this is not above."""
    spec = graph.edges[edge]
    node = graph.nodes[spec.consumer]
    assert node.rule is not None
    stub = _Stub(graph, known, copies, metric, log_weights)
    shape = jax.ShapeDtypeStruct(spec.variable.shape, spec.variable.dtype)
    with jax.ensure_compile_time_eval():
        ctx = context(stub, spec.consumer, memory)  # pyright: ignore[reportArgumentType]
        copies_each = node.rule.count(ctx, node.edges.index(edge), jnp.zeros(shape.shape, shape.dtype))
        largest = float(np.max(np.asarray(copies_each), initial=0.0))
    times, uniform = _times(spec.view, value, spec.sources)
    if uniform and isinstance(copies_each, float):
        return times * copies_each, times * copies_each
    full = jnp.broadcast_to(jnp.asarray(copies_each, shape.dtype), shape.shape)
    found = spec.view.transpose(known, full)[spec.sources.index(value)]
    return found, times * largest


class _Stub:
    """As much of a problem as a context needs while the weights of values are being worked out."""

    def __init__(self, graph, known, copies, metric, log_weights):
        self.graph, self.known, self.copies, self.metric, self.log_weights = graph, known, copies, metric, log_weights
        self.tau = self.unit = 1.0
        self.as_published = False
        self.shares = self.largest_shares = ((1.0,) * len(graph.values),) * 2


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
    graph: Graph, known, copies, metric: Metric, log_weights, memory: bool
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
            times, bound = _count(graph, known, copies, metric, log_weights, edge, value, memory)
            part = float(np.exp(max(log - top, -80.0)))
            share, largest = share + part * times, largest + part * bound
        shares.append(float(share) if isinstance(share, (int, float)) else share)
        most.append(largest)
    return tuple(shares), tuple(most)


def check_copies(copies: str) -> None:
    if copies not in ("neuron", "sample", "none"):
        raise ValueError(f'`copies` must be "neuron", "sample" or "none", got {copies!r}.')


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
    needed |= {v.index for n in graph.nodes if n.equation is not None for v in n.equation.kept}
    needed |= {v.index for n in graph.nodes for v, _ in _factors(n.rule)}
    known = {i: jnp.asarray(env[i]) for i in sorted(needed)}
    kinds = [graph.nodes[p].kind for p in graph.producers]
    at = [env[v.index] for v in graph.values]  # what an identity node puts out is its operand's variable
    initial = tuple(jnp.asarray(x) if k in ("parameter", "data") else None for x, k in zip(at, kinds, strict=True))
    states = tuple(None if k in ("parameter", "data") else jnp.asarray(x) for x, k in zip(at, kinds, strict=True))
    logs = edge_logs(graph, metric, offset)
    lean = _shares(graph, known, copies, metric, logs, False)
    differs = copies == "sample" and any(n.operation == "conv_general_dilated" for n in graph.nodes)
    full = _shares(graph, known, copies, metric, logs, True) if differs else lean
    shares, largest = (lean[0], full[0]), (lean[1], full[1])
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
        `"sample"` (every row one of the weights), `"none"` (one constraint for the whole product).
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
