"""What `train(solver=X())` takes where nothing else is said: metric, copies, tau, number of sweeps, and average.

Transforms a solver and the depth of a graph into settings of the projection regime. They were found on networks of 2, 8
and 20 hidden layers and on two with convolutions, on digits, MNIST and CIFAR-10. Limits: a recurrence that is one
constraint counts as one operation, another one as deep as its body, whatever its number of time steps.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from .._errors import described
from .._graph._graph import Graph
from .._metric import Metric
from .._problem._problem import Copies, FeasibilityProblem
from .._program._equations import dependents
from .._program._trace import Trace
from ..solvers import AbstractSolver, CyclicProjections

PROJECTION_TAU = 5.0
"""The factor of one sample's loss where the new parameters are the projection's: a sample goes far toward its label."""

AVERAGE = 0.999
"""The decay of the average of the parameters, which is the model. Each projection fits its minibatch alone: the average
over the last tenth of them fits them all. With one it is the projection itself."""

_SWEEPS_AT_TAU = 8
"""So many sweeps alternating reflections may make with the factor above: a network of two hidden layers takes them."""

_LOOSER = 16.0
"""Beside kernels that are learned, parameters are less stiff by this factor. Found by trying: see `RESULTS.md`."""

_FEWER = 5
"""So many times fewer sweeps are made at a minibatch whose state is kept. Found by trying: see `RESULTS.md`."""

ROUGH = 1e-2
"""What may be left of equations solved by iteration: the next sweep finds it, and so does the next minibatch."""


class Settings(NamedTuple):
    """How a minibatch is projected: see [`feasibility_problem`][]."""

    metric: Metric
    copies: Copies


def in_projection_regime(solver: AbstractSolver | None, metric: Metric | None) -> bool:
    """Whether training projects: with a solver, unless it is the cyclic sweep alone, or the metric is steep."""
    if solver is None:
        return False
    return not isinstance(solver, CyclicProjections) if metric is None else not metric.in_gradient_regime


def settings(solver: AbstractSolver) -> Settings:
    """The settings of the projection regime.

    The parameters of an algorithm with a memory are stiffer than those of one that returns to consensus before each
    projection: it goes farther.
    """
    has_memory = solver.store_copies and not solver.is_cyclic
    parameter = 500.0 if _is_undamped(solver) else 1000.0 if has_memory else 300.0
    return Settings(Metric(1.0, parameter), "none")


def loosened(metric: Metric, traced: Trace) -> Metric:
    """The metric for a loss with kernels to learn, whose parameters move more easily; for another loss the same."""
    equations, inputs = traced.program.equations, traced.program.inputs
    unknown = dependents(equations, inputs[: len(traced.parameters)])
    learns = any(e.name == "conv_general_dilated" and e.inputs[1].index in unknown for e in equations)
    return Metric(metric.grade, metric.parameter / _LOOSER) if learns else metric


def tau(problem: FeasibilityProblem, solver: AbstractSolver) -> float:
    r"""The factor of one sample's loss in the projection regime.

    Alternating reflections damp nothing. In each of $n$ sweeps the objective pulls once more, and what it pulled before
    goes on: after all of them the parameters have moved like $n^2$, by which the factor is divided in deep networks.
    """
    if not _is_undamped(solver):
        return PROJECTION_TAU
    return PROJECTION_TAU * min(1.0, _SWEEPS_AT_TAU / sweeps(problem, solver)) ** 2


def _is_undamped(solver: AbstractSolver) -> bool:
    """Whether a step goes the whole way of two reflections."""
    return solver.store_copies and solver.gap_scale == 2.0


def reach(graph: Graph) -> int:
    """How many sweeps a two-color solver takes to bring the objective's answer to all nodes: one for two of them."""
    return -(-(max(graph.distance) + 1) // 2)


def comes_to_rest(solver: AbstractSolver) -> bool:
    """Whether a solver has a memory, and goes on well from a state that was left long ago."""
    return solver.store_copies and not _is_undamped(solver)


def sweeps(problem: FeasibilityProblem, solver: AbstractSolver, persists: bool = False) -> int:
    """How many sweeps a solver makes: so many that signals go through all layers and back.

    One that goes on from where it was last time needs fewer: signals go on too.
    """
    count = 4 if solver.is_cyclic else 2 * reach(problem.graph)
    return max(1, count // _FEWER) if persists else count


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
