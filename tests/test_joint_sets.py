"""Sets of groups, of several sets on one array, and of several arrays together: projections against brute force."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from test_constraints import classifier

import eqxproj
from eqxproj import sets

# Groups of neighbours.


@pytest.mark.parametrize("k, of, axis", [(2, 4, -1), (1, 3, 0), (3, 4, None), (4, 4, 1)])
def test_groups_of_neighbours_against_all_choices(k, of, axis):
    x = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    got = np.asarray(jax.jit(sets.Sparse(k=k, of=of, axis=axis))(x))
    lines = [(x.ravel(), got.ravel())] if axis is None else zip(np.moveaxis(x, axis, -1), np.moveaxis(got, axis, -1))
    for line, found in lines:
        for group, answer in zip(line.reshape(-1, of), found.reshape(-1, of)):
            choices = [[i in chosen for i in range(of)] for chosen in itertools.combinations(range(of), k)]
            best = min(np.linalg.norm(np.where(kept, 0, group)) for kept in choices)
            assert np.count_nonzero(answer) == k
            np.testing.assert_allclose(np.linalg.norm(group - answer), best, rtol=1e-6)


def test_a_fraction_of_groups_equals_and_members():
    np.testing.assert_array_equal(sets.Sparse(0.5, of=2)(jnp.ones(4)), [1, 0, 1, 0])
    member = jnp.array([0.0, 1e-30, -2.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    np.testing.assert_array_equal(sets.Sparse(k=2, of=4)(member), member)
    assert bool(jnp.isnan(sets.Sparse(k=1, of=4)(member.at[0].set(jnp.nan))[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kept", [1, 7, 63, 64])
def test_largest_entries_are_those_of_a_sort(kept, dtype):
    """Also beside equals, zeros, infinities and numbers that float32 holds as subnormal."""
    rng = np.random.default_rng(kept)
    x = np.concatenate([rng.normal(size=40), rng.choice([0.0, 1.0, -1.0], size=20), [np.inf, -1e-40, 1e-41, -0.0]])
    x = jnp.asarray(rng.permutation(x), dtype)
    order = np.argsort(-np.abs(np.asarray(x, np.float64)), kind="stable")[:kept]
    want = np.where(np.isin(np.arange(64), order), np.asarray(x, np.float64), 0)
    np.testing.assert_array_equal(np.asarray(sets.Sparse(k=kept)(x), np.float64), want)


# Spectral norm.


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 3e-6), (jnp.bfloat16, 1e-2)])
def test_spectral_norm_is_that_of_power_iteration_and_no_direction_gains(dtype, error):
    """The nearest point of a convex set: no member is at an acute angle to what is left of x."""
    rng, chosen = np.random.default_rng(0), jax.jit(sets.SpectralBall(1.5))
    for scale in (0.02, 1.0, 1e20):
        x = jnp.asarray(scale * rng.normal(size=(30, 40)), dtype)
        y = np.asarray(chosen(x), np.float64)
        v = rng.normal(size=40)
        for _ in range(300):
            v = y.T @ (y @ v)
            v /= np.linalg.norm(v)
        assert np.linalg.norm(y @ v) <= 1.5 * (1 + 1e-6)
        np.testing.assert_array_equal(chosen(chosen(x)), chosen(x))
        left = np.asarray(x, np.float64) - y
        for _ in range(20):
            a, b = rng.normal(size=30), rng.normal(size=40)
            member = 1.5 * np.outer(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
            assert np.sum(left * (member - y)) <= 10 * error * np.linalg.norm(left) * np.linalg.norm(y)
    assert chosen(jnp.zeros((0, 3))).shape == (0, 3)


# Several sets on one array.


def nearest_by_slsqp(x, constraints, bounds=None):
    found = scipy.optimize.minimize(
        lambda y: 0.5 * np.sum((y - x) ** 2), np.full(x.shape, 0.1), jac=lambda y: y - x, bounds=bounds, method="SLSQP",
        constraints=constraints, options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    return found.x


CONVEX = {
    "box and sum": (
        sets.Intersection(sets.Box(0.0, 0.4), sets.Simplex()),
        lambda x: nearest_by_slsqp(x, {"type": "eq", "fun": lambda y: y.sum() - 1}, [(0, 0.4)] * 6),
    ),
    "order, sign and ball": (
        sets.Intersection(sets.Monotone(), sets.NonNegative(), sets.L2Ball(0.8)),
        lambda x: nearest_by_slsqp(
            x, [{"type": "ineq", "fun": np.diff}, {"type": "ineq", "fun": lambda y: 0.64 - y @ y}], [(0, None)] * 6
        ),
    ),
    "nested": (
        sets.Intersection(sets.Intersection(sets.Box(-0.3, np.inf), sets.L2Ball(0.6)), sets.Box(-np.inf, 0.25)),
        lambda x: nearest_by_slsqp(x, {"type": "ineq", "fun": lambda y: 0.36 - y @ y}, [(-0.3, 0.25)] * 6),
    ),
}


@pytest.mark.parametrize("name", CONVEX)
def test_the_nearest_common_point_of_convex_sets(name):
    chosen, oracle = CONVEX[name]
    jitted, rng = jax.jit(chosen), np.random.default_rng(0)
    for _ in range(10):
        x = rng.normal(size=6).astype(np.float32)
        y = np.asarray(jitted(x))
        np.testing.assert_allclose(y, oracle(x.astype(np.float64)), atol=3e-5)
        np.testing.assert_array_equal(jitted(y), y)


def test_an_intersection_with_sets_that_are_not_convex():
    """Nonnegative, sparse: the largest positive entries. Sparse and on a sphere: the largest ones, scaled."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    few = np.asarray(sets.Intersection(sets.NonNegative(), sets.Sparse(k=5))(x))
    best = min(
        np.linalg.norm(x.ravel() - np.where(np.isin(np.arange(24), kept), np.maximum(x.ravel(), 0), 0))
        for kept in itertools.combinations(np.flatnonzero(np.asarray(x).ravel() > 0), 5)
    )
    assert (few >= 0).all() and np.count_nonzero(few) == 5
    np.testing.assert_allclose(np.linalg.norm(x - few), best, rtol=1e-6)
    grouped = np.asarray(jax.jit(sets.Intersection(sets.Sparse(k=2, of=4), sets.Sphere(2.0)))(x))
    assert (np.count_nonzero(grouped.reshape(-1, 4), axis=1) <= 2).all()
    np.testing.assert_allclose(np.linalg.norm(grouped), 2, rtol=1e-5)


