"""The feasibility problem of a loss: its graph, its metric, and the values of the forward pass.

Solvers and the projector read it. It is a pytree, so that it may be made inside a `jit`, or passed into one.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._files import check_packages, check_picture, write_whole
from .._graph._graph import Graph, table
from .._graph._reach import Reach, jumps, reach_of
from .._metric import Metric, clamped
from .._program._trace import Trace
from ..rules._base import EXACT, Noise
from ._constraints import Held
from ._draw import drawn
from ._state import State

Copies = Literal["neuron", "none"]


class AbstractProjector(abc.ABC):
    """How a state is projected onto the constraints of some nodes. Compared by value, hence a frozen dataclass."""

    stores_copies: bool
    """Whether every copy is stored, whatever the solver."""

    @abc.abstractmethod
    def project(self, problem: FeasibilityProblem, state: State, nodes: Sequence[int]) -> State:
        """Projects onto the constraints of `nodes`, no two of which share an edge. Their order does not matter."""

    def project_layer(self, problem: FeasibilityProblem, state: State, nodes: Sequence[int]) -> State:
        """The same, for solvers that go through layers one after another."""
        return self.project(problem, state, nodes)

    def settled(self, problem: FeasibilityProblem, state: State, solution: Callable[[State], State]) -> State:
        """What `solution` makes of a state, projected onto the parameters' nodes, no two of which share an edge."""
        kinds = enumerate(node.kind for node in problem.graph.nodes)
        return self.project(problem, solution(state), [i for i, kind in kinds if kind == "parameter"])


