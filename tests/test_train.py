"""Training: what is seeded, what each sample is seen for, what the history holds, and what is passed on."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj.losses import cross_entropy, squared_error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
MODEL = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32), "b": jnp.zeros(2)}


def loss(p, x, y):
    return cross_entropy(x @ p["w"] + p["b"], y).mean()


def train(loss=loss, model=MODEL, data=(X, Y), steps=5, batch_size=8, **options):
    return eqxproj.train(model, data, loss, steps=steps, batch_size=batch_size, **options)


# Batches.


def seen(count, size, steps, key=None):
    """The samples of each step, read off a loss that sums a power of two for each."""
    result = eqxproj.train(
        jnp.ones(()),
        (2.0 ** np.arange(count),),
        lambda p, x: p * jnp.sum(x),
        steps=steps,
        batch_size=size,
        optimizer=optax.sgd(0.0),
        method="gradient",
        eval_every=1,
        key=key,
    )
    return [[i for i in range(count) if int(total) >> i & 1] for total in result.history["loss"][1:]]


@pytest.mark.parametrize("count, size", [(12, 4), (12, 5), (7, 7), (5, 1), (10, 3)])
def test_every_sample_is_seen_once_an_epoch(count, size):
    """Also where a batch crosses from one epoch to the next, in which no sample stands twice."""
    steps = seen(count, size, 2 * count)
    assert all(len(rows) == size for rows in steps)
    times = np.zeros(count, int)
    for rows in steps:
        times[rows] += 1
        assert times.max() - times.min() <= 1
    assert len({tuple(rows) for rows in steps}) > 1 or size == count


def test_batches_are_seeded():
    def first(key):
        return seen(20, 6, 5, key)

    assert first(jax.random.key(1)) == first(jax.random.key(1)) == first(jax.random.PRNGKey(1))
    assert first(jax.random.key(1)) != first(jax.random.key(2))


def test_parts_of_a_sample_stay_together():
    rows = np.arange(40, dtype=np.float32)

    def apart(p, batch, others):
        (y, nothing), a, b = others, batch["a"], batch["b"]
        assert nothing is None and a.shape == b.shape == y.shape
        return p * jnp.sum(jnp.abs(a - b) + jnp.abs(a - y[:, None].mean(1)))

    data = {"a": rows, "b": list(map(float, rows))}, (jnp.asarray(rows), None)
    found = train(apart, jnp.ones(()), data, optimizer=optax.sgd(0.0), method="gradient", eval_every=1)
    np.testing.assert_array_equal(found.history["loss"][1:], 0.0)


@pytest.mark.parametrize(
    "given, dtype",
    [
        (X.astype(np.float64), jnp.float32),
        (Y.astype(np.int64), jnp.int32),
        (X > 0, jnp.bool_),
        (jnp.asarray(X), jnp.float32),
    ],
)
def test_data_has_the_precision_of_jax(given, dtype):
    found = set()

    def noted(p, x):
        found.add(x.dtype)
        return p * jnp.sum(x)

    train(noted, jnp.ones(()), (given,), steps=1, method="gradient")
    assert found == {jnp.dtype(dtype)}


# Seeds.


def test_same_key_same_result_and_other_key_other_batches():
    first, again, other = (train(key=jax.random.key(k)) for k in (0, 0, 1))
    assert eqx.tree_equal(first.model, again.model)
    np.testing.assert_array_equal(first.history["loss"], again.history["loss"])
    assert not eqx.tree_equal(first.model, other.model)
    assert eqx.tree_equal(train().model, first.model)


def test_batches_do_not_depend_on_the_method():
    """A loss that sums its batch, with an optimizer that does nothing, shows which samples each step has."""

    def probe(p, x, y):
        return squared_error(p["s"], jnp.sum(x, (0, 1))) + 0 * jnp.sum(y)

    still = optax.GradientTransformation(
        lambda p: (), lambda u, s, p=None: (jax.tree_util.tree_map(jnp.zeros_like, u), s)
    )
    histories = [
        train(probe, {"s": jnp.zeros(())}, optimizer=still, method=m, eval_every=1, key=jax.random.key(4)).history[
            "loss"
        ]
        for m in ("projection", "gradient")
    ]
    np.testing.assert_allclose(histories[0][1:], histories[1][1:], rtol=1e-6)
    assert len(set(histories[0][1:].tolist())) == 5


# History.


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize(
    "steps, every, want", [(7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6]), (3, None, [0, 1, 2, 3]), (2, 10, [0, 2])]
)
def test_history(steps, every, want, method):
    evaluate = {"loss": loss, "accuracy": lambda p, x, y: (jnp.argmax(x @ p["w"] + p["b"], -1) == y).mean()}
    result = train(steps=steps, eval_every=every, eval_data=(X, Y), evaluate=evaluate, method=method)
    history = result.history
    names = {"step", "loss", "norm", "learning_rate", "seconds", "eval_loss", "eval_accuracy", "compile_seconds"}
    assert set(history) == names
    assert history["step"].tolist() == want
    assert all(len(history[k]) == len(want) for k in history if k != "compile_seconds")
    assert np.isnan(history["loss"][0]) and np.isfinite(history["loss"][1:]).all()
    assert (np.diff(history["seconds"]) >= 0).all() and history["seconds"][0] == 0.0
    assert history["compile_seconds"] > 0
    np.testing.assert_allclose(history["eval_loss"][0], loss(MODEL, X, Y), rtol=1e-5)
    np.testing.assert_allclose(history["eval_loss"][-1], loss(result.model, X, Y), rtol=1e-5)
    assert history["eval_accuracy"].min() >= 0 and history["eval_accuracy"].max() <= 1


def test_history_without_evaluation():
    assert set(train().history) == {"step", "loss", "norm", "learning_rate", "seconds", "compile_seconds"}
    assert "learning_rate" not in train(optimizer=optax.adam(1e-3)).history


def test_evaluation_is_of_the_loss_by_default():
    np.testing.assert_allclose(train(eval_data=(X, Y)).history["eval_loss"][0], loss(MODEL, X, Y), rtol=1e-5)


def test_about_twenty_evaluations_by_default():
    assert train(steps=40).history["step"].tolist() == list(range(0, 41, 2))


# What is passed on.


def test_learns():
    result = train(steps=200, optimizer=optax.adam(3e-2), eval_data=(X, Y))
    assert result.history["eval_loss"][-1] < 0.3 * result.history["eval_loss"][0]


def test_optimizer_and_displacement():
    """One step of `sgd` is the displacement of the batch itself, with the same options."""
    options = dict(copies="none", tau=0.5, metric=eqxproj.Metric(10.0, 100.0))
    result = train(steps=1, batch_size=40, optimizer=optax.sgd(0.5), **options)
    moved = eqxproj.filter_displacement(loss, **options)(MODEL, X, Y)
    want = jax.tree_util.tree_map(lambda w, d: w - 0.5 * d, MODEL, moved)
    assert eqx.tree_equal(result.model, want, rtol=1e-4, atol=1e-6)


def test_gradient_method_is_the_gradient():
    result = train(steps=1, batch_size=40, optimizer=optax.sgd(0.5), method="gradient")
    want = jax.tree_util.tree_map(lambda w, g: w - 0.5 * g, MODEL, jax.grad(loss)(MODEL, X, Y))
    assert eqx.tree_equal(result.model, want, rtol=1e-4, atol=1e-6)


def test_other_solver_and_several_steps_of_it():
    options = dict(solver=eqxproj.AlternatingProjections(), solver_steps=3, metric=eqxproj.Metric())
    result = train(steps=20, optimizer=optax.adam(1e-2), eval_data=(X, Y), **options)
    assert result.history["eval_loss"][-1] < result.history["eval_loss"][0]


def test_fresh_key_each_step():
    """A loss with an argument named `key` gets another key each step, the same for both methods."""

    def noisy(p, x, y, key):
        return squared_error(p["s"], jax.random.normal(key)) + 0 * jnp.sum(x)

    still = optax.GradientTransformation(
        lambda p: (), lambda u, s, p=None: (jax.tree_util.tree_map(jnp.zeros_like, u), s)
    )
    found = []
    for method in ("projection", "gradient"):
        result = train(noisy, {"s": jnp.zeros(())}, optimizer=still, method=method, eval_every=1, eval_data=(X, Y))
        found.append(result.history["loss"][1:])
    assert len(set(found[0].tolist())) == 5
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_a_loss_gets_a_key_where_it_has_such_an_argument():
    def keyed(p, x, *, key):
        return p * jnp.sum(x) + 0.0 * jax.random.normal(key)

    def optional(p, x, key=None):
        assert key is not None
        return keyed(p, x, key=key)

    for f in (keyed, optional):
        train(f, jnp.ones(()), (X,), steps=1, method="gradient")


def test_pytrees_as_data():
    def f(p, batch, y):
        return cross_entropy(batch["x"] @ p["w"] + p["b"] + batch["more"][0], y).mean()

    data = ({"x": X, "more": [np.zeros((40, 2), np.float32)]}, Y)
    assert eqx.tree_equal(train(f, data=data).model, train().model, rtol=1e-6)


def test_regression():
    """Data without integer arrays."""

    def f(p, x, y):
        return squared_error(x @ p["w"] + p["b"], y).mean()

    y = X @ np.ones((4, 2), np.float32)
    result = train(f, data=(X, y), steps=200, optimizer=optax.adam(3e-2), eval_data=(X, y))
    assert result.history["eval_loss"][-1] < 0.2 * result.history["eval_loss"][0]


def test_unlabeled_data():
    def f(p, x):
        return squared_error(x @ p["w"] @ p["w"].T, x).mean()

    assert np.isfinite(train(f, data=(X,)).history["loss"][-1])


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_auxiliary_output_is_dropped(method):
    def f(p, x, y):
        return loss(p, x, y), {"x": x}

    assert eqx.tree_equal(train(f, has_aux=True, method=method, eval_data=(X, Y)).model, train(method=method).model)


def test_numpy_parameters():
    model = jax.tree_util.tree_map(np.asarray, MODEL)
    assert eqx.tree_equal(train(model=model).model, train().model)


def test_what_is_no_parameter_stays():
    model = {**MODEL, "order": jnp.array([1, 0, 2, 3]), "f": jax.nn.relu, "name": "x"}
    result = train(lambda p, x, y: loss(p, p["f"](x[:, p["order"]]), y), model)
    assert result.model["f"] is jax.nn.relu and result.model["name"] == "x"
    np.testing.assert_array_equal(result.model["order"], model["order"])
    assert not eqx.tree_equal(result.model["w"], MODEL["w"])


def test_the_given_model_is_not_changed():
    before = jax.tree_util.tree_map(np.array, MODEL)
    train()
    assert eqx.tree_equal(MODEL, jax.tree_util.tree_map(jnp.asarray, before))


def test_batch_size_by_default():
    assert eqx.tree_equal(train(batch_size=None).model, train(batch_size=40).model)


# The progress bar.


@pytest.mark.parametrize("options", [{}, {"progress": False}])
def test_prints_nothing(options, capsys):
    train(eval_data=(X, Y), **options)
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(is_terminal, capsys, monkeypatch):
    """A bar in a terminal; a line every few seconds, and one at the end, elsewhere."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    train(steps=3, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "projection" in shown.err and "loss" in shown.err
    assert ("3/3" in shown.err) == is_terminal and ("step 3 of 3" in shown.err) != is_terminal