def test_sets_that_do_not_meet_are_an_error_of_the_call():
    apart = sets.Intersection(sets.Box(1.0, 2.0), sets.Box(-2.0, -1.0))
    with pytest.raises(Exception, match="no common point of its sets was found"):
        jax.block_until_ready(apart(jnp.zeros(3)))
    with pytest.raises(
        ValueError, match=r"`constraints\[0\]` hold one array of shape \(2, 3\), but no value was found"
    ):
        train_two(constraints=[(lambda m: m["a"], apart)])


def test_two_constraints_on_an_array_are_those_of_an_intersection():
    both = [sets.Simplex(None), sets.Box(-np.inf, 0.25)]
    model = {"a": jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)}
    apart = eqxproj.apply_constraints(model, [(lambda m: m["a"], one) for one in both])
    joint = eqxproj.apply_constraints(model, [(lambda m: m["a"], sets.Intersection(*both))])
    np.testing.assert_array_equal(apart["a"], joint["a"])
    np.testing.assert_array_equal(joint["a"], sets.Intersection(*both)(model["a"]))


# One set of several arrays.


def two():
    rng = np.random.default_rng(3)
    return {"a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), "b": jnp.asarray(rng.normal(size=4), jnp.float32)}


def train_two(constraints, model=None, steps=30, **options):
    """Trains arrays `a` and `b` toward ones."""

    def loss(m, x):
        return sum(jnp.mean((x[:, :1] - leaf.ravel()) ** 2) for leaf in jax.tree.leaves(m))

    data = (np.ones((8, 1), np.float32),)
    return eqxproj.train(
        two() if model is None else model, data, loss, steps=steps, optimizer=optax.adam(0.05),
        constraints=constraints, **options,
    )  # fmt: skip


def both(model):
    return [model["a"], model["b"]]


def entries(model):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in both(model)])


