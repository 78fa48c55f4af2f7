"""From a loss, a model and a batch to a feasibility problem: graph, colors, weights and values of the forward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._errors import check_flag, check_function, described, positive_number
from .._graph._build import build
from .._graph._fusion import takes_precedence
from .._graph._graph import Graph, Node, with_concurrence, with_identities
from .._graph._reach import reach_of
from .._graph._weights import edge_logs, reader_logs
from .._metric import Metric, check_metric
from .._numerics._promotion import with_own_promotion
from .._program._fragment import View, forward
from .._program._patches import with_patches
from .._program._primitives import ONE_TO_ONE
from .._program._sharding import on_automatic_mesh
from .._program._trace import Trace, trace
from ..rules._base import SOLVING, Noise
from ..rules._loss import checked_labels
from ..rules._scalar import identity
from ._constraints import Constraint, Held, check_common_points, held
from ._problem import Copies, FeasibilityProblem
from ._projector import Projector
from ._readers import context, shown


def _copy_counts(graph: Graph, known: Mapping[int, Any], copies: Copies, edge: int, value: int) -> float | Array:
    """How many copies of each element of a value the reader of an edge owns."""
    spec = graph.edges[edge]
    node = graph.nodes[spec.consumer]
    assert node.rule is not None
    counts = node.rule.copy_counts(node.equation, node.unknown, node.edges.index(edge), copies)
    position = spec.sources.index(value)
    times = _times(spec.view, position)
    if times is not None and isinstance(counts, float):
        return times * counts
    full = jnp.broadcast_to(jnp.asarray(counts, spec.variable.dtype), spec.variable.shape)
    return spec.view.transpose(known, full)[position]


def _times(view: View, position: int) -> float | None:
    """How often a view shows each element of an operand; `None` where that differs or is not known while tracing."""
    times = {view.operands[position].index: 1.0}
    readers = Counter(v.index for e in view.equations for v in e.inputs)
    for equation in view.equations:
        reads = [v for v in equation.inputs if v.index in times]
        if not reads:
            continue
        repeats = equation.name == "broadcast_in_dim"
        is_plain = repeats or equation.name in ONE_TO_ONE
        if not is_plain or len(equation.outputs) != 1 or any(readers[v.index] != 1 for v in reads):
            return None
        (out,) = equation.outputs
        factor = math.prod(out.shape) / max(math.prod(reads[0].shape), 1) if repeats else 1.0
        times[out.index] = factor * sum(times[v.index] for v in reads)
    return times.get(view.outputs[0].index, 0.0)


def _all_copy_counts(
    graph: Graph, known: Mapping[int, Any], copies: Copies, metric: Metric, log_weights: Sequence[float]
) -> tuple[float | Array, ...]:
    """For each value the number of its copies, each weighted relative to the heaviest."""

    def count(value: int) -> float | Array:
        logs = reader_logs(graph, metric, log_weights, value)
        weights = [math.exp(max(log - max(logs), -80.0)) for log in logs]
        counts = [_copy_counts(graph, known, copies, edge, value) for edge in graph.readers[value]]
        return sum((w * c for w, c in zip(weights, counts, strict=True)), start=0.0)

    return tuple(map(count, range(len(graph.values))))


def check_copies(copies: str) -> None:
    if copies not in ("neuron", "none"):
        raise ValueError(f'`copies` must be "neuron" or "none", got {described(copies)}.')


def check_noise(noise: str) -> None:
    if noise not in ("unreached", "everywhere", "never"):
        raise ValueError(
            f'`noise` must be "unreached" (jumps answer under noise where no gradient reaches), "everywhere" or '
            f'"never", got {noise!r}.'
        )


def check_tau(tau: Any) -> None:
    positive_number("tau", tau, "the factor of one sample's loss")


@with_own_promotion
def make_problem(
    traced: Trace,
    metric: Metric,
    copies: Copies,
    tau: float,
    data: str,
    two_colors: bool,
    offset: float = 0.0,
    residuals: Sequence[Array] = (),
    noise: Noise = "unreached",
    sends: Sequence[bool] = (),
    all_held: Sequence[Held] = (),
    concurrence: bool | None = None,
) -> FeasibilityProblem:
    """The problem of a traced loss; other arguments as for `feasibility_problem`.

    `offset` is the logarithm of the weight of the objective's own edges, `residuals` are results of products of the
    forward pass that are known already. `sends` says for each argument whether the terms of the loss with this target
    send a gradient back; all do by default. `all_held` are the sets of parameters.
    """
    if copies == "none" and not metric.in_gradient_regime:
        seeds = traced.program.inputs[: len(traced.parameters) if data == "constant" else None]
        traced = replace(traced, program=with_patches(traced.program, seeds, takes_precedence))
    joined = "products" if copies == "neuron" else "sums"
    projects = not metric.in_gradient_regime
    recurrences = "whole" if not two_colors else "smooth" if projects and copies == "none" else "apart"
    graph = build(traced, data, recurrences, thresholds=joined if projects else "apart")
    if two_colors:
        graph = _two_colored(graph, concurrence)
    graph = replace(graph, variant=(data, two_colors, concurrence))
    env = forward(graph.program, [*traced.parameters, *traced.arguments], residuals)
    needed = {i for edge in graph.edges for i in edge.view.known}
    for node in graph.nodes:
        needed |= _needed(node)
    known = {i: jnp.asarray(env[i]) for i in sorted(needed)}
    values = [jnp.asarray(env[v.index]) for v in graph.values]  # an identity node's output is its operand's variable
    is_given = [graph.nodes[producer].kind in ("parameter", "data") for producer in graph.producers]
    logs = edge_logs(graph, metric, offset)
    arguments = traced.program.inputs[len(traced.parameters) :]
    stopped = {v.index for v, is_sent in zip(arguments, sends, strict=False) if not is_sent}
    value, *rest = (env[v.index] for v in graph.program.outputs)
    problem = FeasibilityProblem(
        trace=traced,
        known=known,
        initial=tuple(x if given else None for x, given in zip(values, is_given, strict=True)),
        forward=tuple(None if given else x for x, given in zip(values, is_given, strict=True)),
        value=jnp.asarray(value),
        auxiliary=traced.auxiliary(rest),
        copy_counts=_all_copy_counts(graph, known, copies, metric, logs),
        held=_held_parameters(traced, all_held),
        prepared={},
        graph=graph,
        metric=metric,
        copies=copies,
        tau=float(tau),
        log_weights=logs,
        projector=Projector(),
        noise=noise,
        reach=reach_of(graph, noise if metric.in_gradient_regime else "everywhere", traced.data, stopped),
    )
    return problem if metric.in_gradient_regime else replace(problem, prepared=_prepared(problem))


def _prepared(problem: FeasibilityProblem) -> dict[int, Any]:
    """What the rules of the nodes compute in advance, for the projection regime."""
    rules = {i: node.rule for i, node in enumerate(problem.graph.nodes) if node.rule is not None}
    nodes, state = problem.graph.nodes, problem.start(False)
    with jax.default_matmul_precision(SOLVING):
        found = {
            i: rule.prepare(context(problem, i, False), [shown(problem, state, e) for e in nodes[i].edges])
            for i, rule in rules.items()
        }
    return {i: made for i, made in found.items() if made is not None}


def _two_colored(graph: Graph, concurrence: bool | None) -> Graph:
    """A graph with two colors, by identity nodes; with `concurrence`, where rules want it, all operations in one."""
    rule = identity(graph.values[0])
    if concurrence is None:
        concurrence = any(node.rule is not None and node.rule.wants_concurrence for node in graph.nodes)
    if concurrence:
        graph = with_concurrence(graph, rule)
    return with_identities(graph, rule)


def _held_parameters(traced: Trace, all_held: Sequence[Held]) -> dict[int, Held]:
    """What is held in sets, by the number of the parameter."""
    sets = {one.positions[0]: one for one in all_held}
    return {number: sets[place] for number, place in enumerate(traced.leaves) if place in sets}


def _needed(node: Node) -> set[int]:
    """The variables whose values on the forward pass a node needs."""
    needed = set(node.function.known) if node.function is not None else set()
    if node.rule is not None:
        needed.update(node.rule.known_variables())
    if node.equation is not None:
        needed.update(v.index for v, picked in zip(node.equation.inputs, node.unknown, strict=True) if not picked)
        needed.update(v.index for v in node.equation.residuals)
    return needed


RAW_TAU = 0.1
"""Of a problem that is solved for its own sake, in the unit metric by default."""


def feasibility_problem(
    loss: Callable[..., Any],
    model: PyTree,
    *args: Any,
    copies: Copies = "neuron",
    metric: Metric | None = None,
    data: Literal["constant", "pinned"] = "constant",
    two_colors: bool = True,
    concurrence: bool | None = None,
    tau: float = RAW_TAU,
    noise: Noise = "unreached",
    constraints: Sequence[Constraint] = (),
    has_aux: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> FeasibilityProblem:
    """The feasibility problem of `loss(model, *args)`.

    **Arguments:**

    - `loss`: the function that is given to `equinox.filter_value_and_grad` otherwise.
    - `model`: its inexact arrays are the unknown parameters.
    - `args`: the further arguments of the loss, such as a batch.
    - `copies`: how many copies a bilinear operation owns: `"neuron"` (every scalar product its own, as in the paper),
        or `"none"` (one constraint for the whole product; in the projection regime also for a recurrence in which
        nothing jumps and nothing has a rule or a derivative of its own).
    - `metric`: a [`Metric`][]; the unit metric by default.
    - `data`: `"constant"`, or `"pinned"` for data as variables held in place.
    - `two_colors`: whether the graph gets two colors, by identity nodes, and with nodes for all time steps of a
        recurrence that is no constraint of its own. Cyclic solvers do without: nothing is added, and a recurrence is
        one node.
    - `concurrence`: whether all operations get one color, and what makes copies equal the other ("divide and concur").
        By default where the loss has a [`threshold`][]. Else colors alternate from the objective back.
    - `tau`: factor of one sample's loss in the prox of the objective. In the projection regime losses that are sets do
        not use it.
    - `noise`: in the gradient regime, where operations with jumps (signs, roundings, positions of maxima) answer under
        noise: `"unreached"`, for what no gradient reaches; `"everywhere"`, beside the gradient too; or `"never"`.
    - `constraints`: pairs `(where, set)`, as for [`train`][], but none of several arrays together. All copies of such a
        parameter are equal, and in the set: every projection onto the parameter's node ends there.
    - `has_aux`: whether the loss returns `(value, auxiliary)`.
    - `kwargs`: keyword arguments of the loss.

    **Returns:**

    A [`FeasibilityProblem`][].

    **Raises:** `ValueError` for a loss that is no scalar or does not depend on the model, and for unknown options;
    `UnsupportedPrimitiveError` for operations without a rule.
    """
    check_function("loss", loss, "loss(model, *args) -> scalar")
    check_flag("has_aux", has_aux)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"`kwargs` must map names to arguments of the loss, got {described(kwargs)}.")
    check_copies(copies)
    check_tau(tau)
    check_noise(noise)
    metric = Metric() if metric is None else metric
    check_metric(metric)
    model, args, kwargs = on_automatic_mesh((model, args, dict(kwargs or {})))
    if concurrence is not None:
        check_flag("concurrence", concurrence)
    all_held = held(model, constraints)
    for one in all_held:
        if len(one.positions) > 1:
            raise ValueError(
                f"{one.names}: arrays that are in a set together (`Together`) are for `train` and `apply_constraints`; "
                "here each parameter is a node of its own. Give a set for each array, or make them one parameter."
            )
    check_common_points(model, all_held)
    traced = trace(loss, model, args, kwargs, has_aux=has_aux)
    problem = make_problem(
        traced, metric, copies, tau, data, two_colors, noise=noise, all_held=all_held, concurrence=concurrence
    )
    check_labels(labels_of(problem), args)
    return problem


class Labels(NamedTuple):
    """Labels of a loss of this library: their values, what raises where they are wrong, and which argument they are."""

    values: Array
    check: Callable[[Any], None]
    argument: int | None  # the place among the arrays of the arguments; `None` where they are computed from these


def labels_of(problem: FeasibilityProblem) -> list[Labels]:
    """The labels that the objectives of a problem read."""
    arguments = problem.trace.program.inputs[len(problem.trace.parameters) :]
    places = {v.index: i for i, v in enumerate(arguments)}
    equations = [n.equation for n in problem.graph.nodes if n.kind == "objective" and n.equation is not None]
    found = filter(None, map(checked_labels, equations))
    return [Labels(problem.known[index], check, places.get(index)) for index, check in found]


def check_labels(found: Sequence[Labels], data: PyTree) -> None:
    """Raises a `ValueError` where labels are out of range.

    Labels that are an argument of the loss as they stand are looked up in `data`, the whole of it; of others those of
    the problem's own batch are checked.
    """
    leaves = [x for x in jtu.tree_leaves(data) if eqx.is_array_like(x)]
    for values, check, argument in found:
        labels = leaves[argument] if argument is not None and argument < len(leaves) else values
        if not isinstance(labels, jax.core.Tracer):
            check(labels)