def test_an_optimizer_needs_no_hash():
    class Update(list):
        def __call__(self, *args, **kwargs):
            return optax.sgd(0.1).update(*args, **kwargs)

    without = optax.GradientTransformation(optax.sgd(0.1).init, Update())
    plain = train(optimizer=optax.sgd(0.1), method="gradient")
    assert eqx.tree_equal(train(optimizer=without, method="gradient").model, plain.model)


@pytest.mark.parametrize("peak", [3e-3, 0.1])
@pytest.mark.parametrize("steps", [1, 7, 100, 3000])
def test_default_rate_warms_up_and_falls(steps, peak):
    """With a constant gradient, a step of Adam is the rate."""
    optimizer = eqxproj.default_optimizer(steps) if peak == 3e-3 else eqxproj.default_optimizer(steps, peak)

    def step(state, _):
        update, state = optimizer.update(jnp.ones(()), state)
        return state, update

    updates = jax.lax.scan(step, optimizer.init(jnp.zeros(())), length=steps)[1]
    rates = (-np.asarray(updates, float) * 3e-3 / peak).tolist()
    top = int(np.argmax(np.isclose(rates, max(rates), rtol=1e-4)))
    fall = 6 * steps // 10
    assert max(rates) == pytest.approx(3e-3, rel=1e-3) and top <= fall
    assert np.all(np.diff(rates[:fall]) > -1e-6) and np.all(np.diff(rates[fall:]) < 0)
    if steps >= 100:
        assert rates[0] == pytest.approx(3e-4, rel=1e-3) and rates[-1] < 4e-5
        assert rates[fall - 1] == pytest.approx(3e-3, rel=1e-3)


