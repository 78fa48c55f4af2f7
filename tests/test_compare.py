"""Tests of `python -m eqxproj compare`."""

import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import eqxproj
from eqxproj._compare import _command, _output, _picture

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
    return _command.main([*SMALL, *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        _command.main(arguments)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "compare" in out and "None" not in out


def test_defaults_of_the_parser():
    options = _command._parser().parse_args(["compare"])
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
        _command.main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_every_solver_of_the_command_line_can_be_made():
    for name in _command._SOLVERS.values():
        assert getattr(eqxproj, name)() is not None


def test_table():
    finished = _command._Outcome("projection", 0.97251, 3.456, 1.2, 1200, {})
    stopped = _command._Outcome("gradient", steps=12, is_complete=False)
    lines = _command._table([finished, stopped]).split("\n")
    assert lines[0].split() == ["method", "test", "accuracy", "seconds", "compile", "seconds", "steps"]
    assert lines[2].split() == ["projection", "0.9725", "3.46", "1.20", "1,200"]
    assert lines[3].split() == ["gradient", "-", "-", "-", "12,", "interrupted"]
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


@pytest.fixture
def untrained(monkeypatch):
    """Fails where data are loaded, which is before anything is trained."""

    def load(*_, **__):
        raise AssertionError("data are loaded")

    monkeypatch.setattr(eqxproj.datasets, "load", load)


def test_without_matplotlib_there_is_an_error_before_training(untrained, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run(["--output", str(tmp_path / "a.png")]) == 1
    err = capsys.readouterr().err
    assert "pip install 'eqxproj[plot]'" in err and "--no-picture" in err


def test_without_a_picture_matplotlib_is_not_needed(faked, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    assert run(["--no-picture"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--output", "missing/a.png"], "--output"),
        (["--output", "a.nonsense"], ".png"),
        (["--output", "."], "folder"),
        (["--output", "a.png", "--json", "missing/a.json"], "--json"),
        (["--output", "a.png", "--json", "."], "--json"),
        (["--output", "a.png", "--json", "../here/a.png"], "another file"),
    ],
)
def test_files_that_cannot_be_written_are_found_before_training(
    untrained, arguments, word, tmp_path, monkeypatch, capsys
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert word in err and repr(arguments[-1])[1:-1] in err and "Traceback" not in err
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk(faked, tmp_path, capsys):
    assert run(["--output", str(tmp_path / "a.png"), "--json", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out
    assert "--json" in captured.err and "space" in captured.err
    assert (tmp_path / "a.png").exists() and pathlib.Path("/dev/full").exists()


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch, capsys):
    target = tmp_path / "a.png"
    target.write_bytes(b"of another run")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert _output.write([("--output", str(target), b"whole"), ("--json", str(tmp_path / "b"), b"more")]) == 1
    assert capsys.readouterr().err.count("No space left") == 2
    assert target.read_bytes() == b"of another run"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_behind_its_link_and_keeps_its_mode(tmp_path):
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    assert _output.write([("--json", str(link), b"new")]) == 0
    assert link.is_symlink() and target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("interrupted", ["projection", "gradient"])
def test_interrupt(interrupted, monkeypatch, tmp_path, capsys):
    """The table and the files hold all that was reached."""

    def train(*args, method, **options):
        result = fake_train(*args, method=method, **options)
        if method == interrupted:
            raise eqxproj.TrainingInterrupted(1, result.model, result.history)
        return result

    monkeypatch.setattr(eqxproj, "train", train, raising=False)
    report, picture = tmp_path / "a.json", tmp_path / "a.png"
    assert run(["--output", str(picture), "--json", str(report)]) == 130
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (last,) = [line for line in lines if line[-1:] == ["interrupted"]]
    assert last[0] == interrupted
    assert 0 <= float(last[1]) <= 1
    others = [line for line in lines if line[:1] == ["projection"] and line[-1:] != ["interrupted"]]
    assert bool(others) == (interrupted == "gradient")
    assert picture.read_bytes().startswith(b"\x89PNG")
    outcomes = json.loads(report.read_text())["outcomes"]
    assert [o["is_complete"] for o in outcomes] == [True] * (interrupted == "gradient") + [False]
    assert len(outcomes[-1]["history"]["eval_accuracy"]) == 3


def test_interrupt_before_the_first_report(monkeypatch, tmp_path, capsys):
    def train(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(eqxproj, "train", train, raising=False)
    assert run(["--output", str(tmp_path / "a.png")]) == 130
    captured = capsys.readouterr()
    assert "Nothing was trained" in captured.out and "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_signals_end_a_real_run_cleanly(number, delay, tmp_path):
    words = [sys.executable, "-u", "-m", "eqxproj", "compare", "--steps", "100000000", "--json", "a.json"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "100,000,000 steps" in process.stdout.readline()
        time.sleep(delay)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Stopped by" in out and "Traceback" not in out + err
    assert {p.name for p in tmp_path.iterdir()} in (set(), {"a.json", "compare.png"})


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize("out", ["| true", "> /dev/full", ">&-", "2>&-", "2> /dev/full"])
def test_output_that_nobody_reads_ends_quietly(out, tmp_path):
    command = f"{sys.executable} -m eqxproj compare --steps 20 --json a.json {out}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stdout + done.stderr and "Exception" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "compare.png"}


def test_the_scale_shows_the_last_nine_tenths():
    steps = list(range(0, 101, 10))
    history = {"step": steps, "seconds": steps, "eval_accuracy": [0.1, *np.linspace(0.9, 0.98, 10)]}
    curve = _picture.Curve("", history)
    low, high = _picture.limits([curve], 1000)
    late = _picture.errors_of(curve, 1000)[1:]
    assert low < min(late) and max(late) < high < 0.2
    exact = _picture.Curve("", history | {"eval_accuracy": [1.0] * 11})
    assert _picture.errors_of(exact, 50) == [0.01] * 11


def test_missing_data(capsys, tmp_path):
    assert run(["--dataset", "mnist", "--data-dir", str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert "nowhere" in err and "--data-dir" in err and "data_dir" not in err


def test_batch_larger_than_the_data(capsys):
    assert run(["--batch-size", "2000"]) == 1
    err = capsys.readouterr().err
    assert "2000" in err and "1437" in err


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "eqxproj", "compare", "--help"], capture_output=True, text=True, check=True
    )
    assert "--dataset" in done.stdout
