"""All operations in one color, and the gains of their constraints: weighted means by hand, and what refuses them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj
from eqxproj.losses import equal, squared_error
from eqxproj.readers import operand, value_of
from eqxproj.solvers import onto

pytestmark = pytest.mark.usefixtures("quick_compilation")
RRR = eqxproj.RelaxedReflectReflect
RATE = 0.1


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = random(0, 3, 2)
MODEL = {"w1": random(1, 2, 2), "b": random(2, 2), "w2": random(3, 2)}


def network(model, x, y):
    return jnp.sum(equal(jnp.tanh(x @ model["w1"] + model["b"]) @ model["w2"], y))


@pytest.fixture(scope="module")
def problem():
    return eqxproj.feasibility_problem(network, MODEL, X, jnp.array([0.5, -0.5, 1.0]), concurrence=True)


def places(problem):
    """The nodes and edges of the network by name: operations, and what holds the copies of which value for which."""
    graph = problem.graph
    of = {n: [i for i, node in enumerate(graph.nodes) if node.operation == n] for n in ("dot_general", "add+tanh")}
    second, first = sorted(of["dot_general"], key=lambda i: graph.depth[i])
    (middle,) = of["add+tanh"]
    identity = {graph.nodes[graph.producers[graph.edges[node.edges[0]].sources[0]]].operation: i
                for i, node in enumerate(graph.nodes) if node.kind == "identity"}  # fmt: skip
    return first, middle, second, identity["dot_general"], identity["add+tanh"]


def copies(problem, state):
    """All copies by name, with items first: `w1[i, j, k]`, `s[i, j]` and `s_read`, `b`, `h` and `h_read`, `w2`, `y`."""
    graph = problem.graph
    first, middle, second, of_s, of_h = places(problem)
    seen = [np.asarray(operand(problem, state, e)) for e in range(len(graph.edges))]
    shapes = {graph.edges[e].variable.shape: e for e in graph.nodes[second].edges}
    by_parameter = {graph.edges[e].is_parameter: e for e in graph.nodes[middle].edges}
    return {
        "w1": seen[graph.nodes[first].edges[0]][0],
        "s": seen[graph.nodes[of_s].edges[0]],
        "s_read": seen[by_parameter[False]],
        "b": seen[by_parameter[True]],
        "h": seen[graph.nodes[of_h].edges[0]],
        "h_read": seen[shapes[3, 2]][0, :, 0],
        "w2": seen[shapes[2,]][0, :, 0],
        "y": seen[graph.nodes[[n.kind for n in graph.nodes].index("objective")].edges[0]],
    }


def gains(problem, state):
    first, middle, second, *_ = places(problem)
    return [np.asarray(state.gains[n]).reshape(s) for n, s in ((first, (3, 2)), (middle, (3, 2)), (second, (3,)))]


def test_the_colors(problem):
    plain = eqxproj.feasibility_problem(network, MODEL, X, jnp.ones(3))
    colors = {node.kind: set() for node in problem.graph.nodes}
    for node, color in zip(problem.graph.nodes, problem.graph.colors, strict=True):
        colors[node.kind].add(color)
    assert colors == {"operation": {1}, "objective": {0}, "parameter": {0}, "identity": {0}}
    assert not problem.graph.conflicts
    assert {plain.graph.colors[i] for i, n in enumerate(plain.graph.nodes) if n.kind == "operation"} == {0, 1}


def test_convex_problems_have_the_same_solution():
    x, wanted = random(4, 8, 3), jnp.array([0.5, -1.0, 2.0])

    def loss(model, x, y):
        return jnp.sum(equal(jnp.cumsum(x @ model), jnp.cumsum(y)))

    for concurrence in (True, False):
        made = eqxproj.feasibility_problem(loss, jnp.zeros(3), x, x @ wanted, concurrence=concurrence)
        found = eqxproj.solve(made, RRR(1.0), steps=1500, every=100).model
        np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.mark.slow
def test_they_start_at_one_and_their_mean_stays(problem):
    solver = RRR(0.5, reweight=RATE)
    start = solver.init(problem, jax.random.key(0))
    assert all(np.all(g == 1) for g in gains(problem, start))
    assert sum(g is not None for g in start.gains) == 3
    assert RRR(0.5).init(problem).gains == ()
    state = eqxproj.solve(problem, solver, steps=30, start="random", key=jax.random.key(0)).state
    found = np.concatenate([g.ravel() for g in gains(problem, state)])
    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    assert np.all(found > 0) and found.max() > 1.2 and found.min() < 0.8


def test_one_step_by_hand(problem):
    """The gaps of the constraints, from all copies by their names."""
    solver = RRR(0.5, reweight=RATE)
    state = _unlike(problem, solver.init(problem, jax.random.key(1)))

    @jax.jit
    def stepped(state):
        on_a = onto(problem, state, 0)
        on_b = onto(problem, eqxproj.combine((2.0, -1.0), (on_a, state)), 1)
        return on_a, on_b, solver.step(problem, state)

    on_a, on_b, new = stepped(state)
    a, b = copies(problem, on_a), copies(problem, on_b)
    square = {name: np.square(b[name] - a[name]) for name in a}
    squares = [
        square["w1"].sum(-1) + square["s"],
        square["s_read"] + square["b"] + square["h"],
        square["h_read"].sum(-1) + square["w2"].sum(-1) + square["y"],
    ]
    mean = np.concatenate([x.ravel() for x in squares]).mean()
    for old, found, x in zip(gains(problem, state), gains(problem, new), squares, strict=True):
        np.testing.assert_allclose(found, old + RATE * (x / mean - old), rtol=1e-4)


def _unlike(problem, state):
    """The state with gains that differ."""
    rng = np.random.default_rng(5)
    new = [None if g is None else jnp.asarray(rng.uniform(0.2, 3.0, g.shape), g.dtype) for g in state.gains]
    return replace(state, gains=tuple(new))


def test_the_consensus_is_the_weighted_mean(problem):
    state = _unlike(problem, RRR(0.5, reweight=RATE).init(problem, jax.random.key(2)))
    c, (first, middle, second) = copies(problem, state), gains(problem, state)
    consensus = jax.jit(lambda state: onto(problem, state, 0))
    new = consensus(state)
    one = second[:, None]
    want = {
        "w1": (first[..., None] * c["w1"]).sum(0) / first.sum(0)[:, None],
        "b": (middle * c["b"]).sum(0) / middle.sum(0),
        "w2": (one * c["w2"]).sum(0) / one.sum(0),
        "s": (first * c["s"] + middle * c["s_read"]) / (first + middle),
        "h": (middle * c["h"] + one * c["h_read"]) / (middle + one),
        "y": np.array([0.5, -0.5, 1.0]),
    }
    found = copies(problem, new)
    for name in ("w1", "b", "w2"):
        np.testing.assert_allclose(found[name], np.broadcast_to(want[name], found[name].shape), rtol=1e-4, atol=1e-5)
    for name in ("s", "h", "y"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-4, atol=1e-5)
    for name in ("s", "h"):
        np.testing.assert_allclose(found[name + "_read"], want[name], rtol=1e-4, atol=1e-5)
    values = dict(zip(problem.trace.names, problem.graph.parameters, strict=True))
    np.testing.assert_allclose(value_of(problem, new, values["['b']"]), want["b"], rtol=1e-4, atol=1e-5)
    # With gains of one it is the projection without gains.
    ones = replace(state, gains=tuple(None if g is None else jnp.ones_like(g) for g in state.gains))
    plain = consensus(replace(state, gains=()))
    for a, b in zip(copies(problem, consensus(ones)).values(), copies(problem, plain).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_contradicts_itself_stiffens():
    """The last two items want the same output to be two numbers."""
    x, y = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), jnp.array([1.0, 1.0, 1.0, 3.0])
    made = eqxproj.feasibility_problem(lambda w, x, y: jnp.sum(equal(x @ w, y)), jnp.zeros(2), x, y, concurrence=True)
    solver = RRR(0.5, reweight=0.02)
    (start,) = (np.ravel(g) for g in solver.init(made).gains if g is not None)
    np.testing.assert_array_equal(start, np.ones(4))
    assert RRR(0.5).init(made).gains == ()
    state = eqxproj.solve(made, solver, steps=300, every=50).state
    (found,) = (np.ravel(g) for g in state.gains if g is not None)
    assert found.mean() == pytest.approx(1.0, rel=1e-4)
    assert found[2:].min() > 1.3 * found[:2].max()


def test_what_has_no_place_for_gains():
    def made(loss=equal, **options):
        return eqxproj.feasibility_problem(
            lambda w, x, y: jnp.sum(loss(jnp.tanh(x @ w), y)), jnp.ones(2), X, jnp.zeros(3), **options
        )

    refused = [
        ({"metric": eqxproj.Metric(1.0, 10.0)}, "needs the unit metric, but `problem` has Metric"),
        ({"metric": eqxproj.Metric(2.0, 1.0)}, "needs the unit metric"),
        ({"copies": "none"}, 'moves the weights of copies. Make `problem` with copies="neuron"'),
        ({"concurrence": False}, "needs all operations in one color"),
        ({"loss": squared_error}, "needs a loss that is a set"),
    ]
    for options, match in refused:
        problem = made(**{"concurrence": True, **options})
        with pytest.raises(ValueError, match="`reweight` " + match):
            eqxproj.solve(problem, RRR(0.5, reweight=RATE), steps=1)
        assert eqxproj.RelaxedReflectReflect(0.5).check(problem) is None


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "much", True, None, jnp.ones(2)])
def test_bad_reweight(value, untyped):
    with pytest.raises(ValueError, match=r"`reweight` must be a number in \[0, 1\)"):
        RRR(0.5, reweight=value)
