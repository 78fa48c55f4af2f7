r"""Displacements: how far a projection step moves the parameters, in the shape and size of a gradient.

`filter_displacement(loss)(model, x, y)` runs a solver from the forward pass and returns, for every parameter, the
dual of $x - P(x)$, divided by tau: shaped, signed and sized like the answer of `equinox.filter_grad`, so that any
optax transformation takes it at its usual settings. In the gradient regime (a steep metric) it *is* the gradient
wherever there is one. With a flatter metric it is an implicit, preconditioned step. Either way it goes on through
operations that have no gradient.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._errors import check_flag, check_function
from .._metric import Metric, check_metric
from .._numerics._promotion import with_own_promotion
from .._problem._make import RAW_TAU, check_copies, check_noise, check_tau, make_problem
from .._problem._problem import Copies, FeasibilityProblem
from .._problem._readers import moved_by
from .._problem._state import State, iterate, prepared
from .._program._canonical import canonicalised
from .._program._compiled import jitted
from .._program._sharding import with_automatic_axes
from .._program._trace import Trace, trace
from ..rules._base import EXACT, Noise
from ..rules._registry import registry_version
from ..solvers import AbstractSolver, CyclicProjections
from ..solvers._solve import check_positive, check_solver
from ._nnx import flax_for
from ._regime import loosened, sweeps
from ._regime import tau as tau_of

DEFAULT_METRIC = Metric(grade=1e18, parameter=1e4)
"""The metric of the gradient regime: so steep that a displacement is the gradient where there is one, at any depth.

A node whose derivative has size $a$, its gain, divides the dual that comes back through it by $1 + a^2/g$, with $g$ the
grade. Training stalls where this damping adds up. Inside of a matrix exponential there are gains of 1e7. At 1e18 the
damping is mostly below the precision of float32, so that products, maxima and local solvers leave it out.
"""
DEFAULT_TAU = 1e-6
"""The factor of one sample's loss in the gradient regime: so small that the objective answers by its slope alone.

It matters for a loss without a prox of its own, whose curvature bends the answer with a larger factor: the prox of a
Gaussian likelihood at 0.01 narrows learned variances until training diverges.
"""
LARGE_TAU = 0.01
"""The factor where a smaller one would do harm: outside of the gradient regime, where steps should cross a jump, and in
a loss that computes in float16, where small duals are rounded to zero (duals are proportional to the factor)."""


@dataclass(frozen=True)
class Options:
    """How a displacement is computed: the solver, its number of steps, and the problem that it runs on.

    `steps` is `None` where it follows from the depth of the graph, as does the tau of a `raw` displacement, which is
    taken off as it is. `accuracy` is that of projections that are found by iteration. With `follows`, convolutions make
    the parameters of the metric less stiff. With `persists` a run goes on from what it left at a minibatch.
    """

    solver: AbstractSolver
    steps: int | None
    metric: Metric
    copies: Copies
    tau: float | None
    noise: Noise
    raw: bool = False
    accuracy: float = EXACT
    follows: bool = False
    persists: bool = False

    def problem(self, traced: Trace) -> FeasibilityProblem:
        """The problem of a traced loss, whose tau by default is small in the gradient regime, except in float16."""
        program, tau = traced.program, self.tau
        if tau is None:
            variables = (*program.inputs, *(v for equation in program.equations for v in equation.outputs))
            small = self.metric.in_gradient_regime and not any(v.dtype == jnp.float16 for v in variables)
            tau = DEFAULT_TAU if small else LARGE_TAU
        metric = loosened(self.metric, traced) if self.follows else self.metric
        problem = make_problem(
            traced, metric, self.copies, tau, "constant", self.solver.needs_two_colors, noise=self.noise
        )
        self.solver.check(problem)
        if self.raw and self.tau is None:
            problem = replace(problem, tau=tau_of(problem, self.solver))
        return replace(problem, accuracy=self.accuracy)

    def state(self, problem: FeasibilityProblem) -> State:
        """The state after all steps, whose parameters are read."""
        return run(problem, self.solver, self._count(problem))

    def start(self, problem: FeasibilityProblem) -> State:
        """The forward pass, with an array for all that steps may move."""
        return prepared(ft.partial(self.solver.step, problem), self.solver.init(problem))

    def moved(self, problem: FeasibilityProblem, start: State) -> State:
        """The state after all steps from a state of `start`, as the solver may go on from it."""
        return iterate(ft.partial(self.solver.step, problem), start, self._count(problem))

    def _count(self, problem: FeasibilityProblem) -> int:
        return sweeps(problem, self.solver, self.persists) if self.steps is None else self.steps


def checked_options(
    solver: AbstractSolver | None,
    steps: int | None,
    metric: Metric | None,
    copies: Copies | None,
    tau: float | None,
    noise: Noise,
    steps_name: str = "steps",
    raw: bool = False,
) -> Options:
    """Options from those of a user, checked. `None` means the default; `steps_name` is the user's name of `steps`."""
    solver = CyclicProjections() if solver is None else solver
    metric = DEFAULT_METRIC if metric is None else metric
    copies = "neuron" if copies is None else copies
    check_solver(solver)
    if steps is not None:
        check_positive(steps_name, steps)
    check_metric(metric)
    check_copies(copies)
    check_noise(noise)
    if tau is not None:
        check_tau(tau)
    return Options(solver, steps, metric, copies, tau, noise, raw)


@with_own_promotion
def run(problem: FeasibilityProblem, solver: AbstractSolver, steps: int) -> State:
    """`steps` steps of a solver from the forward pass."""
    step = solver.last_step if steps == 1 else solver.step
    return solver.settled(problem, iterate(ft.partial(step, problem), solver.init(problem), steps))


