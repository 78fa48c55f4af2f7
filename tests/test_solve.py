"""`solve`: the same under every transformation, its measures, results, errors, and what it compiles and keeps."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from every_solver import SOLVERS

import eqxproj
from eqxproj._graph._graph import Graph
from eqxproj._program import _compiled
from eqxproj.losses import equal
from eqxproj.sets import Box, NonNegative, Sphere
from eqxproj.solvers import _iterate

RESULTS, AP = eqxproj.RESULTS, eqxproj.AlternatingProjections()
pytestmark = pytest.mark.usefixtures("quick_compilation")


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = random(0, 3, 2)
Y = X @ jnp.array([1.0, -2.0]) + 0.5
MODEL = {"w": jnp.ones(2), "b": jnp.zeros(()), "name": "line"}


def line(model, x, y):
    return jnp.sum(equal(x @ model["w"] + model["b"], y))


@pytest.fixture(scope="module")
def problem():
    return eqxproj.feasibility_problem(line, MODEL, X, Y)


def assert_same(got, want, rtol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, want)


# ----------------------------------------------------------------------------------------------------------------------
# Under transformations
# ----------------------------------------------------------------------------------------------------------------------


def test_it_is_the_same_inside_of_a_jit(problem):
    outside = eqxproj.solve(problem, AP, steps=7, every=3)
    assert outside.stats["steps"] == 7
    np.testing.assert_array_equal(outside.stats["step"], [3, 6, 7])
    assert outside.result == RESULTS.step_limit
    inside = eqx.filter_jit(lambda p, tol: eqxproj.solve(p, AP, steps=7, every=3, tol=tol))(problem, 0.0)
    assert_same(eqx.filter(inside.model, eqx.is_array), eqx.filter(outside.model, eqx.is_array))
    assert_same(inside.state, outside.state)
    assert inside.model["name"] == "line"
    assert inside.result == RESULTS.step_limit
    for name in ("steps", "step", "change", "gap", "violation"):
        np.testing.assert_allclose(inside.stats[name], outside.stats[name], rtol=1e-5)

    @jax.jit
    def made_inside(w, x, y):
        made = eqxproj.feasibility_problem(line, {**MODEL, "w": w}, x, y)
        found = eqxproj.solve(made, AP, steps=7, every=3)
        return found.state, found.stats["gap"], found.result == RESULTS.step_limit

    state, gap, is_limit = made_inside(MODEL["w"], X, Y)
    assert is_limit
    assert_same(state, outside.state)
    np.testing.assert_allclose(gap, outside.stats["gap"], rtol=1e-5)


def test_restarts_over_keys(problem):
    keys = jax.random.split(jax.random.key(1), 3)

    def run(key):
        found = eqxproj.solve(problem, AP, steps=40, every=4, tol=0.05, start="random", key=key)
        return found.model["w"], found.stats, found.result

    w, stats, result = jax.vmap(run)(keys)
    assert (result == RESULTS.converged).shape == (3,)
    for i, key in enumerate(keys):
        one = eqxproj.solve(problem, AP, steps=40, every=4, tol=0.05, start="random", key=key)
        assert (result == RESULTS.converged)[i] == (one.result == RESULTS.converged)
        np.testing.assert_allclose(w[i], one.model["w"], rtol=1e-4)
        count = len(one.stats["step"])
        assert stats["steps"][i] == one.stats["steps"]
        for name in ("step", "change", "gap", "violation"):
            np.testing.assert_allclose(stats[name][i, :count], one.stats[name], rtol=1e-3)
        assert np.all(stats["step"][i, count:] == -1)
        assert np.isnan(stats["gap"][i, count:]).all()
    assert len(np.unique(np.asarray(w), axis=0)) == 3  # other keys, other starts


def test_it_goes_on_exactly_also_in_a_scan(problem):
    whole = eqxproj.solve(problem, AP, steps=20, every=4)
    half = eqxproj.solve(problem, AP, steps=10, every=4)
    rest = eqxproj.solve(problem, AP, steps=10, every=4, start=half.state)
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)
    np.testing.assert_array_equal(rest.model["w"], whole.model["w"])

    def body(state, _):
        found = eqxproj.solve(problem, AP, steps=2, start=state)
        return found.state, (found.stats["gap"], found.result)

    start = eqxproj.solve(problem, AP, steps=10).state
    state, (gap, result) = jax.jit(lambda state: jax.lax.scan(body, state, None, 5))(start)
    assert_same(state, whole.state)
    assert gap.shape == (5, 2)
    assert np.all(result == RESULTS.step_limit)


def test_callback_and_progress_are_not_for_a_jit(problem):
    for options in ({"progress": True}, {"callback": lambda step, report: None}):
        with pytest.raises(ValueError, match="`progress` and `callback` work outside of `jit` and `vmap` alone"):
            eqx.filter_jit(lambda p, o=options: eqxproj.solve(p, AP, steps=2, **o))(problem)


# ----------------------------------------------------------------------------------------------------------------------
# Measures and results
# ----------------------------------------------------------------------------------------------------------------------


def test_tol_is_of_change_or_violation(problem):
    free = eqxproj.solve(problem, AP, steps=60).stats
    least = np.minimum(free["change"], free["violation"])
    first = int(np.argmax(least <= 0.02)) + 1
    assert 1 < first < 60
    found = eqxproj.solve(problem, AP, steps=60, tol=0.02)
    assert (found.result == RESULTS.converged, found.stats["steps"]) == (True, first)
    assert "result=converged" in repr(found)
    rare = eqxproj.solve(problem, AP, steps=60, tol=0.02, every=50)
    assert (rare.stats["steps"], list(rare.stats["step"])) == (50, [50])
    seldom = eqxproj.solve(problem, AP, steps=60, tol=1e9, every=100)  # a larger `every` than steps
    assert (seldom.stats["steps"], seldom.result == RESULTS.converged) == (60, True)


@pytest.mark.parametrize(
    ("solver", "scale"),
    [
        (eqxproj.DouglasRachford(0.25), 0.5),
        (eqxproj.DifferenceMap(1.0), 1.0),
        (eqxproj.RelaxedReflectReflect(0.4), 0.4),
    ],
)
def test_tol_is_of_the_gap(problem, solver, scale):
    free = eqxproj.solve(problem, solver, steps=40)
    assert np.all(free.stats["violation"] > 0.05)  # which is no measure of these solvers
    tol = float(free.stats["gap"][-3])
    first = int(np.argmax(free.stats["gap"] <= tol)) + 1
    found = eqxproj.solve(problem, solver, steps=40, tol=tol)
    assert (found.result == RESULTS.converged, found.stats["steps"]) == (True, first)
    # The gap, from the duals by hand: the moves of all copies in the last step, over the elements of all outputs.
    last, before = found.state, eqxproj.solve(problem, solver, steps=first - 1).state
    copies = [[eqxproj.readers.operand(problem, s, e) for e in range(len(problem.graph.edges))] for s in (last, before)]
    moved = sum(float(np.sum(np.square(np.asarray(a) - np.asarray(b)))) for a, b in zip(*copies, strict=True))
    nodes = [n for n in problem.graph.nodes if n.kind in ("operation", "identity", "objective")]
    outputs = sum(int(np.prod(problem.graph.values[v].shape)) for n in nodes for v in n.outputs)
    assert found.stats["gap"][-1] == pytest.approx(np.sqrt(moved / outputs) / scale, rel=1e-3)


def test_results_are_told_apart(problem):
    found = eqxproj.solve(problem, AP, steps=1)
    assert found.result != RESULTS.converged
    assert "result=step_limit, steps=1" in repr(found)
    assert len({str(RESULTS[getattr(RESULTS, n)]) for n in ("step_limit", "converged", "non_finite", "stopped")}) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Where it starts
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_starts(problem, untyped):
    other = eqxproj.feasibility_problem(line, {**MODEL, "w": jnp.ones(3)}, random(1, 3, 3), Y)
    key, state = jax.random.key(0), eqxproj.DouglasRachford().init(problem)
    bad = [
        ({"start": "random"}, ValueError, '`start="random"` needs a `key`'),
        ({"start": "random", "key": jax.random.split(key, 3)}, ValueError, "got 3 of them"),
        ({"start": "random", "key": 3}, TypeError, "`key` must be one PRNG key"),
        ({"start": "backward"}, ValueError, "`start` must be .*, got 'backward'"),
        ({"start": None}, ValueError, "`start` must be .*, got None"),
        ({"start": jnp.ones(2)}, ValueError, "`start` must be"),
        ({"start": state}, ValueError, "`start` is a state of another problem, or of another solver"),
        ({"start": AP.init(other, key)}, ValueError, "`start` is a state of another problem"),
    ]
    for options, error, match in bad:
        with pytest.raises(error, match=match):
            eqxproj.solve(problem, AP, steps=1, **options)
    made = eqxproj.feasibility_problem(line, MODEL, X, Y, concurrence=True)
    plain, weighted = eqxproj.RelaxedReflectReflect(0.5), eqxproj.RelaxedReflectReflect(0.5, reweight=0.1)
    for first, second in ((plain, weighted), (weighted, plain)):
        with pytest.raises(ValueError, match="`start` is a state of another problem"):
            eqxproj.solve(made, second, steps=1, start=first.init(made))


def test_random_copies_are_uniform(problem):
    state = eqxproj.DouglasRachford().init(problem, jax.random.key(3))
    copies = [np.ravel(eqxproj.readers.operand(problem, state, e)) for e in range(len(problem.graph.edges))]
    drawn = np.concatenate(copies)
    assert np.all(np.abs(drawn) <= 1)
    assert len(np.unique(drawn)) == drawn.size
    again = eqxproj.DouglasRachford().init(problem, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, again, state)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong, and what is asked for between the steps
# ----------------------------------------------------------------------------------------------------------------------


@eqxproj.custom_projection
def counter(x):
    return 1.0 * x


@counter.def_projection
def _(ctx, inputs, target):
    (x,) = inputs
    return jnp.where(x > 3.5, jnp.nan, x + 1.0)


def counted(model, y):
    return jnp.sum(equal(counter(model["w"]), y))


@pytest.fixture(scope="module")
def counting():
    """A problem whose parameter goes up until it is NaN."""
    return eqxproj.feasibility_problem(counted, {"w": jnp.zeros(2)}, jnp.full(2, 9.0))


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_not_finite(counting, every):
    good, states = 0, []
    while True:  # how many steps are good, one by one
        try:
            states.append(eqxproj.solve(counting, AP, steps=good + 1))
        except eqxproj.NonFiniteError:
            break
        good += 1
    assert good > 2
    with pytest.raises(eqxproj.NonFiniteError) as caught:
        eqxproj.solve(counting, AP, steps=20, every=every)
    assert caught.value.step == good
    assert "custom_projection, operation) at test_solve.py" in caught.value.node
    np.testing.assert_array_equal(caught.value.model["w"], states[-1].model["w"])
    inside = eqx.filter_jit(lambda p: eqxproj.solve(p, AP, steps=20, every=every))(counting)
    assert inside.result == RESULTS.non_finite
    assert "result=non_finite" in repr(inside)
    kept = good // every * every
    assert inside.stats["steps"] == kept
    jax.tree.map(np.testing.assert_array_equal, inside.state, states[kept - 1].state)
    np.testing.assert_array_equal(inside.model["w"], states[kept - 1].model["w"])


def test_not_finite_from_the_start():
    def bad():
        return eqxproj.feasibility_problem(line, {**MODEL, "w": jnp.array([1.0, jnp.nan])}, X, Y)

    with pytest.raises(eqxproj.NonFiniteError, match="at step 0") as caught:
        eqxproj.solve(bad(), AP, steps=3)
    assert caught.value.step == 0
    found = eqx.filter_jit(lambda p: eqxproj.solve(p, AP, steps=3, every=2))(bad())
    assert (found.result == RESULTS.non_finite, int(found.stats["steps"])) == (True, 0)
    assert np.all(found.stats["step"] == -1)


def test_callbacks(problem):
    seen = []

    def note(step, report):
        seen.append((step, report))
        return len(seen)  # true, but not `True`

    found = eqxproj.solve(problem, AP, steps=30, every=2, callback=note)
    steps = [step for step, _ in seen]
    assert (found.stats["steps"], steps[-1]) == (30, 30)
    assert steps == sorted(set(steps)) and all(step % 2 == 0 for step in steps)
    for step, report in seen:
        assert set(report) == {"change", "gap", "violation", "state"}
        assert report["gap"] == found.stats["gap"][step // 2 - 1]
        assert isinstance(report["state"], eqxproj.State)

    for true in (True, np.True_, jnp.asarray(True)):
        stopped = eqxproj.solve(problem, AP, steps=30, callback=lambda step, report, true=true: true)
        assert stopped.result == RESULTS.stopped
        assert stopped.stats["steps"] == 1
        assert "result=stopped" in repr(stopped)
    one = eqxproj.solve(problem, AP, steps=1)
    jax.tree.map(np.testing.assert_array_equal, stopped.state, one.state)

    def fails(step, report):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        eqxproj.solve(problem, AP, steps=30, callback=fails)


def test_ctrl_c_returns_the_best_state(problem):
    seen = {}

    def interrupt(step, report):
        seen[report["gap"]] = report["state"]
        if step > 10:
            raise KeyboardInterrupt

    found = eqxproj.solve(problem, eqxproj.DouglasRachford(), steps=10_000, callback=interrupt)
    assert found.result == RESULTS.interrupted
    assert "result=interrupted" in repr(found)
    assert 10 < found.stats["steps"] < 10_000
    jax.tree.map(np.testing.assert_array_equal, found.state, seen[min(seen)])


def test_progress(problem, capsys):
    eqxproj.solve(problem, AP, steps=7, progress=True)
    text = capsys.readouterr().err
    assert "AlternatingProjections" in text
    assert "7" in text and "gap" in text
    eqxproj.solve(problem, AP, steps=7)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------------------
# What is compiled, and what is kept
# ----------------------------------------------------------------------------------------------------------------------


class CompiledError(Exception):
    pass


@pytest.fixture
def refuses(monkeypatch):
    """Nothing compiles any more: what needs it raises."""

    def refuse(*args):
        raise CompiledError

    monkeypatch.setattr(_iterate, "lowered", refuse)


def solved(loss, model=MODEL, x=X, y=Y, solver=AP, **options):
    return eqxproj.solve(eqxproj.feasibility_problem(loss, model, x, y, **options), solver, steps=3)


def make_line():
    def line(model, x, y):
        return jnp.sum(equal(x @ model["w"] + model["b"], y))

    return line


def test_problems_of_one_shape_compile_once(problem, refuses, request):
    request.getfixturevalue("monkeypatch").undo()
    eqxproj.solve(problem, AP, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_iterate, "lowered", lambda *args: (_ for _ in ()).throw(CompiledError()))
        first = solved(line)
        second = solved(make_line(), {**MODEL, "w": jnp.zeros(2), "name": "other"}, 2.0 * X, Y + 1.0)
        assert not np.allclose(first.model["w"], second.model["w"])
        eqxproj.solve(problem, AP, steps=11, every=4, tol=0.1)
        for model, x, y, options in [
            ({**MODEL, "w": jnp.ones(1)}, X[:, :1], Y, {}),
            (MODEL, X[:2], Y[:2], {}),
            (MODEL, X, Y, {"solver": eqxproj.CyclicProjections()}),
            (MODEL, X, Y, {"tau": 0.2}),
            (MODEL, X, Y, {"copies": "none"}),
            (MODEL, X, Y, {"metric": eqxproj.Metric(2.0, 1.0)}),
            (MODEL, X, Y, {"data": "pinned"}),
            (MODEL, X, Y, {"concurrence": True}),
            (MODEL, X, Y, {"constraints": [(lambda m: m["w"], NonNegative())]}),
        ]:
            with pytest.raises(CompiledError):
                solved(line, model, x, y, **options)
    # The second of the problems is solved as it is by a program of its own.
    fresh = _compiled._KEPT.copy()
    _compiled._KEPT.clear()
    want = solved(make_line(), {**MODEL, "w": jnp.zeros(2)}, 2.0 * X, Y + 1.0)
    _compiled._KEPT.update(fresh)
    np.testing.assert_array_equal(second.model["w"], want.model["w"])


SMALL = 0.01
NEXT = float(np.nextafter(np.float32(SMALL), np.float32(1)))  # both print as 0.01


def scaled(factor):
    return lambda m, x, y: jnp.sum(equal(factor * (x @ m["w"]), y))


def in_loop(factor):
    def loss(m, x, y):
        body = lambda h, row: (factor * jnp.tanh(h + row @ m["w"]), None)  # noqa: E731
        return jnp.sum(equal(jax.lax.scan(body, jnp.zeros(()), x)[0], y[0]))

    return loss


def summed(reverse):
    return lambda m, x, y: jnp.sum(equal(jax.lax.cumsum(x @ m["w"], reverse=reverse), y))


def with_rule(factor):
    @eqxproj.custom_projection
    def double(x):
        return 2.0 * x

    @double.def_projection
    def _(ctx, inputs, target):
        return factor * target

    return lambda m, x, y: jnp.sum(equal(double(x @ m["w"]), y))


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [(scaled, SMALL, NEXT), (in_loop, SMALL, NEXT), (summed, False, True), (with_rule, 0.5, 0.25)],
)
def test_other_losses_compile_again(monkeypatch, make, one, other):
    options = {"two_colors": False, "solver": eqxproj.CyclicProjections()}
    solved(make(one), **options)
    monkeypatch.setattr(_iterate, "lowered", lambda *args: (_ for _ in ()).throw(CompiledError()))
    if make is not with_rule:  # a rule is a function, and each is another
        solved(make(one), **options)
    with pytest.raises(CompiledError):
        solved(make(other), **options)


def test_arrays_inside_of_a_loss_are_arguments():
    def made(factor):
        return lambda m, x, y: jnp.sum(equal(factor * (x @ m["w"]), y))

    options = {"two_colors": False, "solver": eqxproj.CyclicProjections()}
    first = solved(made(jnp.array([1.0, 2.0, 3.0])), **options)
    second = solved(made(jnp.array([1.0, 2.0, 3.5])), **options)
    _compiled._KEPT.clear()
    np.testing.assert_array_equal(second.model["w"], solved(made(jnp.array([1.0, 2.0, 3.5])), **options).model["w"])
    assert np.any(np.asarray(first.model["w"]) != np.asarray(second.model["w"]))


def test_a_rule_registered_anew(registry):
    loss = lambda m, x, y: jnp.sum(equal(jax.lax.erf_inv(0.1 * (x @ m["w"])), y))  # noqa: E731
    options = {"two_colors": False, "solver": eqxproj.CyclicProjections()}
    found = []
    for factor in (1.0, 0.5):

        @eqxproj.register_projection("erf_inv")
        def _(ctx, inputs, target, factor=factor):
            return (factor * jax.scipy.special.erf(target),)

        found.append(np.asarray(solved(loss, **options).model["w"]))
    assert not np.allclose(*found)


def test_nothing_is_kept_alive():
    def graphs():
        gc.collect()
        return sum(isinstance(x, Graph) for x in gc.get_objects())

    before = graphs()
    references = []
    for size in (50_000, 60_000):
        big = jnp.ones(size) * size

        def loss(model, y, big=big):
            return jnp.sum(equal(model["w"] * jnp.mean(big) / 1e5, y))

        model = {"w": jnp.ones(()), "big": big + 1.0}
        made = eqxproj.feasibility_problem(loss, model, jnp.ones(()))
        found = eqxproj.solve(made, AP, steps=3)
        assert np.isfinite(found.model["w"])
        references += [weakref.ref(x) for x in (loss, big, model["big"], found.model["big"])]
        del loss, big, model, made, found
    assert graphs() == before
    assert [r() for r in references] == [None] * 8


# ----------------------------------------------------------------------------------------------------------------------
# Parameters in sets
# ----------------------------------------------------------------------------------------------------------------------

TALL = random(3, 8, 4)
WANTED = jnp.array([0.7, 0.0, 0.4, 0.0])


def linear(model, x, y):
    return jnp.sum(equal(x @ model["w"], y))


def linear_twice(model, x, y):
    """The same, with one operation more: the parameter has the other color."""
    return jnp.sum(equal(jnp.cumsum(x @ model["w"]), jnp.cumsum(y)))


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("loss", [linear, pytest.param(linear_twice, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOLVERS)
def test_parameters_end_in_their_sets(name, loss):
    model = {"w": jnp.array([-0.3, 0.6, 0.2, -0.9]), "unused": jnp.array([2.0, -0.3]), "free": jnp.array([-1.0])}
    pairs = [(lambda m: m["w"], NonNegative()), (lambda m: [m["w"], m["unused"]], Box(-0.1, 0.7))]
    made = eqxproj.feasibility_problem(loss, model, TALL, TALL @ WANTED, constraints=pairs)
    found = eqxproj.solve(made, SOLVERS[name], steps=500, every=50).model
    w, unused = np.asarray(found["w"]), np.asarray(found["unused"])
    assert np.all(w >= 0) and np.all(w <= np.float32(0.7))
    np.testing.assert_array_equal(unused, np.float32([0.7, -0.1]))
    assert found["free"] == -1.0
    if name != "AR":  # whose step need not come to rest
        want = scipy.optimize.nnls(np.asarray(TALL, np.float64), np.asarray(TALL @ WANTED, np.float64))[0]
        np.testing.assert_allclose(want, WANTED, atol=1e-6)
        np.testing.assert_allclose(w, want, atol=0.02)


def test_sets_that_are_not_convex():
    target = TALL[:, :2] @ jnp.array([0.6, 0.8])
    pairs = [(lambda m: m["w"], Sphere(1.0))]
    made = eqxproj.feasibility_problem(linear, {"w": jnp.ones(2)}, TALL[:, :2], target, constraints=pairs)
    found = eqxproj.solve(made, AP, steps=100, every=50).model["w"]
    np.testing.assert_allclose(jnp.linalg.norm(found), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found, [0.6, 0.8], atol=0.01)


def test_bad_constraints(untyped):
    model = {"w": jnp.ones(4)}
    bad = [
        3,
        [3],
        [(3, NonNegative())],
        [(lambda m: m["w"], lambda x: x)],
        [(lambda m: m["v"], NonNegative())],
        [(lambda m: m["w"][:1], NonNegative())],
        [(lambda m: m["w"], Box(0.0, 1.0)), (lambda m: m["w"], Box(2.0, 3.0))],
    ]
    for constraints in bad:
        with pytest.raises((TypeError, ValueError)) as of_problem:
            eqxproj.feasibility_problem(linear, model, TALL, TALL @ WANTED, constraints=constraints)
        with pytest.raises((TypeError, ValueError)) as of_train:
            eqxproj.train(model, (TALL, TALL @ WANTED), linear, steps=1, constraints=constraints)
        assert of_problem.type is of_train.type
        assert str(of_problem.value) == str(of_train.value)
        assert "`constraints" in str(of_problem.value)
