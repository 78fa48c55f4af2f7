"""The data sets of the examples, the benchmarks and `python -m eqxproj compare`, as numpy arrays.

One of them, `"digits"`, comes with the package. The others are read from the hub of Hugging Face, or from a folder in
its layout, by the library `datasets` and Pillow. Both take long to import, so this waits until a data set is read.
"""

import dataclasses
import io
import numbers
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from ._errors import described

_DIGITS_FILE = pathlib.Path(__file__).resolve().parent / "data" / "digits.parquet"
_DIGITS_TRAIN = 1437

# One split, a `datasets.Dataset` (a name of the library here would import it with the package), and rows by split.
_Rows = Any
_Splits = Mapping[Any, _Rows]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory. Inputs and labels share their leading axis.

    Images are `(channels, height, width)`, as the convolutions of Equinox want them; see `flatten` for an MLP.
    """

    name: str
    train: tuple[Shaped[np.ndarray, "train ..."], Int32[np.ndarray, "train ..."]]
    test: tuple[Shaped[np.ndarray, "test ..."], Int32[np.ndarray, "test ..."]]
    n_classes: int
    input_shape: tuple[int, ...]
    vocabulary: str | None = None

    def flatten(self) -> "Dataset":
        """The same data with each input as one vector: inputs are `(samples, features)`."""
        size = int(np.prod(self.input_shape))
        train, test = ((x.reshape(len(x), size), y) for x, y in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test, input_shape=(size,))


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Where a data set is found and what its columns are called.

    `read` turns the column `inputs` of one split into an array; it is `None` for text, whose splits are read together.
    `hub` is the name on the hub, `None` where there is none, and `revision` the branch to read there.
    """

    n_classes: int
    inputs: str
    read: "Callable[[_Source, _Rows, str], np.ndarray] | None"
    hub: str | None = None
    revision: str | None = None
    mode: str = ""
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Source:
    """One data set being read: its name, its spec, and where it comes from (for messages)."""

    name: str
    spec: _Spec
    place: str

    def error(self, split: str, got: str, wanted: str) -> ValueError:
        return ValueError(f"Data set {self.name!r}, split {split!r} of {self.place}: got {got}; wanted {wanted}.")


def load(name: str, data_dir: str | os.PathLike[str] | None = None, *, sequence_length: int = 64) -> Dataset:
    """Load a data set into memory.

    | name | inputs | labels |
    |---|---|---|
    | `"digits"` | `(1, 8, 8)` in [0, 1], 1,437 for training and 360 for testing; comes with the package | 10 classes |
    | `"mnist"` | `(1, 28, 28)` in [0, 1] | 10 classes |
    | `"cifar10"` | `(3, 32, 32)` in [0, 1] | 10 classes |
    | `"higgs_sample"` | 28 floats, as they are in the file; only from a folder | 2 classes |
    | `"tiny_shakespeare"` | `sequence_length` characters, as positions in `vocabulary` | the character after each |

    **Arguments:**

    - `name`: one of the names above.
    - `data_dir`: a local folder that `datasets.load_dataset(data_dir)` understands, with the columns of the hub's copy.
        `None` reads from the hub, and needs a network unless the hub's cache has the data already.
    - `sequence_length`: how many characters a sample of text has. The sequences do not overlap; a remainder is dropped.

    **Returns:** A `Dataset`: numpy arrays `train=(x, y)` and `test=(x, y)`, `n_classes`, `input_shape`, and for text
    the `vocabulary`. Inputs are float32 (int32 for text), labels int32.

    **Raises:** `ValueError` for an unknown name, and for data that are not what the name promises; `FileNotFoundError`
    for a missing folder; `OSError` where the hub could not be read.
    """
    if not isinstance(name, str) or name not in _SPECS:
        raise ValueError(f"`name`: got {described(name)}; wanted one of {', '.join(map(repr, _SPECS))}.")
    if isinstance(sequence_length, bool) or not isinstance(sequence_length, numbers.Integral) or sequence_length < 1:
        raise ValueError(f"`sequence_length`: got {described(sequence_length)}; wanted an integer of at least 1.")
    if not (data_dir is None or isinstance(data_dir, (str, os.PathLike))):
        raise TypeError(f"`data_dir`: got {described(data_dir)}; wanted the path of a folder, or None.")
    spec = _SPECS[name]
    if name == "digits":
        return _load_digits(spec, data_dir)
    splits = _load_hub(name, spec) if data_dir is None else _load_folder(name, pathlib.Path(data_dir).expanduser())
    source = _Source(name, spec, f"the hub's {spec.hub!r}" if data_dir is None else f"`data_dir` {str(data_dir)!r}")
    missing = [split for split in ("train", "test") if split not in splits]
    if missing:
        raise ValueError(
            f"Data set {name!r} from {source.place}: got the splits {sorted(map(str, splits))}; wanted 'train' and "
            f"'test'. Name the files of a folder after their split, as in `test-00000-of-00001.parquet`."
        )
    if spec.read is None:
        return _read_text(source, splits, int(sequence_length))
    train, test = (_read_split(source, splits[split], split) for split in ("train", "test"))
    shape = train[0].shape[1:]
    if test[0].shape[1:] != shape:
        raise source.error("test", f"inputs of shape {test[0].shape[1:]}", f"{shape}, as in the split 'train'")
    return Dataset(name, train, test, spec.n_classes, shape)


