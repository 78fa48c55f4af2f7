"""The arguments of a loss: checks, and the dtype that it is computed in."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool


def floating(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    """The argument in the dtype it is computed in (float32 at least), and its own dtype."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be a floating-point array, got dtype {array.dtype}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)), array.dtype


def with_classes(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    """As `floating`, of an array whose last axis holds the classes."""
    array, dtype = floating(name, x)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"`{name}` must have a last axis with at least one class, got shape {array.shape}.")
    return array, dtype


def is_index(labels: Array, shape: tuple[int, ...]) -> bool:
    """Whether the labels are integers, one for each sample of logits of this shape."""
    return labels.shape == shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer)


def is_right(labels: Array, n: int) -> Bool[Array, "*batch n"]:
    """Whether a class is the right one."""
    return labels[..., None] == jnp.arange(n, dtype=labels.dtype)


def step_of(tau: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The step `tau`, broadcast to the shape of the loss, in the dtype of the computation."""
    array = jnp.asarray(tau, dtype)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"`tau` must be a scalar or broadcast to the shape of the loss, {shape}, got shape {array.shape}."
        ) from None
