"""`train(persist=True)`: each visit of a minibatch goes on from the state that the solver left there."""

import dataclasses
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_solver import SOLVERS

import eqxproj
from eqxproj._training import _train
from eqxproj._training._data import same_batches
from eqxproj._training._persistence import left_by
from eqxproj._training._regime import sweeps
from eqxproj.losses import cross_entropy, squared_error
from eqxproj.rules._base import EXACT

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
METRIC = eqxproj.Metric(1.0, 20.0)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = random(0, 11, 3), random(1, 11)
MODEL = {"first": random(2, 3, 5), "b": random(3, 5), "last": random(4, 5)}


def loss(model, x, y):
    """With a bias that is squared first: a value that depends on parameters alone."""
    return squared_error(jnp.tanh(x @ model["first"] + model["b"] ** 2) @ model["last"], y).mean()


def train(solver="DR", loss=loss, data=(X, Y), **options):
    options = {"steps": 7, "batch_size": 4, "key": KEY, "metric": METRIC, "ema": 0.0, **options}
    return eqxproj.train(MODEL, data, loss, solver=SOLVERS[solver], **options)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("name", ["DR", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DM", "RRR", "CDR"))])
def test_it_goes_on_from_the_state_of_the_minibatch(name, monkeypatch):
    """As `solve` does from its own states, in which all that has no axis of samples is set back."""
    monkeypatch.setattr(_train, "ROUGH", EXACT)
    trained = train(name, persist=True, solver_steps=2, tau=2.0, copies="none").model
    rows, states, model = same_batches(11, 4, KEY), [None] * 3, MODEL
    for step in range(7):
        batch = next(rows)
        problem = eqxproj.feasibility_problem(loss, model, X[batch], Y[batch], metric=METRIC, tau=2.0, copies="none")
        graph, state = problem.graph, states[step % 3]
        start = None
        if state is not None:
            fresh = SOLVERS[name].init(problem)
            of_data = [variable.shape[:1] == (4,) for variable in graph.values]
            values = zip(of_data, state.values, fresh.values, strict=True)
            duals = zip(graph.edges, state.duals, strict=True)
            start = dataclasses.replace(
                state,
                values=tuple(old if keep else new for keep, old, new in values),
                shifts=tuple(None if x is None else jnp.zeros_like(x) for x in state.shifts),
                duals=tuple(
                    None if d is None else d if any(of_data[v] for v in e.sources) else jnp.zeros_like(d)
                    for e, d in duals
                ),
            )
        solution = eqxproj.solve(
            problem, SOLVERS[name], steps=2, every=2, **({} if start is None else {"start": start})
        )
        states[step % 3], model = solution.state, solution.model
    for name in MODEL:
        np.testing.assert_allclose(trained[name], model[name], rtol=1e-3, atol=1e-4)
        assert not np.allclose(trained[name], MODEL[name], atol=1e-2)


def test_what_depends_on_parameters_alone_starts_anew():
    problem = eqxproj.feasibility_problem(loss, MODEL, X[:4], Y[:4], metric=METRIC, copies="none")
    state = eqxproj.solve(problem, SOLVERS["DR"], steps=2, every=2).state
    left = left_by(problem, state)
    kept = {variable.shape for variable, x in zip(problem.graph.values, left.values, strict=True) if x is not None}
    assert kept == {(4,), (4, 5)}
    for edge, dual in zip(problem.graph.edges, left.duals, strict=True):  # the bias is shown with an axis of samples
        assert (dual is None) == (problem.graph.values[edge.sources[0]].shape[:1] != (4,))


def test_minibatches_stay_the_same_and_hold_all_samples():
    rows = same_batches(11, 4, KEY)
    first, second = ([next(rows) for _ in range(3)] for _ in range(2))
    assert same(first, second)
    counts = np.bincount(np.concatenate(first), minlength=11)
    assert counts.sum() == 12 and sorted(counts)[:10] == [1] * 10
    assert not same(first, [next(same_batches(11, 4, jax.random.key(4)))] * 3)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole = train(persist=True, steps=7)
    train(persist=True, steps=4, checkpoint=tmp_path)
    assert same(train(persist=True, steps=7, resume=tmp_path).model, whole.model)
    with pytest.raises(ValueError, match="it holds left.values"):
        train(persist=False, steps=7, resume=tmp_path)


def test_a_data_set_has_the_same_minibatches():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": np.asarray(X).tolist(), "y": np.asarray(Y).tolist()})
    found = train(persist=True, data=table, columns=("x", "y")).model
    for name, x in train(persist=True).model.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


def one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def test_fewer_sweeps_are_made(untyped):
    """A fifth of them, at least one."""
    for name, far, often, seldom in (("DR", 7, 8, 1), ("DM", 19, 20, 4), ("CDR", 19, 4, 1)):
        problem = SimpleNamespace(graph=SimpleNamespace(distance=[0, far]))
        assert [sweeps(problem, SOLVERS[name], flag) for flag in (False, True)] == [often, seldom]


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": None}, "projection regime"),
        ({"method": "gradient"}, "projection regime"),
        ({"metric": eqxproj.Metric(1e18, 1e4), "solver": eqxproj.RelaxedReflectReflect()}, "projection regime"),
        ({"solver": eqxproj.AlternatingProjections()}, "got AlternatingProjections"),
        ({"solver": eqxproj.AlternatingReflections()}, "got AlternatingReflections"),
        ({"solver": eqxproj.DouglasRachford(1.0)}, "comes to rest"),
        ({"data": [(X, Y), (X, Y)].__iter__(), "batch_size": None}, "in place of an iterable"),
        ({"loss": lambda model, x, y, key: loss(model, x, y)}, "`loss` draws new random numbers"),
        ({"transform": lambda x, y, key: (x, y)}, "`transform` draws new random numbers"),
        ({"accumulate": 2}, "leave `accumulate` out"),
        ({"sharding": one_device()}, "leave `sharding` out"),
    ],
)
def test_what_cannot_persist_is_refused(options, words):
    options = {"solver": SOLVERS["DR"], "loss": loss, "data": (X, Y), "batch_size": 4, **options}
    with pytest.raises(ValueError, match=f"`persist=True` needs .*{words}"):
        eqxproj.train(MODEL, options.pop("data"), options.pop("loss"), steps=3, persist=True, **options)