# --- where the rows come from ---


def _hugging_face() -> Any:
    """The library `datasets` of Hugging Face."""
    import datasets  # takes about as long to import as JAX

    return datasets


def _load_local(path: str, **options: Any) -> _Splits:
    """`datasets.load_dataset` for local files, into memory: its copy of the files in a cache is deleted at once.

    No progress bar is drawn, as there would be for each file that is opened.
    """
    library = _hugging_face()
    had_bars = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            return library.load_dataset(path, cache_dir=cache, keep_in_memory=True, **options)
    finally:
        if had_bars:
            library.enable_progress_bars()


def _load_digits(spec: _Spec, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """The built-in digits, divided by a fixed permutation."""
    if data_dir is not None:
        raise ValueError(f"`data_dir`: got {str(data_dir)!r}; wanted none, since 'digits' comes with the package.")
    source = _Source("digits", spec, f"the package's file {str(_DIGITS_FILE)!r}")
    if not _DIGITS_FILE.is_file():
        raise FileNotFoundError(f"{str(_DIGITS_FILE)!r} is missing from this installation: install eqxproj again.")
    rows = _load_local("parquet", data_files={"train": str(_DIGITS_FILE)})["train"]
    x, y = _read_split(source, rows, "train")
    x = x.reshape(len(x), 1, 8, 8)
    # `RandomState` and not `default_rng`: numpy promises that its numbers stay the same from release to release.
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Dataset("digits", (x[train], y[train]), (x[test], y[test]), spec.n_classes, (1, 8, 8))


def _load_folder(name: str, folder: pathlib.Path) -> _Splits:
    remedy = (
        f"Put the parquet files of the hub's copy of {name!r} there, one or more for each split "
        "(`train-00000-of-00001.parquet`, `test-00000-of-00001.parquet`)"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"`data_dir`: got {str(folder)!r}, which is not a folder. {remedy}, or leave it out.")
    try:
        return _load_local(str(folder))
    except FileNotFoundError as error:  # includes the errors of `datasets` for a folder without data
        raise FileNotFoundError(f"`data_dir`: got {str(folder)!r}, which holds no data files. {remedy}.") from error
    except Exception as error:
        call = f"datasets.load_dataset({str(folder)!r})"
        raise ValueError(f"`data_dir`: `{call}` failed with {type(error).__name__}: {error} {remedy}.") from error


def _load_hub(name: str, spec: _Spec) -> _Splits:
    if spec.hub is None:
        raise ValueError(f"`data_dir`: got none; wanted a folder, since {name!r} is not on the hub.")
    try:
        return _hugging_face().load_dataset(spec.hub, revision=spec.revision)
    except Exception as error:  # a missing network shows in many types, which depend on the version of `datasets`
        raise OSError(
            f"{name!r} could not be loaded from the hub as {spec.hub!r} ({type(error).__name__}: {error}). Without a "
            f"network, pass `data_dir=`, a folder with the hub's parquet files of it."
        ) from error


# --- from rows to arrays ---


def _check_column(source: _Source, rows: _Rows, split: str, name: str) -> None:
    if name not in rows.column_names:
        raise source.error(split, f"the columns {rows.column_names}", f"a column {name!r}")
    if len(rows) == 0:
        raise source.error(split, "no rows", "at least one")


def _read_split(
    source: _Source, rows: _Rows, split: str
) -> tuple[Float32[np.ndarray, "rows ..."], Int32[np.ndarray, " rows"]]:
    """Inputs and labels of one split."""
    assert source.spec.read is not None
    for column in (source.spec.inputs, "label"):
        _check_column(source, rows, split, column)
    labels = rows.with_format("arrow")[:]["label"].to_numpy()
    classes, are_integers = source.spec.n_classes, labels.dtype.kind in "iu"
    if not are_integers or labels.min() < 0 or labels.max() >= classes:
        found = f"from {labels.min()} to {labels.max()}" if are_integers else f"of type {rows.features['label']}"
        raise source.error(split, f"'label' {found}", f"integers from 0 to {classes - 1}, none missing")
    return source.spec.read(source, rows.select_columns([source.spec.inputs]), split), labels.astype(np.int32)


def _read_lists(source: _Source, rows: _Rows, split: str) -> Float32[np.ndarray, "rows features"]:
    """A column of equally long lists of numbers."""
    (column,) = rows.column_names
    cells = rows.with_format("arrow")[:][column].to_numpy(zero_copy_only=False)
    try:
        x = np.stack(cells).astype(np.float32)
    except (TypeError, ValueError) as error:
        found = f"{column!r} of type {rows.features[column]}"
        raise source.error(split, found, "lists of numbers, all of the same length") from error
    return x / np.float32(source.spec.scale)


def _read_images(source: _Source, rows: _Rows, split: str) -> Float32[np.ndarray, "rows channels height width"]:
    """A column of encoded images, decoded in one pass from their bytes."""
    (column,) = rows.column_names
    feature = rows.features[column]
    if not isinstance(feature, _hugging_face().Image) and not (isinstance(feature, dict) and "bytes" in feature):
        raise source.error(split, f"{column!r} of type {feature}", "encoded images")
    pixels, first = None, 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for index, cell in enumerate(batch[column].to_pylist(), start=first):  # pyright: ignore
            image = _decode(source, cell, f"{split}[{index}]")
            if pixels is None:
                pixels = np.empty((len(rows), *image.shape), np.uint8)
            if image.shape != pixels.shape[1:]:
                found = f"an image of shape {image.shape} in row {index}"
                raise source.error(split, found, f"the shape {pixels.shape[1:]} of row 0")
            pixels[index] = image
        first = index + 1
    assert pixels is not None  # `_check_column` has refused an empty split
    x = (pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)).astype(np.float32)
    x /= source.spec.scale
    return x


