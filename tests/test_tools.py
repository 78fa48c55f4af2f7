"""What is around the steps: data of all kinds, callbacks, early stopping, averages, line searches, states of layers."""

import csv
import itertools

import datasets
import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from flax import nnx

import eqxproj
from eqxproj.losses import cross_entropy, squared_error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
MODEL = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros(2)}


def loss(p, x, y):
    return cross_entropy(x @ p["w"] + p["b"], y).mean()


def train(steps=6, model=MODEL, data=(X, Y), loss=loss, **options):
    return eqxproj.train(model, data, loss, steps=steps, **options)


def batches(size=8, dictionary=False):
    parts = [(X[i : i + size], Y[i : i + size]) for i in range(0, len(X), size)]
    return [{"x": x, "y": y} for x, y in parts] if dictionary else parts


class Loader:
    """As those of torch and grain: to be gone through again and again."""

    def __init__(self, items):
        self.items, self.passes = items, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.items)


def by_hand(items, steps, rate=0.1):
    """Plain gradient descent along given batches."""
    model = MODEL
    for x, y in itertools.islice(itertools.cycle(items), steps):
        model = jax.tree.map(lambda p, g: p - rate * g, model, jax.grad(loss)(model, x, y))
    return model


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


SGD = {"optimizer": optax.sgd(0.1), "method": "gradient"}


# Data.


