r"""Solvers that go through the layers of the graph one after another, from the objective back to the data.

A layer is all nodes of one longest distance from the objective, so that every node follows all that read from it.
Source: section 3 of arXiv 2506.05878.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from .._problem._problem import FeasibilityProblem
from .._problem._state import State, combine
from ._base import AbstractCopyingSolver, AbstractSolver


class CyclicProjections(AbstractSolver):
    """One projection after another, from the objective back. No copies are stored.

    From the forward pass, in the gradient regime, this is one backward sweep that returns the gradient where there is
    one.
    """

    store_copies: ClassVar[bool] = False
    needs_two_colors: ClassVar[bool] = False
    is_cyclic: ClassVar[bool] = True

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        project = problem.project_layer  # each look-up of a module's method goes through all of its arrays
        for layer in problem.graph.layers:
            state = project(state, layer)
        return state

    def last_step(self, problem: FeasibilityProblem, state: State) -> State:
        return self.step(problem, replace(state, is_last=True))  # every node has been read when it is projected


class CyclicDouglasRachford(AbstractCopyingSolver):
    r"""$x \leftarrow D_n \cdots D_1 x$ with $D_i = (I + R_{i+1} R_i)/2$, the layers taken cyclically."""

    is_cyclic: ClassVar[bool] = True

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        layers, project = problem.graph.layers, problem.project_layer
        for first, second in zip(layers, (*layers[1:], layers[0]), strict=True):
            reflected = state
            for layer in (first, second):
                reflected = combine((2.0, -1.0), (project(reflected, layer), reflected))
            state = combine((0.5, 0.5), (state, reflected))
        return state
