"""Where minibatches come from: arrays, a data set of the package `datasets`, or an iterable of batches.

Transforms any of them into a stream of items, one a step: rows of arrays that lie on the device whole, or batches on
the host, which are read ahead in a thread. Limits: an iterable gives its batches in its own order; a resumed run passes
over those that were used.
"""

from __future__ import annotations

import abc
import copy
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import as_array, described
from ..solvers._solve import check_positive
from ._data import batches, canonical, check_data, is_mapped, same_batches, take

_T = TypeVar("_T")
Batch = tuple[PyTree, ...]

_ON_DEVICE = 2**29
"""Bytes up to which data are kept on the device whole."""
_CHUNK_BYTES = 2**25
"""Of the batches that are sent to the device in one go."""
_LONGEST = 256
"""Steps that run on the device without a word from the host."""


class AbstractSource(abc.ABC):
    """A stream of minibatches.

    - `whole`: arrays that lie on the device, of which an item is rows; `None` where an item is a batch.
    - `batch_size`: samples of a batch. `count`: of all data; `None` where nobody knows.
    - `longest`: how many items one chunk of steps takes at most.
    - `checked`: data to check labels on before training: all of them, or the first batch.
    """

    whole: PyTree
    batch_size: int
    count: int | None
    longest: int
    checked: Batch

    @abc.abstractmethod
    def items(self, start: int) -> Iterator[PyTree]:
        """An item a step, from step `start` on; it ends where the data do."""

    @abc.abstractmethod
    def batch(self, item: PyTree) -> Batch:
        """The batch of an item, on the host."""

    @abc.abstractmethod
    def first(self) -> Batch:
        """A few samples to try the loss on."""


