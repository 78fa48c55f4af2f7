"""State and checkpoints: a resumed run is the whole run bit for bit, whatever ended it."""

import errno
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj.losses import cross_entropy

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
MODEL = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros(2)}


def loss(p, x, y):
    return cross_entropy(x @ p["w"] + p["b"], y).mean()


def noisy(p, x, y, key):
    return loss(p, x + 0.1 * jax.random.normal(key, x.shape), y)


def train(steps=20, model=MODEL, data=(X, Y), loss=loss, **options):
    options = {"batch_size": 8, "eval_every": 5, "eval_data": (X, Y)} | options
    return eqxproj.train(model, data, loss, steps=steps, **options)


def stop_at(step):
    return lambda now, report: now >= step


def assert_same(a, b):
    assert eqx.tree_equal(a.model, b.model)
    assert eqx.tree_equal(a.state.arrays, b.state.arrays)
    for name in set(a.history) - {"seconds", "compile_seconds"}:
        np.testing.assert_array_equal(a.history[name], b.history[name])


OPTIONS = {
    "defaults": {},
    "gradient": {"method": "gradient"},
    "noise": {"loss": noisy},
    "momentum": {"optimizer": optax.sgd(0.1, momentum=0.9)},
    "average": {"ema": 0.9},
    "best": {"early_stopping": eqxproj.EarlyStopping(patience=None)},
    "discrete": {"constraints": [(lambda p: p["w"], eqxproj.sets.Sparse(0.5))]},
    "parts": {"accumulate": 2},
    "solver": {"solver": eqxproj.AlternatingProjections(), "solver_steps": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_twenty_steps_are_ten_and_ten(name, tmp_path):
    """As a value, and through a file."""
    whole = train(**OPTIONS[name])
    half = train(**OPTIONS[name], callbacks=[stop_at(10)], checkpoint=tmp_path)
    assert half.state.step == 10 and half.reason == "callback" and half.history["step"][-1] == 10
    assert_same(train(**OPTIONS[name], resume=half.state), whole)
    assert_same(train(**OPTIONS[name], resume=tmp_path), whole)


def test_a_state_can_be_used_twice():
    half = train(callbacks=[stop_at(10)])
    first, second = (train(resume=half.state) for _ in range(2))
    assert_same(first, second)
    assert half.state.parameters["w"].shape == (4, 2) and half.state.optimizer_state is not None


def test_ten_and_ten_with_an_optimizer_without_a_schedule():
    options = {"optimizer": optax.adam(1e-2)}
    assert_same(train(20, resume=train(10, **options).state, **options), train(20, **options))


def test_in_types_that_numpy_does_not_have(tmp_path):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL)
    state = {"n": jnp.zeros((), jnp.bfloat16), "key": jax.random.key(3)}

    def counted(p, s, x, y):
        return loss(p, x.astype(jnp.bfloat16), y), s | {"n": s["n"] + 1}

    options = {"model": model, "loss": counted, "model_state": state}
    whole = train(**options)
    train(callbacks=[stop_at(10)], checkpoint=tmp_path, **options)
    again = train(resume=tmp_path, **options)
    assert_same(again, whole)
    assert float(again.model_state["n"]) == 20 and again.model_state["n"].dtype == jnp.bfloat16


def test_checkpoints_are_few_and_whole(tmp_path):
    (tmp_path / ".step-0000000003.eqxproj.left").write_bytes(b"of a process that was killed")
    train(checkpoint=tmp_path / "deep" / "er", checkpoint_every=7)
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "step-0000000014.eqxproj",
        "step-0000000020.eqxproj",
    ]
    train(checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "step-0000000015.eqxproj",
        "step-0000000020.eqxproj",
    ]
    content = (tmp_path / "step-0000000020.eqxproj").read_bytes()
    assert content.startswith(b'{"format": "eqxproj checkpoint", "version": 1')


DAMAGE = [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-40] + b"x" * 40]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_last_whole_checkpoint_is_used(damage, tmp_path):
    whole = train(checkpoint=tmp_path)
    last = tmp_path / "step-0000000020.eqxproj"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match="damaged.*The one before it is used"):
        again = train(resume=tmp_path)
    assert_same(again, whole)
    (tmp_path / "step-0000000015.eqxproj").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="None of the 2 checkpoints"):
        train(resume=tmp_path)


def test_resume_true_begins_where_there_is_nothing(tmp_path):
    whole = train()
    assert_same(train(checkpoint=tmp_path, resume=True, callbacks=[stop_at(10)]), train(callbacks=[stop_at(10)]))
    assert_same(train(checkpoint=tmp_path, resume=True), whole)
    assert_same(train(checkpoint=tmp_path, resume=True), whole)  # nothing is left to do


