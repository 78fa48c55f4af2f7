"""`projection(f, *primals)`: as `jax.vjp`, but the way back takes a wanted output, and returns inputs that give it.

The inputs are found by a solver on the feasibility problem of `f` whose outputs equal the target. Limits: targets that
`f` cannot reach are approached only; the way back is compiled once for each shape of target.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import as_array, check_function, described
from .._metric import Metric, check_metric
from .._problem._make import check_copies, make_problem
from .._problem._problem import Copies
from .._program._canonical import canonicalised
from .._program._complex import pairs
from .._program._custom import custom_loss
from .._program._sharding import on_automatic_mesh
from .._program._trace import trace
from ..rules._registry import registry_version
from ..solvers import AbstractSolver, AlternatingProjections
from ..solvers._solve import check_positive, check_solver
from ._displacement import run


def _distance(outputs: Array, target: Array) -> Array:
    """The value of the loss below, which solvers do not use: its prox is a projection."""
    return 0.5 * jnp.square(outputs - target)


_equals = custom_loss(_distance, lambda outputs, target, tau: (target - outputs).astype(outputs.dtype), hard=True)


def _checked(tree: PyTree, name: str, is_bad: Callable[[Array], Array], what: str) -> PyTree:
    """A pytree whose inexact arrays hold nothing bad: a `ValueError` at once, or an error of a compiled program."""

    def checked(path: Any, x: Any) -> Any:
        if not eqx.is_inexact_array(x):
            return x
        bad = jnp.any(is_bad(x))
        message = f"`{name}{jtu.keystr(path)}` holds {what}, and nothing can be projected from there or to it."
        if isinstance(bad, jax.core.Tracer):
            return eqx.error_if(x, bad, message)
        if bool(bad):
            raise ValueError(message)
        return x

    return jtu.tree_map_with_path(checked, tree)


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

    **Raises:** `ValueError` where the target is not shaped like the output, and where it or the primals hold NaN (the
    target also infinity); inside of a `jit`, as `equinox.error_if` does.
    """
    check_function("f", f, "f(*primals)")
    solver = AlternatingProjections() if solver is None else solver
    check_solver(solver)
    check_positive("steps", steps)
    check_copies(copies)
    chosen = Metric() if metric is None else metric
    check_metric(chosen)
    if not jtu.tree_leaves(eqx.filter(primals, eqx.is_inexact_array)):
        raise ValueError(f"`primals` must hold floating-point arrays that may change, got {described(primals)}.")
    primals = _checked(on_automatic_mesh(primals), "primals", jnp.isnan, "NaN")
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
        target = jtu.tree_map(lambda x: as_array("target", x) if isinstance(x, np.ma.MaskedArray) else x, target)
        wanted, got = eqx.filter(out, eqx.is_inexact_array), eqx.filter(target, eqx.is_array_like)
        shapes = [jtu.tree_map(jnp.shape, t) for t in (wanted, got)]
        if shapes[0] != shapes[1]:
            found = described(target) if shapes[1] is None else f"{type(target).__name__} of shape {shapes[1]}"
            raise ValueError(f"`target` must be shaped like the output of `f`: wanted {shapes[0]}, got {found}.")
        kinds = zip(jtu.tree_leaves(got), jtu.tree_leaves(wanted), strict=True)
        if any(jnp.iscomplexobj(t) and not jnp.iscomplexobj(o) for t, o in kinds):
            raise TypeError("`target` must be real where the output of `f` is, but it holds complex numbers.")
        typed = jtu.tree_map(lambda t, o: jnp.asarray(t, o.dtype), got, wanted)
        finite = _checked(typed, "target", lambda x: ~jnp.isfinite(x), "NaN or infinity")
        return solved(registry_version(), tuple(primals), finite)

    return out, project
