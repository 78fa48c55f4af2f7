"""What every solver is: `init`, `step`, `terminate` and `postprocess`. The loop around them is `_solve.solve`."""

from __future__ import annotations

import abc
import functools as ft
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Bool

from .._errors import as_number, described
from .._problem._measures import Measures
from .._problem._problem import FeasibilityProblem
from .._problem._readers import value_of
from .._problem._state import State, combine
from ._start import random_start


class AbstractSolver(eqx.Module):
    """An iterative projection algorithm.

    - `store_copies`: whether it needs every copy of a variable. An algorithm that projects only from consensus
        does not.
    - `needs_two_colors`: whether it projects nodes together that may share no edge, so that the graph must get two
        colors. A sweep through the layers does not.
    - `is_cyclic`: whether a step goes through all layers, so that signals reach every node in it. A step that projects
        onto one color and then onto the other brings them two nodes farther.
    """

    store_copies: eqx.AbstractClassVar[bool]
    needs_two_colors: eqx.AbstractClassVar[bool]
    is_cyclic: ClassVar[bool] = False

    @property
    def gap_scale(self) -> float:
        """How far a step goes, in units of the distance between the two projections that it is made of."""
        return 1.0

    def check(self, problem: FeasibilityProblem) -> None:  # noqa: B027
        """Raises a `ValueError` where the solver cannot solve a problem. By default it can solve all."""

    def init(self, problem: FeasibilityProblem, key: Array | None = None) -> State:
        """The state to start from: the forward pass, or with a key one with random copies."""
        return problem.start(self.store_copies) if key is None else random_start(problem, key, self.store_copies)

    @abc.abstractmethod
    def step(self, problem: FeasibilityProblem, state: State) -> State:
        """One iteration."""

    def last_step(self, problem: FeasibilityProblem, state: State) -> State:
        """One iteration after which nothing but the parameters is read: an algorithm may leave out all else."""
        return self.step(problem, state)

    def terminate(self, measures: Measures, tol: float | Array) -> Bool[Array, ""]:
        """Whether to stop: the state has stopped changing, or every constraint holds to the tolerance."""
        return (measures.change <= tol) | (measures.violation <= tol)

    def settled(self, problem: FeasibilityProblem, state: State) -> State:
        """The state whose parameters are read at the end."""
        return state

    def postprocess(self, problem: FeasibilityProblem, state: State) -> tuple[Array, ...]:
        """The parameters that the state stands for: their entries, or where they started if the loss ignores them."""
        state = self.settled(problem, state)
        return tuple(
            start if value is None else value_of(problem, state, value)
            for start, value in zip(problem.trace.parameters, problem.graph.parameters, strict=True)
        )


class AbstractCopyingSolver(AbstractSolver):
    """An algorithm that needs every copy, and two colors."""

    store_copies: ClassVar[bool] = True
    needs_two_colors: ClassVar[bool] = True

    def solution(self, problem: FeasibilityProblem, state: State) -> State:
        """Where a solution stands, if the solver has come to rest: at the state, or at a projection of it."""
        return state

    def settled(self, problem: FeasibilityProblem, state: State) -> State:
        """All copies of a parameter equal, and in its sets: the solution, projected onto the parameters' nodes."""
        return problem.projector.settled(problem, state, ft.partial(self.solution, problem))


class AbstractGapSolver(AbstractCopyingSolver):
    """An algorithm at whose fixed points two projections agree, though the state itself satisfies no constraint."""

    def terminate(self, measures: Measures, tol: float | Array) -> Bool[Array, ""]:
        """Whether to stop: the two projections of a step are close, in the mean over the constraints."""
        return measures.gap <= tol


def check_has_projections(problem: FeasibilityProblem, solver: AbstractSolver) -> None:
    """Raises a `ValueError` where values have several readers, and nodes answer by pullbacks: duals would grow."""
    branches = any(len(edges) > 1 for edges in problem.graph.readers)
    if problem.metric.in_gradient_regime and branches:
        raise ValueError(
            f"{type(solver).__name__} reflects projections, but in the gradient regime, where `metric` is "
            f"{problem.metric}, nodes answer by their pullback: where values have several readers, its duals would "
            "grow from step to step. Take a grade below 100, such as `eqxproj.Metric(1.0, 1000.0)`, or "
            "`AlternatingProjections`."
        )


def check_number(name: str, value: float, low: float, high: float) -> float:
    """A solver's parameter, checked to lie in (low, high]."""
    number = as_number(value)
    if number is None or not low < number <= high:
        raise ValueError(f"`{name}` must be a number in ({low:g}, {high:g}], got {described(value)}.")
    return number


def onto(problem: FeasibilityProblem, state: State, color: int) -> State:
    r"""$P_A$ (color 0, with the objective in it) or $P_B$ (color 1)."""
    return problem.project(state, problem.graph.color(color))


def reflect(problem: FeasibilityProblem, state: State, color: int) -> State:
    """$R = 2P - I$."""
    return combine((2.0, -1.0), (onto(problem, state, color), state))