@pytest.mark.parametrize("value", [1, "yes", np.True_])
def test_no_flag_is_refused(value, untyped):
    with pytest.raises(TypeError, match="`persist` must be `True` or `False`"):
        train(persist=value)


def test_a_state_that_is_not_finite_names_its_node():
    """On the second visit of a minibatch, the state of which is finite on the first."""

    def breaks(model, x, y):
        h = x @ model["first"] + model["b"]
        return loss(model, x, y) + jnp.where(jnp.abs(model["b"] - MODEL["b"]).sum() > 0.01, jnp.inf, 0.0) * h.sum()

    with pytest.raises(eqxproj.NonFiniteError) as error:
        train(loss=breaks, persist=True)
    assert error.value.step >= 1
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(error.value.model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DR", "DM", "RRR"])
def test_one_sweep_learns_digits(name):
    """With states that persist as well as with eight sweeps, without them far worse."""
    data = eqxproj.datasets.load("digits").flatten()
    model = eqx.nn.MLP(64, 10, 128, 2, key=jax.random.key(0))

    def classification(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y).mean()

    def accuracy(**options):
        found = eqxproj.train(model, data.train, classification, steps=200, solver=SOLVERS[name], **options).model
        return float(jnp.mean(jnp.argmax(jax.vmap(found)(data.test[0]), -1) == data.test[1]))

    assert accuracy(persist=True) > 0.94
    with pytest.warns(UserWarning, match="does not reach all layers"):
        assert accuracy(solver_steps=1) < 0.8