class RowSource(AbstractSource):
    """Batches of so many rows, shuffled anew each epoch, or always the same ones."""

    count: int

    def __init__(self, count: int, batch_size: int, key: Array):
        self.count, self.batch_size, self._key, self._order = count, batch_size, key, batches

    @property
    def period(self) -> int:
        """How many minibatches hold all rows."""
        return -(-self.count // self.batch_size)

    def fixed(self) -> RowSource:
        """The same rows in minibatches that stay the same."""
        same = copy.copy(self)
        same._order = same_batches
        return same

    def _rows(self, start: int) -> Iterator[np.ndarray]:
        return itertools.islice(self._order(self.count, self.batch_size, self._key), start, None)


class ArraySource(RowSource):
    """Batches of arrays."""

    def __init__(self, arrays: Batch, count: int, batch_size: int, key: Array, is_divided: bool):
        super().__init__(count, batch_size, key)
        self.arrays, self.checked = arrays, arrays
        leaves = jtu.tree_leaves(arrays)
        is_kept = not is_divided and sum(x.nbytes for x in leaves) <= _ON_DEVICE and not any(map(is_mapped, leaves))
        self.whole = jtu.tree_map(jnp.asarray, arrays) if is_kept else None
        row = sum(x[:1].nbytes for x in leaves)
        self.longest = _LONGEST if is_kept else _fitting(batch_size * row)

    def items(self, start: int) -> Iterator[PyTree]:
        rows = self._rows(start)
        if self.whole is not None:
            return (picked.astype(np.int32) for picked in rows)
        return read_ahead(take(self.arrays, picked) for picked in rows)

    def batch(self, item: PyTree) -> Batch:
        return item if self.whole is None else take(self.arrays, item)

    def first(self) -> Batch:
        """The first sample, and those with the least and the largest entry of each integer array."""
        integers = [x for x in jtu.tree_leaves(self.arrays) if x.dtype.kind in "iu" and not is_mapped(x)]
        flat = [x.reshape(self.count, -1) for x in integers]
        extremes = [int(row) for x in flat for row in (np.argmin(x.min(1)), np.argmax(x.max(1)))]
        return take(self.arrays, np.unique(np.array([0, *extremes], int)))


class TableSource(RowSource):
    """Batches of the rows of a `datasets.Dataset`, read as they are needed."""

    whole = None

    def __init__(self, table: Any, columns: tuple[str, ...], batch_size: int, key: Array):
        super().__init__(len(table), batch_size, key)
        self._table, self._columns = table, columns
        self.checked = check_data(self._read(np.arange(batch_size)), "data")[0]
        self.longest = _fitting(sum(x.nbytes for x in jtu.tree_leaves(self.checked)))

    def _read(self, rows: np.ndarray) -> Batch:
        return _converted(self._table[rows.tolist()], self._columns)

    def items(self, start: int) -> Iterator[PyTree]:
        return read_ahead(map(self._read, self._rows(start)))

    def batch(self, item: PyTree) -> Batch:
        return item

    def first(self) -> Batch:
        return self.checked


class BatchSource(AbstractSource):
    """Batches as an iterable gives them; begun again where it ends, if it can be.

    `convert` makes a batch on the host of what the iterable gives.
    """

    whole = None

    count = None

    def __init__(self, iterable: Iterable[Any], convert: Callable[[Any], Batch]):
        self._iterable, self._convert = iterable, convert
        self._started = iter(iterable)
        self._is_once = self._started is iterable
        first = next(self._started, None)
        if first is None:
            raise ValueError("`data` is empty: it gives no batches.")
        self._first = self._checked_first(first)
        leaves = jtu.tree_leaves(self._first)
        self.batch_size, self.checked = len(leaves[0]), self._first
        self.longest = _fitting(sum(x.nbytes for x in leaves))

    def _checked_first(self, first: Any) -> Batch:
        """The first batch, checked as arrays are."""
        return check_data(self._convert(first), "data")[0]

    def items(self, start: int) -> Iterator[PyTree]:
        return read_ahead(itertools.islice(self._all(), start, None))

    def _all(self) -> Iterator[Batch]:
        yield self._first
        yield from map(self._convert, self._started)
        while not self._is_once:
            again = iter(self._iterable)
            first = next(again, None)
            if first is None:
                return
            yield self._convert(first)
            yield from map(self._convert, again)

    def batch(self, item: PyTree) -> Batch:
        return item

    def first(self) -> Batch:
        return self._first


def source_of(
    data: Any, columns: Sequence[str] | None, batch_size: int | None, key: Array, is_divided: bool
) -> AbstractSource:
    """The source of the argument `data` of [`train`][]; `is_divided` says whether batches lie on several devices.

    **Raises:** `TypeError` for what is neither arrays nor gives batches; `ValueError` for unusable arrays, columns and
    batch sizes.
    """
    if _is_data_set(data):
        names = _check_columns(columns, getattr(data, "column_names", None))
        return _of_data_set(data, names, batch_size, key)
    if _gives_batches(data):
        if batch_size is not None:
            raise ValueError("`batch_size` is that of the batches which `data` gives: leave it out.")
        names = None if columns is None else _check_columns(columns, None)
        return BatchSource(data, lambda given: _converted(given, names))
    if columns is not None:
        raise ValueError("`columns` names those of a `datasets.Dataset`, or of batches that are dictionaries.")
    arrays, count = check_data(data, "data")
    return ArraySource(arrays, count, check_batch_size(batch_size, count), key, is_divided)


def check_batch_size(batch_size: int | None, count: int) -> int:
    """The samples of a batch that this process reads: all of them, or its part where there are several."""
    processes = jax.process_count()
    if processes > 1 and batch_size is not None:
        check_positive("batch_size", batch_size)
        if batch_size % processes:
            raise ValueError(f"`batch_size` is {batch_size}, which {processes} processes cannot share evenly.")
        batch_size = batch_size // processes
    if batch_size is None:
        return min(256, count)
    check_positive("batch_size", batch_size)
    if batch_size > count:
        raise ValueError(
            f"`batch_size` is {batch_size}, but `data` has only {count} samples. Use a batch size of at most {count}."
        )
    return int(batch_size)


def _is_data_set(data: Any) -> bool:
    """Whether something is a data set of the package `datasets`, which is not imported for that."""
    return any(c.__module__.split(".")[0] == "datasets" and "Dataset" in c.__name__ for c in type(data).__mro__)


def _gives_batches(data: Any) -> bool:
    """Whether something is an iterable of batches, and not a container of arrays, an array, text or a table."""
    is_other = isinstance(data, (tuple, list, Mapping, str, bytes, np.ndarray, jax.Array))
    return not is_other and hasattr(data, "__iter__") and not hasattr(data, "to_numpy") and not _is_tensor(data)


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "__array__")


