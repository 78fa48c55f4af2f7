"""The default optimizer, and the check of one that the user gives.

The default rate is chosen for the coordinates of [`Preconditioner`][], and suits plain gradients and displacements too.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._errors import described, positive_number
from .._numerics._promotion import with_own_promotion
from ..solvers._solve import check_positive

REPLACING = optax.sgd(1.0)
"""Takes a raw displacement off as it is: the new parameters are the projection's."""


def default_optimizer(steps: int, peak: float = 3e-3) -> optax.GradientTransformation:
    """Adam with a rate that suits most networks without a search: it warms up, stays, and falls when training ends.

    **Arguments:**

    - `steps`: how many steps it is for. In the first twentieth of them, 100 at most, the rate rises to its peak; over
        the last four tenths it falls with a cosine to a hundredth of that.
    - `peak`: the rate between the two. Small networks on smooth tasks may learn more at ten times the default. An
        optimizer that is given to [`train`][] goes with `precondition=True` to do what the default does.

    **Returns:** An optax transformation, that of [`train`][] where none is given. The scale of the loss does not
    matter.

    **Raises:** `ValueError` where `steps` is no positive integer, or `peak` no positive finite number.
    """
    check_positive("steps", steps)
    return _default_optimizer(int(steps), positive_number("peak", peak, "the largest rate"))


@functools.lru_cache(64)  # the same functions again, so that a step compiled with them is found
@with_own_promotion
def _default_optimizer(steps: int, peak: float) -> optax.GradientTransformation:
    warm, hold = min(100, steps // 20), 6 * steps // 10
    parts = [
        optax.linear_schedule(0.1 * peak, peak, warm),
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(steps - hold, 1), 0.01),
    ]
    rate = optax.join_schedules(parts, [warm, hold])
    return optax.chain(_in_first_units(), optax.scale_by_adam(b2=0.99), _scheduled(rate))


class Scheduled(NamedTuple):
    """How many steps there were, and the learning rate of the last one, where the history reads it."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def _scheduled(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Goes down with a rate that follows a schedule and can be read from the state."""

    def init(params: PyTree) -> Scheduled:
        count = jnp.zeros((), jnp.int32)
        return Scheduled(count, jnp.asarray(schedule(count), jnp.float32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Scheduled]:
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        moved = jtu.tree_map(lambda u: (-rate).astype(u.dtype) * u, updates)
        return moved, Scheduled(jnp.asarray(optax.safe_increment(state.count)), rate)

    return optax.GradientTransformation(init, update)


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
            f"`optax.adam(1e-3)`; got {described(optimizer)}."
        )


@with_own_promotion
def checked_optimizer(optimizer: Any, parameters: PyTree) -> optax.GradientTransformationExtraArgs:
    """The optimizer as one that takes the value of the loss, by tracing a first update.

    **Raises:** `TypeError` where it is none, or cannot take an update.
    """
    check_optimizer(optimizer)
    chain = _extended(optimizer)

    def first(transformation: optax.GradientTransformationExtraArgs, parameters: PyTree) -> PyTree:
        def value_fn(p: PyTree) -> Array:
            leaves = [jnp.sum(jnp.abs(x) ** 2).astype(jnp.result_type(float)) for x in jtu.tree_leaves(p)]
            return jnp.sum(jnp.stack(leaves))

        state = transformation.init(parameters)
        known = dict(value=jnp.asarray(0.0), grad=parameters, value_fn=value_fn)
        updates, after = transformation.update(parameters, state, parameters, **known)
        _check_kept(state, after)
        return updates

    try:
        updates = jax.eval_shape(lambda p: first(chain, p), parameters)
    except TypeError as error:
        # Some take no further arguments, though they say that they do.
        if "value" not in str(error) and "grad" not in str(error):
            raise _unusable(error) from error
        chain = _without_value(chain)
        try:
            updates = jax.eval_shape(lambda p: first(chain, p), parameters)
        except Exception as second:
            raise _unusable(second) from second
    except Exception as error:
        raise _unusable(error) from error
    if jtu.tree_map(jnp.shape, updates) != jtu.tree_map(jnp.shape, parameters):
        raise TypeError(
            "`optimizer` must return updates structured and shaped like the parameters, but its `update` returned "
            f"{jtu.tree_structure(updates)}. It is `update(updates, state, params) -> (updates, state)`."
        )
    return chain


# The same functions again, so that a step compiled with them is found.
_remembered = functools.lru_cache(64)(optax.with_extra_args_support)


def _extended(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer as one that may be given further arguments."""
    try:
        return _remembered(optimizer)
    except TypeError:  # it has no hash
        return optax.with_extra_args_support(optimizer)


@functools.lru_cache(64)
def _without_value(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    def update(updates: PyTree, state: PyTree, params: PyTree = None, **_: Any) -> tuple[PyTree, PyTree]:
        return optimizer.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _check_kept(before: PyTree, after: PyTree) -> None:
    """Raises a `TypeError` where an update changes what kind of state an optimizer has."""
    old, new = (jtu.tree_leaves_with_path(state) for state in (before, after))
    for (path, a), (other, b) in zip(old, new, strict=False):
        if path != other or jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise TypeError(
                "its state must keep its structure, shapes and dtypes from one step to the next, but "
                f"`state{jtu.keystr(path)}` does not"
            )
    if len(old) != len(new):
        raise TypeError("its state must keep its structure from one step to the next")


def _unusable(error: Exception) -> TypeError:
    return TypeError(
        "`optimizer` must take an update like the parameters, its state, the parameters, and the value of the "
        f"loss as `value`, as `grad` and `value_fn` for a line search, but it raised {type(error).__name__}: {error}. "
        "Optimizers that ask for a `grad_fn` are not offered one: turn it off, as in "
        "`optax.contrib.sam(..., opaque_mode=False)`, or write the loop yourself, with "
        "`eqxproj.filter_value_and_displacement`."
    )