@with_own_promotion
def displacement_of(problem: FeasibilityProblem, state: State, raw: bool) -> PyTree:
    """The displacement of every parameter, as a pytree like the model.

    Of a complex parameter it is, as JAX has it for gradients, the conjugate of what lowers the loss if it is taken off.
    A `raw` one is taken off as it is.
    """
    conjugate = () if raw else problem.trace.imaginary

    scale = problem.gradient_scale

    def leaf(start: Array, value: int | None) -> Array:
        if value is None or (shift := state.shifts[value]) is None:
            return jnp.zeros_like(start)
        if not raw:
            return (shift / -scale).astype(start.dtype)
        moved = moved_by(problem, state, value)
        assert moved is not None
        return -moved.astype(start.dtype)

    parts = map(leaf, problem.trace.parameters, problem.graph.parameters)
    return problem.trace.tree([-x if i in conjugate else x for i, x in enumerate(parts)])


def filter_value_and_displacement(
    loss: Callable[..., Any],
    *,
    solver: AbstractSolver | None = None,
    metric: Metric | None = None,
    copies: Copies = "neuron",
    tau: float | None = None,
    noise: Noise = "unreached",
    steps: int = 1,
    raw: bool = False,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """As `equinox.filter_value_and_grad`: the value of a loss, and a displacement instead of a gradient.

    **Arguments:**

    - `loss`: `loss(model, *args, **kwargs)`, a scalar, or `(scalar, auxiliary)` with `has_aux`.
    - `solver`, `steps`: the solver, and how many steps it takes from the forward pass; one cyclic sweep by default.
    - `metric`: a [`Metric`][]; by default a steep one, in which the displacement is the gradient wherever there is one;
        with `raw` the unit metric.
    - `copies`: `"neuron"` or `"none"`, see [`feasibility_problem`][].
    - `tau`: factor of one sample's loss in the prox of the objective. By default 1e-6 in the gradient regime (a metric
        with a grade of 100 or more), 0.01 outside of it and for a loss that computes in float16; with `raw` 0.1.
    - `noise`: where operations with jumps answer under noise: `"unreached"`, for what no gradient reaches, so that all
        else gets its gradient; `"everywhere"`, beside the gradient too; or `"never"`.
    - `raw`: return $x - P(x)$ itself, unscaled: `optax.sgd(1.0)` then replaces x by P(x).
    - `has_aux`: as in `equinox.filter_value_and_grad`.

    **Returns:** A function of the same arguments as `loss` that returns `(value, displacement)`, or
    `((value, auxiliary), displacement)`. The displacement is a pytree like the model, with `None` for whatever is no
    inexact array. That of a complex array is conjugated, as its gradient is, unless it is `raw`. For an nnx module it
    is what `nnx.grad` returns, the state of its `nnx.Param` variables; the other variables that the loss changes
    (running statistics, counts of random numbers) are changed in the module.

    **Raises:** `ValueError` and `TypeError` for unusable options; on the call, `UnsupportedPrimitiveError` and
    `ValueError` as [`feasibility_problem`][].
    """
    check_function("loss", loss, "loss(model, *args) -> scalar")
    check_flag("raw", raw)
    check_flag("has_aux", has_aux)
    if raw:
        metric, tau = Metric() if metric is None else metric, RAW_TAU if tau is None else tau
    chosen = checked_options(solver, steps, metric, copies, tau, noise)

    compute = _Compute(loss, chosen, raw, has_aux)
    of_module = ft.cache(lambda flax: _Compute(flax.ModuleLoss(loss, has_aux), chosen, raw, True))

    @ft.wraps(loss)
    def value_and_displacement(model: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        flax, version = flax_for(model), registry_version()  # other rules, another program
        if flax is None:
            return jitted(compute, version)(model, args, kwargs)
        (value, (aux, rest)), moved = jitted(of_module(flax), version)(flax.from_nnx(model), args, kwargs)
        return ((value, aux) if has_aux else value), flax.written_back(model, moved, rest)

    return value_and_displacement


class _Compute(eqx.Module):
    """The value and the displacement of a loss. Its leaf is the loss, or the leaves of a loss that is a pytree."""

    loss: Callable[..., Any]
    chosen: Options = eqx.field(static=True)
    raw: bool = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)

    def __call__(self, model: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, PyTree]:
        return with_automatic_axes(self._answer, (model, args, kwargs), eqx.filter(model, eqx.is_inexact_array))

    def _answer(self, given: tuple[PyTree, tuple[Any, ...], dict[str, Any]]) -> tuple[Any, PyTree]:
        traced = trace(self.loss, *given, has_aux=self.has_aux)
        problem = self.chosen.problem(traced)
        state = canonicalised(lambda: self.chosen.state(problem), traced.program)
        moved = displacement_of(problem, state, self.raw)
        return ((problem.value, problem.auxiliary) if self.has_aux else problem.value), moved


def filter_displacement(loss: Callable[..., Any], **options: Any) -> Callable[..., PyTree]:
    """As `equinox.filter_grad`: the displacement of [`filter_value_and_displacement`][], without the value.

    **Returns:** A function that returns the displacement, or `(displacement, auxiliary)` with `has_aux`.
    """
    both = filter_value_and_displacement(loss, **options)

    @ft.wraps(loss)
    def displacement(model: PyTree, /, *args: Any, **kwargs: Any) -> PyTree:
        value, moved = both(model, *args, **kwargs)
        return (moved, value[1]) if options.get("has_aux") else moved

    return displacement
