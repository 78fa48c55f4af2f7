"""The loop of a solver as one compiled program, and the program for each problem of one shape.

Transforms a state into that after many steps, in chunks: only at the end of a chunk are the steps measured, and checked
for NaN and infinity. A chunk that ends there is undone. Limits: a chunk takes all of its steps, so that the loop may
stop up to a chunk late.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._problem._measures import Measures, measured
from .._problem._problem import FeasibilityProblem
from .._problem._state import State, filled, prepared
from .._program._canonical import lowered
from .._program._compiled import configuration, kept
from .._program._signature import signature
from ..rules._registry import registry_version
from ._base import AbstractSolver


class Progress(eqx.Module):
    """Where a solver stands.

    - `state`: after the last chunk that was finite. `chunks`: how many there were.
    - `stats`: the measures of each chunk, as they fit into the buffer.
    - `is_done`: whether the solver says to stop. `is_finite`: whether all chunks were.
    """

    state: State
    chunks: Int[Array, ""]
    stats: Measures
    is_done: Bool[Array, ""]
    is_finite: Bool[Array, ""]

    @classmethod
    def of(cls, state: State, capacity: int) -> Progress:
        empty = jnp.full((capacity,), jnp.nan, jnp.float32)
        false = jnp.asarray(False)
        return cls(state, jnp.asarray(0, jnp.int32), Measures(empty, empty, empty), false, all_finite(state))


def all_finite(state: State) -> Bool[Array, ""]:
    """Whether all entries of a state are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(state)]))


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


def begin(problem: FeasibilityProblem, solver: AbstractSolver, start: State | Array | None) -> State:
    """The state to start from, whose entries stay arrays from step to step; `start` is a state, a key, or `None`."""
    state = start if isinstance(start, State) else solver.init(problem, start)
    return prepared(ft.partial(solver.step, problem), state)


def advance(
    problem: FeasibilityProblem,
    solver: AbstractSolver,
    progress: Progress,
    limit: int | Array,
    every: int | Array,
    tol: float | Array,
) -> Progress:
    """Goes on until there were `limit` chunks of `every` steps, or until the solver says to stop."""

    def chunk(progress: Progress) -> Progress:
        new, measures = _chunk(problem, solver, progress.state, every)
        ok = all_finite(new)
        state = jtu.tree_map(lambda a, b: jnp.where(ok, a, b), new, progress.state)
        place = progress.chunks
        stats = Measures(*(old.at[place].set(x) for old, x in zip(progress.stats, measures, strict=True)))
        return Progress(state, place + 1, stats, solver.terminate(measures, tol) & ok, ok)

    def goes_on(progress: Progress) -> Bool[Array, ""]:
        return (progress.chunks < limit) & ~progress.is_done & progress.is_finite

    return jax.lax.while_loop(goes_on, chunk, progress)


def _chunk(
    problem: FeasibilityProblem, solver: AbstractSolver, state: State, every: int | Array
) -> tuple[State, Measures]:
    """The state after some steps, and the measures of the last one."""
    nothing = Measures(*(jnp.asarray(jnp.nan, jnp.float32),) * 3)

    def body(i: Array, carry: tuple[State, Measures]) -> tuple[State, Measures]:
        old, _ = carry
        new = filled(solver.step(problem, old), old)
        last = jax.lax.cond(i == every - 1, lambda: _measures(problem, solver, old, new), lambda: nothing)
        return new, last

    return jax.lax.fori_loop(0, every, body, (state, nothing))


def _measures(problem: FeasibilityProblem, solver: AbstractSolver, old: State, new: State) -> Measures:
    found = measured(problem, old, new, solver.gap_scale)
    return Measures(*(x.astype(jnp.float32) for x in found))


# --- one program for all problems of one shape ---


def _arrays(problem: FeasibilityProblem) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(problem, eqx.is_array))


def _key(problem: FeasibilityProblem, solver: AbstractSolver) -> tuple[Hashable, tuple[Any, ...]]:
    """What of a problem and a solver a compiled program depends on, beside shapes; and what is compared by identity."""
    graph, traced = problem.graph, problem.trace
    structure, objects = signature(traced.program)
    held = eqx.partition(problem.held, eqx.is_array)[1]
    fixed = (problem.metric, problem.copies, problem.tau, problem.log_weights, problem.projector, problem.noise)
    fixed += (problem.accuracy,)
    shape = (type(graph), graph.variant, traced.is_parameter, traced.is_complex, problem.reach, problem.outer_unit)
    leaves, treedef = jtu.tree_flatten((held, fixed, solver))
    return (structure, shape, treedef, registry_version()), (*objects, *leaves)


def program_of(
    kind: str,
    function: Callable[..., PyTree],
    problem: FeasibilityProblem,
    solver: AbstractSolver,
    *arguments: PyTree,
) -> Callable[..., PyTree]:
    """`function(problem, solver, ...)` as a program that is compiled once for all problems of one shape.

    It takes arguments of the shapes of `arguments`, which are arrays. What is kept holds no problem, and no graph.
    """
    leaves, static = _arrays(problem), eqx.filter(problem, eqx.is_array, inverse=True)
    treedef = jtu.tree_structure(eqx.filter(problem, eqx.is_array))
    key, objects = _key(problem, solver)

    def pure(leaves: list[Array], arguments: PyTree) -> PyTree:
        return function(eqx.combine(jtu.tree_unflatten(treedef, leaves), static), solver, *arguments)

    flat, shape = jtu.tree_flatten((leaves, arguments))
    types = tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in flat)
    compiled = kept(
        kind, lambda _: lowered(pure, leaves, arguments).compile(), list(objects), shape, types, key, configuration()
    )
    return lambda *arguments: compiled(leaves, arguments)
