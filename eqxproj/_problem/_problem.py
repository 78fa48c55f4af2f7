"""The feasibility problem of a loss: its graph, its metric, and the values of the forward pass.

Transforms nothing: it is what solvers and the projector read. It is a pytree, so that it may be made inside a `jit`, or
passed into one.
"""

from __future__ import annotations

from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._graph._graph import Graph, table
from .._metric import Metric, clamped
from .._program._trace import Trace
from ._state import State

Copies = Literal["neuron", "none"]


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
    shares: tuple[float | Array, ...]
    graph: Graph = eqx.field(static=True)
    metric: Metric = eqx.field(static=True)
    copies: Copies = eqx.field(static=True)
    tau: float = eqx.field(static=True)
    log_weights: tuple[float, ...] = eqx.field(static=True)
    """The logarithm of the weight of each edge."""
    largest_shares: tuple[float, ...] = eqx.field(static=True)
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

    def start(self, store_copies: bool) -> State:
        """The state of the forward pass: every copy equals the value that it copies."""
        nothing = (None,) * len(self.initial)
        return State(
            self.forward, nothing, (None,) * len(self.graph.edges), (True,) * len(self.graph.nodes), store_copies
        )

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
