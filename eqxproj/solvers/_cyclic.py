r"""Solvers that go through the layers of the graph one after another, from the objective back to the data.

- cyclic projections: one projection after another; from the forward pass this is one backward sweep, whose duals
    become the
  gradient as the metric becomes steep;
- cyclic Douglas-Rachford: $D_n \cdots D_1$ with $D_i = (I + R_{i+1} R_i)/2$.

A layer is all nodes of one longest distance from the objective (`order="topological"`: every node follows all its
consumers), or one frontier of a breadth-first walk that does not remember where it has been (`order="breadth_first"`,
as in the software of arXiv 2506.05878): a node that is reached by ways of several lengths is projected once for each.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import equinox as eqx

from .._graph._graph import frontiers
from .._problem._problem import FeasibilityProblem
from .._problem._projector import project_layer
from .._problem._state import State, combine
from ._base import AbstractSolver

Order = Literal["topological", "breadth_first"]


def _check_order(order: str) -> None:
    if order not in ("topological", "breadth_first"):
        raise ValueError(f'`order` must be "topological" or "breadth_first", got {order!r}.')


def _layers(problem: FeasibilityProblem, order: Order) -> tuple[tuple[int, ...], ...]:
    return problem.graph.layers if order == "topological" else frontiers(problem.graph)


class CyclicProjections(AbstractSolver):
    """One projection after another, from the objective back. No copies are stored.

    **Arguments:**

    - `order`: `"topological"` or `"breadth_first"`, see the module.
    """

    memory: ClassVar[bool] = False
    order: Order = eqx.field(static=True)

    def __init__(self, order: Order = "topological"):
        _check_order(order)
        self.order = order

    def init(self, problem: FeasibilityProblem) -> State:
        # What that software writes back leaves copies that differ, so that parity with it needs them all.
        return problem.start(problem.as_published and problem.copies != "none")

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        for layer in _layers(problem, self.order):
            state = project_layer(problem, state, layer)
        return state


class CyclicDouglasRachford(AbstractSolver):
    r"""$x \leftarrow D_n \cdots D_1 x$ with $D_i = (I + R_{i+1} R_i)/2$, the layers taken cyclically.

    **Arguments:**

    - `order`: `"topological"` or `"breadth_first"`, see the module.
    """

    memory: ClassVar[bool] = True
    order: Order = eqx.field(static=True)

    def __init__(self, order: Order = "topological"):
        _check_order(order)
        self.order = order

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        layers = _layers(problem, self.order)
        for first, second in zip(layers, (*layers[1:], layers[0]), strict=True):
            reflected = state
            for layer in (first, second):
                reflected = combine((2.0, -1.0), (project_layer(problem, reflected, layer), reflected))
            state = combine((0.5, 0.5), (state, reflected))
        return state
