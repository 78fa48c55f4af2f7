"""The metric: weights by depth and kind, exact as ratios at any depth, clamped as values."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqxproj
from eqxproj import Metric
from eqxproj.losses import cross_entropy, squared_error


def test_default_is_the_unit_metric():
    metric = Metric()
    assert (metric.grade, metric.parameter) == (1.0, 1.0)
    assert all(metric.log_weight(d, p) == 0.0 for d in range(5) for p in (False, True))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_weights(depth):
    metric = Metric(grade=10.0, parameter=1e3)
    assert math.exp(metric.log_weight(depth, False)) == pytest.approx(10.0**depth)
    assert math.exp(metric.log_weight(depth, True)) == pytest.approx(10.0**depth * 1e3)


def test_grade_below_one():
    assert math.exp(Metric(grade=0.1, parameter=0.5).log_weight(2, True)) == pytest.approx(0.005)


def weights_of(log_weight, log_output_weight=0.0):
    """The weights of one operand and one output, and the ratio of the second to the first, as rules see them."""
    ctx = eqxproj.rules.Context.plain().reweighted([log_weight], [log_output_weight])
    return ctx.weights[0], ctx.output_weights[0], ctx.ratio(0)


@pytest.mark.parametrize("log", [-1e4, -69.0, 0.0, 5.0, 69.0, 1e4])
def test_clamped(log):
    weight, _, _ = weights_of(log)
    assert 1e-30 < weight < 1e30
    assert jnp.isfinite(jnp.float32(weight)) and jnp.float32(1 / weight) > 0
    if abs(log) <= 69.0:
        assert weight == pytest.approx(math.exp(log))


@pytest.mark.parametrize("log", [-1e4, -69.0, 0.0, 5.0, 55.0, 1e4])
def test_clamped_outputs(log):
    """An output never weighs more than its operands for the reason that both are clamped."""
    assert weights_of(0.0, log)[1] == pytest.approx(weights_of(min(log, 55.0))[0])
    assert weights_of(0.0, 1e4)[1] <= 1e-6 * weights_of(1e4)[0]


def test_ratios_are_exact_where_values_are_clamped():
    metric = Metric(grade=1e6, parameter=1e6)
    deep, deeper = metric.log_weight(100, False), metric.log_weight(101, False)
    assert weights_of(deep)[0] == weights_of(deeper)[0]
    assert weights_of(deeper, deep)[2] == pytest.approx(1e-6)
    assert weights_of(deep, deeper)[2] == pytest.approx(1e6)
    assert weights_of(1e5, 0.0)[2] >= 0.0 and weights_of(0.0, 1e5)[2] == pytest.approx(weights_of(1e5)[0])


@pytest.mark.parametrize("grade, steep", [(1e-3, False), (1.0, False), (99.0, False), (100.0, True), (1e6, True)])
@pytest.mark.parametrize("parameter", [1.0, 1e6])
def test_the_grade_alone_decides_the_regime(grade, parameter, steep):
    assert Metric(grade, parameter).in_gradient_regime is steep


def test_is_static_and_hashable():
    assert hash(Metric(2.0, 3.0)) == hash(Metric(2.0, 3.0))
    assert Metric(2.0) == Metric(2.0) and Metric(2.0) != Metric(3.0)
    assert jax.tree_util.tree_leaves(Metric()) == []
    assert isinstance(Metric(), eqx.Module)


def tied(p, x, y):
    """A chain in which one weight is used at two depths."""
    return squared_error(jnp.tanh(x @ p["w"]) @ p["w"] @ p["v"], y).mean()


MODEL = {"w": jnp.eye(4), "v": jnp.ones((4, 2))}


def test_weights_of_edges():
    metric = Metric(grade=10.0, parameter=1e3)
    problem = eqxproj.feasibility_problem(
        tied, MODEL, jnp.ones((3, 4)), jnp.zeros((3, 2)), metric=metric, copies="none"
    )
    graph = problem.graph
    for i, edge in enumerate(graph.edges):
        want = 10.0 ** graph.depth[edge.consumer] * (1e3 if edge.is_parameter else 1.0)
        assert problem.edge_weight(i) == pytest.approx(want)
    assert any(graph.edges[e].is_parameter for e in range(len(graph.edges)))


def test_weight_of_a_value_with_several_consumers():
    """The weight of the output is the sum of its consumers' weights."""
    metric = Metric(grade=10.0, parameter=1.0)

    def loss(p, x, y):
        h = x @ p["w"]
        return squared_error(jnp.concatenate([h, h[:, :1]], -1) @ p["u"] + jnp.tanh(h)[:, :2], y).mean()

    model = {"w": jnp.eye(4), "u": jnp.ones((5, 2))}
    problem = eqxproj.feasibility_problem(
        loss, model, jnp.ones((3, 4)), jnp.zeros((3, 2)), metric=metric, copies="none"
    )
    graph = problem.graph
    (value,) = [v for v in range(len(graph.values)) if len(graph.readers[v]) == 2 and graph.values[v].shape == (3, 4)]
    log, count = eqxproj.readers.output_weight(problem, value)
    weights = [10.0 ** graph.depth[graph.edges[e].consumer] for e in graph.readers[value]]
    assert math.exp(log) == pytest.approx(max(weights))
    counts = [
        graph.edges[e].view.transpose(problem.known, jnp.ones(graph.edges[e].variable.shape))
        for e in graph.readers[value]
    ]
    want = sum(c[0] * w for c, w in zip(counts, weights, strict=True)) / max(weights)
    assert jnp.allclose(jnp.broadcast_to(jnp.asarray(count), (3, 4)), jnp.broadcast_to(want, (3, 4)))
    assert len(set(map(float, jnp.broadcast_to(want, (3, 4))[0]))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("grade", [1e-6, 1e6])
def test_no_depth_overflows(grade):
    """Twenty layers: weights far beyond what float32 holds, and yet displacements are finite, at all layers."""
    keys = jax.random.split(jax.random.key(0), 20)
    weights = [jnp.eye(3) + 0.1 * jax.random.normal(k, (3, 3)) for k in keys]

    def loss(ws, x, y):
        for w in ws:
            x = jax.nn.relu(x @ w)
        return squared_error(x, y).mean()

    moved = eqxproj.filter_displacement(loss, metric=Metric(grade, 1e6), copies="none")(
        weights, jnp.ones((2, 3)), jnp.zeros((2, 3))
    )
    assert all(bool(jnp.all(jnp.isfinite(m))) for m in moved)
    if grade > 1:
        assert all(float(jnp.abs(m).max()) > 0 for m in moved)


def test_many_sweeps_do_not_grow_where_weights_are_clamped():
    """Each further sweep of a steep metric adds about a gradient, in residual layers too deep for exact weights."""
    keys = jax.random.split(jax.random.key(0), 6)
    layers = [(jax.random.normal(k, (16, 16)) / 8, jnp.zeros(16)) for k in keys]
    x, y = jax.random.normal(keys[0], (16, 16)), jnp.arange(16) % 10

    def loss(layers, x, y):
        (first, shift), *inner, (last, end) = layers
        x = jax.nn.relu(x @ first + shift)
        for w, b in inner:
            x = x + jax.nn.relu(x @ w + b)
        return cross_entropy(x @ last + end, y).mean()

    options = {"solver": eqxproj.AlternatingProjections(), "metric": Metric(1e3, 1e4), "tau": 0.1}
    sizes = []
    for steps in (24, 48):
        moved = eqxproj.filter_displacement(loss, steps=steps, **options)(layers, x, y)
        sizes.append(jnp.asarray([jnp.linalg.norm(w) for w, _ in moved]))
    assert jnp.all(sizes[0] > 0)
    assert jnp.all(sizes[1] < 4 * sizes[0]), sizes
