"""Tests of `eqxproj.datasets`: without a network, and on folders made here."""

import io
import pathlib
import re

import datasets as hf
import numpy as np
import pytest
from PIL import Image

from eqxproj import datasets

GRAY = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4) * 2
COLOR = np.arange(5 * 3 * 4 * 3, dtype=np.uint8).reshape(5, 3, 4, 3)


def write(folder: pathlib.Path, split: str, columns: dict, features: hf.Features | None = None) -> None:
    folder.mkdir(exist_ok=True)
    rows = hf.Dataset.from_dict(columns, features=features)
    rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def image_features(column: str = "image") -> hf.Features:
    return hf.Features({column: hf.Image(), "label": hf.Value("int64")})


def write_images(folder: pathlib.Path, column: str, images: np.ndarray) -> None:
    for split, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        content = {column: [Image.fromarray(image) for image in images[rows]], "label": list(range(10))[rows]}
        write(folder, split, content, image_features(column))


@pytest.fixture(autouse=True)
def no_progress_bars():
    hf.disable_progress_bars()
    yield
    hf.enable_progress_bars()


def test_digits():
    data = datasets.load("digits")
    (x, y), (x_test, y_test) = data.train, data.test
    assert x.shape == (1437, 1, 8, 8) and x_test.shape == (360, 1, 8, 8)
    assert x.dtype == np.float32 and y.dtype == np.int32 and y.shape == (1437,) and y_test.shape == (360,)
    assert (x.min(), x.max()) == (0, 1)
    assert set(y) == set(y_test) == set(range(10))
    assert (data.name, data.n_classes, data.input_shape, data.vocabulary) == ("digits", 10, (1, 8, 8), None)


def test_digits_are_the_same_each_time():
    first, second = datasets.load("digits"), datasets.load("digits")
    np.testing.assert_array_equal(first.train[0], second.train[0])
    # The division must never change: results on it would no longer compare.
    np.testing.assert_array_equal(first.test[1][:8], [7, 9, 4, 7, 0, 2, 6, 1])


def test_digits_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    datasets.load("digits")
    assert list(tmp_path.iterdir()) == []


def test_progress_bars_are_put_back(no_progress_bars):
    hf.enable_progress_bars()
    datasets.load("digits")
    assert not hf.are_progress_bars_disabled()


def test_flatten():
    data = datasets.load("digits")
    flat = data.flatten()
    assert flat.train[0].shape == (1437, 64) and flat.test[0].shape == (360, 64) and flat.input_shape == (64,)
    np.testing.assert_array_equal(flat.train[0][7], data.train[0][7].ravel())
    assert data.input_shape == (1, 8, 8)


@pytest.mark.parametrize("path_type", [str, pathlib.Path])
def test_gray_images(tmp_path, path_type):
    write_images(tmp_path, "image", GRAY)
    data = datasets.load("mnist", path_type(tmp_path))
    assert data.train[0].dtype == np.float32 and data.input_shape == (1, 6, 4)
    np.testing.assert_allclose(data.train[0][:, 0], GRAY[:3] / 255, rtol=1e-6)
    np.testing.assert_allclose(data.test[0][:, 0], GRAY[3:] / 255, rtol=1e-6)
    assert data.train[1].tolist() == [0, 1, 2] and data.test[1].tolist() == [3, 4]


def test_color_images_have_their_channels_first(tmp_path):
    write_images(tmp_path, "img", COLOR)
    data = datasets.load("cifar10", tmp_path)
    assert data.input_shape == (3, 3, 4)
    np.testing.assert_allclose(data.train[0], np.moveaxis(COLOR[:3], -1, 1) / 255, rtol=1e-6)


def test_more_images_than_a_batch(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2300, 2, 2), np.uint8)
    for split in ("train", "test"):
        write(
            tmp_path,
            split,
            {"image": [Image.fromarray(image) for image in images], "label": [0] * len(images)},
            image_features(),
        )
    data = datasets.load("mnist", tmp_path)
    np.testing.assert_array_equal(np.round(data.train[0][:, 0] * 255), images)


def test_higgs(tmp_path):
    inputs = np.random.default_rng(0).normal(size=(6, 28)).astype(np.float32)
    for split in ("train", "test"):
        write(tmp_path, split, {"inputs": inputs.tolist(), "label": [0, 1] * 3})
    data = datasets.load("higgs_sample", tmp_path)
    np.testing.assert_array_equal(data.train[0], inputs)
    assert data.n_classes == 2 and data.input_shape == (28,)


