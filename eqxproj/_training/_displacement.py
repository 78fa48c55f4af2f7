r"""Displacements: what a projection step wants of the parameters, in the place of a gradient.

`filter_displacement(loss)(model, x, y)` runs a solver from the forward pass and returns, for every parameter, the
dual of $x - P(x)$, divided by tau: shaped, signed and sized like the answer of `equinox.filter_grad`, so that any
optax transformation takes it at its usual settings. As the metric becomes steep it *is* the gradient; with a finite
one it is an implicit, preconditioned step; and it goes on through operations that have no gradient.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._metric import Metric, check_metric
from .._problem._make import RAW_TAU, check_copies, check_tau, make_problem
from .._problem._problem import Copies, FeasibilityProblem
from .._problem._readers import moved_by
from .._problem._state import State, conformed, settled
from .._program._canonical import canonicalised
from .._program._equations import Program
from .._program._trace import trace
from ..solvers import AbstractSolver, CyclicProjections
from ..solvers._solve import check_positive, check_solver

DEFAULT_METRIC = Metric(grade=1e18, parameter=1e4)
"""So steep that it is a gradient where there is one, at any depth: a node with a gain of $a$ damps what comes back
through it by $1 + a^2/g$. On MNIST it learns as flatter ones do, or better. With a grade of 1e3, wide layers damp
enough to hold up a deep autoencoder; with 1e5, a gain of a hundred inside of the network, or data of that size, does;
with 1e12, the matrix exponential, inside of which there are gains of 1e7. At this grade, products, maxima and local
solvers leave the damping out, which float32 would hardly show."""
DEFAULT_TAU = 1e-6
"""So small that a loss without a prox of its own answers by its slope, whatever its curvature: that of a cosine of
small vectors is high, and so is that of a Gaussian likelihood with learned variances, whose prox at 0.01 narrows them
until training diverges."""
LARGE_TAU = 0.01
"""In a metric that is not steep, where a step wants states to move, and may want them to cross a jump; and for a loss
with float16 in it, where the duals of a smaller one, which are proportional to it, would be lost."""


def default_tau(program: Program, metric: Metric) -> float:
    """The default tau of a program of the loss."""
    variables = (*program.inputs, *(v for equation in program.equations for v in equation.outputs))
    small = metric.is_steep and not any(v.dtype == jnp.float16 for v in variables)
    return DEFAULT_TAU if small else LARGE_TAU


def run(problem: FeasibilityProblem, solver: AbstractSolver, steps: int) -> State:
    """`steps` steps of a solver from the forward pass."""
    state = solver.init(problem)
    if steps == 1 and not solver.store_copies:
        return solver.step(problem, state)
    start = settled(ft.partial(solver.step, problem), state)
    if steps <= _UNROLLED:
        state = start
        for _ in range(steps):
            state = conformed(solver.step(problem, state), start)
        return state
    return jax.lax.fori_loop(0, steps, lambda _, s: conformed(solver.step(problem, s), start), start)


_UNROLLED = 4
"""So few steps are unrolled, which takes as many times as long to compile and is a tenth faster with convolutions."""


def displacement_of(problem: FeasibilityProblem, state: State, raw: bool) -> PyTree:
    """The displacement of every parameter, as a pytree like the model."""
    leaves: list[Array] = []
    for start, value in zip(problem.trace.parameters, problem.graph.parameters, strict=True):
        shift = None if value is None else state.shifts[value]
        if shift is None or value is None:
            leaves.append(jnp.zeros_like(start))
            continue
        moved = moved_by(problem, state, value) if raw else shift / problem.gradient_scale
        assert moved is not None
        leaves.append(-moved.astype(start.dtype))
    return problem.trace.tree(leaves)


def filter_value_and_displacement(
    loss: Callable[..., Any],
    *,
    solver: AbstractSolver | None = None,
    metric: Metric | None = None,
    copies: Copies = "neuron",
    tau: float | None = None,
    steps: int = 1,
    raw: bool = False,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """In the place of `equinox.filter_value_and_grad`: the value of a loss, and a displacement instead of a gradient.

    **Arguments:**

    - `loss`: `loss(model, *args, **kwargs)`, a scalar, or `(scalar, auxiliary)` with `has_aux`.
    - `solver`: one cyclic sweep by default. `steps` of it are taken from the forward pass.
    - `metric`: a [`Metric`][]; by default a steep one, or with `raw` the unit metric.
    - `copies`: `"neuron"` or `"none"`, see [`feasibility_problem`][].
    - `tau`: factor of one sample's loss in the prox of the objective; by default 1e-6 (0.01 in a metric
        with a grade below 100, and where the loss computes in float16), or with `raw` 0.1.
    - `raw`: return $x - P(x)$ itself, unscaled: `optax.sgd(1.0)` then replaces x by P(x).
    - `has_aux`: as in `equinox.filter_value_and_grad`.

    **Returns:**

    A function of the same arguments as `loss` that returns `(value, displacement)`, or
    `((value, auxiliary), displacement)`. The displacement is a pytree like the model, with `None` in the place of all
    that is no inexact array.

    **Raises:** `ValueError` and `TypeError` for unusable options; on the call, `UnsupportedPrimitiveError` and
    `ValueError` as [`feasibility_problem`][].
    """
    solver = CyclicProjections() if solver is None else solver
    check_solver(solver)
    check_positive("steps", steps)
    check_copies(copies)
    if tau is not None:
        check_tau(tau)
    chosen = metric if metric is not None else (Metric() if raw else DEFAULT_METRIC)
    check_metric(chosen)

    @eqx.filter_jit
    def compute(model: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]):
        traced = trace(loss, model, args, kwargs, has_aux=has_aux)
        factor = tau if tau is not None else RAW_TAU if raw else default_tau(traced.program, chosen)
        problem = make_problem(traced, chosen, copies, factor, "constant", solver.needs_two_colors)
        state = canonicalised(lambda: run(problem, solver, steps), traced.program)
        moved = displacement_of(problem, state, raw)
        return ((problem.value, problem.auxiliary) if has_aux else problem.value), moved

    @ft.wraps(loss)
    def value_and_displacement(model: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        return compute(model, args, kwargs)

    return value_and_displacement


def filter_displacement(loss: Callable[..., Any], **options: Any) -> Callable[..., PyTree]:
    """In the place of `equinox.filter_grad`: as [`filter_value_and_displacement`][], without the value.

    **Returns:**

    A function that returns the displacement, or `(displacement, auxiliary)` with `has_aux`.
    """
    both = filter_value_and_displacement(loss, **options)

    @ft.wraps(loss)
    def displacement(model: PyTree, /, *args: Any, **kwargs: Any) -> PyTree:
        value, moved = both(model, *args, **kwargs)
        return (moved, value[1]) if options.get("has_aux") else moved

    return displacement
