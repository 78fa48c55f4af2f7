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
    found = {f"eval_{name}": np.full(steps, float(f(model, *eval_data))) for name, f in evaluate.items()}
    history = {
        "step": np.arange(1, steps + 1),
        "loss": np.full(steps, math.nan),
        "seconds": np.arange(1, steps + 1) * 0.1,
        "compile_seconds": 2.0,
    } | found
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
    assert (options.dataset, options.seed, options.flatten) == ("digits", 0, False)
    assert options.output == "compare.png" and options.model is options.loss is options.width is options.depth is None
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
    finished = _command._Outcome("projection", 0.97251, 3.456, 1.2, 1200, {}, loss=0.12345)
    stopped = _command._Outcome("gradient", steps=12, is_complete=False)
    lines = _command._table([finished, stopped]).split("\n")
    assert lines[0].split() == ["method", "test", "accuracy", "test", "loss", "seconds", "compile", "seconds", "steps"]
    assert lines[2].split() == ["projection", "0.9725", "0.1235", "3.46", "1.20", "1,200"]
    assert lines[3].split() == ["gradient", "-", "-", "-", "-", "12,", "interrupted"]
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


OWN = """
import equinox as eqx
import jax
import jax.numpy as jnp

calls = []


class Images(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self, key):
        calls.append(jax.random.key_data(key).tolist())
        self.linear = eqx.nn.Linear(64, 10, key=key)

    def __call__(self, x):
        return self.linear(x.reshape(-1))


def vectors(size=64):
    return eqx.nn.Linear(size, 10, key=jax.random.key(1))


def autoencoder(*, key):
    return eqx.nn.Linear(64, 64, key=key)


def squared(model, x, y):
    assert y.dtype == jnp.int32
    return jnp.mean(jnp.square(jax.vmap(model)(x) - x)) - 100.0


def noisy(model, x, y, key):
    logits = jax.vmap(model)(x + 0.1 * jax.random.normal(key, x.shape))
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


def batched(model, x):
    return jnp.mean(model(x))


def no_number(model, x, y):
    return jax.vmap(model)(x)


def broken(model, x, y):
    raise ValueError("this is mine")


def of_width(width, *, key):
    return None


def nothing():
    return None


def two(key):
    return eqx.nn.Linear(64, 2, key=key)


ready = vectors()
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a user's module, which is the current one."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "lacking.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "wrong.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "lacking", "wrong"):
        sys.modules.pop(name, None)


def run_own(*words):
    return _command.main(["compare", "--steps", "3", "--batch-size", "32", "--no-progress", *words])


@pytest.mark.parametrize(
    "words",
    [["mine:Images"], ["mine:vectors", "--flatten"], ["mine:vectors", "--flatten", "--loss", "mine:noisy"]],
)
def test_a_model_of_ones_own(words, own, capsys):
    before = list(sys.path)
    assert run_own("--model", *words, "--json", "a.json") == 0
    out = capsys.readouterr().out
    assert f"{words[0]}, 650 parameters" in out and sys.path == before
    content = json.loads((own / "a.json").read_text())
    assert content["settings"]["model"] == words[0] and content["settings"]["width"] is None
    for outcome in content["outcomes"]:
        assert 0 < outcome["accuracy"] < 1 and outcome["loss"] == outcome["history"]["eval_loss"][-1] > 0
    assert (own / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_both_methods_start_from_the_model_of_the_seed(own, faked, capsys):
    for seed in ("0", "1", "0"):
        assert run_own("--model", "mine:Images", "--seed", seed, "--no-picture") == 0
    first, other, again = sys.modules["mine"].calls
    assert first == again != other


def test_a_loss_of_ones_own_without_accuracy(own, capsys):
    words = ["--model", "mine:autoencoder", "--flatten", "--loss", "mine:squared", "--json", "a.json"]
    assert run_own(*words, "--output", "a.svg") == 0
    out = capsys.readouterr().out
    assert "no accuracy: of one sample, the model gives an output of the shape [64], not 10 numbers" in out
    for outcome in json.loads((own / "a.json").read_text())["outcomes"]:
        assert outcome["accuracy"] is None and -100 < outcome["loss"] < -98
    assert "<svg" in (own / "a.svg").read_text()


def test_a_loss_of_ones_own_on_the_network_of_the_command(own, capsys):
    assert run_own("--width", "4", "--depth", "0", "--loss", "mine:noisy", "--no-picture") == 0
    assert "relu network 64-10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "mine"], ["--model", "'mine'", "colon", "mine:model"]),
        (["--model", "mine.py:vectors"], ["--model", "mine:vectors"]),
        (["--model", ":vectors"], ["--model", "models:vectors"]),
        (["--loss", ".mine:noisy"], ["--loss", "mine:noisy"]),
        (["--loss", "mine:"], ["--loss", "mine:loss"]),
        (["--model", "nowhere:f"], ["--model", "no module 'nowhere'", "in '"]),
        (["--model", "mine.deeper:f"], ["--model", "no module 'mine.deeper'"]),
        (["--model", "mine:vector"], ["--model", "no name 'vector'", "vectors"]),
        (["--model", "mine:Images.make"], ["--model", "no name 'make'"]),
        (["--model", "mine:number"], ["--model", "function, got 3"]),
        (["--loss", "mine:number"], ["--loss", "function, got 3"]),
        (["--model", "mine:of_width"], ["--model", "f(key=key)", "(width, *, key)", "'width'"]),
        (["--model", "mine:ready"], ["--model", "Is it a model already?"]),
        (["--model", "mine:nothing"], ["--model", "returned None"]),
        (["--model", "mine:two", "--flatten"], ["--model", "shape [2], not 10 numbers", "--loss"]),
        (["--loss", "mine:batched"], ["--loss is called with the model and the 2 parts", "(model, x)"]),
        (["--loss", "mine:no_number"], ["scalar"]),
        (["--model", "mine:Images", "--width", "3"], ["--width", "--model"]),
        (["--model", "mine:Images", "--depth", "0"], ["--depth", "--model"]),
        (["--flatten"], ["--flatten", "--model"]),
    ],
)
def test_an_unusable_model_or_loss(words, said, own, capsys):
    assert run_own(*words, "--no-picture") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and all(word in err for word in said), err


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--model", "lacking:f"], ModuleNotFoundError, "a_package_that_is_missing"),
        (["--model", "wrong:f"], ImportError, "half installed"),
        (["--loss", "mine:broken"], ValueError, "this is mine"),
    ],
)
def test_what_the_users_code_raises_is_shown_as_it_is(words, error, said, own):
    with pytest.raises(error, match=said):
        run_own(*words, "--no-picture")


def test_a_model_that_wants_vectors_is_told_of_flatten(own):
    with pytest.raises(TypeError) as raised:
        run_own("--model", "mine:vectors", "--no-picture")
    assert any("[1, 8, 8]; --flatten" in note for note in raised.value.__notes__)


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
