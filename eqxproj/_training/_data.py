"""The user's arrays, checked, and an endless stream of shuffled minibatches of their rows.

Transforms a tuple of pytrees into one of arrays on the host. Limits: every array has one entry a sample along its first
axis. Arrays that are mapped into memory from a file stay there, and are read batch by batch.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import as_array, described, is_key

_BLOCK = 2**26
"""Bytes of the part of an array that is looked at in one go."""


def check_data(data: Any, what: str) -> tuple[tuple[PyTree, ...], int]:
    """The data as a tuple of pytrees of arrays of one length, and that length; `what` is its name, for messages.

    **Raises:** `TypeError` where it is no tuple, or holds what is no array of numbers; `ValueError` where it is empty,
    of unequal lengths, not finite, masked, or beyond the integers that JAX computes with.
    """
    _check_container(data, what)
    paths, treedef = jtu.tree_flatten_with_path(tuple(data), is_leaf=_is_numbers)
    named = [(f"{what}{jtu.keystr(path)}", leaf) for path, leaf in paths]
    lengths: dict[str, int] = {}
    arrays = [_as_host(leaf, name) for name, leaf in named]
    for (name, _), array in zip(named, arrays, strict=True):
        if array.ndim == 0:
            raise ValueError(f"`{name}` must be an array with one entry a sample along its first axis; got {array!r}.")
        lengths[name] = array.shape[0]
    if not lengths:
        raise ValueError(f"`{what}` must hold arrays, got {described(data)}.")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{k} has {n}" for k, n in lengths.items())
        raise ValueError(f"The arrays of `{what}` must have one length, one entry a sample; {listed}.")
    count = next(iter(lengths.values()))
    if count == 0:
        raise ValueError(f"`{what}` is empty: its arrays have no samples.")
    for (name, _), array in zip(named, arrays, strict=True):
        if (bad := _first_bad(array)) is not None:
            raise ValueError(f"`{name}` holds NaN or infinity, first at sample {bad}. Remove or replace such samples.")
    return jtu.tree_unflatten(treedef, arrays), count


def _check_container(data: Any, what: str) -> None:
    """Raises a `TypeError` for what is no tuple of parts, such as one array alone, or a list of batches."""
    if not isinstance(data, (tuple, list)) or len(data) == 0:
        raise TypeError(
            f"`{what}` must be a tuple of arrays such as `(x, y)`, whose parts the loss takes after the model; got "
            f"{type(data).__name__}{' without parts' if isinstance(data, (tuple, list)) else ''}."
        )
    if isinstance(data, list) and any(isinstance(part, (tuple, list, dict)) for part in data):
        raise TypeError(
            f"`{what}` must be a tuple of arrays such as `(x, y)`, whose parts the loss takes after the model; got a "
            f"list of {type(data[0]).__name__}. Join batches into one array a part, `(np.concatenate(xs), "
            "np.concatenate(ys))`; `train` makes minibatches itself. Parts that are nested stand in a tuple."
        )


def _is_numbers(x: Any) -> bool:
    """Whether something is a (nested) list of numbers or text, to be read as one array."""
    leaves = jtu.tree_leaves(x) if isinstance(x, list) else ()
    return bool(leaves) and all(isinstance(leaf, (bool, int, float, complex, str, np.generic)) for leaf in leaves)


def _as_host(x: Any, name: str) -> np.ndarray:
    """An array on the host, in the precision that JAX computes with; `name` is that of the argument."""
    if is_key(x):
        raise ValueError(f"`{name}` holds PRNG keys. Give the loss an argument named `key` instead.")
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"`{name}` is a traced array: `train` runs outside of `jax.jit` and other transformations.")
    array = as_array(name, x)
    return array if is_mapped(array) else canonical(array, name)


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array lies in a file that is mapped into memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return isinstance(base, mmap.mmap)


def canonical(array: np.ndarray, name: str) -> np.ndarray:
    """The array in the dtype that JAX has for its own. Too large floats become infinite; integers must fit."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and array.size and dtype.itemsize < array.dtype.itemsize:
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"`{name}` holds integers from {low} to {high}, but JAX computes with {dtype} unless `jax_enable_x64` "
                f"is set, from {limits.min} to {limits.max}. Renumber them, or turn `jax_enable_x64` on."
            )
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _first_bad(array: np.ndarray) -> int | None:
    """The first sample that is not finite, if any; looked for block by block, so that nothing large is made."""
    if array.dtype.kind in "biu":
        return None
    rows = max(1, _BLOCK // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        finite = np.isfinite(block if block.dtype.kind in "fc" else np.asarray(block, np.float32))
        if not finite.all():
            return start + int(np.argmin(finite.reshape(len(block), -1).all(1)))
    return None


def check_model(model: PyTree) -> None:
    """Raises a `ValueError` where a parameter is not finite."""
    for path, leaf in jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array)):
        if not bool(jax.numpy.all(jax.numpy.isfinite(leaf))):
            raise ValueError(
                f"Parameter `model{jtu.keystr(path)}` holds NaN or infinity before any training. Initialize it anew."
            )


def _generator(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


def batches(count: int, batch_size: int, key: Array) -> Iterator[np.ndarray]:
    """An endless stream of index arrays. Each epoch has a new order; a batch may cross from one epoch to the next.

    In no batch is a sample twice: what is left of an epoch comes later in the order of the next one.
    """
    generator = _generator(key)
    pool = np.empty(0, np.int64)
    while True:
        if len(pool) < batch_size:
            order = generator.permutation(count)
            fresh = order[~np.isin(order, pool)][: batch_size - len(pool)]
            pool = np.concatenate([pool, fresh, order[~np.isin(order, fresh)]])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def same_batches(count: int, batch_size: int, key: Array) -> Iterator[np.ndarray]:
    """An endless stream of index arrays, which are the same in each epoch, in the same order.

    Every sample is in one of them; the last one is filled up with the first samples of the order.
    """
    order = np.resize(_generator(key).permutation(count), -(-count // batch_size) * batch_size)
    return itertools.cycle(order.reshape(-1, batch_size))


def take(data: Sequence[PyTree], rows: np.ndarray) -> tuple[PyTree, ...]:
    """The samples of some rows, in the precision that JAX computes with."""

    def of(path: Any, x: Any) -> Any:
        return canonical(x[rows], f"data{jtu.keystr(path)}") if isinstance(x, np.ndarray) else x

    return tuple(jtu.tree_map_with_path(of, tuple(data)))