def _decode(source: _Source, cell: dict[str, Any] | None, where: str) -> np.ndarray:
    """One image, from its bytes or, where a folder holds image files, from its path."""
    from PIL import Image

    try:
        if cell is None:
            raise ValueError("the cell is empty")
        content = io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
        with Image.open(content) as image:
            return np.asarray(image if image.mode == source.spec.mode else image.convert(source.spec.mode))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"Data set {source.name!r} of {source.place}: {where} is not an image ({error}).") from error


def _read_text(source: _Source, splits: _Splits, length: int) -> Dataset:
    """Text, a character a token: sequences, and the same sequences one character later."""
    texts = {}
    for split in splits:
        _check_column(source, splits[split], str(split), source.spec.inputs)
        texts[split] = "".join(text or "" for text in splits[split][source.spec.inputs])
    vocabulary = "".join(sorted(set("".join(texts.values()))))
    codes = np.array([ord(character) for character in vocabulary], np.uint32)

    def pair(split: str) -> tuple[np.ndarray, np.ndarray]:
        characters = np.frombuffer(texts[split].encode("utf-32-le"), "<u4")
        n = (len(characters) - 1) // length
        if n < 1:
            found = f"{len(characters)} characters"
            raise source.error(split, found, f"at least {length + 1}; pass a smaller `sequence_length`")
        tokens = np.searchsorted(codes, characters).astype(np.int32)
        return tokens[: n * length].reshape(n, length), tokens[1 : n * length + 1].reshape(n, length)

    return Dataset(source.name, pair("train"), pair("test"), len(vocabulary), (length,), vocabulary)


_SPECS = {
    "digits": _Spec(10, "image", _read_lists, scale=16.0),
    "mnist": _Spec(10, "image", _read_images, hub="ylecun/mnist", mode="L", scale=255.0),
    "cifar10": _Spec(10, "img", _read_images, hub="uoft-cs/cifar10", mode="RGB", scale=255.0),
    "higgs_sample": _Spec(2, "inputs", _read_lists),
    # The hub's own copy is a script, which `datasets` no longer runs; this branch holds the hub's conversion of it.
    "tiny_shakespeare": _Spec(0, "text", None, hub="karpathy/tiny_shakespeare", revision="refs/convert/parquet"),
}