def largest_by_choice(x, k):
    kept = min(itertools.combinations(range(len(x)), k), key=lambda kept: np.sum(np.delete(x, list(kept)) ** 2))
    return np.where(np.isin(np.arange(len(x)), kept), x, 0)


JOINT = {
    "budget": (sets.Sparse(k=4), lambda x: largest_by_choice(x, 4)),
    "fraction": (sets.Sparse(0.3), lambda x: largest_by_choice(x, 3)),
    "norm": (sets.L2Ball(1.2), lambda x: x * min(1, 1.2 / np.linalg.norm(x))),
    "shares": (
        sets.Simplex(),
        lambda x: nearest_by_slsqp(x, {"type": "eq", "fun": lambda y: y.sum() - 1}, [(0, None)] * 10),
    ),
}


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize("name", JOINT)
def test_arrays_that_are_in_a_set_together(name, method):
    chosen, oracle = JOINT[name]
    constraints = [(both, sets.Together(chosen))]
    got = eqxproj.apply_constraints(two(), constraints)
    np.testing.assert_allclose(entries(got), oracle(entries(two())), atol=5e-6)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, two())
    trained = train_two(constraints, method=method).model
    np.testing.assert_allclose(entries(trained), oracle(entries(trained)), atol=5e-6)
    assert eqx.tree_equal(eqxproj.apply_constraints(trained, constraints), trained)
    assert np.mean((entries(trained) - 1) ** 2) < np.mean((entries(got) - 1) ** 2)  # toward ones
    if name in ("budget", "fraction"):
        assert np.count_nonzero(entries(trained)) == (4 if name == "budget" else 3)


def test_a_budget_goes_where_it_is_needed():
    """Apart, each array keeps half of its entries; together, the array of small entries gives up its own."""
    model = {"a": jnp.array([[5.0, -4.0, 3.0]]), "b": jnp.array([0.1, 0.2, 0.3])}
    got = eqxproj.apply_constraints(model, [(both, sets.Together(sets.Sparse(0.5)))])
    np.testing.assert_array_equal(got["a"], model["a"])
    np.testing.assert_array_equal(got["b"], np.zeros(3))