def test_text(tmp_path):
    text = "the quick brown fox"
    for split, content in (("train", text), ("validation", "jumps"), ("test", text[::-1])):
        write(tmp_path, split, {"text": [content]})
    data = datasets.load("tiny_shakespeare", tmp_path, sequence_length=4)
    assert data.vocabulary is not None
    assert data.vocabulary == "".join(sorted(set(text + "jumps"))) and data.n_classes == len(data.vocabulary)
    x, y = data.train
    assert x.shape == y.shape == (4, 4) and x.dtype == y.dtype == np.int32
    read = ["".join(data.vocabulary[token] for token in row) for row in x]
    assert "".join(read) == text[:16]
    assert "".join(data.vocabulary[token] for token in y.ravel()) == text[1:17]
    with pytest.raises(ValueError, match="19 characters; wanted at least 31; pass a smaller `sequence_length`"):
        datasets.load("tiny_shakespeare", tmp_path, sequence_length=30)
    with pytest.raises(ValueError, match="`sequence_length`: got 0"):
        datasets.load("tiny_shakespeare", tmp_path, sequence_length=0)


# --- what goes wrong ---


def test_unknown_name():
    with pytest.raises(ValueError, match="got 'imagenet'; wanted one of 'digits', 'mnist'"):
        datasets.load("imagenet")


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(ValueError, match="comes with the package"):
        datasets.load("digits", tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*not a folder.*parquet"):
        datasets.load("mnist", tmp_path / "nowhere")


def test_folder_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data files.*parquet"):
        datasets.load("mnist", tmp_path)


def test_file_that_is_no_parquet(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="`data_dir`: .* failed with") as error:
        datasets.load("mnist", tmp_path)
    assert error.value.__cause__ is not None


def test_missing_split(tmp_path):
    write(tmp_path, "train", {"inputs": [[1.0]], "label": [0]})
    with pytest.raises(ValueError, match=r"got the splits \['train'\]; wanted 'train' and 'test'"):
        datasets.load("higgs_sample", tmp_path)


@pytest.mark.parametrize(("columns", "wanted"), [({"img": [1], "label": [0]}, "image"), ({"image": [1]}, "label")])
def test_missing_column(tmp_path, columns, wanted):
    for split in ("train", "test"):
        write(tmp_path, split, columns)
    message = re.escape(f"got the columns {list(columns)}; wanted a column '{wanted}'")
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


def test_no_rows(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, split, {"image": [], "label": []}, image_features())
    with pytest.raises(ValueError, match="got no rows; wanted at least one|corresponds to no data"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize("labels", [[0, 10], [-1, 0], [0, None], ["a", "b"], [0.0, 1.0]])
def test_labels_that_are_no_classes(tmp_path, labels):
    images = [Image.fromarray(image) for image in GRAY[:2]]
    for split in ("train", "test"):
        features = None if isinstance(labels[0], str | float) else image_features()
        columns = {"image": [[0], [1]] if features is None else images, "label": labels}
        write(tmp_path, split, columns, features)
    with pytest.raises(ValueError, match="got 'label' .*; wanted integers from 0 to 9"):
        datasets.load("mnist", tmp_path)


def test_column_that_holds_no_images(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, split, {"image": [[0, 1]], "label": [0]})
    with pytest.raises(ValueError, match="got 'image' of type .*; wanted encoded images"):
        datasets.load("mnist", tmp_path)


def test_broken_image(tmp_path):
    good = io.BytesIO()
    Image.fromarray(GRAY[0]).save(good, "PNG")
    for split in ("train", "test"):
        content = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:40], "path": None}]
        write(tmp_path, split, {"image": content, "label": [0, 1]}, image_features())
    with pytest.raises(ValueError, match=r"train\[1\] is not an image"):
        datasets.load("mnist", tmp_path)


def test_images_of_different_shapes(tmp_path):
    for split in ("train", "test"):
        content = {"image": [Image.fromarray(GRAY[0]), Image.fromarray(GRAY[0].T)], "label": [0, 1]}
        write(tmp_path, split, content, image_features())
    with pytest.raises(ValueError, match=r"shape \(4, 6\) in row 1; wanted the shape \(6, 4\)"):
        datasets.load("mnist", tmp_path)


def test_splits_of_different_shapes(tmp_path):
    write(tmp_path, "train", {"inputs": [[1.0, 2.0]], "label": [0]})
    write(tmp_path, "test", {"inputs": [[1.0]], "label": [0]})
    with pytest.raises(ValueError, match=r"split 'test'.*shape \(1,\); wanted \(2,\)"):
        datasets.load("higgs_sample", tmp_path)


@pytest.mark.parametrize("inputs", [[[1.0], [1.0, 2.0]], [[1.0], None], [["a"], ["b"]]])
def test_inputs_that_are_no_table(tmp_path, inputs):
    for split in ("train", "test"):
        write(tmp_path, split, {"inputs": inputs, "label": [0, 1]})
    with pytest.raises(ValueError, match="got 'inputs' of type .*; wanted lists of numbers, all of the same length"):
        datasets.load("higgs_sample", tmp_path)


def test_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(name, **_):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    with pytest.raises(OSError, match="'ylecun/mnist'.*Couldn't reach.*pass `data_dir=`") as error:
        datasets.load("mnist")
    assert isinstance(error.value.__cause__, ConnectionError)
    with pytest.raises(ValueError, match="'higgs_sample' is not on the hub"):
        datasets.load("higgs_sample")
