"""Steps in the coordinates of the layers' inputs: which layers have them, and what a step then does not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj._problem._make import make_problem
from eqxproj._program._normal_form import normal_form
from eqxproj._program._recurrence import Recurrence
from eqxproj._program._trace import trace
from eqxproj._training._displacement import DEFAULT_METRIC
from eqxproj._training._preconditioner import Preconditioner, preconditioner

KEYS = jax.random.split(jax.random.key(0), 4)
X = 1.5 + jax.random.normal(KEYS[0], (64, 6))
IMAGES = 0.7 + jax.random.normal(KEYS[1], (5, 2, 8, 8))
W, B = jax.random.normal(KEYS[2], (6, 4)), jax.random.normal(KEYS[3], (4,))


class Pair(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None = None


def linear(m, x):
    return jax.vmap(m)(x)


def rows(m, x):
    return x @ m.weight + m.bias


def weighted(m, x):
    return 2.0 * (x @ m.weight) - m.bias


def converted(m, x):
    """As in mixed precision: the parameters are kept in one type and used in another."""
    w, b = (p.astype(jnp.bfloat16) for p in (m.weight, m.bias))
    return x @ w.astype(jnp.float32) + b.astype(jnp.float32)


def several_axes(m, x):
    """Contracts two axes of the inputs, in another order than that of the weight."""
    return jnp.tensordot(x, m.weight, ((1, 2), (1, 0))) + m.bias


def loss_of(outputs: Callable[..., Any], penalty: float = 0.0) -> Callable[..., Any]:
    def loss(model, x):
        norms = [jnp.sum(p**2) for p in jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))]
        data = jnp.mean(jnp.tanh(outputs(model, x)) ** 2)
        return data + penalty * sum(norms) if penalty else data

    return loss


def of(loss, model, *args, in_order: bool = True, fixed=()) -> Preconditioner:
    traced = trace(loss, model, args)
    problem = make_problem(traced, DEFAULT_METRIC, "neuron", 0.01, "constant", not in_order)
    return preconditioner(problem, fixed)


def applied(found: Preconditioner, update):
    """The update of the parameters where no set changes it."""
    scaled = found.scaled(update)
    return found.offset(scaled, scaled)


LAYERS = {
    "linear": (linear, eqx.nn.Linear(6, 4, key=KEYS[2]), X, 0.0),
    "matmul": (rows, Pair(W, B), X, 0.0),
    "matmul, penalty": (rows, Pair(W, B), X, 0.1),
    "converted": (converted, Pair(W, B), X, 0.0),
    "converted, penalty": (converted, Pair(W, B), X, 0.1),
    "coefficients": (weighted, Pair(W, B), X, 0.0),
    "two axes": (
        several_axes,
        Pair(jax.random.normal(KEYS[1], (6, 3, 4)), B),
        jnp.stack([X, 2 * X, X - 1], axis=1),
        0.0,
    ),
    "convolution": (linear, eqx.nn.Conv2d(2, 3, 3, key=KEYS[2]), IMAGES, 0.0),
}


def random_like(model, key):
    return jtu.tree_map(lambda p: jax.random.normal(key, p.shape), eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_maps_are_adjoint_but_for_the_deviation(name, in_order):
    """$\\langle g, P u \\rangle = \\langle P^T g, u \\rangle$ for any change of coordinates."""
    outputs, model, x, penalty = LAYERS[name]
    found = of(loss_of(outputs, penalty), model, x, in_order=in_order)
    assert [layer.bias is not None for layer in found.layers] == [True]
    g, u = random_like(model, KEYS[0]), random_like(model, KEYS[1])
    scaled = jtu.tree_leaves(u)
    scaled[found.layers[0].weight] = scaled[found.layers[0].weight] * found.scales[0]
    pairs = (g, applied(found, u)), (found.centered(g), scaled)
    one, other = (
        sum(float(jnp.vdot(a, b)) for a, b in zip(jtu.tree_leaves(p), jtu.tree_leaves(q), strict=True))
        for p, q in pairs
    )
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_step_of_the_weight_keeps_the_mean_of_the_outputs(name):
    outputs, model, x, penalty = LAYERS[name]
    found = of(loss_of(outputs, penalty), model, x)
    leaves, treedef = jtu.tree_flatten(random_like(model, KEYS[0]))
    bias = found.layers[0].bias
    assert bias is not None
    leaves[bias] = jnp.zeros_like(leaves[bias])
    update = jtu.tree_unflatten(treedef, leaves)

    def drift(update):
        """The mean change of an output, beside the root mean square of the changes."""
        change = jnp.asarray(outputs(eqx.apply_updates(model, update), x)) - jnp.asarray(outputs(model, x))
        axes = tuple(i for i in range(change.ndim) if i != 1)
        return float(jnp.max(jnp.abs(jnp.mean(change, axes))) / jnp.sqrt(jnp.mean(change**2)))

    assert drift(applied(found, update)) < 0.1
    assert drift(update) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (30.0, 0.0), (1.0, 5.0), (20.0, -40.0)])
def test_training_does_not_depend_on_origin_and_unit_of_the_data(factor, shift):
    """A network that undoes a shift and a factor of its inputs learns as it would without; plain Adam does not."""
    x = jax.random.normal(KEYS[0], (256, 6))
    y = jnp.sin(2 * x[:, :2])

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    plain = eqx.nn.MLP(6, 2, 32, 1, key=KEYS[1])
    first = plain.layers[0]
    undone = (first.weight / factor, first.bias - first.weight @ jnp.full(6, shift / factor))
    changed = eqx.tree_at(lambda m: (m.layers[0].weight, m.layers[0].bias), plain, undone)

    def reached(model, x, precondition):
        result = eqxproj.train(
            model, (x, y), loss, steps=60, optimizer=optax.adam(3e-3, eps=1e-12), precondition=precondition
        )
        return float(loss(result.model, x, y))

    expected = reached(plain, x, True)
    assert reached(changed, factor * x + shift, True) == pytest.approx(expected, rel=0.03)
    if factor != 1:
        assert abs(reached(changed, factor * x + shift, False) - reached(plain, x, False)) > 0.1 * expected


def test_statistics_are_those_of_the_inputs():
    found = of(loss_of(rows), Pair(W, B), X)
    np.testing.assert_allclose(found.means[0][:, 0], (1 - 1 / 64) * np.asarray(X).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.scales[0], 1 / np.sqrt(np.asarray(X).var(0).mean()), rtol=1e-4)
    quiet = of(loss_of(rows), Pair(W, B), 3.0 + 1e-4 * X)
    np.testing.assert_allclose(quiet.scales[0], 10.0, rtol=1e-4)  # the least deviation is 0.1


@pytest.mark.parametrize(("inputs", "factor"), [(30, 1.0), (128, 1.0), (512, 0.5), (2048, 0.25)])
def test_steps_of_wide_layers_are_smaller(inputs, factor):
    x = jax.random.normal(KEYS[0], (64, inputs))
    found = of(loss_of(rows), Pair(jnp.ones((inputs, 4)), B), x)
    np.testing.assert_allclose(found.scales[0], factor / np.sqrt(np.asarray(x).var(0).mean()), rtol=1e-4)
    window = jax.random.normal(KEYS[0], (4, 32, 6, 6))
    convolution = of(loss_of(linear), eqx.nn.Conv2d(32, 3, 4, key=KEYS[0]), window)  # 512 inputs an output
    deviation = np.sqrt(np.asarray(window).var((0, 2, 3)).mean())
    np.testing.assert_allclose(convolution.scales[0], 0.5 / deviation, rtol=1e-4)


def test_of_many_rows_some_are_enough():
    x = 1.5 + jax.random.normal(KEYS[0], (5000, 6))
    found = of(loss_of(rows), Pair(W, B), x)
    np.testing.assert_allclose(found.scales[0], 1 / np.sqrt(np.asarray(x).var(0).mean()), rtol=0.05)
    kept = np.asarray(x)[::4]
    np.testing.assert_allclose(found.means[0][:, 0], (1 - 1 / 1250) * kept.mean(0), rtol=1e-5)
    images = jax.random.normal(KEYS[1], (9, 2, 40, 32))
    image = of(loss_of(linear), eqx.nn.Conv2d(2, 3, 3, key=KEYS[2]), images)
    some = np.asarray(images)[:, :, ::4, ::2]
    np.testing.assert_allclose(image.means[0].ravel(), (1 - 1 / some[:, 0].size) * some.mean((0, 2, 3)), atol=1e-6)


def test_one_row_still_moves_its_weight():
    found = of(loss_of(rows), Pair(W, B), X[:1])
    np.testing.assert_array_equal(found.means[0], 0.0)


def test_what_has_no_coordinates_of_its_own():
    square = jnp.ones((4, 4))
    cases = {
        "no bias": (lambda m, x: x @ m.weight, Pair(W), X),
        "a bias for every row": (lambda m, x: x @ m.weight + m.bias[:, None], Pair(square, B), jnp.ones((4, 4))),
        "a bias with two readers": (lambda m, x: (x @ m.weight + m.bias) * m.bias, Pair(W, B), X),
        "a product with two readers": (
            lambda m, x: (lambda z: (z + m.bias) * jnp.tanh(z))(x @ m.weight),
            Pair(W, B),
            X,
        ),
    }
    for name, (outputs, model, x) in cases.items():
        found = of(loss_of(outputs), model, x)
        assert [layer.bias for layer in found.layers] == [None], name
    tied = of(loss_of(lambda m, x: jnp.tanh(x @ m.weight + m.bias) @ m.weight.T), Pair(W, B), X)
    assert tied.layers == ()
    grouped = eqx.nn.Conv2d(2, 2, 3, groups=2, key=KEYS[0])
    assert of(loss_of(linear), grouped, IMAGES).layers == ()
    batched = of(loss_of(lambda m, x: jax.vmap(jnp.dot)(x, m.weight)), Pair(X), X)
    assert batched.layers == ()


def test_layers_of_constrained_biases_keep_their_coordinates():
    model, loss = eqx.nn.MLP(6, 4, 5, 1, key=KEYS[0]), loss_of(linear)
    assert [layer.weight for layer in of(loss, model, X).layers] == [0, 2]
    assert [layer.weight for layer in of(loss, model, X, fixed={0, 2}).layers] == [0, 2]
    assert [layer.weight for layer in of(loss, model, X, fixed={3}).layers] == [0]


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("chosen", [eqxproj.sets.Sparse(0.2), eqxproj.sets.NonNegative(), eqxproj.sets.LowRank(1)])
def test_a_step_of_a_constrained_weight_keeps_the_mean_of_the_outputs(chosen):
    """But for the share of one row that the mean leaves out."""
    model, x = eqx.nn.Linear(6, 4, key=KEYS[2]), 3 + X
    far = optax.stateless(lambda u, _: jtu.tree_map(lambda g: -0.3 * g / jnp.abs(g).max() * (g.ndim == 2), u))
    constraints = [(lambda m: m.weight, chosen)]
    start = eqxproj.apply_constraints(model, constraints)
    result = eqxproj.train(
        start, (x,), loss_of(linear), steps=1, optimizer=far, precondition=True, constraints=constraints
    )
    change = jnp.mean(linear(result.model, x) - linear(start, x), 0)
    by_weight = (result.model.weight - start.weight) @ jnp.mean(x, 0)
    assert float(jnp.max(jnp.abs(by_weight))) > 0.1
    np.testing.assert_allclose(change, by_weight / len(x), rtol=1e-2, atol=1e-5)


def trained(**options):
    return eqxproj.train(eqx.nn.MLP(6, 4, 5, 1, key=KEYS[0]), (X,), loss_of(linear), steps=5, **options).model


@pytest.mark.slow
def test_it_is_on_with_the_default_optimizer_alone():
    same, other = trained(), trained(precondition=True)
    assert eqx.tree_equal(same, other)
    assert not eqx.tree_equal(same, trained(precondition=False))
    adam = optax.adam(1e-2)
    assert eqx.tree_equal(trained(optimizer=adam), trained(optimizer=adam, precondition=False))
    assert not eqx.tree_equal(trained(optimizer=adam), trained(optimizer=adam, precondition=True))
    assert eqx.tree_equal(trained(method="gradient"), trained(method="gradient", precondition=False))


def test_gradients_have_no_inputs_to_go_by():
    with pytest.raises(ValueError, match='needs `method="projection"`'):
        trained(precondition=True, method="gradient")


SERIES = 0.5 + jax.random.normal(KEYS[1], (7, 5, 6))


def along_time(m, x):
    """A recurrent network over the first axis of `x`, whose states are those of [`states_of`][]."""

    def cell(h, row):
        h = jnp.tanh(row @ m.cell.weight + m.cell.bias + h @ m.back.weight)
        return h, h

    return jax.lax.scan(cell, jnp.zeros((x.shape[1], 4)), x)[1]


def in_a_map(m, x):
    return jax.lax.map(lambda row: jnp.tanh(row @ m.cell.weight + m.cell.bias) @ m.back.weight, x)


def nested(m, x):
    def outer(h, row):
        h = jax.lax.scan(lambda g, r: (jnp.tanh(r @ m.cell.weight + m.cell.bias + g @ m.back.weight), None), h, row)[0]
        return h, h

    return jax.lax.scan(outer, jnp.zeros((x.shape[2], 4)), x)[1]


class Recurrent(eqx.Module):
    cell: Pair
    back: Pair


RECURRENT = Recurrent(Pair(W, B), Pair(jax.random.normal(KEYS[0], (4, 4))))


def states_of(m, x):
    """The state before each step, in a plain loop."""
    h, found = jnp.zeros((x.shape[1], 4)), []
    for row in x:
        found.append(h)
        h = jnp.tanh(row @ m.cell.weight + m.cell.bias + h @ m.back.weight)
    return jnp.stack(found)


def summed(m, x):
    """Two products that share a bias."""
    return x @ m.cell.weight + jnp.cos(x) @ m.back.weight + m.cell.bias


def test_products_may_share_a_bias():
    model = Recurrent(Pair(W, B), Pair(2 * W))
    found = of(loss_of(summed), model, X)
    assert [(layer.weight, layer.bias) for layer in found.layers] == [(0, 1), (2, 1)]
    leaves, treedef = jtu.tree_flatten(random_like(model, KEYS[0]))
    update = applied(found, jtu.tree_unflatten(treedef, [leaves[0], jnp.zeros(4), leaves[2]]))
    change = summed(eqx.apply_updates(model, update), X) - summed(model, X)
    assert float(jnp.max(jnp.abs(jnp.mean(change, 0)))) < 0.1 * float(jnp.sqrt(jnp.mean(change**2)))


@pytest.mark.parametrize("reverse", [False, True])
def test_inside_of_a_scan_the_inputs_are_those_of_all_steps(reverse):
    def outputs(m, x):
        return along_time(m, x[::-1] if reverse else x)

    found = of(loss_of(outputs, 0.01), RECURRENT, SERIES)
    assert [(layer.weight, layer.bias) for layer in found.layers] == [(0, 1), (2, 1)]
    inputs = np.asarray(SERIES).reshape(-1, 6)
    states = np.asarray(states_of(RECURRENT, SERIES[::-1] if reverse else SERIES)).reshape(-1, 4)
    for i, each in enumerate((inputs, states)):
        np.testing.assert_allclose(found.means[i][:, 0], (1 - 1 / 35) * each.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.scales[i], 1 / np.sqrt(each.var(0).mean()), rtol=1e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_parameters_of_a_smaller_type_than_the_states_have_the_same_inputs(inside):
    """Converted at each step, or before the recurrence."""

    def wide(m):
        return jtu.tree_map(lambda p: p.astype(jnp.float32), m)

    def outputs(m, x):
        if not inside:
            return along_time(wide(m), x)

        def cell(h, row):
            own = wide(m)
            h = jnp.tanh(row @ own.cell.weight + own.cell.bias + h @ own.back.weight)
            return h, h

        return jax.lax.scan(cell, jnp.zeros((x.shape[1], 4)), x)[1]

    half = jtu.tree_map(lambda p: p.astype(jnp.bfloat16), RECURRENT)
    small, large = of(loss_of(outputs), half, SERIES), of(loss_of(along_time), wide(half), SERIES)
    assert [(layer.weight, layer.bias) for layer in small.layers] == [(0, 1), (2, 1)]
    for one, other in zip((*small.means, *small.scales), (*large.means, *large.scales), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_inside_of_a_map_and_of_a_scan_in_a_scan():
    mapped = of(loss_of(in_a_map), RECURRENT, SERIES)
    assert [(layer.weight, layer.bias) for layer in mapped.layers] == [(0, 1), (2, None)]
    hidden = np.tanh(np.asarray(SERIES) @ np.asarray(W) + np.asarray(B))
    np.testing.assert_allclose(mapped.scales[1], 1 / np.sqrt((hidden**2).mean()), rtol=1e-4)
    twice = of(loss_of(nested), RECURRENT, SERIES.reshape(7, 5, 1, 6))
    flat = of(loss_of(along_time), RECURRENT, SERIES.reshape(35, 1, 6))
    assert [(layer.weight, layer.bias) for layer in twice.layers] == [(0, 1), (2, 1)]
    for one, other in zip((*twice.means, *twice.scales), (*flat.means, *flat.scales), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_a_recurrence_laid_out_over_time_has_the_same_inputs():
    laid, kept = (of(loss_of(along_time), RECURRENT, SERIES, in_order=order) for order in (False, True))
    by_weight = {layer.weight: scale for layer, scale in zip(kept.layers, kept.scales, strict=True)}
    assert {layer.weight for layer in laid.layers} <= by_weight.keys()
    for layer, scale in zip(laid.layers, laid.scales, strict=True):
        np.testing.assert_allclose(scale, by_weight[layer.weight], rtol=1e-4)


def test_what_has_no_coordinates_inside_of_a_scan():
    twice = of(loss_of(lambda m, x: along_time(m, x) @ m.back.weight), RECURRENT, SERIES)
    assert [layer.weight for layer in twice.layers] == [0]  # the other is read inside and outside

    def of_the_state(m, x):
        """A state that is multiplied with a parameter, or that multiplies, is no layer's weight."""
        cell = lambda h, row: (jnp.tanh(h * m.bias + h @ h.T @ row[:, :4]), None)  # noqa: E731
        return jax.lax.scan(cell, jnp.ones((x.shape[1], 4)), x)[0] @ m.weight

    assert [layer.weight for layer in of(loss_of(of_the_state), Pair(jnp.eye(4), B), SERIES).layers] == [0]