@pytest.mark.parametrize(
    "arguments, said",
    [((0,), "`steps` must be a positive integer, got 0"), ((2.5,), "got 2.5")]
    + [((9, x), "`peak` must be a positive finite number.*got") for x in (0.0, -1.0, float("nan"), float("inf"), "1")],
)
def test_a_default_optimizer_of_wrong_arguments(arguments, said, untyped):
    with pytest.raises(ValueError, match=said):
        eqxproj.default_optimizer(*arguments)


def test_default_optimizer_is_used_by_both_methods():
    for method in ("projection", "gradient"):
        given = train(
            steps=12, method=method, optimizer=eqxproj.default_optimizer(12), precondition=method == "projection"
        )
        assert eqx.tree_equal(train(steps=12, method=method).model, given.model)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale, method):
    """By the defaults; with Adam as it is, its epsilon would hold up a small loss."""
    plain = train(steps=20, method=method).model
    scaled = train(lambda p, x, y: scale * loss(p, x, y), steps=20, method=method).model
    assert eqx.tree_equal(scaled, plain, rtol=1e-3, atol=1e-4)
    adam = train(lambda p, x, y: 1e-12 * loss(p, x, y), steps=20, method=method, optimizer=optax.adam(3e-3)).model
    assert not eqx.tree_equal(adam, train(steps=20, method=method, optimizer=optax.adam(3e-3)).model, atol=1e-3)


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_steps_of_small_types_are_not_lost(method, dtype):
    """At 1 a bfloat16 has steps of 1/128; a hundred of 1e-4 each still add up to one hundredth."""
    seen = set()

    def linear(p, x):
        seen.add(str(p.dtype))
        return jnp.mean(squared_error((p * x).astype(jnp.float32), jnp.zeros_like(x, jnp.float32)))

    x = np.ones((4, 1), np.float32)
    result = eqxproj.train(jnp.ones(1, dtype), (x,), linear, steps=100, method=method, optimizer=optax.sign_sgd(1e-4))
    assert result.model.dtype == dtype and seen == {str(jnp.dtype(dtype))}
    np.testing.assert_allclose(np.asarray(result.model, np.float32), 0.99, atol=4e-3)