def test_a_full_disk_in_the_middle_of_a_save(tmp_path, monkeypatch):
    """The run ends with the model; the checkpoint before is used."""
    whole = train()
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= 4:  # of each checkpoint, the file and the folder are written down; the folder is tried first
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(eqxproj.CheckpointError, match="No space left") as caught:
        train(checkpoint=tmp_path)
    monkeypatch.undo()
    assert caught.value.step == 10 and caught.value.history["step"].tolist() == [0, 5, 10]
    assert np.isfinite(caught.value.model["w"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000005.eqxproj"]
    assert_same(train(resume=tmp_path), whole)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}}, r"parameters\['b'\].*float32\[2\].*float32\[3\]"),
        ({"optimizer": optax.sgd(0.1)}, "another model, optimizer"),
        ({"batch_size": 4}, "`batch_size` is 4.*was 8"),
        ({"data": (X[:40], Y[:40])}, "samples in `data` is 40.*was 50"),
        ({"key": jax.random.key(7)}, "`key` is not that"),
        ({"steps": 15}, "`steps` is 15.*has taken 20"),
        ({"ema": 0.9}, "another model, optimizer"),
    ],
)
def test_states_of_other_runs(options, message, tmp_path):
    result = train(checkpoint=tmp_path)
    for resume in (result.state, tmp_path):
        with pytest.raises(ValueError, match=message):
            train(resume=resume, **options)


def test_bad_arguments(tmp_path, untyped):
    file = tmp_path / "file"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(NotADirectoryError, match="`checkpoint` must be a folder"):
        train(checkpoint=file)
    with pytest.raises(TypeError, match="`checkpoint`"):
        train(checkpoint=3)
    with pytest.raises(ValueError, match="`checkpoint_every` was given without a folder"):
        train(checkpoint_every=3)
    with pytest.raises(ValueError, match="`checkpoint_every`"):
        train(checkpoint=tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="name the folder as `checkpoint`"):
        train(resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="damaged"):
        train(resume=file)
    with pytest.raises(TypeError, match="`resume` must be a state"):
        train(resume=3)


def test_another_version_is_said(tmp_path):
    train(checkpoint=tmp_path)
    last = tmp_path / "step-0000000020.eqxproj"
    content = last.read_bytes()[:-32].replace(b'"version": 1', b'"version": 9', 1)
    last.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(ValueError, match="version 9"):
        train(resume=last)


SCRIPT = """
    import signal, sys, time
    import numpy as np, jax.numpy as jnp, equinox as eqx, eqxproj

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    model = {"w": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros(2)}

    def loss(p, x, y):
        return eqxproj.losses.cross_entropy(x @ p["w"] + p["b"], y).mean()

    def slowly(step, report):
        print(step, flush=True)
        time.sleep(float(sys.argv[2]))

    folder = sys.argv[1] or None
    result = eqxproj.train(
        model, (x, y), loss, steps=60, batch_size=8, eval_every=2, callbacks=[slowly], checkpoint=folder,
        resume=folder is not None,
    )
    np.savez(sys.argv[3], **result.model)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_killed_processes_go_on(number, tmp_path):
    """A process that is killed at any moment, and run again, ends where an undisturbed one does."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(eqxproj.__file__).parent.parent)}

    def start(folder, pause, out):
        command = [sys.executable, str(script), folder, pause, str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    folder = str(tmp_path / "checkpoints")
    for when in ("10", "24"):
        process = start(folder, "0.05", "killed.npz")
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == when:
                break
        time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode != 0
        if number != signal.SIGINT:
            assert process.returncode == -number  # as if nobody had listened
    last = start(folder, "0", "again.npz")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert int(out.split()[0]) >= 24
    undisturbed = start("", "0", "whole.npz")
    assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
    again, whole = (np.load(tmp_path / f"{name}.npz") for name in ("again", "whole"))
    for name in ("w", "b"):
        np.testing.assert_array_equal(again[name], whole[name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_chunk_runs_loses_nothing(number, monkeypatch):
    """It comes while the memory of the old state is used for the new one, to a handler of the user."""

    class Stop(BaseException):
        pass

    def stop(number, frame):
        raise Stop

    def advance(*args):
        real = compiled(*args)

        def wrapped(*args):
            out = real(*args)
            if args[1] >= 10:
                signal.raise_signal(number)
            return out

        return wrapped

    compiled = eqxproj._training._loop.compiled
    monkeypatch.setattr("eqxproj._training._loop.compiled", advance)
    seen = []
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            train(callbacks=[lambda step, report: seen.append(report.model)])
    finally:
        signal.signal(number, before)
    assert len(seen) == 3 and all(np.isfinite(m["w"]).all() for m in seen)


def test_ctrl_c_while_a_chunk_runs(monkeypatch):
    """The state is that after the chunk, and the run can go on from it."""
    compiled = eqxproj._training._loop.compiled

    def advance(*args):
        real = compiled(*args)

        def wrapped(*args):
            out = real(*args)
            if args[1] + args[2] == 10:
                signal.raise_signal(signal.SIGINT)
            return out

        return wrapped

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("eqxproj._training._loop.compiled", advance)
            with pytest.raises(eqxproj.TrainingInterrupted) as caught:
                train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.step == 10
    assert_same(train(resume=caught.value.state), train())
