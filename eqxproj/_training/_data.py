"""Minibatches: the user's arrays, checked and brought to the host, and an endless stream of shuffled batches of them.

Limits: all samples are in memory, and every array has one entry a sample along its first axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


def check_data(data: Any, what: str) -> tuple[tuple[PyTree, ...], int]:
    """The data as a tuple of pytrees of arrays of one length, and that length; `what` is its name, for messages.

    **Raises:** `TypeError` where it is no tuple, `ValueError` where it is empty, of unequal lengths, or not finite.
    """
    if not isinstance(data, (tuple, list)) or not data:
        raise TypeError(
            f"`{what}` must be a tuple of arrays such as `(x, y)`, whose parts the loss takes after the model; got "
            f"{type(data).__name__}."
        )
    data = tuple(jtu.tree_map(_as_host, part, is_leaf=_is_numbers) for part in data)
    lengths: dict[str, int] = {}
    for path, leaf in jtu.tree_leaves_with_path(data):
        name = f"{what}{jtu.keystr(path)}"
        if not hasattr(leaf, "shape") or leaf.ndim == 0:
            raise ValueError(f"`{name}` must be an array with one entry a sample along its first axis; got {leaf!r}.")
        lengths[name] = leaf.shape[0]
        if _is_key(leaf):
            raise ValueError(f"`{name}` holds PRNG keys. Give the loss an argument named `key` instead.")
        kind = leaf.dtype.kind
        if kind not in "biufcV" and not jax.numpy.issubdtype(leaf.dtype, np.floating):
            raise ValueError(f"`{name}` must hold numbers, got dtype {leaf.dtype}.")
        if kind in "fcV" and not _finite(leaf).all():
            bad = int(np.argmin(_finite(leaf).reshape(leaf.shape[0], -1).all(1)))
            raise ValueError(f"`{name}` holds NaN or infinity, first at sample {bad}. Remove or replace such samples.")
    if not lengths:
        raise ValueError(f"`{what}` holds no array.")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{k} has {n}" for k, n in lengths.items())
        raise ValueError(f"The arrays of `{what}` must have one length, one entry a sample; {listed}.")
    count = next(iter(lengths.values()))
    if count == 0:
        raise ValueError(f"`{what}` is empty: its arrays have no samples.")
    return data, count


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_numbers(x: Any) -> bool:
    """Whether something is a (nested) list of numbers, to be read as one array."""
    leaves = jtu.tree_leaves(x) if isinstance(x, list) else ()
    return bool(leaves) and all(isinstance(leaf, (bool, int, float)) for leaf in leaves)


def _as_host(x: Any) -> Any:
    """An array on the host, in the precision that JAX computes with."""
    if _is_key(x) or not (eqx.is_array_like(x) or isinstance(x, list)):
        return x
    array = np.asarray(x)
    with np.errstate(over="ignore"):  # overflows become infinite, which `check_data` finds
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _finite(x: np.ndarray) -> np.ndarray:
    return np.isfinite(np.asarray(x, np.float32) if x.dtype.kind == "V" else x)


def check_model(model: PyTree) -> None:
    """Raises a `ValueError` where a parameter is not finite."""
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array)):
        if not bool(jax.numpy.all(jax.numpy.isfinite(leaf))):
            raise ValueError(
                f"Parameter `model{jtu.keystr(path)}` holds NaN or infinity before any training. Initialize it anew."
            )


def batches(count: int, batch_size: int, key: Array) -> Iterator[np.ndarray]:
    """An endless stream of index arrays. Each epoch has a new order; a batch may cross from one epoch to the next."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(_typed(key))).ravel().tolist())
    pool = np.empty(0, np.int64)
    while True:
        while len(pool) < batch_size:
            pool = np.concatenate([pool, generator.permutation(count)])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def _typed(key: Any) -> Array:
    if not isinstance(key, jax.Array):
        raise TypeError(f"`key` must be a PRNG key such as `jax.random.key(0)`, got {key!r}.")
    return key if _is_key(key) else jax.random.wrap_key_data(key)


def take(data: Sequence[PyTree], rows: np.ndarray) -> tuple[PyTree, ...]:
    """The samples of some rows."""
    return tuple(jtu.tree_map(lambda x: x[rows] if isinstance(x, np.ndarray) else x, part) for part in data)