def test_an_overflow_of_a_small_type_stops_training():
    """The parameter that training keeps is finite in float32, but not in the model's type."""
    with pytest.raises(eqxproj.NonFiniteError) as error:
        eqxproj.train(
            jnp.ones(1, jnp.float16),
            (np.ones((4, 1), np.float32),),
            lambda p, x: -jnp.mean(p.astype(jnp.float32) * x),
            steps=5,
            method="gradient",
            optimizer=optax.sgd(2e4),
        )
    assert np.all(np.isfinite(error.value.model)) and error.value.model.dtype == jnp.float16


@pytest.mark.slow
def test_a_hundred_layers_learn():
    """By the defaults, all of them."""
    keys = jax.random.split(jax.random.key(0), 100)
    model = [0.3 * jax.random.normal(k, (6, 6)) for k in keys]
    x = jax.random.normal(keys[0], (64, 6))
    y = (x[:, 2] > 0).astype(int)

    def deep(ws, x, y):
        for w in ws:
            x = x + 0.02 * jax.nn.relu(x @ w)
        return cross_entropy(x[:, :2], y).mean()

    result = eqxproj.train(model, (x, y), deep, steps=200, eval_data=(x, y))
    assert result.history["eval_loss"][-1] < 0.5 * result.history["eval_loss"][0]
    assert all(float(jnp.max(jnp.abs(a - b))) > 1e-3 for a, b in zip(model, result.model))


def test_in_double_precision():
    code = """
import equinox as eqx, eqxproj, jax, jax.numpy as jnp, numpy as np
x = np.random.default_rng(0).normal(size=(64, 3))
loss = lambda m, x, y: jnp.mean((jax.vmap(m)(x) - y) ** 2)
model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
assert model.layers[0].weight.dtype == jnp.float64
for method in ("projection", "gradient"):
    history = eqxproj.train(model, (x, x[:, :1]), loss, steps=40, method=method).history["loss"]
    assert history[-1] < 0.9 * history[1], history
"""
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_functions_to_evaluate_need_data():
    with pytest.raises(ValueError, match="as `eval_data`"):
        train(steps=2, evaluate={"loss": loss})


def test_optimizers_may_go_by_the_value_of_the_loss():
    optimizer = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    result = train(steps=3, optimizer=optimizer)
    assert np.isfinite(result.history["loss"][-1])
