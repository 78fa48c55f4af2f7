"""What is compiled once is found again with the same functions, and is gone with them."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj import sets
from eqxproj._program import _compiled

W, X = jnp.array([1.0, -2.0]), jnp.array([[0.5, 1.0], [2.0, -1.0], [0.3, 0.1]])


class Counter:
    """Counts the calls of its losses, which are traces."""

    def __init__(self):
        self.count = 0

    def loss(self, w, x):
        self.count += 1
        return jnp.mean((x * w) ** 2)

    def since(self, before):
        return self.count - before


def displaced(function, *args, **options):
    return eqxproj.filter_value_and_displacement(function, **options)(*args)


def test_a_displacement_written_anew_is_traced_once():
    counter = Counter()
    for _ in range(4):
        value, moved = displaced(counter.loss, W, X)  # a method is another object each time
        wanted = jax.value_and_grad(lambda w: jnp.mean((X * w) ** 2))(W)
        np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
        np.testing.assert_allclose(moved, wanted[1], rtol=1e-5)
    assert counter.count == 1
    # Equal options are the same; others are not, nor is another shape, nor another object's method.
    displaced(counter.loss, W, X, solver=eqxproj.CyclicProjections(), steps=1, tau=None)
    assert counter.count == 1
    displaced(counter.loss, W, X, tau=1e-5)
    assert counter.count == 2
    displaced(counter.loss, W, X[:2])
    assert counter.count == 3
    other = Counter()
    displaced(other.loss, W, X)
    assert (counter.count, other.count) == (3, 1)


def test_a_rule_that_is_registered_reaches_what_is_compiled():
    def loss(w):
        return jnp.sum(jnp.sinh(w))

    plain = displaced(loss, W)[1]
    eqxproj.register_projection("sinh", form="duals")(lambda ctx, inputs, dual: [3.0 * dual])
    try:
        np.testing.assert_allclose(displaced(loss, W)[1], 3.0 * jnp.ones(2), rtol=1e-5)
    finally:
        eqxproj.unregister_projection("sinh")
    np.testing.assert_allclose(displaced(loss, W)[1], plain)


def test_the_arrays_of_a_loss_that_is_a_pytree_are_arguments():
    traces = []

    class Scaled(eqx.Module):
        scale: jax.Array
        power: int

        def __call__(self, w):
            traces.append(self.power)
            return jnp.sum((self.scale * w) ** self.power)

    for scale in (1.0, 2.0, 3.0):
        moved = displaced(Scaled(jnp.asarray(scale), 2), W)[1]
        np.testing.assert_allclose(moved, 2 * scale**2 * W, rtol=1e-5)
    displaced(Scaled(jnp.asarray(1.0), 3), W)
    assert traces == [2, 3]


@pytest.mark.parametrize("kind", ["lambda", "method", "object"])
def test_a_loss_and_what_it_closes_over_are_freed(kind):
    class Held:
        def __init__(self):
            self.array = jnp.arange(50.0)

        def __call__(self, w):
            return jnp.sum(jnp.tanh(w * self.array) ** 2)

    def made():
        held = Held()
        array = held.array
        loss = {"lambda": lambda w: jnp.sum((w * array) ** 2), "method": held.__call__, "object": held}[kind]
        return loss, held, array

    before = set(_compiled._KEPT)
    loss, held, array = made()
    displaced(loss, jnp.ones(50))
    entries = set(_compiled._KEPT) - before
    assert len(entries) == 1
    alive = [weakref.ref(held), weakref.ref(array)]
    del loss, held, array
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert not entries & set(_compiled._KEPT)


def test_so_many_are_kept_and_no_more():
    def maker(recall):
        return object()

    first = _compiled.kept("test", maker, "tree", 0)
    assert _compiled.kept("test", maker, "tree", 0) is first
    for number in range(1, _compiled._SIZE + 1):
        _compiled.kept("test", maker, "tree", number)
    assert len(_compiled._KEPT) == _compiled._SIZE
    assert _compiled.kept("test", maker, "tree", 0) is not first
    for key in [key for key in _compiled._KEPT if key[0] == "test"]:
        del _compiled._KEPT[key]


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_training_again_with_the_same_functions_compiles_nothing(method):
    counter, on = Counter(), lambda w: w
    options = dict(
        steps=3, method=method, eval_data=(X,), constraints=[(on, sets.Sphere(2.0))], optimizer=optax.sgd(0.1)
    )
    first = eqxproj.train(W, (X,), counter.loss, **options)
    traces = counter.count
    assert traces > 0
    again = eqxproj.train(W, (X,), counter.loss, **options)
    assert counter.count == traces
    np.testing.assert_array_equal(first.model, again.model)
    np.testing.assert_array_equal(first.history["loss"], again.history["loss"])
    for changed in (dict(options, constraints=()), dict(options, optimizer=optax.sgd(0.2))):
        before = counter.count
        assert not np.array_equal(eqxproj.train(W, (X,), counter.loss, **changed).model, first.model)
        assert counter.since(before) > 0


def test_the_default_optimizer_is_found_again():
    counter = Counter()
    eqxproj.train(W, (X,), counter.loss, steps=2)
    before = counter.count
    eqxproj.train(W, (X,), counter.loss, steps=2, key=jax.random.key(1))
    assert counter.since(before) == 0


def test_a_loss_that_was_trained_is_freed():
    def made():
        array = jnp.arange(2.0)
        return (lambda w, x: jnp.mean((x * w - array) ** 2)), array

    loss, array = made()
    eqxproj.train(W, (X,), loss, steps=2)
    alive = [weakref.ref(loss), weakref.ref(array)]
    del loss, array
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