def test_a_first_state_that_is_a_parameter_is_no_layer():
    def outputs(m, x):
        cell = lambda h, row: (jnp.tanh(row @ m.cell.weight + h @ m.cell.bias), None)  # noqa: E731
        return jax.lax.scan(cell, m.back.weight, x)[0] @ m.back.bias

    model = Recurrent(Pair(W, jnp.eye(4)), Pair(jnp.ones((5, 4)), jnp.ones((4, 4))))
    found = of(loss_of(outputs), model, SERIES)
    assert [(layer.weight, layer.bias) for layer in found.layers] == [(3, None), (0, None), (1, None)]


DEEP = Pair(jax.random.normal(KEYS[0], (3, 6, 6)), jax.random.normal(KEYS[1], (3, 6)))


def through_layers(m, x, reverse=False):
    cell = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None)  # noqa: E731
    return jax.lax.scan(cell, x, (m.weight, m.bias), reverse=reverse)[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_layers_that_a_scan_goes_through(reverse):
    """Their coordinates and steps are those of the same layers, one after the other."""

    def one_by_one(ms, x):
        for m in ms[:: -1 if reverse else 1]:
            x = jnp.tanh(x @ m.weight + m.bias)
        return x

    apart = [Pair(w, b) for w, b in zip(DEEP.weight, DEEP.bias, strict=True)]
    stacked = of(loss_of(lambda m, x: through_layers(m, x, reverse), 0.01), DEEP, X)
    several = of(loss_of(one_by_one, 0.01), apart, X)
    assert [(layer.weight, layer.bias, layer.stacked) for layer in stacked.layers] == [(0, 1, True)]
    np.testing.assert_allclose(stacked.means[0], jnp.stack(several.means), rtol=1e-5)
    np.testing.assert_allclose(stacked.scales[0], jnp.stack(several.scales), rtol=1e-5)
    update = random_like(DEEP, KEYS[2])
    parts = [Pair(update.weight[i], update.bias[i]) for i in range(3)]
    for of_update in (Preconditioner.centered, applied):
        one, others = of_update(stacked, update), of_update(several, parts)
        np.testing.assert_allclose(one.weight, jnp.stack([m.weight for m in others]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one.bias, jnp.stack([m.bias for m in others]), rtol=1e-5, atol=1e-6)


def test_layers_that_a_scan_goes_through_at_each_step_of_another():
    def outputs(m, x):
        cell = lambda h, row: (through_layers(m, h + row), None)  # noqa: E731
        return jax.lax.scan(cell, jnp.zeros((5, 6)), x)[0]

    found = of(loss_of(outputs), DEEP, SERIES)
    assert [(layer.weight, layer.bias, layer.stacked) for layer in found.layers] == [(0, 1, True)]
    h, inputs = jnp.zeros((5, 6)), [[], [], []]
    for row in SERIES:
        h = h + row
        for i in range(3):
            inputs[i].append(h)
            h = jnp.tanh(h @ DEEP.weight[i] + DEEP.bias[i])
    for i in range(3):
        each = np.concatenate([np.asarray(x) for x in inputs[i]])
        np.testing.assert_allclose(found.means[0][i, :, 0], (1 - 1 / 35) * each.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.scales[0][i], 1 / np.sqrt(each.var(0).mean()), rtol=1e-4)


def test_a_bias_for_all_of_the_layers_that_a_scan_goes_through():
    def outputs(m, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + m.bias), None), x, m.weight)[0]

    assert of(loss_of(outputs), Pair(DEEP.weight, DEEP.bias[0]), X).layers == ()


