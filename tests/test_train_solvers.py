"""`train(solver=X())`: what is chosen where nothing else is said, what is learned, and what is refused or warned of."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_solver import SOLVERS

import eqxproj
from eqxproj._program._trace import trace
from eqxproj._training._regime import PROJECTION_TAU, loosened, reach, settings, sweeps, tau
from eqxproj.losses import cross_entropy, squared_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = random(0, 12, 3)
Y = jnp.tanh(X @ jnp.array([1.0, -1.0, 0.5]))
MODEL = {"w": random(1, 3), "b": jnp.zeros(())}


def loss(model, x, y):
    return squared_error(x @ model["w"] + model["b"], y).mean()


def train(loss=loss, model=MODEL, data=(X, Y), steps=2, **options):
    return eqxproj.train(model, data, loss, steps=steps, **options)


def deep(model, x, y):
    """Two products one after another: the objective, they, and the first parameter are four nodes in a row."""
    return squared_error(x @ model[0] @ model[1], y).mean()


def branching(model, x, y):
    """A value with two readers."""
    h = jnp.tanh(x @ model["w"])
    return squared_error(h + jnp.tanh(h + model["b"]), y).mean()


# What is chosen.


def test_the_parameters_are_those_of_the_projection():
    """In every step, as `filter_displacement` and `solve` have them with the same settings."""
    solver = SOLVERS["DM"]
    trained = train(solver=solver, ema=0.0).model
    options = settings(solver)
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y, metric=options.metric, copies=options.copies)
    count, factor = sweeps(problem, solver), tau(problem, solver)
    assert count == 2 * reach(problem.graph) >= 2
    raw = eqxproj.filter_displacement(
        loss, solver=solver, steps=count, raw=True, metric=options.metric, copies=options.copies, tau=factor
    )
    stepped = solved = MODEL
    for _ in range(2):  # `train` takes all samples in each minibatch, whose order is of no matter
        stepped = jax.tree.map(jnp.subtract, stepped, raw(stepped, X, Y))
        problem = eqxproj.feasibility_problem(
            loss, solved, X, Y, metric=options.metric, copies=options.copies, tau=factor
        )
        solved = eqxproj.solve(problem, solver, steps=count).model
    for name in MODEL:
        np.testing.assert_allclose(trained[name], stepped[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(trained[name], solved[name], rtol=1e-4, atol=1e-5)
    assert not np.allclose(trained["w"], MODEL["w"], atol=1e-3)
    assert float(loss(trained, X, Y)) < float(loss(MODEL, X, Y))


def convolves(model, x, y):
    images = jnp.tanh(jax.lax.conv(x.reshape(-1, 1, 2, 2), model["kernel"], (1, 1), "SAME"))
    return squared_error(images.reshape(len(x), -1) @ model["w"], y).mean()


def blurs(model, x, y):
    """A kernel that is known is nothing to learn."""
    images = jax.lax.conv(x.reshape(-1, 1, 2, 2), jnp.ones((1, 1, 2, 2)), (1, 1), "SAME")
    return squared_error(images.reshape(len(x), -1) @ model["w"], y).mean()


def test_beside_convolutions_parameters_are_less_stiff():
    metric = eqxproj.Metric(2.0, 480.0)
    model = {"kernel": jnp.ones((2, 1, 2, 2)), "w": jnp.ones((8, 2))}
    batch = random(0, 3, 4), random(1, 3, 2)
    assert loosened(metric, trace(convolves, model, batch)) == eqxproj.Metric(2.0, 30.0)
    assert loosened(metric, trace(blurs, {"w": jnp.ones((4, 2))}, batch)) == metric
    assert loosened(metric, trace(lambda m, x, y: (x @ m["w"] - y).sum(), {"w": jnp.ones((4, 2))}, batch)) == metric


@pytest.mark.slow
def test_training_takes_the_metric_of_convolutions():
    """As with another metric, unless a metric is given; a loss without convolutions keeps its own."""
    rng = np.random.default_rng(0)
    model = {"kernel": jnp.asarray(rng.normal(size=(2, 1, 2, 2)), jnp.float32), "w": jnp.ones((8, 2)) / 4}
    x, y = (jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in (4, 2))

    def trained(loss, model, **options):
        options = {"steps": 1, "batch_size": 3, "solver": SOLVERS["AR"], **options}
        return eqxproj.train(model, (x, y), loss, key=jax.random.key(0), **options).model

    own = settings(SOLVERS["AR"]).metric
    loose = eqxproj.Metric(own.grade, own.parameter / 16)
    found = trained(convolves, model)
    assert eqx.tree_equal(found, trained(convolves, model, metric=loose))
    assert not np.allclose(found["kernel"], trained(convolves, model, metric=own)["kernel"], atol=1e-3)
    dense = {"w": jnp.eye(4)[:, :2]}
    plain = functools.partial(trained, lambda m, x, y: squared_error(x @ m["w"], y).mean(), dense)
    assert eqx.tree_equal(plain(), plain(metric=own))
    assert eqx.tree_equal(trained(blurs, dense), trained(blurs, dense, metric=own))


def test_the_model_is_an_average_of_projections():
    """Of one projection it is that one; later the newest of n counts 9/(n+8), of 1,000 and more a thousandth."""
    solver = SOLVERS["AR"]
    first, second, last = (train(solver=solver, steps=n, ema=0.0).model for n in (1, 2, 3))
    assert eqx.tree_equal(train(solver=solver, steps=1).model, first)
    two = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first, second)
    for name, x in jax.tree.map(lambda a, b: (2 * a + 9 * b) / 11, two, last).items():
        np.testing.assert_allclose(train(solver=solver, steps=3).model[name], x, rtol=1e-4, atol=1e-6)
    with_optimizer, plain = (train(solver=solver, optimizer=optax.sgd(0.1), **e).model for e in ({}, {"ema": 0.0}))
    assert eqx.tree_equal(with_optimizer, plain)


def test_tau_falls_with_the_square_of_the_depth_for_reflections_alone():
    def chain(model, x, y):
        for w in model:
            x = jnp.tanh(x @ w)
        return squared_error(x, y).mean()

    def found(solver, layers):
        x, model = jnp.ones((3, 4)), [jnp.eye(4)] * layers
        return tau(eqxproj.feasibility_problem(chain, model, x, x), solver)

    reflections = SOLVERS["AR"], eqxproj.DouglasRachford(1.0), eqxproj.RelaxedReflectReflect(2.0)
    for solver in reflections:
        assert found(solver, 1) == PROJECTION_TAU
        assert found(solver, 20) == pytest.approx(found(solver, 10) / 4, rel=0.15)
    for name in ("AP", "DR", "DM", "RRR", "CDR", "CP"):
        assert found(SOLVERS[name], 20) == PROJECTION_TAU


def test_an_optimizer_and_a_flat_metric():
    solver = SOLVERS["AP"]
    stays = train(solver=solver, optimizer=optax.sgd(0.0)).model
    assert eqx.tree_equal(stays, MODEL)
    moved = train(solver=solver, optimizer=optax.adam(0.01), steps=1).model
    for name in MODEL:  # the first step of Adam is its rate, whatever the displacement
        np.testing.assert_allclose(np.abs(moved[name] - MODEL[name]), 0.01, rtol=1e-3)
    flat = train(metric=eqxproj.Metric(1.0, 300.0), steps=1, solver=SOLVERS["CP"]).model
    by_adam = train(metric=eqxproj.Metric(1.0, 300.0), steps=1).model  # no solver: the optimizer takes the displacement
    assert not np.allclose(flat["w"], by_adam["w"], atol=1e-4)
    steep = train(steps=1).model
    also = train(steps=1, solver=SOLVERS["CP"]).model  # a cyclic sweep alone is the gradient regime
    assert eqx.tree_equal(steep, also)
    assert not np.allclose(flat["w"], steep["w"], atol=1e-4)
    two_colors = train(steps=1, solver=SOLVERS["AP"], metric=eqxproj.Metric(1e6, 1e4)).model  # and no warning
    assert bool(jnp.all(two_colors["w"] != MODEL["w"]))


def test_few_sweeps_are_warned_of():
    model, data = [jnp.eye(3), jnp.eye(3)], (X, jnp.ones((12, 3)))
    problem = eqxproj.feasibility_problem(deep, model, *data, copies="none")
    needed = reach(problem.graph)
    assert needed == 2
    text = rf"`solver_steps=1` does not reach all layers: a step of AlternatingProjections.*Take at least {needed}"
    with pytest.warns(UserWarning, match=text):
        train(deep, model, data, steps=1, solver=SOLVERS["AP"], solver_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(deep, model, data, steps=1, solver=SOLVERS["AP"], solver_steps=needed)


@pytest.mark.parametrize("solver_steps", [1, 2])
def test_so_many_sweeps_reach_the_first_layer(solver_steps):
    """The number that the warning asks for is the least with which the farthest parameter moves."""
    model = [jnp.eye(3), 0.5 * jnp.eye(3)]
    problem = eqxproj.feasibility_problem(deep, model, X, jnp.ones((12, 3)), copies="none")
    raw = eqxproj.filter_displacement(deep, solver=SOLVERS["AP"], steps=solver_steps, raw=True, copies="none")
    moved = raw(model, X, jnp.ones((12, 3)))
    assert reach(problem.graph) == 2
    assert bool(jnp.any(moved[0] != 0)) == (solver_steps >= 2)


@pytest.mark.parametrize("name", ["AR", "DR", "DM"])
def test_copies_that_branch_want_a_flat_metric(name):
    for metric in (eqxproj.Metric(1e6, 1e4), eqxproj.Metric(100.0, 1.0)):
        with pytest.raises(ValueError, match="reflects projections, but in the gradient regime, where `metric` is"):
            train(branching, solver=SOLVERS[name], metric=metric)
        problem = eqxproj.feasibility_problem(branching, MODEL, X, Y, metric=metric)
        with pytest.raises(ValueError, match="where values have several readers, its duals would grow"):
            eqxproj.solve(problem, SOLVERS[name], steps=1)


# What is learned.


def test_a_line_is_learned():
    first = float(loss(MODEL, X, Y))
    result = train(steps=500, solver=SOLVERS["RRR"])
    assert float(loss(result.model, X, Y)) < 0.2 * first


@pytest.fixture(scope="module")
def digits():
    return eqxproj.datasets.load("digits").flatten()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_digits_are_learned(digits, name):
    def classify(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y).mean()

    def accuracy(model, x, y):
        return (jax.vmap(model)(x).argmax(-1) == y).mean()

    result = eqxproj.train(
        eqx.nn.MLP(64, 10, 32, 1, key=jax.random.key(0)),
        digits.train,
        classify,
        steps=40,
        batch_size=64,
        solver=SOLVERS[name],
        eval_data=digits.test,
        evaluate={"accuracy": accuracy},
        eval_every=40,
    )
    start, end = result.history["eval_accuracy"]
    assert start < 0.3
    assert end > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("grade", [0.3, 3.0])
@pytest.mark.parametrize("name", ["DR", "DM"])
def test_duals_stay_bounded_where_values_branch(name, grade):
    problem = eqxproj.feasibility_problem(branching, MODEL, X, Y, metric=eqxproj.Metric(grade, 10.0))
    assert any(len(edges) > 1 for edges in problem.graph.readers)
    sizes = []
    state = "forward"
    for _ in range(6):
        state = eqxproj.solve(problem, SOLVERS[name], steps=50, every=50, start=state).state
        sizes.append(max(float(jnp.abs(d).max()) for d in state.duals if d is not None))
    assert np.isfinite(sizes).all()
    assert sizes[-1] <= 2.0 * max(sizes[:2])
