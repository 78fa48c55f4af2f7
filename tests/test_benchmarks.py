"""The benchmarks run, and print a line for all that they compare."""

import json
import pathlib
import re
import subprocess
import sys

import datasets as hf
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

_FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def run(name, *arguments):
    done = subprocess.run([sys.executable, _FOLDER / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accuracy_is_resumed(tmp_path):
    words = ("accuracy.py", "--quick", "--method", "adam", "default", "--out", str(tmp_path))
    out = run(*words)
    assert "| digits (accuracy) | adam |" in out and "| digits (accuracy) | default |" in out
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("digits-*.json")}
    assert len(times) == 5  # four rates of Adam, and the defaults
    (tmp_path / "digits-default-0-0-100.json").unlink()
    assert "| digits (accuracy) | default |" in run(*words)
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("digits-*.json")}
    assert {name for name in times if times[name] != again[name]} == {"digits-default-0-0-100.json"}
    assert (tmp_path / "accuracy.png").exists()
    for row in json.loads((tmp_path / "results.json").read_text()):
        assert 0.5 < row["test"] <= 1 and row["seconds"] > 0 and row["peak_mb"] > 0


def test_optimizers_of_gradients_are_run_at_three_peak_rates(tmp_path):
    words = ("--quick", "--method", "adam-cosine", "muon", "--out", str(tmp_path))
    out = run("accuracy.py", *words)
    assert "| digits (accuracy) | adam-cosine | adam, cosine, peak" in out
    assert "| digits (accuracy) | muon | muon, cosine, peak" in out
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("digits-*.json")}
    assert found.keys() == {f"digits-{method}-{i}-0-100" for method in ("adam-cosine", "muon") for i in range(3)}
    for row in json.loads((tmp_path / "results.json").read_text()):
        tried = [each for each in found.values() if each["method"] == row["method"]]
        best = max(tried, key=lambda each: each["valid"])  # not by the test set
        assert (row["setting"], row["test"]) == (best["setting"], best["test"]) and row["test"] > 0.5


def write_noise_as_mnist(folder):
    """A folder in the layout of the hub, with images of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    features = hf.Features({"image": hf.Image(), "label": hf.Value("int64")})
    for split, count in (("train", 300), ("test", 20)):
        images = [Image.fromarray(pixels) for pixels in rng.integers(256, size=(count, 28, 28), dtype=np.uint8)]
        rows = {"image": images, "label": rng.integers(10, size=count)}
        hf.Dataset.from_dict(rows, features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.mark.parametrize("task", ["mnist-cnn", "mnist-transformer"])
def test_a_small_network_on_images_is_a_task(task, tmp_path):
    write_noise_as_mnist(tmp_path / "mnist")
    words = ("--data-dir", str(tmp_path), "--task", task, "--method", "muon", "default", "--steps", "1", "--seeds", "1")
    out = run("accuracy.py", *words, "--out", str(tmp_path / "out"))
    assert "failed" not in out, out
    assert f"| {task} (accuracy) | muon |" in out and f"| {task} (accuracy) | default |" in out


def test_a_run_over_the_limit_is_stopped_and_said(tmp_path):
    words = ("accuracy.py", "--quick", "--method", "default", "--out", str(tmp_path))
    for _ in range(2):
        assert "left out: took longer than 1 s" in run(*words, "--limit", "1")
    assert not [*tmp_path.glob("digits-*.json")]
    assert "| digits (accuracy) | default |" in run(*words)  # without the limit it is run


def test_settings_are_chosen_by_their_sweeps(tmp_path):
    words = ("--quick", "--method", "adam", "alternating", "--sweeps", "24", "--limit", "1", "--out", str(tmp_path))
    tried = {line.split()[0] for line in run("accuracy.py", *words).splitlines() if "left out" in line}
    solver = {f"digits-alternating-{i}-0-100" for i in (1, 3)}
    assert tried == solver | {f"digits-adam-{i}-0-100" for i in range(4)}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("discrete.py", ("--quick", "--task", "sign-mlp", "hard-mixture"), ("sign-mlp", "hard-mixture")),
        (
            "constraints.py",
            ("--quick", "--task", "two-of-four", "--seeds", "1", "--method", "defaults", "pruning", "straight-through"),
            (
                "| two-of-four | defaults | defaults |",
                "| two-of-four | pruning |",
                "| two-of-four | straight-through |",
            ),
        ),
        ("paper.py", ("--quick",), ("AlternatingProjections", "AlternatingReflections", "default", "adam-cosine")),
        ("boolean.py", ("--quick",), ("multiplier", "projections", "relu-l1", "sign", "default")),
        ("linear_recurrence.py", ("--quick", "--cell", "rnn"), ("gradient", "projection", "scan back", "scan both")),
        ("evaluation.py", ("--images", "100", "--eval-batch-size", "50"), ("100 images, 50 at a time", "at the peak")),
        ("convolutions.py", ("--repeats", "2", "--groups", "4"), ("4 groups", "to the kernel, in a loop", "cnn")),
        ("time_parallel.py", ("--quick", "--cell", "rnn"), ("gradient", "one step, flat", "displacement, 16 steps")),
    ],
)
def test_a_benchmark_prints_its_table(name, arguments, words):
    out = run(name, *arguments)
    assert all(word in out for word in words)


def test_single_nodes_are_fewer_than_chains():
    out = run("composites.py", "--steps", "2", "--seeds", "1", "--model", "softmax gate", "--metric", "default")
    header, row = out.splitlines()
    assert header.split() == ["model", "metric", "single", "chains", "ratio", "nodes", "time"]
    single, chains = re.search(r"(\d+)/ +(\d+)", row).groups()
    assert int(single) < int(chains)


@pytest.mark.parametrize(
    ("lines", "arguments"),
    [
        (4, ("step_time.py", "--repeats", "1", "--model", "mlp128")),
        (1, ("compile_time.py", "--repeats", "1", "--model", "residual-25")),
    ],
)
def test_a_benchmark_of_time_prints_ratios(lines, arguments):
    """The header, then lines whose first is the gradient's, which all else is divided by."""
    header, first, *rest = run(*arguments).splitlines()
    assert "ratio" in header and "gradient" in first and len(rest) == lines
