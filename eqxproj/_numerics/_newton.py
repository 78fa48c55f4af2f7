r"""One damped Newton method: roots of elementwise functions in a bracket, and minima over pytrees.

Both are safe: [`bracketed_root`][] bisects where a step leaves the bracket, [`descend`][] halves a step until the cost
falls. Limits: neither can be differentiated in reverse mode, and the minimum that `descend` finds is a local one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

_Memory = TypeVar("_Memory")


def bracketed_root(
    function: Callable[[Array], tuple[Array, Array, ArrayLike]],
    start: Float[Array, "*shape"],
    low: Float[Array, "*shape"],
    high: Float[Array, "*shape"],
    *,
    rtol: float,
    atol: Float[ArrayLike, "*#shape"] = 0.0,
    max_steps: int,
) -> tuple[Float[Array, "*shape"], Bool[Array, ""]]:
    r"""The roots of an elementwise function that is at most zero at `low` and at least zero at `high`.

    Newton's method. Every evaluation shrinks the bracket, and a step that would leave it goes to its middle. An element
    is done where its Newton step is at most $\mathrm{rtol}\,|t| + \mathrm{atol}$ plus the error of the step, or where
    it moves by rounding only. Close to a root the error is of the order of the square of the last step: `rtol` may be
    as large as the square root of the accuracy that is wanted.

    `function` answers the value, the slope, and how uncertain rounding leaves the value (zero, if not known). Returns
    the roots, and whether all were done before `max_steps` evaluations. Where the function is NaN, so is the root.
    """
    eps = float(jnp.finfo(start.dtype).eps)

    def newton(carry):
        t, low, high, _, count = carry
        value, slope, error = function(t)
        low, high = jnp.where(value <= 0, t, low), jnp.where(value >= 0, t, high)
        new = t - value / slope
        far = jnp.abs(new - t) > rtol * jnp.abs(new) + atol + error / slope
        # A step below the resolution of t stays at t, which is an end of the bracket now.
        new = jnp.where((new >= low) & (new <= high), new, 0.5 * (low + high))
        new = jnp.where(jnp.isnan(value), value, new).astype(t.dtype)
        moving = jnp.any(far & (jnp.abs(new - t) > 4.0 * eps * jnp.abs(new)))
        return new, low, high, moving, count + 1

    carry = (start, low, high, jnp.asarray(True), jnp.asarray(0))
    root, _, _, moving, _ = jax.lax.while_loop(lambda carry: carry[3] & (carry[4] < max_steps), newton, carry)
    return root, ~moving


def descend(
    cost: Callable[[PyTree], Array],
    residual: Callable[[PyTree], PyTree],
    direction: Callable[[PyTree, PyTree, _Memory], tuple[PyTree, _Memory]],
    is_done: Callable[[PyTree, PyTree], Array],
    x: PyTree,
    r: PyTree,
    memory: _Memory,
    *,
    max_steps: int,
    max_halvings: int,
    rounding: float = 0.0,
) -> PyTree:
    """Minimizes a cost over a pytree: steps from the caller, each one halved until the cost falls.

    It stops where no step lowers the cost, where `is_done` (of the residuals of a point and of the one before) says so,
    or after `max_steps`. A step to a point whose residual is not finite is not taken, and is the last. The `cost` is
    infinite where there is none; `residual` answers what `direction` and `is_done` read, such as the gradient, and is
    `r` at the first point `x`. `direction` answers a step and the `memory` for its next call, such as where its own
    solver starts from. A rise of the cost within the relative error `rounding` counts as a fall.
    """

    def body(carry):
        x, value, r, memory, _, count = carry
        step, memory = direction(x, r, memory)
        new, lower, fell = _shortened(cost, x, value, step, max_halvings, rounding)
        r_new = residual(new)
        fell = fell & _is_finite(r_new)
        x = jtu.tree_map(lambda a, b: jnp.where(fell, a, b), new, x)
        value = jnp.where(fell, lower, value)
        return x, value, r_new, memory, fell & ~is_done(r_new, r), count + 1

    carry = (x, cost(x), r, memory, jnp.asarray(True), jnp.asarray(0))
    return jax.lax.while_loop(lambda carry: carry[4] & (carry[5] < max_steps), body, carry)[0]


def _shortened(
    cost: Callable[[PyTree], Array], x: PyTree, value: Array, step: PyTree, max_halvings: int, rounding: float
) -> tuple[PyTree, Array, Array]:
    """The point at the end of a step that is halved until the cost falls, its cost, and whether that fell."""
    bound = value + rounding * jnp.abs(value)

    def halve(carry):
        scale, _, _, count = carry
        trial = jtu.tree_map(lambda a, b: (a + scale * b).astype(a.dtype), x, step)
        return 0.5 * scale, trial, cost(trial), count + 1

    carry = (jnp.ones_like(value), x, jnp.full_like(value, jnp.inf), jnp.asarray(0))
    _, trial, lower, _ = jax.lax.while_loop(lambda c: ~(c[2] < bound) & (c[3] <= max_halvings), halve, carry)
    return trial, lower, lower < bound


def _is_finite(x: PyTree) -> Array:
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(x)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)
