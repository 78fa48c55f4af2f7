"""What `train(solver=X())` takes where nothing else is said: metric, copies, tau and number of sweeps.

Transforms a solver and the depth of a graph into settings of the projection regime. They were found on networks of two
hidden layers, on digits and MNIST. Limits: a recurrence counts as deep as its body, whatever its number of time steps.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from .._errors import described
from .._graph._graph import Graph
from .._metric import Metric
from .._problem._problem import Copies, FeasibilityProblem
from ..solvers import AbstractSolver, AlternatingReflections, CyclicProjections

PROJECTION_TAU = 5.0
"""The factor of one sample's loss where the new parameters are the projection's: a sample goes far toward its label."""

ROUGH = 1e-2
"""What may be left of the equation of a product: the next sweep finds it, and so does the next minibatch."""


class Settings(NamedTuple):
    """How a minibatch is projected: see [`feasibility_problem`][]."""

    metric: Metric
    copies: Copies
    tau: float


def in_projection_regime(solver: AbstractSolver | None, metric: Metric | None) -> bool:
    """Whether training projects: with a solver, unless it is the cyclic sweep alone, or the metric is steep."""
    if solver is None:
        return False
    return not isinstance(solver, CyclicProjections) if metric is None else not metric.in_gradient_regime


def settings(solver: AbstractSolver) -> Settings:
    """The settings of the projection regime.

    The parameters of an algorithm that goes farther with each step are stiffer: of alternating reflections, which are
    not relaxed at all, the most; the least of those that return to consensus before each projection.
    """
    has_memory = solver.store_copies and not solver.is_cyclic
    parameter = 3000.0 if isinstance(solver, AlternatingReflections) else 1000.0 if has_memory else 300.0
    return Settings(Metric(1.0, parameter), "none", PROJECTION_TAU)


def reach(graph: Graph) -> int:
    """How many sweeps a two-color solver takes to bring the objective's answer to all nodes: one for two of them."""
    return -(-(max(graph.distance) + 1) // 2)


def sweeps(problem: FeasibilityProblem, solver: AbstractSolver) -> int:
    """How many sweeps a solver makes: so many that signals go through all layers and back."""
    return 4 if solver.is_cyclic else 2 * reach(problem.graph)


def warn_of_few(problem: FeasibilityProblem, solver: AbstractSolver, steps: int) -> None:
    """Warns where so many sweeps do not reach all layers."""
    needed = reach(problem.graph)
    if not solver.is_cyclic and steps < needed:
        warnings.warn(
            f"`solver_steps={described(steps)}` does not reach all layers: a step of {type(solver).__name__} brings "
            f"signals two nodes farther, and the last one of this loss is {max(problem.graph.distance)} nodes away. "
            f"Take at least {needed}, or leave `solver_steps` out.",
            stacklevel=2,
        )
