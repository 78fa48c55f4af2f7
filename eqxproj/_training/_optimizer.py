"""The default optimizer, and the check of one that the user gives.

The default rate is chosen for the coordinates of [`Preconditioner`][], and suits plain gradients and displacements too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree


@functools.lru_cache(64)  # the same functions again, so that a step compiled with them is found
def default_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a rate that suits most networks without a search: it warms up, stays, and falls when training ends."""
    peak, warm, hold = 3e-3, min(100, steps // 20), 6 * steps // 10
    parts = [
        optax.linear_schedule(0.1 * peak, peak, warm),
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(steps - hold, 1), 0.01),
    ]
    return optax.chain(_in_first_units(), optax.adam(optax.join_schedules(parts, [warm, hold]), b2=0.99))


def _in_first_units() -> optax.GradientTransformation:
    """Divides by the largest entry of the first updates, so that Adam's epsilon means the same at any scale of loss."""

    def init(params: PyTree) -> Array:
        return jnp.asarray(0.0, jnp.float32)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        leaves = [jnp.max(jnp.abs(u), initial=0.0).astype(jnp.float32) for u in jtu.tree_leaves(updates)]
        unit = jnp.where(state > 0, state, jnp.max(jnp.stack(leaves)))
        divisor = jnp.where(unit > 0, unit, 1.0)
        return jtu.tree_map(lambda u: (u / divisor).astype(u.dtype), updates), unit

    return optax.GradientTransformation(init, update)


def check_optimizer(optimizer: Any) -> None:
    """Raises a `TypeError` for what is no optax transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be an optax transformation, an object with `init` and `update` such as "
            f"`optax.adam(1e-3)`; got {optimizer!r}."
        )


def check_first_update(optimizer: optax.GradientTransformation, parameters: PyTree) -> None:
    """Traces a first update. Raises a `TypeError` where the optimizer cannot take it."""

    def first(parameters: PyTree) -> PyTree:
        chain = optax.with_extra_args_support(optimizer)
        state = chain.init(parameters)
        return chain.update(parameters, state, parameters, value=jnp.asarray(0.0))[0]

    try:
        jax.eval_shape(first, parameters)
    except Exception as error:
        raise TypeError(
            "`optimizer` must take an update like the parameters, its state, the parameters, and the value of the "
            f"loss as `value`, but it raised {type(error).__name__}: {error}. Optimizers with a line search "
            "evaluate the loss on their own, which `train` does not offer: turn it off, as in "
            "`optax.lbfgs(1e-2, linesearch=None)`, or write the loop yourself, with "
            "`eqxproj.filter_value_and_displacement`."
        ) from error
