"""All that a run of training goes on from, as a value and as a file.

Transforms a [`TrainingState`][] into a file and back: a line of JSON, the arrays as Equinox writes them, and a digest
of both. Nothing is pickled, and a file is written whole or not at all. Limits: a state says what its arrays are for
only by their names, shapes and types; the model, the optimizer and the data come with the script.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from .._errors import described, is_key
from .._files import replacing
from .._program._sharding import placed_as
from ._evaluation import Record
from ._step import TrainState, copied

_FORMAT, _VERSION = "eqxproj checkpoint", 1
_KEPT = 2
"""How many checkpoints stay in a folder: the last one, and the one before."""
_NAME = re.compile(r"step-(\d{10})\.eqxproj")
_NUMBERS = ("step", "batch_size", "count", "best_value", "best_step", "waited", "seconds", "loss", "norm")
_DIGEST = hashlib.sha256


class TrainingState(eqx.Module):
    """What [`train`][] goes on from with `resume=`: `result.state`, or a file that `checkpoint=` has written.

    - `step`: number of finished steps. `key`: PRNG key of the run. `batch_size`, `count`: samples of a batch, and of
        all data where that is known; with the step they say where in the data the run is.
    - `arrays`: the parameters, the state of the optimizer, and what else the steps change.
    - `best`: arrays of the best model, with [`EarlyStopping`][]; `best_value`, `best_step` what and when it was, and
        `waited` how many records there were since.
    - `records`: what has been recorded. `seconds`: of training so far. `loss`, `norm`: of the last step.
    """

    step: int
    arrays: TrainState
    key: Array
    batch_size: int
    count: int | None
    best: PyTree = None
    best_value: float = math.nan
    best_step: int = 0
    waited: int = 0
    records: tuple[Record, ...] = ()
    seconds: float = 0.0
    loss: float = math.nan
    norm: float = math.nan

    @property
    def parameters(self) -> PyTree:
        """The inexact arrays of the model as they are trained, in float32 at least."""
        return self.arrays.parameters

    @property
    def optimizer_state(self) -> PyTree:
        """The state of the optimizer."""
        return self.arrays.optimizer

    def __repr__(self) -> str:
        return f"TrainingState(step={self.step}, batch_size={self.batch_size}, count={self.count})"


def _numbers(state: TrainingState) -> dict[str, Any]:
    """All but the arrays, as JSON has it."""
    key = {"impl": str(jax.random.key_impl(state.key)), "data": np.asarray(jax.random.key_data(state.key)).tolist()}
    return {**{name: getattr(state, name) for name in _NUMBERS}, "records": list(state.records), "key": key}


def _arrays(state: TrainingState) -> PyTree:
    return eqx.filter((state.arrays, state.best), eqx.is_array)


def _described(arrays: PyTree) -> list[list[Any]]:
    """Name, shape and dtype of each array."""
    named = jtu.tree_leaves_with_path(arrays)
    return [[jtu.keystr(path[1:]).lstrip("."), list(x.shape), str(x.dtype)] for path, x in named]


def resumed(state: TrainingState, fresh: TrainingState) -> TrainingState:
    """A state that goes on in the place of a fresh one.

    **Raises:** `ValueError` where it is that of another model, optimizer, order of the data or key.
    """
    _check_same(_described(_arrays(state)), _described(_arrays(fresh)), "`resume`")
    for name, given in (("batch_size", fresh.batch_size), ("count", fresh.count)):
        if getattr(state, name) != given:
            what = "`batch_size` is" if name == "batch_size" else "The number of samples in `data` is"
            raise ValueError(
                f"{what} {given}, but that of the run to resume was {getattr(state, name)}: its position in the data "
                "means nothing here. To train on other data or batches, start a new run from the model."
            )
    if not bool(jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(fresh.key))):
        raise ValueError("`key` is not that of the run to resume. Give the same one, or start a new run.")
    old = jtu.tree_leaves(_arrays(state))
    template, rest = eqx.partition((fresh.arrays, fresh.best), eqx.is_array)
    filled = jtu.tree_unflatten(jtu.tree_structure(template), old)
    arrays, best = eqx.combine(copied(placed_as(filled, template)), rest)
    return replace(state, arrays=arrays, best=best)


def _check_same(got: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]], what: str) -> None:
    """Raises a `ValueError` at the first array that differs."""
    for one, other in zip([*got, None], [*wanted, None], strict=False):
        if one is None and other is None:
            return
        if one is None or other is None or list(one) != list(other):
            there, here = ("nothing" if x is None else f"{x[0]}: {x[2]}{list(x[1])}" for x in (one, other))
            raise ValueError(
                f"{what} is a state of another model, optimizer or set of options: it holds {there}, where this run "
                f"has {here}. Pass the arguments of the run that wrote it."
            )


class _Hashed:
    """A file that is written to, and the digest of what was written."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest = file, _DIGEST()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._file.write(content)


