"""What training takes: two constraints on one array, layers of no width, divided arrays, modes of JAX, any scale."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import eqxproj
from eqxproj import sets
from eqxproj._training._data import batches

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype(np.float32)
Y = (np.arange(24) % 3).astype(np.int32)
MODEL = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))


def loss(model, x, y):
    return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()


def train(model=MODEL, data=(X, Y), loss=loss, steps=3, **options):
    return eqxproj.train(model, data, loss, steps=steps, **options)


# Two constraints on one array.


def nearest_by_scipy(x, inequalities, equalities=()):
    """The nearest point of a convex set that scipy finds from its inequalities $g(y) >= 0$."""
    rules = [{"type": "ineq", "fun": g} for g in inequalities] + [{"type": "eq", "fun": g} for g in equalities]
    found = minimize(
        lambda y: 0.5 * np.sum((y - x) ** 2), np.full(x.size, 0.2), jac=lambda y: y - x, constraints=rules,
        method="SLSQP", options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert found.success or found.status == 8  # 8: no step of the line search is worth rounding any more
    return found.x


def between(low, high):
    return [lambda y: y - low, lambda y: high - y]


CONVEX = {
    "box, ball": ((sets.Box(-0.3, 0.5), sets.L2Ball(0.7)), [*between(-0.3, 0.5), lambda y: 0.49 - y @ y], []),
    "simplex, box": ((sets.Simplex(axis=None), sets.Box(0.0, 0.3)), between(0.0, 0.3), [lambda y: y.sum() - 1]),
    "increasing, ball": ((sets.Monotone(), sets.L2Ball(0.5)), [np.diff, lambda y: 0.25 - y @ y], []),
    "non-negative, increasing, box": (
        (sets.NonNegative(), sets.Monotone(), sets.Box(-1.0, 0.4)),
        [lambda y: y, np.diff, lambda y: 0.4 - y],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVEX)
def test_the_nearest_common_point_of_convex_sets(name):
    chosen, inequalities, equalities = CONVEX[name]
    constraints = [(lambda m: m, s) for s in chosen]
    for _ in range(3):
        x = RNG.normal(size=6)
        start = jnp.asarray(x, jnp.float32)
        found = eqxproj.apply_constraints(start, constraints)
        np.testing.assert_allclose(found, nearest_by_scipy(x, inequalities, equalities), atol=2e-4)
        for s in chosen:
            np.testing.assert_allclose(s(found), found, atol=1e-6)


W = jax.random.normal(jax.random.key(0), (3, 4))
MEETING = {
    "sphere, box": (sets.Sphere(1.0), sets.Box(-0.3, 0.3)),
    "few entries, orthogonal": (sets.Sparse(k=5), sets.Orthogonal()),
    "orthogonal, few entries": (sets.Orthogonal(), sets.Sparse(k=5)),
    "few entries, ball": (sets.Sparse(k=3), sets.L2Ball(0.5)),
    "levels, few entries": (sets.Quantized([-1.0, 0.0, 1.0]), sets.Sparse(k=4)),
    "box, ball": (sets.Box(-0.3, 0.3), sets.L2Ball(0.5)),
    "rank, non-negative": (sets.LowRank(1), sets.NonNegative()),
}


def linear(w, x, y):
    return jnp.mean(eqxproj.losses.cross_entropy(x @ w.T, y))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEETING)
def test_a_trained_array_is_in_both_of_its_sets(name):
    result = train(W, loss=linear, steps=15, constraints=[(lambda w: w, s) for s in MEETING[name]])
    assert float(jnp.max(jnp.abs(result.model))) > 0
    for s in MEETING[name]:
        np.testing.assert_allclose(s(result.model), result.model, atol=2e-5)


def test_constraints_that_overlap_in_one_array():
    """One picks both weights and one the first of them, in half precision."""
    model = {"a": W.astype(jnp.bfloat16), "b": W}
    constraints = [(lambda m: [m["a"], m["b"]], sets.Box(-0.3, 0.3)), (lambda m: m["a"], sets.L2Ball(0.5))]
    found = eqxproj.apply_constraints(model, constraints)
    assert float(jnp.linalg.norm(found["a"].astype(jnp.float32))) <= 0.5
    assert float(jnp.max(jnp.abs(found["a"]))) <= 0.3
    np.testing.assert_array_equal(found["b"], np.clip(W, -0.3, 0.3))


def test_sets_that_do_not_meet_are_said_before_training(monkeypatch):
    monkeypatch.setattr("eqxproj._training._train.Loop", None)
    for pair in (
        (sets.Box(1.0, 2.0), sets.NonNegative(), sets.Box(-2.0, 0.5)),
        (sets.Sparse(k=2), sets.Quantized([-1.0, 1.0])),
    ):
        with pytest.raises(ValueError, match=r"`constraints\[0\]`.*`constraints\[1\]`.*no value was found"):
            train(W, loss=linear, constraints=[(lambda w: w, s) for s in pair])


# Data and models at the edge.


@pytest.mark.parametrize("width, depth", [(0, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_layers_of_no_width_train_as_by_gradients(width, depth, method):
    model, y = eqx.nn.MLP(4, 3, width, depth, key=jax.random.key(0)), np.ones((24, 3), np.float32)

    def squares(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    result = train(model, (X, y), squares, optimizer=optax.sgd(0.1), method=method)
    wanted = model
    for _ in range(3):
        wanted = eqx.apply_updates(wanted, jax.tree.map(lambda g: -0.1 * g, eqx.filter_grad(squares)(wanted, X, y)))
    found, wanted = (jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (result.model, wanted))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert np.isfinite(train(model, (X, y), squares).history["loss"][-1])


@pytest.mark.parametrize("count, size", [(10, 7), (10, 9), (10, 10), (7, 3), (5, 4)])
def test_no_batch_holds_a_sample_twice(count, size):
    stream = batches(count, size, jax.random.key(1))
    rows = [next(stream) for _ in range(40)]
    assert all(len(set(r.tolist())) == size for r in rows)
    seen = np.concatenate(rows)[: 4 * count].reshape(4, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in seen)


@pytest.mark.parametrize("big", [1e38, 3e38, 1e-30])
def test_spheres_and_balls_at_any_scale(big):
    x = np.float32(big) * np.asarray([[1.0, -0.5, 0.25], [0.5, 1.0, 1.0]], np.float32)
    wide = x.astype(np.float64)
    for axis in (None, -1):
        norm = np.sqrt(np.sum(wide**2, axis=axis, keepdims=True))
        np.testing.assert_allclose(sets.Sphere(2.0, axis=axis)(jnp.asarray(x)), 2 * wide / norm, rtol=1e-5)
        np.testing.assert_allclose(
            sets.L2Ball(2.0, axis=axis)(jnp.asarray(x)), wide * np.minimum(1, 2 / norm), rtol=1e-5
        )
    u, s, v = np.linalg.svd(wide / big, full_matrices=False)
    np.testing.assert_allclose(
        np.asarray(sets.LowRank(1)(jnp.asarray(x)), np.float64) / big, s[0] * u[:, :1] * v[:1], rtol=1e-4
    )
    np.testing.assert_allclose(sets.Orthogonal()(jnp.asarray(x)), u @ v, atol=1e-5)
    scaled = sets.Monotone()(jnp.asarray(wide / big, jnp.float32))
    np.testing.assert_allclose(np.asarray(sets.Monotone()(jnp.asarray(x)), np.float64) / big, scaled, rtol=1e-5)


def test_a_projection_of_nan_under_jit():
    def back(target):
        return eqxproj.projection(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 2)), steps=2)[1](target)

    with pytest.raises(Exception, match="`target` holds NaN"):
        jax.block_until_ready(eqx.filter_jit(back)(jnp.full((2, 2), jnp.nan)))


# What happens in training.


def test_a_metric_that_raises_later_leaves_the_model():
    calls = []

    def count(value):
        calls.append(value)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return np.float32(value)

    def metric(model, x, y):
        return jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), loss(model, x, y))

    with pytest.raises(
        eqxproj.EvaluationError, match=r"`evaluate\['calls'\]` raised .*: RuntimeError: no more\."
    ) as caught:
        train(steps=4, eval_every=1, eval_data=(X, Y), evaluate={"calls": metric}, method="gradient")
    error = caught.value
    assert error.step == 2 and list(error.history["step"]) == [0, 1]
    assert not eqx.tree_equal(eqx.filter(error.model, eqx.is_array), eqx.filter(MODEL, eqx.is_array))
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.step, str(again)) == (error.name, error.step, str(error))


def test_a_metric_may_be_nan():
    result = train(eval_data=(X, Y), evaluate={"nan": lambda m, x, y: jnp.nan * x.sum()}, method="gradient", steps=1)
    assert np.isnan(result.history["eval_nan"]).all()


@pytest.mark.parametrize(
    "error",
    [
        eqxproj.NonFiniteError("node", 1, MODEL, {"loss": np.ones(2)}),
        eqxproj.TrainingInterrupted(3, {"w": np.ones(2), "f": lambda x: x}, {}),
        eqxproj.EvaluationError("a", "raised.", 3, {"w": np.ones(2)}, {}),
        eqxproj.ConstraintError("`constraints[0]`", {"w": np.ones(2)}, {}),
        eqxproj.NonFiniteError("node", 0, np.ones(2)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    arrays = [x for x in jax.tree.leaves(error.model) if eqx.is_array(x)]
    kept = [x for x in jax.tree.leaves(again.model) if eqx.is_array(x)]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True))


@pytest.mark.parametrize("steps", [3, 4])
def test_sharpness_aware_minimization(steps):
    """As the hand-written loop over gradients, on full batches."""
    sam = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    got = train(steps=steps, batch_size=24, optimizer=sam).model
    params, static = eqx.partition(MODEL, eqx.is_inexact_array)
    state = sam.init(params)
    for _ in range(steps):
        gradient = eqx.filter_grad(loss)(eqx.combine(params, static), X, Y)
        updates, state = sam.update(gradient, state, params)
        params = eqx.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(eqx.filter(got, eqx.is_inexact_array)), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_what_is_printed_fits_on_a_screen():
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y)
    solution = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=2)
    for shown in map(repr, (problem, solution, solution.state, train(method="gradient"))):
        assert len(shown) < 600 and shown.count("\n") < 10
    assert "40 nodes" not in repr(problem) and f"{len(problem.graph.nodes)} nodes" in repr(problem)


# Modes of JAX, and devices.


def strictly(call):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return call()


@pytest.mark.slow
@pytest.mark.usefixtures("full_precision")
def test_the_strict_modes_change_nothing():
    def own(model, x, y):
        h = jnp.tanh(jax.vmap(model)(x))
        return jnp.mean(eqxproj.losses.hinge(h, y)) + jnp.mean(eqxproj.losses.margin(h, y))

    for function in (loss, own):
        found = strictly(lambda f=function: eqxproj.filter_displacement(f)(MODEL, X, Y))
        wanted = eqx.filter_grad(function)(MODEL, X, Y)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    both = [(lambda m: m.layers[0].weight, s) for s in (sets.NonNegative(), sets.L2Ball())]
    a, b = strictly(lambda: train(steps=2, constraints=both)), train(steps=2, constraints=both)
    np.testing.assert_array_equal(a.history["loss"], b.history["loss"])
    half = jnp.ones((3, 4), jnp.bfloat16)
    for s in (sets.Sphere(), sets.Orthogonal(), sets.Monotone(), sets.Quantized(2, scale="learned"), sets.Sparse(0.5)):
        np.testing.assert_array_equal(strictly(lambda s=s: s(half)), s(half))

    def mixed(model, x, y):
        return loss(model, x, y) + jnp.sum(x * y[:, None])

    with pytest.raises(Exception, match="strict"):  # the user's own code is checked still
        strictly(lambda: eqxproj.filter_displacement(mixed)(MODEL, X, Y))
