"""Constraints on parameters: how they are attached, and models that satisfy them exactly after training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from set_members import WIDER, error_of

import eqxproj
from eqxproj import sets


def test_attach_errors_come_before_training():
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`constraints\[0\]` does not fit"):
        eqxproj.train(
            model, (np.ones((4, 3), np.float32), np.zeros(4, np.int32)), lambda m, x, y: jax.vmap(m)(x).mean(), steps=1,
            constraints=[(lambda m: m.bias, sets.Orthogonal())],
        )  # fmt: skip
    eqxproj.apply_constraints(model, [(lambda m: m.weight, sets.Sparse(k=100))])


def test_a_set_of_your_own_must_keep_the_shape():
    class First(sets.AbstractSet):
        def __call__(self, x):
            return x[:1]

    with pytest.raises(ValueError, match="must return arrays of the shape and dtype"):
        eqxproj.apply_constraints({"a": jnp.zeros(3)}, [(lambda m: m["a"], First())])


def test_constraints_apply_in_order_and_leave_the_rest():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    constraints = [
        (lambda m: m.layers[0].weight, sets.Sparse(0.5)),
        (lambda m: m.layers[0].weight, sets.NonNegative()),
        (lambda m: (m.layers[1].weight, m.layers[1].bias), sets.Quantized([-0.5, 0.5])),
    ]
    new = eqxproj.apply_constraints(model, constraints)
    assert (new.layers[0].weight >= 0).all() and int((new.layers[0].weight != 0).sum()) <= 6
    assert np.isin(new.layers[1].weight, [-0.5, 0.5]).all() and np.isin(new.layers[1].bias, [-0.5, 0.5]).all()
    np.testing.assert_array_equal(new.layers[0].bias, model.layers[0].bias)


def test_all_weights_by_one_constraint():
    model = {"a": jnp.array([-1.0, 2.0]), "b": [jnp.array(-3.0)]}
    new = eqxproj.apply_constraints(model, [(lambda m: m, sets.NonNegative())])
    assert eqx.tree_equal(new, {"a": jnp.array([0.0, 2.0]), "b": [jnp.array(0.0)]})


def classifier(width):
    """A small network, data that it can learn, and a loss."""
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int32)

    def loss(model, x, y):
        return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()

    return eqx.nn.MLP(6, 2, width, 2, key=jax.random.key(0)), (x, y), loss


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_trained_model_satisfies_constraints_exactly(method):
    model, (x, y), loss = classifier(16)
    constraints = [
        (lambda m: m.layers[0].weight, sets.Sparse(0.25)),
        (lambda m: m.layers[1].weight, sets.Quantized([-0.3, 0.0, 0.3])),
        (lambda m: m.layers[2].weight, sets.NonNegative()),
        (lambda m: [layer.bias for layer in m.layers], sets.Box(-0.1, 0.1)),
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
    assert eqx.tree_equal(eqxproj.apply_constraints(result.model, constraints), result.model)
    assert result.history["eval_loss"][-1] < 0.9 * result.history["eval_loss"][0]


def test_first_evaluation_is_of_the_constrained_model():
    x, y = np.ones((8, 2), np.float32), np.zeros(8, np.int32)
    model = {"w": jnp.array([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]])}

    def loss(p, x, y):
        return eqxproj.losses.cross_entropy(x @ p["w"], y).mean()

    result = eqxproj.train(
        model, (x, y), loss, steps=1, eval_data=(x, y), constraints=[(lambda p: p["w"], sets.NonNegative())],
        evaluate={"least": lambda p, x, y: p["w"].min()},
    )  # fmt: skip
    assert result.history["eval_least"][0] == 0.0


@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize(
    "names",
    [
        ("orthogonal", "two_bits", "l2_columns"),
        pytest.param(("k_rows", "rank", "simplex"), marks=pytest.mark.slow),
        pytest.param(("sphere_rows", "l1", "pattern"), marks=pytest.mark.slow),
    ],
)
def test_trained_model_is_in_wider_sets(method, names):
    model, (x, y), loss = classifier(12)

    def weight(i):
        return lambda m: m.layers[i].weight

    constraints = [(weight(i), WIDER[name][0]) for i, name in enumerate(names)]
    result = eqxproj.train(
        model, (x, y), loss, steps=20, optimizer=optax.adam(1e-2), constraints=constraints, method=method,
        eval_data=(x, y),
    )  # fmt: skip
    for i, name in enumerate(names):
        assert WIDER[name][1](np.asarray(weight(i)(result.model), np.float64), error_of(jnp.float32)), name
    again = eqxproj.apply_constraints(result.model, constraints)
    assert eqx.tree_equal(again, result.model)
    assert result.history["eval_loss"][-1] < result.history["eval_loss"][0]


# Training with sets of isolated pieces.


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_small_steps_add_up_to_the_next_level(method):
    """From a level on, steps of 0.01 never reach the next one if each is undone."""
    model = {"w": jnp.array([0.4, -0.4, 0.4])}
    x = np.eye(3, dtype=np.float32)
    y = np.array([[2.0], [1.0], [-1.0]], np.float32)

    def loss(model, x, y):
        return jnp.mean(eqxproj.losses.squared_error(x @ model["w"][:, None], y))

    constraints = [(lambda m: m["w"], sets.Quantized([-1.0, 0.0, 1.0, 2.0]))]
    options = {"steps": 300, "optimizer": optax.sgd(0.02), "method": method}
    result = eqxproj.train(model, (x, y), loss, constraints=constraints, **options)
    np.testing.assert_array_equal(result.model["w"], y[:, 0])


def test_what_is_seen_during_training_is_projected():
    """The history and an interrupted run show the projected array, not the one that is kept."""
    seen = []

    def watch(model, x, y):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), model["w"])
        return jnp.sum(model["w"])

    data = (np.eye(2, dtype=np.float32), np.zeros((2, 1), np.float32))
    eqxproj.train(
        {"w": jnp.array([0.3, 0.9])},
        data,
        lambda model, x, y: jnp.mean((x @ model["w"][:, None] - y - 0.4) ** 2),
        steps=6,
        constraints=[(lambda m: m["w"], sets.Quantized([0.0, 1.0]))],
        eval_data=data,
        eval_every=1,
        evaluate={"sum": watch},
    )
    jax.effects_barrier()
    assert len(seen) == 7 and all(np.isin(w, [0.0, 1.0]).all() for w in seen)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["projection", "gradient"])
@pytest.mark.parametrize(
    "chosen",
    [sets.Sparse(k=10), sets.Quantized([-0.5, 0.0, 0.5]), sets.Intersection(sets.Sparse(k=30), sets.Box(-1.0, 1.0))],
)
def test_a_discrete_set_takes_hold_of_the_nearest_entries_first(method, chosen):
    """Along a cubic schedule, whole after six tenths of the steps; the optimizer leaves the weights where they are."""
    seen, steps = [], 20
    start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)), jnp.float32)

    def loss(model, x):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), model["w"])
        return jnp.mean((x @ model["w"]) ** 2)

    eqxproj.train(
        {"w": start}, (np.eye(4, dtype=np.float32),), loss, steps=steps, optimizer=optax.sgd(0.0), method=method,
        constraints=[(lambda m: m["w"], chosen)],
    )  # fmt: skip
    jax.effects_barrier()
    projected = np.asarray(chosen(start))
    way = np.abs(projected - start)
    shown = seen[-steps:]  # before them, the loss is tried
    for number, w in enumerate(shown):
        waits = w != projected
        np.testing.assert_array_equal(w[waits], np.asarray(start)[waits])
        left = max(0.0, 1 - number / (0.6 * steps)) ** 3 * np.count_nonzero(way)
        assert abs(waits.sum() - left) <= 1
        assert waits.sum() == 0 or way[waits].min() >= way[~waits].max(initial=0)
    assert (shown[0] != projected).sum() == np.count_nonzero(way) and (shown[12] == projected).all()
