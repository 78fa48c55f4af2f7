"""`solve`: runs a solver on a problem. This loop owns iteration, measurement, non-finite checks and results."""

from __future__ import annotations

import functools as ft
import numbers
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._errors import NonFiniteError, as_number, described
from .._numerics._promotion import with_own_promotion
from .._problem._measures import change, violation
from .._problem._problem import FeasibilityProblem
from .._problem._state import State, iterate, prepared
from .._program._canonical import canonicalised
from ..rules._registry import registry_version
from . import AbstractSolver


class Solution(eqx.Module):
    """What [`solve`][] returns.

    - `model`: the model with the parameters found.
    - `state`: the solver's last state.
    - `stats`: `"steps"`, and per step `"change"` (largest change of any copy or parameter) and `"violation"` (largest
        distance of any node's output copies from the function of its input copies).
    - `result`: `"converged"`, or `"step limit"`.
    """

    model: PyTree
    state: State
    stats: dict[str, Any]
    result: str = eqx.field(static=True)

    def __repr__(self) -> str:
        last = {name: values[-1] for name, values in self.stats.items() if np.ndim(values) and len(values)}
        shown = ", ".join(f"last {name}={described(value)}" for name, value in last.items())
        model, steps = type(self.model).__name__, described(self.stats.get("steps"))
        return f"Solution(result={described(self.result)}, steps={steps}, {shown}, model=<{model}>)"


def finite_nodes(problem: FeasibilityProblem, state: State) -> Bool[Array, " nodes"]:
    """For each node whether its operands and outputs are finite."""
    flags = []
    for spec in problem.graph.nodes:
        arrays = [state.duals[e] for e in spec.edges]
        arrays += [held[v] for held in (state.values, state.shifts, problem.initial) for v in spec.outputs]
        checks = [jnp.all(jnp.isfinite(x)) for x in arrays if x is not None]
        flags.append(jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True))
    return jnp.stack(flags)


def first_bad(problem: FeasibilityProblem, finite: Any) -> int | None:
    """The non-finite node nearest to the objective, from which a sweep starts; `None` where all are finite."""
    bad = [i for i, ok in enumerate(finite) if not ok]
    return min(bad, key=lambda i: (problem.graph.depth[i], i)) if bad else None


@eqx.filter_jit
def _begin(
    problem: FeasibilityProblem, solver: AbstractSolver, version: Hashable
) -> tuple[State, Bool[Array, " nodes"]]:
    """The state to start from. `version` is that of the registry: rules inside of recurrences are looked up here."""
    del version
    start = prepared(ft.partial(solver.step, problem), solver.init(problem))
    return start, finite_nodes(problem, start)


@eqx.filter_jit
def _advance(
    problem: FeasibilityProblem, solver: AbstractSolver, version: Hashable, tol: float, state: State
) -> tuple[State, Bool[Array, " nodes"], Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """One step, not taken to a state that is not finite: state, finite nodes, change, violation, whether to stop."""
    del version
    step = ft.partial(solver.step, problem)
    new = canonicalised(lambda: iterate(step, state, 1), problem.trace.program)
    finite = finite_nodes(problem, new)
    moved, broken = change(problem, state, new), violation(problem, new)
    ok = jnp.all(finite)
    kept = jtu.tree_map(lambda a, b: jnp.where(ok, a, b), new, state)
    return kept, finite, moved, broken, solver.terminate(moved, broken, tol)


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` for what is no integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {described(value)}.")


def check_solver(solver: Any) -> None:
    if not isinstance(solver, AbstractSolver):
        got = f"{solver.__name__}. Call the class to make one." if isinstance(solver, type) else f"{described(solver)}."
        raise TypeError(f"`solver` must be an instance of a solver such as `eqxproj.DouglasRachford()`, got {got}")


@with_own_promotion
def solve(problem: FeasibilityProblem, solver: AbstractSolver, *, steps: int, tol: float = 0.0) -> Solution:
    """Runs a solver on a problem, from the forward pass.

    **Arguments:**

    - `problem`: from [`feasibility_problem`][].
    - `solver`: a solver, for instance `DouglasRachford()`.
    - `steps`: at most so many steps.
    - `tol`: stop where the largest change, or the largest violation, of a step is at most this.

    **Returns:**

    A [`Solution`][].

    **Raises:** `NonFiniteError` where a state becomes NaN or infinite, with the node, the step, and the last good
    model.
    """
    if not isinstance(problem, FeasibilityProblem):
        raise TypeError(f"`problem` must come from `eqxproj.feasibility_problem`, got {described(problem)}.")
    check_solver(solver)
    if solver.needs_two_colors and problem.graph.conflicts:
        raise ValueError(
            f"{type(solver).__name__} projects all nodes of one color together, but `problem` has edges that join two "
            "nodes of one color. Make it with `two_colors=True`."
        )
    check_positive("steps", steps)
    limit = as_number(tol)
    if limit is None or not limit >= 0:
        raise ValueError(f"`tol` must be a number of at least zero, got {described(tol)}.")
    state, finite = _begin(problem, solver, registry_version())
    bad, count, result = first_bad(problem, jax.device_get(finite)), 0, "step limit"
    stats: dict[str, list[float]] = {"change": [], "violation": []}
    while bad is None and count < steps and result != "converged":
        state, finite, moved, broken, done = _advance(problem, solver, registry_version(), limit, state)
        count += 1
        bad = first_bad(problem, jax.device_get(finite))
        stats["change"].append(float(moved))
        stats["violation"].append(float(broken))
        result = "converged" if bool(done) else result
    model = problem.trace.rebuild(solver.postprocess(problem, state))
    if bad is not None:
        raise NonFiniteError(problem.describe(bad), max(count - 1, 0), model)
    arrays = {name: np.asarray(values, np.float32) for name, values in stats.items()}
    return Solution(model, state, {"steps": count, **arrays}, result)
