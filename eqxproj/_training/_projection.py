"""`projection(f, *primals)`: as `jax.vjp`, but the way back takes a wanted output, and returns inputs that give it.

The inputs are found by a solver on the feasibility problem of `f` whose outputs equal the target. Limits: targets that
`f` cannot reach are approached only; the way back is compiled once for each shape of target.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._errors import check_function
from .._metric import Metric, check_metric
from .._problem._make import check_copies, make_problem
from .._problem._problem import Copies
from .._program._canonical import canonicalised
from .._program._complex import pairs
from .._program._custom import custom_loss
from .._program._trace import trace
from ..rules._registry import registry_version
from ..solvers import AbstractSolver, AlternatingProjections
from ..solvers._solve import check_positive, check_solver
from ._displacement import run


def _distance(outputs: Array, target: Array) -> Array:
    """The value of the loss below, which solvers do not use: its prox is a projection."""
    return 0.5 * jnp.square(outputs - target)


_equals = custom_loss(_distance, lambda outputs, target, tau: (target - outputs).astype(outputs.dtype), hard=True)


def projection(
    f: Callable[..., Any],
    *primals: PyTree,
    solver: AbstractSolver | None = None,
    steps: int = 100,
    metric: Metric | None = None,
    copies: Copies = "neuron",
) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree, ...]]]:
    """The value of `f(*primals)`, and a function from a wanted output to inputs near `primals` that give it.

    **Arguments:**

    - `f`: any function of pytrees of arrays whose operations have rules.
    - `primals`: where to start. Their inexact arrays may change.
    - `solver`, `steps`: alternating projections between the graphs of the operations and the target by default.
    - `metric`, `copies`: as for [`feasibility_problem`][].

    **Returns:** `(out, project)`. `project(target)` takes a pytree like `out` and returns a tuple like `primals`:
    inputs near `primals`, the nearest ones where `f` is one linear operation. The output at these inputs approaches the
    target as `steps` grow, where it can be reached at all.

    **Raises:** `ValueError` where the target is not shaped like the output.
    """
    check_function("f", f, "f(*primals)")
    solver = AlternatingProjections() if solver is None else solver
    check_solver(solver)
    check_positive("steps", steps)
    check_copies(copies)
    chosen = Metric() if metric is None else metric
    check_metric(chosen)
    out = f(*primals)

    def loss(primals: tuple[PyTree, ...], target: PyTree) -> Array:
        outputs = jtu.tree_leaves(eqx.filter(f(*primals), eqx.is_inexact_array))
        sides = pairs(outputs), pairs(jtu.tree_leaves(target))
        parts = [_equals(o, t).sum() for o, t in zip(*sides, strict=True)]
        return sum(parts[1:], start=parts[0])

    @eqx.filter_jit
    def solved(version: Hashable, primals: tuple[PyTree, ...], target: PyTree) -> tuple[PyTree, ...]:
        del version  # a static argument: other rules, another program
        traced = trace(loss, primals, (target,))
        problem = make_problem(traced, chosen, copies, 1.0, "constant", two_colors=True)
        state = canonicalised(lambda: run(problem, solver, steps), traced.program)
        return traced.rebuild(solver.postprocess(problem, state))

    def project(target: PyTree) -> tuple[PyTree, ...]:
        wanted, got = eqx.filter(out, eqx.is_inexact_array), eqx.filter(target, eqx.is_array_like)
        shapes = [jtu.tree_map(jnp.shape, t) for t in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"`target` must be shaped like the output of `f`: wanted {shapes[0]}, got {shapes[1]}.")
        return solved(
            registry_version(), tuple(primals), jtu.tree_map(lambda t, o: jnp.asarray(t, o.dtype), got, wanted)
        )

    return out, project
