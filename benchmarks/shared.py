"""What the benchmarks share: their loss, a step of alternating projections, timing in turn, and the file of figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxproj
from eqxproj._problem._state import iterate, prepared


def classification(model, x, y):
    """The mean cross-entropy of a model of one sample."""
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def copies_for(solver: eqxproj.AbstractSolver) -> str:
    """A copy a neuron; for solvers that remember their copies one constraint a whole product, which is faster."""
    return "none" if solver.store_copies else "neuron"


def projection_step(model, x, y, **options: Any):
    """One step of alternating projections on `classification`, from a state of its loop.

    **Arguments:**

    - `options`: of `eqxproj.feasibility_problem`.

    **Returns:**

    The compiled step, a function `(state, arrays) -> state`; the state, and the arrays.
    """
    solver = eqxproj.AlternatingProjections()
    problem = eqxproj.feasibility_problem(classification, model, x, y, **options)
    arrays, rest = eqx.partition(problem, eqx.is_array)
    start = prepared(lambda state: solver.step(problem, state), solver.init(problem))

    def step(state, arrays):
        return iterate(lambda state: solver.step(eqx.combine(arrays, rest), state), state, 1)

    return jax.jit(step).lower(start, arrays).compile(), start, arrays


def in_turn(steps: Mapping[str, Callable[[], Any]], repeats: int, warm: int) -> dict[str, dict[str, float]]:
    """Runs steps in turn (A B C A B C ...), so that the machine's noise hits all of them.

    **Arguments:**

    - `steps`: by name; all are compared with the first.
    - `repeats`, `warm`: rounds that count, and rounds before them that do not.

    **Returns:**

    For each step the median of its milliseconds, and the median of its ratios to the first of the same round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            times[name].append(time.perf_counter() - start)
    counted = {name: np.asarray(t[warm:]) for name, t in times.items()}
    base = next(iter(counted.values()))
    return {name: {"ms": 1e3 * float(np.median(t)), "ratio": float(np.median(t / base))} for name, t in counted.items()}


def write(path: str | None, results: Any) -> None:
    """Writes figures to a JSON file, where one is wanted."""
    if path:
        with open(path, "w") as file:
            json.dump(results, file, indent=1)
