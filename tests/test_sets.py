"""Sets of parameters: their projections against brute force, and models that satisfy them exactly after training."""

import itertools

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj import sets
from eqxproj.sets import apply_constraints

LEVELS = (-1.0, 0.0, 0.25, 2.0)

SETS = {
    "box": (sets.box(-0.5, 0.75), lambda x: (x >= -0.5).all() and (x <= 0.75).all()),
    "point": (sets.box(0.3, 0.3), lambda x: (x == np.float32(0.3)).all()),
    "half": (sets.box(-np.inf, 0.0), lambda x: (x <= 0).all()),
    "non_negative": (sets.non_negative(), lambda x: (x >= 0).all()),
    "sparse": (sets.sparse(0.3), lambda x: (x != 0).sum() <= max(1, int(0.3 * x.size + 1e-9))),
    "one": (sets.sparse(1e-6), lambda x: (x != 0).sum() <= 1),
    "dense": (sets.sparse(1.0), lambda x: True),
    "quantized": (sets.quantized(LEVELS), lambda x: np.isin(x, np.float32(LEVELS)).all()),
    "sign": (sets.quantized([-1.0, 1.0]), lambda x: np.isin(x, [-1, 1]).all()),
}

arrays = st.integers(0, 2**16).map(lambda seed: np.random.default_rng(seed))
seeded = hypothesis.settings(derandomize=True, deadline=None, max_examples=25, database=None)


def nearest(name, x):
    """The least distance of x to the set, by brute force."""
    x = np.asarray(x, np.float64).ravel()
    if name in ("box", "point", "half", "non_negative"):
        low, high = {"box": (-0.5, 0.75), "point": (0.3, 0.3), "half": (-np.inf, 0.0), "non_negative": (0.0, np.inf)}[
            name
        ]
        return np.sqrt(sum(max(low - v, 0, v - high) ** 2 for v in x))
    if name in ("quantized", "sign"):
        levels = LEVELS if name == "quantized" else (-1.0, 1.0)
        return min(np.linalg.norm(x - np.array(p)) for p in itertools.product(levels, repeat=len(x)))
    kept = {"sparse": max(1, int(0.3 * len(x) + 1e-9)), "one": 1, "dense": len(x)}[name]
    return min(np.linalg.norm(np.delete(x, list(support))) for support in itertools.combinations(range(len(x)), kept))