@pytest.mark.parametrize("kind", ["loader", "dictionaries", "generator", "lists", "tensors", "grain"])
def test_an_iterable_of_batches(kind):
    """In its own order, and again from the start where it ends."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

    samples = {"x": np.concatenate([x for x, _ in batches()]), "y": np.concatenate([y for _, y in batches()])}
    of_grain = grain.MapDataset.source([{k: v[i] for k, v in samples.items()} for i in range(48)]).batch(8)
    steps = 5 if kind == "generator" else 9
    data = {
        "loader": Loader(batches()),
        "dictionaries": Loader(batches(dictionary=True)),
        "generator": (b for b in batches()),
        "lists": Loader([list(b) for b in batches()]),
        "tensors": Loader([[Tensor(x), Tensor(y)] for x, y in batches()]),
        "grain": of_grain.to_iter_dataset(),
    }[kind]
    columns = {"columns": ("x", "y")} if kind in ("dictionaries", "grain") else {}
    result = train(steps, data=data, **columns, **SGD)
    assert_close(result.model, by_hand(batches(), steps))
    assert result.reason == "steps" and result.state.batch_size == 8


def test_a_generator_that_ends():
    result = train(50, data=(b for b in batches()), eval_every=4, **SGD)
    assert result.reason == "data" and result.state.step == 6
    assert result.history["step"].tolist() == [0, 4, 6]
    assert_close(result.model, by_hand(batches(), 6))


def test_batches_of_several_sizes():
    parts = [(X[:20], Y[:20]), (X[20:40], Y[20:40]), (X[40:], Y[40:])]
    assert_close(train(7, data=Loader(parts), **SGD).model, by_hand(parts, 7))


def test_a_loader_that_raises_is_heard():
    def failing():
        yield from batches()[:2]
        raise RuntimeError("the file is gone")

    with pytest.raises(RuntimeError, match="the file is gone"):
        train(5, data=failing())


def test_a_resumed_run_passes_over_what_was_used():
    whole = train(10, data=Loader(batches()), **SGD)
    half = train(10, data=Loader(batches()), callbacks=[lambda step, _: step == 4], eval_every=2, **SGD)
    assert eqx.tree_equal(train(10, data=Loader(batches()), resume=half.state, **SGD).model, whole.model)


def table():
    return datasets.Dataset.from_dict({"x": X.tolist(), "id": list(range(len(X))), "y": Y.tolist()})


def test_a_data_set_with_columns():
    """Shuffled as the arrays are."""
    same = {"batch_size": 8, "key": jax.random.key(5)} | SGD
    assert_close(train(9, data=table(), columns=("x", "y"), **same).model, train(9, **same).model)


def test_a_streamed_data_set():
    streamed = table().to_iterable_dataset()
    result = train(9, data=streamed, columns=("x", "y"), batch_size=8, **SGD)
    assert_close(result.model, by_hand(batches(), 9))


def test_arrays_in_a_file_are_read_batch_by_batch(tmp_path, monkeypatch):
    """They are shuffled as others are, and never copied whole."""
    large = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float64, shape=X.shape)
    large[:] = X
    large.flush()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_close(train(7, data=(mapped, Y), batch_size=8, **SGD).model, train(7, batch_size=8, **SGD).model)
    seen = []
    monkeypatch.setattr("eqxproj._training._data.canonical", lambda x, name: seen.append(x.shape) or x)
    train(2, data=(mapped, Y), batch_size=8, **SGD)
    assert (48, 4) not in seen and (8, 4) in seen


def test_an_epoch_of_a_data_set_holds_every_sample_once():
    seen = []

    def watched(p, x, y, i):
        jax.debug.callback(lambda i: seen.append(np.asarray(i)), i)
        return loss(p, x, y)

    train(12, data=table(), columns=("x", "y", "id"), loss=watched, batch_size=8, **SGD)
    jax.effects_barrier()
    epochs = np.concatenate(seen[-12:]).reshape(2, 48)
    assert all(sorted(e) == list(range(48)) for e in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_transforms_run_on_the_device_with_a_key_each_step():
    keys = []

    def flipped(x, y, key):
        keys.append(key)
        sign = jax.random.rademacher(key, (x.shape[0], 1), x.dtype)
        return sign * x, y

    doubled = train(5, transform=lambda x, y: (2 * x, y), batch_size=8, **SGD)
    assert_close(doubled.model, train(5, data=(2 * X, Y), batch_size=8, **SGD).model)
    one, other = (train(5, transform=flipped, batch_size=8, key=jax.random.key(k), **SGD) for k in (0, 0))
    assert eqx.tree_equal(one.model, other.model)
    assert len(keys) < 10  # traced, not called each step
    assert not eqx.tree_equal(one.model, train(5, batch_size=8, **SGD).model)


@pytest.mark.parametrize(
    "data, options, error, message",
    [
        (table(), {}, ValueError, "say which columns.*'x', 'id', 'y'"),
        (table(), {"columns": ("x", "z")}, ValueError, "'x', 'id', 'y'"),
        (table(), {"columns": "x"}, TypeError, "tuple of names"),
        (table().select([]), {"columns": ("x", "y")}, ValueError, "empty"),
        (table(), {"columns": ("x", "y"), "batch_size": 100}, ValueError, "only 48 samples"),
        (Loader(batches()), {"batch_size": 8}, ValueError, "leave it out"),
        (Loader(batches()), {"columns": ("x", "y")}, TypeError, "are dictionaries"),
        (Loader(batches(dictionary=True)), {"columns": ("x", "z")}, ValueError, "'z'"),
        (Loader([]), {}, ValueError, "gives no batches"),
        (Loader([(X * np.nan, Y)]), {}, ValueError, "NaN"),
        (Loader([("text", Y)]), {}, TypeError, "text"),
        ((X, Y), {"columns": ("x", "y")}, ValueError, "`columns` names those"),
    ],
)
def test_data_that_cannot_be_used(data, options, error, message, untyped):
    with pytest.raises(error, match=message):
        train(data=data, **options)


# Around the steps.


def test_callbacks_see_each_record_and_may_stop(tmp_path):
    """As a logger into a file of comma-separated values."""
    seen = []
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)

        def log(step, report):
            seen.append((step, report.model, report.values))
            writer.writerow([step, report.values["loss"], report.values["eval_loss"]])

        result = train(20, eval_every=2, eval_data=(X, Y), callbacks=[log, lambda step, report: step >= 8])
    assert [step for step, *_ in seen] == [0, 2, 4, 6, 8] and result.reason == "callback"
    assert result.history["step"].tolist() == [0, 2, 4, 6, 8]
    for _, model, values in seen:  # the models stay as they were
        np.testing.assert_allclose(values["eval_loss"], loss(model, X, Y), rtol=1e-5)
    rows = list(csv.reader((tmp_path / "log.csv").read_text().splitlines()))
    np.testing.assert_allclose([float(r[2]) for r in rows], result.history["eval_loss"], rtol=1e-6)
    assert eqx.tree_equal(result.model, seen[-1][1])


def test_a_callback_may_stop_before_the_first_step():
    result = train(20, callbacks=[lambda step, report: True])
    assert result.reason == "callback" and result.state.step == 0 and result.history["step"].tolist() == [0]
    assert eqx.tree_equal(result.model, MODEL)


def test_norm_and_rate_are_recorded():
    result = train(
        8, eval_every=1, batch_size=48, optimizer=optax.inject_hyperparams(optax.sgd)(0.25), method="gradient"
    )
    wanted = optax.tree_utils.tree_norm(jax.grad(loss)(MODEL, X, Y))
    np.testing.assert_allclose(result.history["norm"][1], wanted, rtol=1e-5)
    assert (result.history["learning_rate"] == 0.25).all()
    rates = train(100, eval_every=1).history["learning_rate"]
    assert rates.argmax() > 1 and rates[-1] < 0.1 * rates.max()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_returns_the_best_model(mode):
    """The value to watch is made to be best at step 4, by the number of its calls."""
    sign = 1.0 if mode == "min" else -1.0
    values = iter([5.0, 3.0, 1.0, 2.0, 1.5, 4.0, 0.0])
    models = {}
    result = train(
        40,
        eval_every=2,
        eval_data=(X, Y),
        evaluate={"made": eqxproj.on_host(lambda p, x, y: sign * next(values))},
        early_stopping=eqxproj.EarlyStopping("eval_made", mode, patience=3),
        callbacks=[lambda step, report: models.update({step: report.model})],
    )
    assert result.reason == "early_stopping" and result.state.step == 10
    assert result.state.best_step == 4 and result.state.best_value == sign
    assert eqx.tree_equal(result.model, models[4]) and not eqx.tree_equal(result.model, models[10])


def test_a_small_change_is_no_better_one():
    rule = eqxproj.EarlyStopping("loss", min_delta=0.5)
    assert rule.is_better(0.4, 1.0) and not rule.is_better(0.6, 1.0)
    assert rule.is_better(9.0, float("nan")) and not rule.is_better(float("nan"), 9.0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"early_stopping": eqxproj.EarlyStopping("eval_accuracy")}, ValueError, "recorded are 'loss', 'norm'"),
        ({"early_stopping": 3}, TypeError, "EarlyStopping"),
        ({"callbacks": [3]}, TypeError, r"callbacks\[0\]"),
        ({"callbacks": lambda step, report: None}, TypeError, "a sequence of functions"),
        ({"eval_batch_size": 4}, ValueError, "without data"),
        ({"eval_batch_size": 0, "eval_data": (X, Y)}, ValueError, "eval_batch_size"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"accumulate": 5}, ValueError, "divide the batch size, 48"),
        ({"ema": 1.0}, ValueError, "between 0 and 1"),
        ({"ema": "0.9"}, ValueError, "between 0 and 1"),
        ({"ema": 0.9, "eval_parameters": lambda s, p: p}, ValueError, "Choose one"),
        ({"eval_parameters": 3}, TypeError, "eval_parameters"),
        ({"transform": 3}, TypeError, "transform"),
        ({"model_state": {"n": 3}}, TypeError, "holds no arrays"),
        ({"model_state": {"n": jnp.zeros(())}, "has_aux": True}, ValueError, "leave `has_aux` out"),
    ],
)
def test_options_that_cannot_be_used(options, error, message, untyped):
    with pytest.raises(error, match=message):
        train(**options)


@pytest.mark.parametrize("size", [1, 7, 48, 1000])
def test_evaluation_in_batches_is_the_mean(size):
    whole = train(3, eval_data=(X, Y))
    parts = train(3, eval_data=(X, Y), eval_batch_size=size)
    np.testing.assert_allclose(parts.history["eval_loss"], whole.history["eval_loss"], rtol=1e-5)


@pytest.mark.usefixtures("full_precision")
def test_evaluation_outside_of_jit():
    def numpy_loss(p, x, y):
        assert isinstance(x, np.ndarray)
        logits = x @ np.asarray(p["w"]) + np.asarray(p["b"])
        return float(np.mean(scipy.special.logsumexp(logits, 1) - logits[np.arange(len(y)), y]))

    functions = {"numpy": eqxproj.on_host(numpy_loss), "jax": loss}
    history = train(3, eval_data=(X, Y), evaluate=functions, eval_batch_size=7).history
    np.testing.assert_allclose(history["eval_numpy"], history["eval_jax"], rtol=1e-5)
    with pytest.raises(eqxproj.EvaluationError, match="on_host"):
        train(3, eval_data=(X, Y), evaluate={"numpy": lambda p, x, y: float(np.sum(x))})


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(method, parts):
    options = {"batch_size": 8, "method": method, "optimizer": optax.sgd(0.1)}
    assert_close(train(5, accumulate=parts, **options).model, train(5, **options).model, 1e-4)


def test_accumulation_under_the_defaults():
    """The coordinates of the layers are means over the parts: near those of the whole, not the same."""
    whole, parts = (train(30, batch_size=24, accumulate=k, eval_data=(X, Y)) for k in (1, 3))
    np.testing.assert_allclose(parts.history["eval_loss"][-1], whole.history["eval_loss"][-1], rtol=0.1)


def test_moving_average():
    """Against the formula, on the parameters of each step; the parameters themselves go on without it."""
    each = [MODEL]
    result = train(7, ema=0.5, batch_size=8, eval_data=(X, Y), **SGD)
    for steps in range(1, 8):
        each.append(train(steps, batch_size=8, **SGD).model)
    average = MODEL
    for number, model in enumerate(each[1:]):
        decay = min(0.5, number / (9 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, model)
    assert_close(result.model, average)
    assert_close(result.state.parameters, each[-1])
    np.testing.assert_allclose(result.history["eval_loss"][-1], loss(average, X, Y), rtol=1e-5)


def test_parameters_that_an_optimizer_evaluates():
    optimizer = optax.contrib.schedule_free_adamw(0.05, warmup_steps=2)
    evaluated = optax.contrib.schedule_free_eval_params
    result = train(20, optimizer=optimizer, eval_parameters=evaluated, method="gradient", eval_data=(X, Y))
    wanted = evaluated(result.state.optimizer_state, result.state.parameters)
    assert_close(result.model, wanted)
    assert not eqx.tree_equal(result.model, result.state.parameters)
    np.testing.assert_allclose(result.history["eval_loss"][-1], loss(wanted, X, Y), rtol=1e-5)


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_line_searches(method):
    """L-BFGS on a least-squares problem finds what `scipy` does."""
    target = X @ np.asarray([1.0, -2.0, 0.5, 3.0], np.float32) + 0.1 * RNG.normal(size=48).astype(np.float32)

    def quadratic(w, x, y):
        return squared_error(x @ w, y).mean()

    options = {"loss": quadratic, "data": (X, target), "batch_size": 48, "method": method}
    result = train(30, model=jnp.zeros(4), optimizer=optax.lbfgs(), **options)
    np.testing.assert_allclose(result.model, scipy.optimize.lsq_linear(X, target).x, rtol=1e-3, atol=1e-3)


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.last = eqx.nn.Linear(4, 2, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.last(x), state


def normed_loss(model, state, x, y):
    logits, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return cross_entropy(logits, y).mean(), state


@pytest.mark.parametrize("parts", [1, 2])
def test_states_of_layers_are_kept(parts):
    """Against a hand-written loop of gradients; the running statistics are no parameters."""
    model, state = eqx.nn.make_with_state(Normed)(jax.random.key(0))
    options = {"batch_size": 48, "accumulate": parts}
    result = train(4, model=model, loss=normed_loss, model_state=state, **options, **SGD)
    for _ in range(4 if parts == 1 else 0):
        (_, state), grads = eqx.filter_value_and_grad(normed_loss, has_aux=True)(model, state, X, Y)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
    if parts == 1:
        assert_close(eqx.filter(result.model, eqx.is_array), eqx.filter(model, eqx.is_array), 1e-4)
        assert_close(result.model_state, state, 1e-4)
    inference = eqx.nn.inference_mode(result.model)
    found = jax.vmap(lambda x: inference(x, result.model_state)[0])(X)
    assert np.isfinite(found).all()
    given = {"model": result.model, "model_state": result.model_state, "eval_data": (X, Y)}
    history = train(4, loss=normed_loss, **given, **options).history
    assert history["eval_loss"][-1] < history["eval_loss"][0]


def test_a_loss_that_returns_another_state():
    with pytest.raises(TypeError, match="structured like the one"):
        train(loss=lambda p, s, x, y: (loss(p, x, y), (s, s)), model_state={"n": jnp.zeros(())})


def test_the_model_is_not_given_away():
    """The memory of the parameters is used again from step to step: neither the user's nor the result's is."""
    model = jax.tree.map(jnp.copy, MODEL)
    first = train(4, model=model)
    second = train(8, model=model, resume=first.state, optimizer=None)
    for tree in (model, first.model, first.state.arrays, second.model):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def test_the_types_of_a_result():
    result = train(1)
    assert "TrainResult(model=<dict>" in repr(result) and "step=1" in repr(result.state)


def test_an_nnx_module_is_shown_to_callbacks():
    seen = []
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    options = {"eval_data": (X, Y), "eval_every": 2, "ema": 0.5, "early_stopping": eqxproj.EarlyStopping(patience=9)}

    def nnx_loss(module, x, y):
        return cross_entropy(module(x), y).mean()

    whole = train(6, model=module, loss=nnx_loss, **options)
    half = train(6, model=module, loss=nnx_loss, callbacks=[lambda s, r: seen.append(r.model) or s == 4], **options)
    again = train(6, model=module, loss=nnx_loss, resume=half.state, **options)
    assert all(isinstance(m, nnx.Linear) for m in (*seen, whole.model)) and len(seen) == 3
    np.testing.assert_array_equal(again.model.kernel[...], whole.model.kernel[...])
    with pytest.raises(TypeError, match="an nnx module holds its own"):
        train(model=module, loss=nnx_loss, model_state={"n": jnp.zeros(())})
