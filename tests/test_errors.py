"""What the library says about what it cannot use: before any training, with the argument, what was got and wanted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.ndimage import map_coordinates

import eqxproj
from eqxproj import NonFiniteError, TrainingInterrupted, UnsupportedPrimitiveError
from eqxproj._training._evaluation import Evaluation
from eqxproj.losses import cross_entropy, squared_error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype(np.float32)
Y = (np.arange(20) % 3).astype(np.int32)
MODEL = {
    "a": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
    "d": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
}


def loss(p, x, y):
    return cross_entropy(jax.nn.relu(x @ p["a"]) @ p["d"], y).mean()


def optax_loss(p, x, y):
    logits = jax.nn.relu(x @ p["a"]) @ p["d"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.fixture
def no_training(monkeypatch):
    """Fails where the first step of training is compiled."""

    def compiled(*args, **kwargs):
        raise AssertionError("training has begun")

    monkeypatch.setattr("eqxproj._training._loop.compiled", compiled)


def train(model=MODEL, data=(X, Y), loss=loss, steps=3, batch_size=8, **options):
    return eqxproj.train(model, data, loss, steps=steps, batch_size=batch_size, **options)


def problem(loss=loss, model=MODEL, x=X, y=Y, **options):
    return eqxproj.feasibility_problem(loss, model, x, y, **options)


def displacement(loss=loss, model=MODEL, x=X, y=Y, **options):
    return eqxproj.filter_displacement(loss, **options)(model, x, y)


CALLS = {"train": train, "problem": problem, "displacement": displacement}


def raises(error, *parts, call, **options):
    with pytest.raises(error) as caught:
        call(**options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def with_entry(x, value):
    x = np.array(x)
    x[3, 1] = value
    return x


# Data.

BAD_DATA = {
    "unequal lengths": (ValueError, (X, Y[:-1]), ["`data`", "one length", "data[0] has 20", "data[1] has 19"]),
    "empty": (ValueError, (X[:0], Y[:0]), ["`data` is empty"]),
    "nothing": (TypeError, (), ["`data`", "tuple of arrays", "got tuple"]),
    "an array": (TypeError, X, ["`data`", "tuple of arrays", "got ndarray"]),
    "none": (TypeError, None, ["`data`", "tuple of arrays", "got NoneType"]),
    "a number": (ValueError, (X, 3.0), ["`data[1]`", "one entry a sample", "array(3."]),
    "words": (ValueError, (X, np.array(["a"] * 20)), ["`data[1]`", "must hold numbers", "<U1"]),
    "nan of complex64": (ValueError, (with_entry(X * 1j, np.nan), Y), ["`data[0]`", "NaN or infinity", "sample 3"]),
    "keys": (ValueError, (X, Y, jax.random.split(jax.random.key(0), 20)), ["`data[2]`", "PRNG keys", "`key`"]),
    "nan": (ValueError, (with_entry(X, np.nan), Y), ["`data[0]`", "NaN or infinity", "sample 3"]),
    "infinity": (ValueError, (with_entry(X, -np.inf), Y), ["`data[0]`", "NaN or infinity", "sample 3"]),
    "overflow": (ValueError, (with_entry(X.astype(float), 1e300), Y), ["`data[0]`", "NaN or infinity", "sample 3"]),
    "nan of bfloat16": (
        ValueError,
        (jnp.asarray(X, jnp.bfloat16).at[3, 1].set(jnp.nan), Y),
        ["`data[0]`", "NaN or infinity", "sample 3"],
    ),
    "nested": (ValueError, ({"image": with_entry(X, np.nan)}, Y), ["`data[0]['image']`", "NaN"]),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(what, untyped, no_training):
    error, data, parts = BAD_DATA[what]
    raises(error, *parts, call=train, data=data)
    if data is not None:
        raises(error, *[p.replace("data", "eval_data") for p in parts], call=train, eval_data=data)


@pytest.mark.parametrize(
    "size, parts", [(21, ["21", "only 20 samples"]), (0, ["0"]), (-1, ["-1"]), (2.0, ["2.0"]), (True, ["True"])]
)
def test_bad_batch_size(size, parts, untyped, no_training):
    raises(ValueError, "`batch_size`", *parts, call=train, batch_size=size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_parameters_that_are_not_finite(value, method, no_training):
    model = MODEL | {"d": MODEL["d"].at[1, 2].set(value)}
    raises(ValueError, "`model['d']`", "NaN or infinity", call=train, model=model, method=method)


@pytest.mark.parametrize(
    "changed", [{"x": with_entry(X, np.nan)}, {"model": MODEL | {"d": MODEL["d"].at[1, 2].set(np.inf)}}]
)
def test_solve_names_the_node_of_what_is_not_finite(changed):
    with pytest.raises(NonFiniteError) as caught:
        eqxproj.solve(problem(**changed), eqxproj.AlternatingProjections(), steps=2)
    assert caught.value.step == 0
    assert caught.value.node in str(caught.value)


# Labels.


@pytest.mark.parametrize("shift, low, high", [(1, 1, 3), (-1, -1, 1), (1000, 1000, 1002)])
def test_labels_out_of_range(shift, low, high, no_training):
    parts = [f"from {low} to {high}", "0 to 2"]
    raises(ValueError, *parts, call=train, data=(X, Y + shift))
    raises(ValueError, *parts, call=problem, y=Y + shift)


def test_one_bad_label_among_many(no_training):
    labels = Y.copy()
    labels[17] = 3
    raises(ValueError, "from 0 to 3", call=train, data=(X, labels))


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize("shift", [1, 1000])
def test_labels_out_of_range_of_optax(shift, method, no_training):
    raises(
        ValueError, "`loss` is nan", f"from {shift} to {shift + 2}", "labels out of range",
        call=train, loss=optax_loss, data=(X, Y + shift), method=method,
    )  # fmt: skip


# The loss.

BAD_LOSSES = {
    "vector": (lambda p, x, y: squared_error(x @ p["a"], 0 * (x @ p["a"])).sum(-1), ["floating-point scalar", "shape"]),
    "integer": (lambda p, x, y: jnp.argmax((x @ p["a"]).sum(0)), ["floating-point scalar", "int32"]),
    "python integer": (lambda p, x, y: 3, ["scalar array", "int"]),
    "tuple": (lambda p, x, y: (loss(p, x, y), 1), ["scalar array", "tuple", "`has_aux=True`"]),
    "dictionary": (lambda p, x, y: {"loss": loss(p, x, y)}, ["scalar array", "dict"]),
    "none": (lambda p, x, y: None, ["scalar array", "NoneType"]),
    "complex": (lambda p, x, y: loss(p, x, y) * 1j, ["floating-point scalar", "complex64"]),
    "of data alone": (lambda p, x, y: jnp.mean(jnp.asarray(x)), ["does not depend on", "`model`"]),
    "stopped": (lambda p, x, y: jax.lax.stop_gradient(loss(p, x, y)), ["does not depend on", "`model`"]),
    "constant": (lambda p, x, y: 1.0, ["does not depend on", "`model`"]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", BAD_LOSSES)
def test_bad_losses(what, call, no_training):
    bad, parts = BAD_LOSSES[what]
    raises(ValueError, "`loss`", *parts, call=CALLS[call], loss=bad)


@pytest.mark.parametrize("call", CALLS)
def test_missing_auxiliary(call, no_training):
    raises(ValueError, "`loss`", "`(value, auxiliary)`", "an array", call=CALLS[call], has_aux=True)


@pytest.mark.parametrize("call", CALLS)
def test_model_without_parameters(call, no_training):
    model = {"a": jnp.arange(24).reshape(4, 6), "d": 1.0, "f": jax.nn.relu}
    raises(ValueError, "`model`", "no floating-point array", "dict", call=CALLS[call], model=model)


def test_mismatched_shapes_of_a_custom_loss_are_said(untyped):
    with pytest.raises(ValueError, match=r"\(20, 6\).*\(20, 5\)"):
        problem(loss=lambda p, x, y: squared_error(x @ p["a"], jnp.ones((20, 5))).mean())


# Options.

SOLVERS = (eqxproj.DouglasRachford, "douglas_rachford", 3)
BAD_OPTIONS = [
    *[(ValueError, "steps", v, ("train",)) for v in (0, -1, 2.5, True, "3", None)],
    *[(TypeError, "solver", v, ("train", "displacement")) for v in SOLVERS],
    *[(ValueError, "copies", v, tuple(CALLS)) for v in ("all", 3)],
    *[(ValueError, "noise", v, tuple(CALLS)) for v in ("sometimes", None, True)],
    *[(ValueError, "data", v, ("problem",)) for v in ("variable", 3)],
    (ValueError, "method", "adam", ("train",)),
    *[(ValueError, "tau", v, tuple(CALLS)) for v in (0, 0.0, -1, np.nan, np.inf, True, "1")],
    *[(ValueError, "solver_steps", v, ("train",)) for v in (0, 1.0, True)],
    *[(ValueError, "eval_every", v, ("train",)) for v in (0, 1.5)],
    *[(TypeError, "optimizer", v, ("train",)) for v in ("adam", optax.adam)],
    *[(TypeError, "key", v, ("train",)) for v in (3, "seed")],
    *[(TypeError, "metric", v, tuple(CALLS)) for v in ("steep", 3.0, {"grade": 1.0})],
]


@pytest.mark.parametrize(
    "error, name, value, call",
    [
        pytest.param(e, n, v, c, id=f"{c}-{n}-{getattr(v, '__name__', None) or repr(v)}")
        for e, n, v, calls in BAD_OPTIONS
        for c in calls
    ],
)
def test_bad_options(error, name, value, call, untyped, no_training):
    shown = getattr(value, "__name__", None) or repr(value)
    raises(error, f"`{name}`", shown, call=CALLS[call], **{name: value})


@pytest.mark.parametrize("value", [0, -1.5, True, 2.0])
def test_bad_steps_of_a_displacement(value, untyped):
    raises(ValueError, "`steps`", repr(value), call=displacement, steps=value)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, True, "1", None])
@pytest.mark.parametrize("name", ["grade", "parameter"])
def test_bad_metric_values(name, value, untyped):
    raises(ValueError, f"`{name}`", repr(value), "positive finite", call=eqxproj.Metric, **{name: value})


@pytest.mark.parametrize(
    "solver, name, value",
    [
        (eqxproj.DouglasRachford, "relaxation", 0.0),
        (eqxproj.DouglasRachford, "relaxation", 1.5),
        (eqxproj.DifferenceMap, "beta", 0),
        (eqxproj.DifferenceMap, "beta", "1"),
        (eqxproj.RelaxedReflectReflect, "beta", np.nan),
    ],
)
def test_bad_solver_options(solver, name, value, untyped):
    raises(ValueError, f"`{name}`", repr(value), call=solver, **{name: value})


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 1.0}, {"steps": 2, "tol": -1.0}, {"steps": 2, "tol": True}]
)
def test_bad_solve_options(options, untyped):
    name = [*options][-1]
    with pytest.raises(ValueError, match=f"`{name}`"):
        eqxproj.solve(problem(), eqxproj.AlternatingProjections(), **options)


def test_bad_solver_of_solve(untyped):
    with pytest.raises(TypeError, match="`solver`.*AlternatingProjections. Call the class"):
        eqxproj.solve(problem(), eqxproj.AlternatingProjections, steps=1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "error, constraint, part",
    [
        (TypeError, eqxproj.sets.Sparse(0.1), "pair `(where, set)`"),
        (TypeError, (lambda p: p["a"], 0.1), "set of `eqxproj.sets`"),
        (TypeError, ("a", eqxproj.sets.Sparse(0.1)), "pair `(where, set)`"),
        (ValueError, (lambda p: 3, eqxproj.sets.Sparse(0.1)), "floating-point array"),
    ],
)
def test_bad_constraints(error, constraint, part, untyped, no_training):
    raises(error, "`constraints[0]`", part, call=train, constraints=[constraint])


def test_an_optimizer_that_asks_for_a_gradient_function(no_training):
    optimizer = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)
    raises(TypeError, "`optimizer`", "grad_fn", "opaque_mode=False", call=train, optimizer=optimizer)


def test_an_optimizer_whose_state_changes_its_kind(no_training):
    def update(updates, state, params=None):
        return updates, jnp.zeros(state.size + 1)

    growing = optax.GradientTransformation(lambda p: jnp.zeros(1), update)
    raises(TypeError, "`optimizer`", "keep its structure, shapes and dtypes", call=train, optimizer=growing)


# Operations without a rule.


def two_unsupported(p, x, y):
    h = jax.lax.while_loop(lambda c: c.max() < 0, jnp.tanh, x @ p["a"])
    best = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(h.shape, h.dtype), x @ p["a"])
    return cross_entropy(h @ p["d"] + best.sum(-1, keepdims=True), y).mean()


def test_all_missing_operations_are_named():
    with pytest.raises(UnsupportedPrimitiveError) as caught:
        problem(loss=two_unsupported)
    first = two_unsupported.__code__.co_firstlineno
    assert sorted((m.primitive, m.source) for m in caught.value.missing) == [
        ("pure_callback", f"test_errors.py:{first + 2} (two_unsupported)"),
        ("while", f"test_errors.py:{first + 1} (two_unsupported)"),
    ]
    message = str(caught.value)
    for missing in caught.value.missing:
        assert f"{missing.primitive!r} at {missing.source}" in message
    for remedy in ("register_projection", "custom_projection", "stop_gradient", "jax.lax.scan"):
        assert remedy in message


def looped(p, x, y):
    h = jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0]), c[1] + 1), (x @ p["a"], 0))[0]
    chosen = jnp.argmax(h, -1)
    return cross_entropy(jax.nn.one_hot(chosen, 6) @ p["d"] + jnp.round(h[:, :3]) * p["a"][0, 0], y).mean()


@pytest.mark.parametrize("call", CALLS)
def test_missing_operations_are_found_by_every_call(call, no_training):
    with pytest.raises(UnsupportedPrimitiveError) as caught:
        CALLS[call](loss=looped)
    assert {m.primitive for m in caught.value.missing} == {"while"}
    assert all("test_errors.py" in m.source and "(looped)" in m.source for m in caught.value.missing)


def test_an_operation_at_one_place_is_named_once():
    def repeated(p, x, y):
        h = x @ p["a"]
        for _ in range(3):
            h = jax.lax.while_loop(lambda c: c.max() < 0, jnp.tanh, h)
        return cross_entropy(h @ p["d"], y).mean()

    with pytest.raises(UnsupportedPrimitiveError) as caught:
        problem(loss=repeated)
    assert [m.primitive for m in caught.value.missing] == ["while"]


def interpolated(place):
    """Between the entries of a table, at learned places."""
    return map_coordinates(jnp.arange(5.0) ** 2, [place], order=1, mode="nearest")


@jax.custom_vjp
def answering(place):
    return interpolated(place)


answering.defvjp(lambda place: jax.vjp(interpolated, place), lambda back, cotangent: back(cotangent))


@pytest.mark.usefixtures("full_precision")
def test_positions_rounded_from_unknowns_say_so_and_the_remedy_works():
    def loss(p, function):
        return cross_entropy(jax.vmap(function)(2 + jnp.tanh(X @ p["a"])) @ p["d"], Y).mean()

    with pytest.raises(UnsupportedPrimitiveError, match="'gather' at .*, which reads what floor makes") as caught:
        eqxproj.filter_value_and_displacement(loss)(MODEL, interpolated)
    assert "custom_vjp" in str(caught.value)
    _, moved = eqxproj.filter_value_and_displacement(loss)(MODEL, answering)
    wanted = jax.grad(loss)(MODEL, interpolated)
    np.testing.assert_allclose(moved["a"], wanted["a"], rtol=1e-4, atol=1e-5)
    assert np.any(wanted["a"] != 0)


def test_unsupported_is_not_implemented():
    with pytest.raises(NotImplementedError) as caught:
        problem(loss=two_unsupported)
    first, second = caught.value.missing
    assert UnsupportedPrimitiveError([first, second, first]).missing == (first, second)


# What goes wrong while training.


def test_non_finite_error_fields():
    error = NonFiniteError("2 (exp, operation) at f.py:3", 7, "model", "history")
    assert isinstance(error, FloatingPointError)
    assert (error.node, error.step, error.model, error.history) == (
        "2 (exp, operation) at f.py:3",
        7,
        "model",
        "history",
    )
    assert "step 7" in str(error) and "f.py:3" in str(error)


def assert_finite(model):
    assert all(bool(jnp.all(jnp.isfinite(w))) for w in jax.tree_util.tree_leaves(model))


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_divergence_stops_with_the_last_good_model(method):
    """The updates overflow after a few steps; the error has the model of the step before."""
    with pytest.raises(NonFiniteError) as caught:
        train(loss=optax_loss, optimizer=optax.sgd(1e30), steps=12, eval_every=4, eval_data=(X, Y), method=method)
    error = caught.value
    assert 0 <= error.step < 12
    assert_finite(error.model)
    assert error.history["step"][0] == 0 and error.history["step"][-1] <= error.step
    assert np.isfinite(error.history["eval_loss"][0])
    assert jax.tree_util.tree_structure(error.model) == jax.tree_util.tree_structure(MODEL)


def growing(optimizer_step):
    """An optimizer that moves the one parameter by a fixed amount a step, whatever the displacement."""
    return optax.GradientTransformation(
        lambda p: (), lambda u, s, p=None: (jax.tree_util.tree_map(lambda x: jnp.full_like(x, optimizer_step), u), s)
    )


def test_overflow_is_at_the_step_and_node_where_it_happens():
    """exp(s) overflows at the third step: the model of the second is on the error, as it was."""

    def overflowing(p, x, y):
        return squared_error(jnp.exp((x * p["s"]).sum(-1)) * 1e-30, y).mean()

    x, y = np.ones((8, 1), np.float32), np.arange(8, dtype=np.int32)
    with pytest.raises(NonFiniteError) as caught:
        train(
            model={"s": jnp.zeros(1)}, data=(x, y), loss=lambda p, x, y: overflowing(p, x, y.astype(jnp.float32)),
            optimizer=growing(50.0), steps=6, batch_size=4,
        )  # fmt: skip
    error = caught.value
    assert error.step == 2
    np.testing.assert_allclose(error.model["s"], 100.0)
    assert "exp" in error.node and "(overflowing)" in error.node


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_interrupt_returns_model_and_history(stop):
    """A KeyboardInterrupt, here out of an evaluation, loses nothing."""

    def interrupt(self, known, *others):
        if known["step"] == stop:
            raise KeyboardInterrupt
        return record(self, known, *others)

    record = Evaluation.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "record", interrupt)
        with pytest.raises(TrainingInterrupted) as caught:
            train(steps=6, eval_every=2, eval_data=(X, Y), evaluate={"loss": loss})
    error = caught.value
    assert isinstance(error, KeyboardInterrupt)
    assert error.step == stop
    assert list(error.history["step"]) == list(range(0, stop, 2))
    assert len(error.history["eval_loss"]) == len(error.history["step"])
    moved = max(float(jnp.abs(error.model[k] - MODEL[k]).max()) for k in MODEL)
    assert (moved > 0) == (stop > 0)
    assert f"step {stop}" in str(error)


def test_interrupt_from_an_evaluation():
    """An evaluation is traced: it raises at its first call, after no step."""

    def evaluate(model, x, y):
        raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        train(eval_data=(X, Y), evaluate={"stop": evaluate})
    assert caught.value.step == 0
    assert eqx.tree_equal(caught.value.model, MODEL)
