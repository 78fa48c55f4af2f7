"""Tests of `python -m eqxproj compare`."""

import json
import math
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import eqxproj
from eqxproj import _compare

SMALL = ["compare", "--steps", "3", "--batch-size", "32", "--width", "8", "--depth", "1", "--no-progress"]


def fake_train(model, data, loss, *, steps, method, eval_data, evaluate, **_):
    """Stands in for `eqxproj.train` where only what happens around it is tested."""
    value = float(evaluate["accuracy"](model, *eval_data))
    history = {
        "step": np.arange(1, steps + 1),
        "loss": np.full(steps, math.nan),
        "seconds": np.arange(1, steps + 1) * 0.1,
        "compile_seconds": 2.0,
        "eval_accuracy": np.full(steps, value),
    }
    return types.SimpleNamespace(model=model, history=history)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(eqxproj, "train", fake_train, raising=False)


def run(arguments: list[str]) -> int:
    return _compare.main([*SMALL, *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        _compare.main(arguments)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "compare" in out and "None" not in out


def test_defaults_of_the_parser():
    options = _compare._parser().parse_args(["compare"])
    assert (options.dataset, options.width, options.depth, options.seed) == ("digits", 128, 2, 0)
    assert options.output == "compare.png"
    assert options.data_dir is options.steps is options.batch_size is options.solver is options.json is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["compare"]),
        (["compare", "--dataset", "imagenet"], ["imagenet", "digits", "mnist", "cifar10"]),
        (["compare", "--solver", "newton"], ["newton", "cyclic", "douglas-rachford"]),
        (["compare", "--steps", "0"], ["--steps", "'0'", "1 or more"]),
        (["compare", "--batch-size", "many"], ["--batch-size", "'many'"]),
        (["compare", "--seed", "-1"], ["--seed", "'-1'", "0 or more"]),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        _compare.main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_every_solver_of_the_command_line_can_be_made():
    for name in _compare._SOLVERS.values():
        assert getattr(eqxproj, name)() is not None


def test_table():
    finished = _compare._Outcome("projection", 0.97251, 3.456, 1.2, 1200, {})
    stopped = _compare._Outcome("gradient", math.nan)
    lines = _compare._table([finished, stopped]).split("\n")
    assert lines[0].split() == ["method", "test", "accuracy", "seconds", "compile", "seconds", "steps"]
    assert lines[2].split() == ["projection", "0.9725", "3.46", "1.20", "1,200"]
    assert lines[3].split() == ["gradient", "-", "-", "-", "interrupted"]
    assert len(set(map(len, lines))) == 1


def test_three_steps_write_picture_and_json(tmp_path, capsys):
    picture, report = tmp_path / "a.png", tmp_path / "a.json"
    assert run(["--output", str(picture), "--json", str(report)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(report.read_text())
    assert content["settings"]["dataset"] == "digits"
    assert [outcome["method"] for outcome in content["outcomes"]] == ["projection", "gradient"]
    for outcome in content["outcomes"]:
        assert 0 <= outcome["accuracy"] <= 1
        assert outcome["steps"] == 3
        assert len(outcome["history"]["eval_accuracy"]) == len(outcome["history"]["step"]) > 0
        assert outcome["history"]["eval_accuracy"][-1] == pytest.approx(outcome["accuracy"])
    out = capsys.readouterr().out
    assert "projection" in out and "gradient" in out and "a.png" in out


def test_not_a_number_is_null_in_json(faked, tmp_path):
    report = tmp_path / "a.json"
    assert run(["--output", str(tmp_path / "a.svg"), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["outcomes"][0]["history"]["loss"] == [None] * 3
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_without_matplotlib_the_table_is_printed(faked, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = tmp_path / "a.json"
    assert run(["--output", str(tmp_path / "a.png"), "--json", str(report)]) == 1
    captured = capsys.readouterr()
    assert "projection" in captured.out and "test accuracy" in captured.out
    assert "pip install 'eqxproj[plot]'" in captured.err
    assert report.exists() and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("output", ["missing/a.png", "a.nonsense", "."])
def test_an_output_that_cannot_be_written(faked, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["--output", output]) == 1
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out
    assert "--output" in captured.err and output in captured.err and "Traceback" not in captured.err


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk(faked, tmp_path, capsys):
    assert run(["--output", str(tmp_path / "a.png"), "--json", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out
    assert "--json" in captured.err and "space" in captured.err
    assert (tmp_path / "a.png").exists() and pathlib.Path("/dev/full").exists()


def test_a_half_written_file_is_removed(tmp_path, monkeypatch, capsys):
    class FullFile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, content):
            raise OSError(28, "No space left on device")

    target = tmp_path / "a.png"
    target.write_bytes(b"half")
    monkeypatch.setattr(pathlib.Path, "open", lambda *_: FullFile())
    assert _compare._write(str(target), "--output", b"whole") == 1
    assert "No space left" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("interrupted", ["projection", "gradient"])
def test_interrupt(interrupted, monkeypatch, tmp_path, capsys):
    def train(*args, method, **options):
        result = fake_train(*args, method=method, **options)
        if method == interrupted:
            raise eqxproj.TrainingInterrupted(1, result.model, result.history)
        return result

    monkeypatch.setattr(eqxproj, "train", train, raising=False)
    assert run(["--output", str(tmp_path / "a.png")]) == 130
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (last,) = [line for line in lines if line[-1:] == ["interrupted"]]
    assert last[0] == interrupted
    assert 0 <= float(last[1]) <= 1
    assert (["projection"] in [line[:1] for line in lines[:-1]]) == (interrupted == "gradient")
    assert not (tmp_path / "a.png").exists()


def test_missing_data(capsys, tmp_path):
    assert run(["--dataset", "mnist", "--data-dir", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_batch_larger_than_the_data(capsys):
    assert run(["--batch-size", "2000"]) == 1
    err = capsys.readouterr().err
    assert "2000" in err and "1437" in err


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "eqxproj", "compare", "--help"], capture_output=True, text=True, check=True
    )
    assert "--dataset" in done.stdout