def test_a_scan_without_steps_has_no_inputs():
    def outputs(m, x):
        cell = lambda h, row: (jnp.tanh(h @ m.back.weight + row @ m.cell.weight), None)  # noqa: E731
        return jax.lax.scan(cell, jnp.ones((5, 4)), x[:0])[0] + m.cell.bias

    assert of(loss_of(outputs), RECURRENT, SERIES).layers == ()


def test_unknown_operands_of_a_body_are_numbered_by_kind():
    """The second carry is known at the start, and unknown from the second step on."""

    def f(first, second, known, unknown, xs):
        def body(carry, x):
            a, b = carry
            return (jnp.tanh(a + unknown * x), b + known + a), b

        return jax.lax.scan(body, (first, second), xs)

    program = normal_form(jax.make_jaxpr(f)(1.0, 2.0, 3.0, 4.0, jnp.ones(5)))
    (equation,) = (e for e in program.equations if e.name == "scan")
    first, _, _, unknown, xs = program.inputs
    recurrence = Recurrence.of(equation)
    assert (recurrence.constants, recurrence.carries) == (2, 2)
    flags = [v in (first, unknown, xs) for v in equation.inputs]
    found = recurrence.unknowns(flags)
    assert sum(flags) == 3 and sum(found.constants) == 1
    assert (list(found.carries), list(found.slices)) == ([True, True], [True])
    constant = flags.index(True)
    assert [found.place(i) for i in (constant, 2, 3, 4)] == [0, 1, 2, 3]
    assert found.split("cabs") == (["c"], ["a", "b"], ["s"])
    by_kind = recurrence.split(["no"] * constant + ["c"] + ["no"] * (1 - constant) + ["a", "b", "s"])
    assert found.chosen(*by_kind) == ["c", "a", "b", "s"]