def _check_columns(columns: Any, known: Sequence[str] | None) -> tuple[str, ...]:
    wanted = '`columns` must be a tuple of names such as `("image", "label")`, which the loss takes in this order'
    listed = "" if known is None else f" There are: {', '.join(map(repr, known))}."
    if columns is None:
        raise ValueError(f"`data` is a data set: say which columns the loss takes. {wanted}.{listed}")
    if isinstance(columns, str) or not isinstance(columns, Sequence) or not all(isinstance(c, str) for c in columns):
        raise TypeError(f"{wanted}; got {described(columns)}.")
    missing = [c for c in columns if known is not None and c not in known]
    if not columns or missing:
        raise ValueError(f"{wanted}; got {described(columns)}.{listed}")
    return tuple(columns)


def _of_data_set(data: Any, columns: tuple[str, ...], batch_size: int | None, key: Array) -> AbstractSource:
    """The source of a data set: by rows where it has a length, else in the order in which it is streamed."""
    formatted = data.with_format("numpy")
    if not hasattr(data, "__len__"):
        size = 256 if batch_size is None else batch_size
        check_positive("batch_size", size)
        return BatchSource(_Streamed(formatted, int(size)), lambda given: _converted(given, columns))
    count = len(data)
    if count == 0:
        raise ValueError("`data` is empty: the data set has no rows.")
    return TableSource(formatted.select_columns(list(columns)), columns, check_batch_size(batch_size, count), key)


class _Streamed:
    """A streamed data set as an iterable of batches of one size."""

    def __init__(self, data: Any, batch_size: int):
        self._data, self._size = data, batch_size

    def __iter__(self) -> Iterator[Any]:
        return self._data.iter(batch_size=self._size, drop_last_batch=True)


def _converted(given: Any, columns: tuple[str, ...] | None) -> Batch:
    """A batch as an iterable gives it, as a tuple of pytrees of arrays on the host."""
    if columns is not None:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`columns` picks entries of batches that are dictionaries; `data` gave {described(given)}."
            )
        missing = [c for c in columns if c not in given]
        if missing:
            raise ValueError(f"`columns` has {missing[0]!r}, but a batch has only {', '.join(map(repr, given))}.")
        given = tuple(given[c] for c in columns)
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return tuple(jtu.tree_map_with_path(_host, parts, is_leaf=_is_tensor))


def _host(path: Any, x: Any) -> np.ndarray:
    name = f"data{jtu.keystr(path)}"
    is_own = isinstance(x, (np.ndarray, np.generic, jax.Array))
    return canonical(as_array(name, np.asarray(x) if _is_tensor(x) and not is_own else x), name)


def _fitting(size: int) -> int:
    """How many batches of so many bytes go to the device together."""
    return max(1, min(_LONGEST, _CHUNK_BYTES // max(1, size)))


class _Raised:
    """An error of the thread that reads ahead."""

    def __init__(self, error: BaseException):
        self.error = error


def read_ahead(items: Iterator[_T], most: int = 4) -> Iterator[_T]:
    """The items of an iterator, which a thread reads ahead; it stops where nobody reads on."""
    waiting: queue.Queue[Any] = queue.Queue(most)
    is_over = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not is_over.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(item)
                if is_over.is_set():
                    return
            put(end)
        except BaseException as error:  # raised again where it is read
            put(_Raised(error))

    thread = threading.Thread(target=read, daemon=True, name="eqxproj-data")
    thread.start()
    try:
        while (item := waiting.get()) is not end:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        is_over.set()
        thread.join(timeout=5.0)


class Chunks:
    """Items in stacks, as the device takes them, of one shape."""

    def __init__(self, items: Iterator[PyTree], longest: int, put: Callable[[PyTree], PyTree]):
        self._items, self._longest, self._put = items, longest, put
        self._held: list[PyTree] = []

    def next(self, most: int) -> tuple[PyTree, list[PyTree]]:
        """At most so many further items, stacked and filled up to the longest chunk; none where the items end."""
        found: list[PyTree] = []
        while len(found) < min(most, self._longest):
            item = self._held.pop() if self._held else next(self._items, None)
            if item is None:
                break
            if found and _shapes(item) != _shapes(found[0]):
                self._held.append(item)
                break
            found.append(item)
        return (self._put(jtu.tree_map(self._stacked, *found)) if found else None), found

    def close(self) -> None:
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def _stacked(self, *arrays: np.ndarray) -> np.ndarray:
        out = np.zeros((self._longest, *arrays[0].shape), arrays[0].dtype)
        for place, array in zip(out, arrays, strict=False):
            place[...] = array
        return out


def _shapes(item: PyTree) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype) for x in jtu.tree_leaves(item)]
