"""What the benchmarks share: a loss, a step of alternating projections, ways to time steps, and the file of figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import eqxproj

STEEP = eqxproj.Metric(grade=1e18, parameter=1e4)
"""The metric that `eqxproj.filter_displacement` takes by default."""


def classification(model, x, y):
    """The mean cross-entropy of a model of one sample."""
    return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(model)(x), y))


def projection_step(model, x, y, **options: Any):
    """One step of alternating projections on `classification`, as it is in the middle of a run.

    **Arguments:**

    - `model`, `x`, `y`: of `classification`.
    - `options`: of `eqxproj.feasibility_problem`.

    **Returns:**

    The compiled step, a function `(state, arrays) -> state`; the state, and the arrays.
    """
    solver = eqxproj.AlternatingProjections()
    problem = eqxproj.feasibility_problem(classification, model, x, y, **options)
    arrays, rest = eqx.partition(problem, eqx.is_array)

    def step(state, arrays):
        return solver.step(eqx.combine(arrays, rest), state)

    start = steady(lambda state: step(state, arrays), solver.init(problem))
    return jax.jit(step).lower(start, arrays).compile(), start, arrays


def steady(step: Callable[[Any], Any], state: Any) -> Any:
    """A solver's first state, in the structure that its steps leave as it is.

    On the forward pass no copy has moved, and the state leaves out what is zero. The first steps add arrays, until
    every further step returns what it was given. Here these arrays are there from the start, as zeros.

    **Arguments:**

    - `step`: one step of the solver, a function of the state.
    - `state`: what the solver starts from.
    """
    last, after = state, jax.eval_shape(step, state)
    while jtu.tree_structure(after) != jtu.tree_structure(last):
        last, after = after, jax.eval_shape(step, after)
    known = {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(state)}
    paths, structure = jtu.tree_flatten_with_path(after)
    leaves = [known[k] if (k := jtu.keystr(path)) in known else jnp.zeros(x.shape, x.dtype) for path, x in paths]
    return jtu.tree_unflatten(structure, leaves)


def training_seconds(model, data: Sequence[Any], loss: Callable[..., Any], steps: int, warm: int, **options: Any):
    """The seconds of every step of `eqxproj.train` on one batch, all of `data`.

    **Arguments:**

    - `model`, `data`, `loss`, `options`: of `eqxproj.train`.
    - `steps`, `warm`: steps that count, and steps before them that do not.
    """
    result = eqxproj.train(model, data, loss, steps=warm + steps, batch_size=len(data[0]), eval_every=1, **options)
    return np.diff(result.history["seconds"])[warm:]


def in_turn(steps: Mapping[str, Callable[[], Any]], repeats: int, warm: int) -> dict[str, dict[str, float]]:
    """Times steps in turn (A B C A B C ...), so that the machine's noise hits all of them.

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
    """Writes figures to a JSON file, if a path is given."""
    if path:
        with open(path, "w") as file:
            json.dump(results, file, indent=1)