def test_arrays_that_are_tied_and_arrays_of_shares():
    rng = np.random.default_rng(0)
    model = {name: jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for name in "ab"}
    tied = [(both, sets.Together(sets.Equal(axis=0), stacked=True))]
    got = eqxproj.apply_constraints(model, tied)
    np.testing.assert_array_equal(got["a"], got["b"])
    np.testing.assert_allclose(got["a"], (model["a"] + model["b"]) / 2, rtol=1e-6)
    trained = train_two(tied, model).model
    np.testing.assert_array_equal(trained["a"], trained["b"])
    assert float(jnp.abs(trained["a"] - 1).max()) < float(jnp.abs(got["a"] - 1).max())
    shares = eqxproj.apply_constraints(model, [(both, sets.Together(sets.Simplex(axis=0), stacked=True))])
    a, b = np.asarray(model["a"]), np.asarray(model["b"])
    np.testing.assert_allclose(shares["a"], np.clip((1 + a - b) / 2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(shares["a"] + shares["b"], 1, atol=1e-6)


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_a_joint_set_meets_sets_of_single_arrays(method):
    """What shares an array is held at once: at the nearest common point, here a ball's within a cone's."""
    constraints = [
        (lambda m: m["b"], sets.NonNegative()),
        (both, sets.Together(sets.L2Ball(1.0))),
    ]
    got = eqxproj.apply_constraints(two(), constraints)
    y = np.concatenate([np.asarray(two()["a"]).ravel(), np.maximum(two()["b"], 0)])
    np.testing.assert_allclose(entries(got), y / max(1, np.linalg.norm(y)), atol=1e-5)
    trained = train_two(constraints, method=method).model
    assert (trained["b"] >= 0).all() and np.linalg.norm(entries(trained)) <= 1 + 1e-6
    nested = [(both, sets.Together(sets.Intersection(sets.NonNegative(), sets.L2Ball(1.0))))]
    trained = train_two(nested, method=method).model
    assert (entries(trained) >= 0).all() and np.linalg.norm(entries(trained)) <= 1 + 1e-6


def test_a_chain_of_joint_sets_and_a_discrete_one():
    model = {"a": jnp.ones(2) * 3, "b": jnp.ones(2), "c": jnp.array([2.0, -2.0])}
    constraints = [
        (lambda m: (m["a"], m["b"]), sets.Together(sets.L2Ball(1.0))),
        (lambda m: (m["c"], m["b"]), sets.Together(sets.Sparse(k=2))),
        (lambda m: m["c"], sets.NonNegative()),
    ]
    got = eqxproj.apply_constraints(model, constraints)
    assert np.linalg.norm([*got["a"], *got["b"]]) <= 1 + 1e-6 and (got["c"] >= 0).all()
    assert np.count_nonzero(np.array([*got["b"], *got["c"]])) <= 2
    again = eqxproj.apply_constraints(got, constraints)
    assert eqx.tree_equal(again, got)


@pytest.mark.slow
def test_layers_of_a_network_share_a_budget():
    model, data, loss = classifier(16)

    def weights(m):
        return [layer.weight for layer in m.layers]

    result = eqxproj.train(
        model, data, loss, steps=60, optimizer=optax.adam(1e-2), eval_data=data,
        constraints=[(weights, sets.Together(sets.Sparse(0.25)))],
    )  # fmt: skip
    count = sum(w.size for w in weights(model))
    assert sum(int((w != 0).sum()) for w in weights(result.model)) == count // 4
    assert result.history["eval_loss"][-1] < 0.5 * result.history["eval_loss"][0]


@pytest.mark.parametrize(
    "where, chosen, part",
    [
        (both, sets.Together(sets.Equal(axis=0), stacked=True), r"arrays of one shape, got \(2, 3\), \(4,\)"),
        (both, sets.Together(sets.Orthogonal()), "`Orthogonal` needs an array with two axes"),
        (lambda m: (m["a"], m["half"]), sets.Together(sets.L2Ball()), "arrays of one dtype, got float32, bfloat16"),
    ],
)
def test_arrays_that_do_not_fit_together(where, chosen, part):
    model = {**two(), "half": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"`constraints\[0\]` does not fit 2 arrays together: .*" + part):
        eqxproj.apply_constraints(model, [(where, chosen)])


def test_a_feasibility_problem_takes_sets_of_single_arrays_alone():
    def loss(m, x):
        return jnp.mean((x @ m["a"]) ** 2)

    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"`constraints\[0\]` \(Together.* are for `train` and `apply_constraints`"):
        eqxproj.feasibility_problem(loss, two(), x, constraints=[(both, sets.Together(sets.L2Ball()))])
    problem = eqxproj.feasibility_problem(
        loss, two(), x, constraints=[(lambda m: m["a"], sets.Intersection(sets.NonNegative(), sets.L2Ball(0.5)))]
    )
    solved = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=3).model["a"]
    assert (solved >= 0).all() and np.linalg.norm(solved) <= 0.5 * (1 + 1e-5)