def save(folder: pathlib.Path, state: TrainingState) -> None:
    """Writes a checkpoint, and takes away all but the last two. Of several processes, the first one writes."""
    arrays = jtu.tree_map(_whole, _plain(_arrays(state)))
    if jax.process_index() != 0:
        return
    header = {"format": _FORMAT, "version": _VERSION, "arrays": _described(arrays), **_numbers(state)}
    with replacing(folder / f"step-{state.step:010d}.eqxproj") as file:
        hashed = _Hashed(file)
        hashed.write(json.dumps(header).encode() + b"\n")
        eqx.tree_serialise_leaves(hashed, arrays)  # pyright: ignore[reportArgumentType]
        file.write(hashed.digest.digest())
    _sync(folder)
    for old in _files(folder)[_KEPT:]:
        old.unlink(missing_ok=True)
    for left in folder.glob(".step-*.eqxproj.*"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)


def _plain(arrays: PyTree) -> PyTree:
    """PRNG keys as numbers, as a file holds them."""
    return jtu.tree_map(lambda x: jax.random.key_data(x) if is_key(x) else x, arrays)


def _as_key(x: Array, like: Array) -> Array:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x


def _whole(x: Array) -> Array:
    """An array of which this process has only a part, as a whole."""
    return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _sync(folder: pathlib.Path) -> None:
    """Makes the system write down the names of a folder's files, where it can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a folder, the last one first."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def check_folder(checkpoint: Any) -> pathlib.Path:
    """The folder of checkpoints, which is made where it is missing, and tried.

    **Raises:** `TypeError` for what is no path, `OSError` where nothing can be written.
    """
    folder = _path(checkpoint, "checkpoint")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`checkpoint` must be a folder, got {str(folder)!r}, which is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ".writable") as file:
        file.write(b"")
    (folder / ".writable").unlink()
    return folder


def _path(value: Any, name: str) -> pathlib.Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be the name of a folder, got {described(value)}.")
    return pathlib.Path(os.fsdecode(value)).expanduser()


def state_of(resume: Any, folder: pathlib.Path | None, fresh: TrainingState) -> TrainingState:
    """The state that the argument `resume` of [`train`][] names; the fresh one where there is none yet.

    **Raises:** `FileNotFoundError` for a folder without checkpoints, `ValueError` for those that cannot be used.
    """
    if resume is None or resume is False:
        return fresh
    if isinstance(resume, TrainingState):
        return resumed(resume, fresh)
    if resume is True:
        if folder is None:
            raise ValueError("`resume=True` goes on from the last checkpoint: name the folder as `checkpoint`.")
        return resumed(_newest(folder, fresh), fresh) if _files(folder) else fresh
    if not isinstance(resume, (str, os.PathLike)):
        raise TypeError(
            "`resume` must be a state (`result.state`), a checkpoint or a folder of them, or `True` for the folder "
            f"`checkpoint`; got {described(resume)}."
        )
    path = _path(resume, "resume")
    if path.is_file():
        return resumed(load(path, fresh), fresh)
    if not path.is_dir() or not _files(path):
        raise FileNotFoundError(f"`resume` is {str(path)!r}, where no checkpoint is. `resume=True` begins anew there.")
    return resumed(_newest(path, fresh), fresh)


def _newest(folder: pathlib.Path, fresh: TrainingState) -> TrainingState:
    """The last checkpoint of a folder that is whole."""
    files = _files(folder)
    for path in files:
        try:
            return load(path, fresh)
        except _Damaged as error:
            warnings.warn(f"{error} The one before it is used.", stacklevel=2)
    raise ValueError(f"None of the {len(files)} checkpoints in {str(folder)!r} is whole.")


class _Damaged(ValueError):
    """A file is no whole checkpoint."""


def load(path: pathlib.Path, fresh: TrainingState) -> TrainingState:
    """The state of a file, its arrays like those of a fresh state.

    **Raises:** `ValueError` where the file is damaged, of another version, or of another model.
    """
    size = path.stat().st_size - _DIGEST().digest_size
    with path.open("rb") as file:
        if size <= 0 or _digest(file, size) != file.read():
            raise _Damaged(f"The checkpoint {str(path)!r} is damaged.")
        file.seek(0)
        header = json.loads(file.readline())
        if header.get("format") != _FORMAT or header.get("version") != _VERSION:
            raise ValueError(
                f"{str(path)!r} is of version {header.get('version')} of the format {header.get('format')!r}; this "
                f"library reads version {_VERSION} of {_FORMAT!r}."
            )
        template = _arrays(fresh)
        plain = _plain(template)
        _check_same(header["arrays"], _described(plain), f"The checkpoint {str(path)!r}")
        found = eqx.tree_deserialise_leaves(file, plain)
    arrays, best = jtu.tree_map(_as_key, found, template)
    impl = header["key"]["impl"]
    key = jax.random.wrap_key_data(jnp.asarray(header["key"]["data"], jnp.uint32), impl=impl)
    records = tuple(header["records"])
    return TrainingState(arrays=arrays, best=best, key=key, records=records, **{n: header[n] for n in _NUMBERS})


def _digest(file: IO[bytes], size: int) -> bytes:
    """The digest of the first bytes of a file, which is read up to there."""
    digest = _DIGEST()
    while size:
        part = file.read(min(size, 2**20))
        if not part:
            break
        digest.update(part)
        size -= len(part)
    return digest.digest()