class FeasibilityProblem(eqx.Module):
    """Find parameters and states that satisfy the constraints of every operation.

    - `graph`: the constraints. `metric`, `copies`, `tau`: as given to [`feasibility_problem`][].
    - `known`: values of what depends on no parameter. `initial`: the start of each parameter and datum.
    - `forward`: the values of the nodes' outputs on the forward pass. `value`: the loss there.
    - `copy_counts`: for each value how many copies of it its consumers own, those of the heaviest counting as one.
    - `log_weights`: the logarithm of the weight of each edge.
    - `noise`: where operations with jumps answer under noise. `reach`: where gradients and these answers go.
    - `held`: for some parameters, by number, the sets that they are held in.
    - `prepared`: what the rules of some nodes have computed in advance.
    - `outer_unit`: the unit of the duals, where the problem is part of another.
    - `accuracy`: of projections that are found by iteration, what may be left of their equations.
    """

    trace: Trace
    known: dict[int, Array]
    initial: tuple[Array | None, ...]
    forward: tuple[Array | None, ...]
    value: Float[Array, ""]
    auxiliary: PyTree
    copy_counts: tuple[float | Array, ...]
    held: dict[int, Held]
    prepared: dict[int, PyTree]
    graph: Graph = eqx.field(static=True)
    metric: Metric = eqx.field(static=True)
    copies: Copies = eqx.field(static=True)
    tau: float = eqx.field(static=True)
    log_weights: tuple[float, ...] = eqx.field(static=True)
    projector: AbstractProjector = eqx.field(static=True)
    noise: Noise = eqx.field(static=True)
    reach: Reach = eqx.field(static=True)
    outer_unit: float | None = eqx.field(static=True, default=None)
    accuracy: float = eqx.field(static=True, default=EXACT)

    def project(self, state: State, nodes: Sequence[int]) -> State:
        """The state projected onto the constraints of some nodes, no two of which share an edge.

        **Arguments:**

        - `state`: from `start`, or from another projection.
        - `nodes`: their numbers, for instance `problem.graph.color(0)`. Their order does not matter.

        **Returns:**

        The new state. Copies of what the nodes have written equal it.
        """
        return self.projector.project(self, state, nodes)

    def project_layer(self, state: State, nodes: Sequence[int]) -> State:
        """`project`, for solvers that go through the layers of the graph one after another."""
        return self.projector.project_layer(self, state, nodes)

    def start(self, store_copies: bool) -> State:
        """The state of the forward pass: every copy equals the value that it copies."""
        nothing = (None,) * len(self.initial)
        stored = (store_copies or self.projector.stores_copies) and self.copies != "none"
        return State(self.forward, nothing, (None,) * len(self.graph.edges), (True,) * len(self.graph.nodes), stored)

    def in_sets(self, parameters: Sequence[Array]) -> tuple[Array, ...]:
        """The parameters in their sets, to the last bit: a state keeps how far they have moved, which is rounded."""
        return tuple(self.held[i].alone(x) if i in self.held else x for i, x in enumerate(parameters))

    def model(self, parameters: Sequence[Array]) -> PyTree:
        """The model with these parameters, as a solver's `postprocess` returns them."""
        return self.trace.rebuild(parameters)

    def edge_weight(self, edge: int) -> float:
        """The weight of an edge, clamped."""
        return clamped(self.log_weights[edge])

    @property
    def gradient_scale(self) -> float:
        """What divides an accumulated dual to give it the size of a gradient. A projection onto a set has no tau."""
        projected = self.graph.hard and not self.metric.in_gradient_regime
        return (1.0 if projected else self.tau) / self.graph.largest

    @property
    def unit(self) -> float:
        """What divides any dual to give it the size of a gradient of the loss."""
        return self.gradient_scale if self.outer_unit is None else self.outer_unit

    def describe(self, node: int) -> str:
        """A node in one line, for messages."""
        spec = self.graph.nodes[node]
        where = f" at {spec.source}" if spec.source else ""
        return f"{node} ({spec.operation}, {spec.kind}){where}"

    def __repr__(self) -> str:
        nodes, rules = self.graph.nodes, sum(n.rule is not None for n in self.graph.nodes)
        count = sum(x.size for x in self.trace.parameters)
        return (
            f"FeasibilityProblem({len(nodes)} nodes, {rules} of them operations, {len(self.graph.edges)} edges, "
            f"{count} parameters in {len(self.trace.parameters)} arrays, metric={self.metric}, copies={self.copies!r}, "
            f"tau={self.tau:g}; `explain()` lists the nodes)"
        )

    def explain(self) -> str:
        """The problem as a table: one line a node, from the objective back.

        **Returns:**

        Operation, rule, shapes of the operands and outputs, color, and the source line in the model. After the table
        stands which nodes go through the local solver, which jumps answer under noise in the gradient regime, and how
        many parameters the loss does not depend on.
        """
        graph = self.graph
        rows = [["node", "operation", "rule", "shapes", "color", "source"]]
        for i in sorted(range(len(graph.nodes)), key=lambda i: (graph.depth[i], i)):
            spec = graph.nodes[i]
            ins = ", ".join(graph.edges[e].variable.describe() for e in spec.edges)
            outs = ", ".join(graph.values[v].describe() for v in spec.outputs)
            shapes = " -> ".join(x for x in (ins, outs) if x)
            rows.append([str(i), spec.operation, spec.describe_rule(), shapes, "AB"[graph.colors[i]], spec.source])
        local = [i for i, n in enumerate(graph.nodes) if n.rule is not None and "local" in n.rule.label]
        unused = [n for n, v in zip(self.trace.names, graph.parameters, strict=True) if v is None]
        lines = [table(rows), ""]
        if local:
            lines.append(f"Through the generic local solver (derivatives of the node alone): nodes {local}.")
        lines += self._explain_jumps()
        if unused:
            lines.append(f"Parameters that the loss does not depend on: {', '.join(unused)}.")
        return "\n".join([*lines, "Operations without a rule: none."])

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws the graph of the problem, from the data at the top down to the objective.

        A box is a node, with its operation and the shapes of its operands and outputs, in one of the two colors.
        Parameters and pinned data are round, the objective has a heavy outline. What an edge shows one time step late
        is dashed. In a graph of more than 40 nodes, equal branches side by side are one box, and a block of rows that
        repeats is drawn once, in a frame that says how often.

        **Arguments:**

        - `path`: the file to write, one of `.png`, `.svg` and `.pdf`, in a folder that is there.

        **Raises:** `TypeError`, `ValueError` and `FileNotFoundError` for an unusable path, and `ImportError` where
        matplotlib or networkx is missing (`pip install 'eqxproj[plot]'`), all before anything is drawn.
        """
        target = check_picture(path)
        check_packages("`problem.draw`", ("matplotlib", "networkx"))
        write_whole(target, drawn(self.graph, target.suffix))

    def _explain_jumps(self) -> list[str]:
        """What the nodes with jumps answer in the gradient regime, whatever the metric is."""
        edges = reach_of(self.graph, self.noise, self.trace.data).edges
        found = [i for i, node in enumerate(self.graph.nodes) if jumps(node)]
        noisy = [i for i in found if any(edges[e] for e in self.graph.nodes[i].edges)]
        plain = [i for i in found if i not in noisy]
        lines = []
        if noisy:
            lines.append(f"Jumps that answer under noise in the gradient regime: nodes {noisy}.")
        if plain:
            lines.append(f"Jumps that answer by their derivative alone in the gradient regime: nodes {plain}.")
        return lines
