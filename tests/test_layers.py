"""Which layers of a graph stand in a branch beside a residual connection, and which of them write into the sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from eqxproj._graph._build import build
from eqxproj._graph._graph import with_identities
from eqxproj._problem._make import make_problem
from eqxproj._program._trace import trace
from eqxproj._training._displacement import DEFAULT_METRIC
from eqxproj._training._layers import layers
from eqxproj._training._preconditioner import Preconditioner, preconditioner
from eqxproj.rules._scalar import identity

KEYS = jax.random.split(jax.random.key(0), 6)
X = 1.5 + jax.random.normal(KEYS[0], (64, 6))
W = {name: jax.random.normal(key, (6, 6)) / 2 for name, key in zip("abcd", KEYS[1:5], strict=True)}
MODEL = {**W, "bias": jax.random.normal(KEYS[5], (6,)), "head": jnp.ones((6, 2))}


def loss_of(outputs):
    return lambda m, x: jnp.mean(jnp.tanh(outputs(m, x) @ m["head"]) ** 2)


def first(m, x):
    return jnp.tanh(x @ m["a"])


def chain(m, x):
    return jnp.tanh(first(m, x) @ m["b"] + m["bias"]) @ m["c"]


def writes(m, x):
    h = first(m, x)
    return h + jnp.tanh(h @ m["b"]) @ m["c"] + m["bias"]


def writes_a_third(m, x):
    h = first(m, x)
    return h - (jnp.tanh(h @ m["b"]) @ m["c"] + m["bias"]) / 3.0


def behind_a_function(m, x):
    """As in residual networks that add the outputs of a relu."""
    h = first(m, x)
    return h + jax.nn.relu(h @ m["b"] + m["bias"])


def under_a_function(m, x):
    """As in those that add before it."""
    h = first(m, x)
    return jax.nn.relu(h + jnp.tanh(h @ m["b"]) @ m["c"] + m["bias"]) @ m["d"]


def twice(m, x):
    h = first(m, x)
    h = h + jnp.tanh(h @ m["b"])
    return h + jnp.tanh(h @ m["c"] + m["bias"]) @ m["d"]


def side_by_side(m, x):
    """The sum of two branches, neither of which is computed from the other."""
    h = first(m, x)
    return jnp.tanh(h @ m["b"]) + h @ m["c"] + m["bias"]


def of_the_data(m, x):
    """Data are no value that a layer could change."""
    return x + jnp.tanh(x @ m["a"]) @ m["b"] + m["bias"]


def transposed(m, x):
    h = first(m, x).T
    return (h + (m["b"] @ jnp.tanh(m["c"] @ h)) + m["bias"][:, None]).T


def gated(m, x):
    h = first(m, x)
    gate = jax.nn.sigmoid(h @ m["b"])
    return gate * h + (1 - gate) * jnp.tanh(h @ m["c"] + m["bias"])


CASES = {
    "chain": (chain, "", ""),
    "writes": (writes, "bc", "c"),
    "writes a third": (writes_a_third, "bc", "c"),
    "behind a function": (behind_a_function, "b", ""),
    "under a function": (under_a_function, "bc", ""),
    "twice": (twice, "bcd", "d"),
    "side by side": (side_by_side, "", ""),
    "of the data": (of_the_data, "", ""),
    "transposed": (transposed, "bc", "b"),
    "gated": (gated, "", ""),
}


def problem_of(outputs, model, x, in_order=True):
    return make_problem(trace(loss_of(outputs), model, (x,)), DEFAULT_METRIC, "neuron", 0.01, "constant", not in_order)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_branches(name, in_order):
    outputs, branch, written = CASES[name]
    graph = build(trace(loss_of(outputs), MODEL, (X,)), "constant", "whole" if in_order else "apart")
    if not in_order:
        graph = with_identities(graph, identity(graph.values[0]))
    owner = {value: i for i, value in enumerate(graph.parameters) if value is not None}
    found = layers(graph, owner)
    names = sorted(MODEL)
    assert {names[layer.weight] for layer in found} >= set(branch) | {"a"}
    assert {names[layer.weight] for layer in found if layer.in_branch} == set(branch)
    assert {names[layer.weight] for layer in found if layer.stream} == set(written)
    assert [layer.stream_factor for layer in found if layer.stream] == [
        pytest.approx(1 / 3 if name == "writes a third" else 1.0)
    ] * len(written)


def deviation(array) -> float:
    array = np.asarray(array).reshape(-1, array.shape[-1])
    return float(np.sqrt(array.var(0).mean()))


def scale_of(found: Preconditioner, weight: int) -> np.ndarray:
    (place,) = (i for i, layer in enumerate(found.layers) if layer.weight == weight)
    return np.asarray(found.scales[place])


@pytest.mark.parametrize("factor", [0.3, 0.01, 1.0, 30.0])
def test_a_step_in_a_branch_is_never_larger_and_is_measured_by_the_sum(factor):
    """`factor` is that of the sum; its deviation counts from 0.1 to 1."""

    def outputs(m, x):
        h = factor * first(m, x)
        return h + factor * (jnp.tanh(h @ m["b"]) @ m["c"])

    model = {n: MODEL[n] for n in ("a", "b", "c", "head")}
    found = preconditioner(problem_of(outputs, model, X))
    h = np.asarray(factor * first(model, X))
    hidden = np.tanh(h @ np.asarray(W["b"]))
    unit = np.clip(deviation(outputs(model, X)) / factor, 0.1, 1.0)
    size = {"a": max(0.1, np.sqrt((np.asarray(X) ** 2).mean())), "b": max(1.0, np.sqrt((h**2).mean()))}
    np.testing.assert_allclose(scale_of(found, 0), 1 / size["a"], rtol=1e-4)
    np.testing.assert_allclose(scale_of(found, 1), 1 / size["b"], rtol=1e-4)
    np.testing.assert_allclose(scale_of(found, 2), unit / max(1.0, np.sqrt((hidden**2).mean())), rtol=1e-4)


def test_blocks_that_a_scan_goes_through_are_those_one_after_the_other():
    deep = {n: jax.random.normal(k, (3, 6, 6)) / 4 for n, k in zip("bc", KEYS, strict=False)}

    def block(h, m):
        return h + jnp.tanh(h @ m["b"]) @ m["c"], None

    def scanned(m, x):
        return jax.lax.scan(block, 0.2 * first(m, x), {n: m[n] for n in "bc"})[0]

    def in_a_row(m, x):
        h = 0.2 * first(m, x)
        for i in range(3):
            h = block(h, {n: m[n][i] for n in "bc"})[0]
        return h

    together = {**deep, "a": W["a"], "head": MODEL["head"]}
    apart = {**together, "b": list(deep["b"]), "c": list(deep["c"])}
    stacked = preconditioner(problem_of(scanned, together, X))
    several = preconditioner(problem_of(in_a_row, apart, X))
    scales = {layer.weight: s for layer, s in zip(several.layers, several.scales, strict=True)}
    expected = {"b": jnp.stack([scales[i] for i in (1, 2, 3)]), "c": jnp.stack([scales[i] for i in (4, 5, 6)])}
    assert bool(jnp.all(expected["c"] < 1.0))
    for i, name in enumerate("bc", start=1):
        np.testing.assert_allclose(scale_of(stacked, i), expected[name], rtol=1e-4)


def test_blocks_in_a_scan_at_each_step_of_another_see_the_sums_of_all_steps():
    deep = {n: jax.random.normal(k, (2, 6, 6)) / 4 for n, k in zip("bc", KEYS, strict=False)}
    series = 0.1 * jax.random.normal(KEYS[3], (7, 5, 6))

    def block(h, m):
        return h + jnp.tanh(h @ m["b"]) @ m["c"], None

    def outputs(m, x):
        both = {n: m[n] for n in "bc"}
        step = lambda h, row: (jax.lax.scan(block, 0.1 * h + row, both)[0], None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((5, 6)), x)[0]

    found = preconditioner(problem_of(outputs, {**deep, "head": MODEL["head"]}, series))
    h, sums = jnp.zeros((5, 6)), ([], [])
    for row in series:
        h = 0.1 * h + row
        for i, each in enumerate(sums):
            h = block(h, jtu.tree_map(lambda p, i=i: p[i], deep))[0]
            each.append(h)
    units = [deviation(jnp.stack(each)) for each in sums]
    assert max(units) < 1.0 and min(units) > 0.1
    np.testing.assert_allclose(scale_of(found, 1), units, rtol=1e-4)


def test_what_a_recurrent_cell_keeps_of_its_state_is_no_branch():
    def outputs(m, x):
        def cell(h, row):
            new = jnp.tanh(row @ m["a"] + h @ m["b"] + m["bias"])
            gate = jax.nn.sigmoid(row @ m["c"] + h @ m["d"])
            return new + gate * (h - new), None

        return jax.lax.scan(cell, jnp.zeros((4, 6)), x)[0]

    found = preconditioner(problem_of(outputs, MODEL, X.reshape(16, 4, 6)))
    assert {layer.weight for layer in found.layers} == {0, 1, 3, 4, 5}
    assert not any(layer.in_branch or layer.stream for layer in found.layers)