@pytest.mark.parametrize("name", SETS)
@seeded
@hypothesis.given(rng=arrays)
def test_projection_is_feasible_idempotent_and_nearest(name, rng):
    chosen, contains = SETS[name]
    x = jnp.asarray(
        rng.normal(size=[(5,), (2, 3), (7,), (1,), (1, 1)][rng.integers(5)]) * rng.choice([0.1, 1, 10]), jnp.float32
    )
    y = chosen(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert contains(np.asarray(y))
    np.testing.assert_array_equal(chosen(y), y)
    distance = np.linalg.norm(np.asarray(y - x, np.float64))
    np.testing.assert_allclose(distance, nearest(name, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fraction, size, kept", [(0.1, 10, 1), (0.1, 9, 1), (0.3, 10, 3), (0.29, 10, 2), (1.0, 4, 4), (0.5, 1, 1)]
)
def test_how_many_are_kept(fraction, size, kept):
    x = jnp.arange(1.0, size + 1)
    assert int((sets.sparse(fraction)(x) != 0).sum()) == kept


def test_sparse_keeps_exactly_as_many_among_equals():
    assert int((sets.sparse(0.5)(jnp.ones((4, 4))) != 0).sum()) == 8


def test_sparse_over_all_axes():
    x = jnp.asarray([[1.0, -5.0, 0.1], [4.0, 0.2, -3.0]])
    np.testing.assert_array_equal(sets.sparse(0.5)(x), [[0, -5.0, 0], [4.0, 0, -3.0]])


def test_ties_between_levels():
    y = sets.quantized([0.0, 1.0])(jnp.array([0.5, -3.0, 7.0]))
    assert y[0] in (0.0, 1.0)
    np.testing.assert_array_equal(y[1:], [0.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SETS)
def test_dtypes_are_kept(name, dtype):
    y = SETS[name][0](jnp.linspace(-2, 2, 9).astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(SETS[name][0](y), y)


def test_under_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    for chosen, _ in SETS.values():
        rows = jnp.stack([chosen(row) for row in x])
        np.testing.assert_array_equal(jax.jit(jax.vmap(chosen))(x), rows)


def test_empty_arrays():
    for name, (chosen, _) in SETS.items():
        assert chosen(jnp.zeros((0, 3))).shape == (0, 3), name


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: sets.box(1.0, -1.0), "`low` must be at most `high`"),
        (lambda: sets.box(float("nan"), 1.0), "`low` must be at most `high`"),
        (lambda: sets.sparse(0.0), "`kept_fraction`"),
        (lambda: sets.sparse(1.5), "`kept_fraction`"),
        (lambda: sets.sparse(float("nan")), "`kept_fraction`"),
        (lambda: sets.quantized([]), "`levels`"),
        (lambda: sets.quantized([0.0, float("inf")]), "`levels`"),
    ],
)
def test_bad_sets(make, part):
    with pytest.raises(ValueError, match=part):
        make()


def test_constraints_apply_in_order_and_leave_the_rest():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    constraints = [
        (lambda m: m.layers[0].weight, sets.sparse(0.5)),
        (lambda m: m.layers[0].weight, sets.non_negative()),
        (lambda m: (m.layers[1].weight, m.layers[1].bias), sets.quantized([-0.5, 0.5])),
    ]
    new = apply_constraints(model, constraints)
    assert (new.layers[0].weight >= 0).all() and int((new.layers[0].weight != 0).sum()) <= 6
    assert np.isin(new.layers[1].weight, [-0.5, 0.5]).all() and np.isin(new.layers[1].bias, [-0.5, 0.5]).all()
    np.testing.assert_array_equal(new.layers[0].bias, model.layers[0].bias)


def test_all_weights_by_one_constraint():
    model = {"a": jnp.array([-1.0, 2.0]), "b": [jnp.array(-3.0)]}
    new = apply_constraints(model, [(lambda m: m, sets.non_negative())])
    assert eqx.tree_equal(new, {"a": jnp.array([0.0, 2.0]), "b": [jnp.array(0.0)]})


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_trained_model_satisfies_constraints_exactly(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int32)
    model = eqx.nn.MLP(6, 2, 16, 2, key=jax.random.key(0))

    def loss(model, x, y):
        return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()

    constraints = [
        (lambda m: m.layers[0].weight, sets.sparse(0.25)),
        (lambda m: m.layers[1].weight, sets.quantized([-0.3, 0.0, 0.3])),
        (lambda m: m.layers[2].weight, sets.non_negative()),
        (lambda m: [layer.bias for layer in m.layers], sets.box(-0.1, 0.1)),
    ]
    result = eqxproj.train(
        model,
        (x, y),
        loss,
        steps=60,
        optimizer=optax.adam(1e-2),
        constraints=constraints,
        method=method,
        eval_data=(x, y),
    )
    first, second, third = result.model.layers
    assert int((first.weight != 0).sum()) == 24
    assert np.isin(np.asarray(second.weight), np.float32([-0.3, 0.0, 0.3])).all()
    assert (third.weight >= 0).all()
    assert all(float(jnp.abs(layer.bias).max()) <= np.float32(0.1) for layer in result.model.layers)
    assert eqx.tree_equal(apply_constraints(result.model, constraints), result.model)
    assert result.history["eval_loss"][-1] < 0.9 * result.history["eval_loss"][0]


def test_first_evaluation_is_of_the_constrained_model():
    x, y = np.ones((8, 2), np.float32), np.zeros(8, np.int32)
    model = {"w": jnp.array([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]])}

    def loss(p, x, y):
        return eqxproj.losses.cross_entropy(x @ p["w"], y).mean()

    result = eqxproj.train(
        model, (x, y), loss, steps=1, eval_data=(x, y), constraints=[(lambda p: p["w"], sets.non_negative())],
        evaluate={"least": lambda p, x, y: p["w"].min()},
    )  # fmt: skip
    assert result.history["eval_least"][0] == 0.0
