"""From a loss to its factor graph: what is known, what is a view, what is fused, and what the objective takes in."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj
from eqxproj.losses import cross_entropy, squared_error
from eqxproj.readers import output_weight, violation

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
Y = jnp.array([0, 1, 2, 0, 1])
P = {
    k: jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32)
    for i, (k, s) in enumerate({"a": (4, 6), "b": (6,), "c": (6, 6), "d": (6, 3)}.items())
}


def graph_of(loss, model, *args, data="constant"):
    return eqxproj.feasibility_problem(loss, model, *args, data=data, two_colors=False).graph


def logits(body):
    """The graph of a loss of `body(p, h) @ d`, h the first layer: what lies between the two products, in operations."""

    def loss(p, x, y):
        return cross_entropy(body(p, x @ p["a"]) @ p["d"], y).mean()

    graph = graph_of(loss, P, X, Y)
    return sorted(n.operation for n in graph.nodes if n.kind == "operation" and n.operation != "dot_general")


def inputs_of(graph, kind):
    return {n.operation for n in graph.nodes if n.kind == kind}


def operations(graph):
    return [n.operation for n in graph.nodes if n.kind == "operation"]


def objectives(graph):
    return [n for n in graph.nodes if n.kind == "objective"]


def operand_shapes(graph, node):
    return [graph.edges[e].variable.shape for e in node.edges]


# Known and unknown.


def linear(p, x, y):
    return squared_error(x @ p["a"], y).mean()


def test_data_is_constant():
    graph = graph_of(linear, P, X, jnp.ones((5, 6)))
    assert inputs_of(graph, "parameter") == {"['a']"}
    assert not inputs_of(graph, "data")
    (product,) = [n for n in graph.nodes if n.operation == "dot_general"]
    assert product.unknown == (False, True)


def test_pinned_data_is_a_variable():
    graph = graph_of(linear, P, X, jnp.ones((5, 6)), data="pinned")
    assert [graph.values[n.outputs[0]].shape for n in graph.nodes if n.kind == "data"] == [(5, 4)]
    (product,) = [n for n in graph.nodes if n.operation == "dot_general"]
    assert product.unknown == (True, True)


def test_integers_are_never_pinned():
    def loss(p, x, i, y):
        return cross_entropy((x @ p["a"])[i] @ p["d"], y).mean()

    graph = graph_of(loss, P, X, jnp.arange(5), Y, data="pinned")
    assert [graph.values[n.outputs[0]].dtype for n in graph.nodes if n.kind == "data"] == [jnp.float32]


def test_what_depends_on_no_parameter_is_evaluated():
    def loss(p, x, y):
        x = jnp.sort(jnp.sign(x @ x.T) @ x, 0) + jnp.argmax(x, 1)[:, None]
        return squared_error(x @ p["a"], y).mean()

    problem = eqxproj.feasibility_problem(loss, P, X, jnp.ones((5, 6)))
    assert operations(problem.graph) == ["dot_general"]
    (index,) = [v.index for v in problem.graph.nodes[1].equation.inputs if v.shape == (5, 4)]
    want = jnp.sort(jnp.sign(X @ X.T) @ X, 0) + jnp.argmax(X, 1)[:, None]
    np.testing.assert_allclose(problem.known[index], want, rtol=1e-6)


def test_stop_gradient_is_known():
    """What it returns is held at the value of the forward pass, whatever it is a function of."""

    def loss(p, x, y):
        gate = jax.lax.stop_gradient(jnp.sort(jnp.tanh(x @ p["c"][:4]), -1))
        return squared_error((x @ p["a"]) * gate, y).mean()

    problem = eqxproj.feasibility_problem(loss, P, X, jnp.ones((5, 6)))
    assert inputs_of(problem.graph, "parameter") == {"['a']"}
    assert "sort" not in operations(problem.graph)
    assert any(
        np.allclose(k, jnp.sort(jnp.tanh(X @ P["c"][:4]), -1)) for k in problem.known.values() if k.shape == (5, 6)
    )


def test_parameter_used_only_under_stop_gradient_is_unused():
    def loss(p, x, y):
        return squared_error(x @ (p["a"] + jax.lax.stop_gradient(p["c"][:4])), y).mean()

    graph = graph_of(loss, P, X, jnp.ones((5, 6)))
    assert [v is None for v in graph.parameters] == [False, True, True, True]


def test_loss_that_does_not_depend_on_the_model():
    with pytest.raises(ValueError, match="does not depend on any floating-point array of `model`"):
        graph_of(lambda p, x: jax.lax.stop_gradient(x @ p["a"]).sum(), P, X)


def test_data_option_is_checked(untyped):
    with pytest.raises(ValueError, match='`data` must be "constant" or "pinned", got \'fixed\''):
        graph_of(linear, P, X, jnp.ones((5, 6)), data="fixed")


# Views.

W = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)}
TWO = {**W, "z": jnp.asarray(np.random.default_rng(2).normal(size=(2, 4)), jnp.float32)}
MASK = jnp.asarray(np.random.default_rng(3).random((3, 4)) > 0.5)

VIEWS = {
    "identity": lambda w: w,
    "reshape": lambda w: w.reshape(2, 6),
    "transpose": lambda w: w.T,
    "slice": lambda w: w[1:, ::2],
    "squeeze": lambda w: w[1],
    "broadcast": lambda w: jnp.broadcast_to(w[:, None], (3, 2, 4)),
    "rev": lambda w: w[::-1],
    "split": lambda w: jnp.split(w, 2, 1)[1],
    "split_twice": lambda w: jnp.concatenate(jnp.split(w, [1], 0)[::-1], 0),
    "pad": lambda w: jnp.pad(w, ((1, 0), (2, 1))),
    "pad_negative": lambda w: jax.lax.pad(w, jnp.float32(0), [(-1, 0, 0), (0, 0, 1)]),
    "pad_with_value": lambda w: jnp.pad(w, 1, constant_values=3.0),
    "gather": lambda w: w[jnp.array([0, 2, 2, 0])],
    "take_along": lambda w: jnp.take_along_axis(w, jnp.array([[0], [3], [1]]), 1),
    "embedding": lambda w: jnp.take(w, jnp.array([[0, 1], [2, 2]]), axis=0),
    "dynamic_slice": lambda w: jax.lax.dynamic_slice(w, (jnp.int32(1), jnp.int32(0)), (2, 3)),
    "repeat": lambda w: jnp.repeat(w, 2, axis=0),
    "tile": lambda w: jnp.tile(w, (2, 1)),
    "select": lambda w: jnp.where(MASK, w, 2.0),
    "select_both": lambda w: jnp.where(MASK, w, w[::-1]),
    "concatenate_self": lambda w: jnp.concatenate([w, w[:1], jnp.ones((1, 4))]),
    "mirrored": lambda w: jnp.concatenate([w, w[::-1]]),
    "tril": lambda w: jnp.tril(w),
    "unstack": lambda w: jnp.concatenate(jnp.unstack(w)[::-1]),
    "stack": lambda w: jnp.stack([w, w.T.reshape(3, 4)]),
}
TWO_VIEWS = {
    "concatenate": lambda w, v: jnp.concatenate([w, v]),
    "select": lambda w, v: jnp.where(MASK, w, jnp.pad(v, ((1, 0), (0, 0)))),
    "nested": lambda w, v: jnp.concatenate([v[::-1].T, jnp.stack([w[0], w[2]], 1)], 1)[jnp.array([0, 0, 3])],
    "dynamic_update_slice": lambda w, v: jax.lax.dynamic_update_slice(w, v, (1, 0)),
}


def matrix(f, arrays):
    """The dense matrix of an affine map of arrays, from unit vectors, and its constant."""
    sizes = [a.size for a in arrays]

    def flat(vector):
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        return np.asarray(f(*(jnp.asarray(p.reshape(a.shape)) for p, a in zip(parts, arrays, strict=True)))).ravel()

    constant = flat(np.zeros(sum(sizes), np.float32))
    columns = [flat(row) - constant for row in np.eye(sum(sizes), dtype=np.float32)]
    return np.stack(columns, 1), constant


def viewed(f, model):
    """The problem of a product with `f(*parameters)` as its only unknown, and the edge that shows it."""
    out = f(*model.values())
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, out.size)), jnp.float32)

    def loss(p, x, y):
        return squared_error(x @ f(*p.values()).reshape(-1, 1), y).mean()

    problem = eqxproj.feasibility_problem(loss, model, x, jnp.ones((2, 1)), copies="none")
    assert operations(problem.graph) == ["dot_general"]
    (node,) = [n for n in problem.graph.nodes if n.kind == "operation"]
    (edge,) = node.edges
    return problem, edge


@pytest.mark.parametrize(
    "f, model",
    [(f, W) for f in VIEWS.values()] + [(f, TWO) for f in TWO_VIEWS.values()],
    ids=[*VIEWS, *(f"two_{k}" for k in TWO_VIEWS)],
)
def test_views(f, model):
    """A view and its transpose are one 0/1 matrix, and the number of copies is its column sums."""
    problem, edge = viewed(f, model)
    spec = problem.graph.edges[edge]
    names = [problem.graph.nodes[problem.graph.producers[v]].operation[2:-2] for v in spec.sources]
    shown = [model[n] for n in names]
    assert spec.is_parameter
    np.testing.assert_array_equal(np.asarray(spec.view.show(problem.known, shown)).ravel(), f(*model.values()).ravel())
    dense, _ = matrix(lambda *v: spec.view.show(problem.known, v), shown)
    assert set(np.unique(dense)) <= {0.0, 1.0} and (dense.sum(1) <= 1).all()
    order = [list(model).index(n) for n in names]
    want, _ = matrix(f, list(model.values()))
    blocks = np.split(want, np.cumsum([a.size for a in model.values()])[:-1], 1)
    np.testing.assert_array_equal(dense, np.concatenate([blocks[i] for i in order], 1))
    u = np.random.default_rng(5).normal(size=spec.variable.shape).astype(np.float32)
    back = spec.view.transpose(problem.known, jnp.asarray(u))
    got = np.concatenate([np.asarray(b).ravel() for b in back])
    np.testing.assert_allclose(got, dense.T @ u.ravel(), rtol=1e-5, atol=1e-6)
    counts = np.split(dense.sum(0), np.cumsum([a.size for a in shown])[:-1])
    for value, count in zip(spec.sources, counts, strict=True):
        assert problem.graph.readers[value] == (edge,)
        share = np.asarray(output_weight(problem, value)[1])
        found = np.broadcast_to(share, problem.graph.values[value].shape)
        np.testing.assert_allclose(found.ravel(), count, rtol=1e-6)


def test_view_with_unknown_indices_is_no_view():
    """An index that depends on a parameter is chosen by a node of its own, not by a view."""

    def loss(p, x, y):
        chosen = jnp.argmax(x @ p["a"], -1)
        return squared_error(p["c"][chosen], y).mean()

    graph = graph_of(loss, P, X, jnp.ones((5, 6)))
    (chooser,) = [n for n in graph.nodes if "argmax" in n.operation]
    assert chooser.describe_rule() == "selection" and len(chooser.edges) == 2


def test_views_impose_no_constraint():
    def loss(p, x, y):
        h = jnp.concatenate([(x @ p["a"])[:, ::-1].T, p["c"].T[:, :5]], 0).T
        return squared_error(h[:, :6] @ p["d"] + h[:, 6:] @ p["d"], y).mean()

    graph = graph_of(loss, P, X, jnp.ones((5, 3)))
    assert sorted(operations(graph)) == ["add", "dot_general", "dot_general", "dot_general"]


def test_edge_over_a_parameter_and_a_state_is_no_parameter_edge():
    def loss(p, x, y):
        return squared_error(jnp.concatenate([x @ p["a"], p["c"]]) @ p["d"], y).mean()

    graph = graph_of(loss, P, X, jnp.ones((11, 3)))
    flags = {tuple(e.variable.shape): e.is_parameter for e in graph.edges}
    assert flags == {(11, 3): False, (11, 6): False, (6, 3): True, (4, 6): True}


# Fusion.


@pytest.mark.parametrize(
    "body, want",
    [
        (lambda p, h: jax.nn.relu(h), ["max"]),
        (lambda p, h: jax.nn.relu(h + p["b"]), ["add+max"]),
        (lambda p, h: h * jax.nn.sigmoid(h), ["logistic+mul"]),
        (lambda p, h: jax.nn.silu(h + p["b"]), ["add+logistic+mul"]),
        (lambda p, h: jax.nn.relu(2.0 * h - 1.0), ["mul+sub+max"]),
        (lambda p, h: h + p["b"], ["add"]),
        (lambda p, h: h, []),
        (lambda p, h: jnp.tanh(jnp.tanh(h)), ["tanh"]),
        (lambda p, h: h + jax.nn.relu(h @ p["c"]), ["add", "max"]),
        (lambda p, h: jax.nn.relu(h) + jax.nn.relu(h @ p["c"]), ["add", "max", "max"]),
        (lambda p, h: jnp.tanh(h + h @ p["c"] - p["b"]), ["add+sub+tanh"]),
        (lambda p, h: jnp.where(h > 0, h, 0.1 * h), ["mul+gt+select_n"]),
        (lambda p, h: h * (h @ p["c"]), ["mul"]),
        (lambda p, h: jnp.tanh(h) * jax.nn.sigmoid(h @ p["c"]), ["logistic", "mul", "tanh"]),
        (lambda p, h: jnp.maximum(h, h @ p["c"]), ["max"]),
    ],
    ids=[
        "relu",
        "biased relu",
        "swish",
        "silu",
        "scaled",
        "bias",
        "none",
        "twice",
        "residual",
        "residual of relu",
        "sum of three",
        "where",
        "product",
        "gate",
        "maximum",
    ],
)
def test_fusion(body, want):
    found = logits(body)
    assert [sorted(set(f.split("+"))) for f in found] == [sorted(set(w.split("+"))) for w in want]


def test_shared_junction_is_one_value():
    """A sum that two functions read is a node of its own; one that one function reads is part of it."""
    shared = logits(lambda p, h: jnp.tanh(h + p["b"]) @ p["c"] + jax.nn.relu(h + p["b"]))
    assert [sorted(set(s.split("+"))) for s in shared] in ([["add"], ["add", "max"], ["add", "tanh"]], [["add"]] * 2)
    once = logits(lambda p, h: (lambda s: jnp.tanh(s) @ p["c"] + jax.nn.relu(s))(h + p["b"]))
    assert sorted(once) == ["add", "add", "max", "tanh"]


def test_known_factors_are_part_of_the_node():
    graph = graph_of(
        lambda p, x, y: squared_error(jax.nn.relu((x @ p["a"]) * x[:, :1] / 3 + x.sum()) @ p["d"], y).mean(),
        P,
        X,
        jnp.ones((5, 3)),
    )
    scalar = [n for n in graph.nodes if n.operation.endswith("max")]
    assert len(scalar) == 1 and scalar[0].rule.describe(scalar[0].equation) == "scalar: relu"
    assert sorted(operations(graph)) == sorted(["dot_general", "dot_general", scalar[0].operation])


def test_mean_over_an_axis_is_affine():
    graph = graph_of(lambda p, x, y: squared_error((x @ p["a"]).mean(0) @ p["d"], y).mean(), P, X, jnp.ones(3))
    affine = [n.rule.describe(n.equation) for n in graph.nodes if "sum" in n.operation or "div" in n.operation]
    assert affine and set(affine) <= {"affine", "identity"}


def gelu_mlp(p, x, y):
    return cross_entropy(jax.nn.gelu(x @ p["a"] + p["b"]) @ p["d"], y).mean()


def residual(p, x, y):
    h = jax.nn.relu(x @ p["a"])
    for _ in range(2):
        h = h + jax.nn.relu(h @ p["c"] + p["b"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ p["d"], y).mean()


def attention(p, x, y):
    h = jnp.tanh(x @ p["a"])
    weights = jax.nn.softmax(h @ p["c"] @ h.T, -1)
    return cross_entropy(weights @ h @ p["d"], y).mean()


def normalized(p, x, y):
    h = x @ p["a"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["b"]
    return cross_entropy(jax.nn.silu(h) @ p["d"], y).mean()


def tied(p, x, y):
    return squared_error(
        (jnp.tanh(x @ p["a"]) @ p["a"].T)[:, :3] + jnp.max(x @ p["a"] * p["b"], -1, keepdims=True), y
    ).mean()


LOSSES = {"gelu": gelu_mlp, "residual": residual, "attention": attention, "normalized": normalized, "tied": tied}


@pytest.mark.parametrize("data", ["constant", "pinned"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_constraint_holds_on_the_forward_pass(name, data):
    """Each node's rule, evaluated at what its edges show, gives the value of the forward pass."""
    y = jnp.ones((5, 3)) if name == "tied" else Y
    problem = eqxproj.feasibility_problem(LOSSES[name], P, X, y, data=data)
    np.testing.assert_allclose(problem.value, LOSSES[name](P, X, y), rtol=1e-6)
    unchecked = eqxproj.combine([1.0], [problem.start(store_copies=False)])  # no output is known to be up to date
    assert not any(unchecked.up_to_date)
    assert float(violation(problem, unchecked)) < 1e-5
    assert all(problem.graph.readers[v] for v in range(len(problem.graph.values)))


# The objective.


def test_mean_and_sum_count_one_sample():
    """tau is the factor of one sample's loss, whatever a mean divides by."""
    for reduce, largest in ((jnp.mean, 1 / 5), (jnp.sum, 1.0)):
        graph = graph_of(lambda p, x, y, f=reduce: f(cross_entropy(x @ p["a"], y)), P, X, Y)
        (node,) = objectives(graph)
        assert node.rule.describe(node.equation) == "prox (cross_entropy)"
        assert (graph.largest, node.scale) == (pytest.approx(largest), 1.0)


def test_weighted_mean_with_a_mask():
    def loss(p, x, y, mask):
        return (cross_entropy(x @ p["a"], y) * mask).sum() / mask.sum()

    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    graph = graph_of(loss, P, X, Y, mask)
    (node,) = objectives(graph)
    assert node.rule.describe(node.equation) == "prox (cross_entropy)"
    assert sorted(v.shape for v, _ in node.rule.factors) == [(), (5,)]


def test_masked_samples_ask_for_nothing():
    def loss(p, x, y, mask):
        return (cross_entropy(x @ p["a"] @ p["c"], y) * mask).mean()

    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    moved = eqxproj.filter_displacement(loss, metric=eqxproj.Metric(1e6, 1e6))
    np.testing.assert_allclose(
        moved(P, X, Y, mask)["c"], moved(P, X.at[jnp.array([1, 4])].multiply(3.0), Y, mask)["c"], rtol=1e-5, atol=1e-7
    )


def test_sum_of_two_losses():
    def loss(p, x, y, z):
        h = jnp.tanh(x @ p["a"])
        return cross_entropy(h @ p["d"], y).mean() + 0.5 * squared_error(h @ p["c"], z).mean()

    graph = graph_of(loss, P, X, Y, jnp.ones((5, 6)))
    found = {n.rule.describe(n.equation): n.scale for n in objectives(graph)}
    assert found == {"prox (cross_entropy)": pytest.approx(1.0), "prox (squared_error)": pytest.approx(0.5 / 30 * 5)}


def test_custom_and_generic_terms():
    def loss(p, x, y, z):
        h = jnp.tanh(x @ p["a"])
        return cross_entropy(h @ p["d"], y).mean() - 0.1 * jnp.mean(jnp.cos(h @ p["c"] - z))

    graph = graph_of(loss, P, X, Y, jnp.ones((5, 6)))
    assert sorted(n.rule.describe(n.equation) for n in objectives(graph)) == ["local prox", "prox (cross_entropy)"]
    assert sorted(operations(graph)) == ["dot_general", "dot_general", "dot_general", "tanh"]


def test_penalty_on_parameters():
    """The penalty belongs to the objective; the network's layers do not become part of it."""

    def loss(p, x, y):
        penalty = sum(jnp.sum(w**2) for w in p.values())
        return cross_entropy(jnp.tanh(x @ p["a"]) @ p["d"], y).mean() + 1e-3 * penalty

    graph = graph_of(loss, P, X, Y)
    assert sorted(operations(graph)) == ["dot_general", "dot_general", "tanh"]
    shapes = sorted(s for n in objectives(graph) if n.rule.label == "local prox" for s in operand_shapes(graph, n))
    assert shapes == [(4, 6), (6,), (6, 3), (6, 6)]


def test_loss_without_data_is_all_objective():
    graph = graph_of(lambda p: jnp.sum((p["a"] @ p["c"] - 1) ** 2), P)
    assert operations(graph) == []
    (node,) = objectives(graph)
    assert sorted(operand_shapes(graph, node)) == [(4, 6), (6, 6)]


def test_logits_reach_a_loss_of_any_library_directly():
    def loss(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ p["a"]) @ p["d"] / 2.0, y).mean()

    graph = graph_of(loss, P, X, Y)
    (node,) = objectives(graph)
    assert sorted(operations(graph)) == ["dot_general", "dot_general", "tanh"]
    assert operand_shapes(graph, node) == [(5, 3)]


def test_negative_loss_has_no_prox():
    """A custom loss with a negative factor is maximized: its prox does not apply, and the generic one takes it."""
    graph = graph_of(lambda p, x, y: -cross_entropy(x @ p["a"], y).mean(), P, X, Y)
    assert [n.rule.describe(n.equation) for n in objectives(graph)] == ["local prox"]


def test_hard_objective():
    assert graph_of(lambda p, x, y: eqxproj.losses.margin(x @ p["a"], y).mean(), P, X, Y).hard
    assert not graph_of(lambda p, x, y: cross_entropy(x @ p["a"], y).mean(), P, X, Y).hard


def test_vmapped_loss_and_model():
    """The loss of one sample, mapped over the batch, gives the graph of the batched loss."""
    model = eqx.nn.MLP(4, 3, 6, 1, key=jax.random.key(0))

    def batched(model, x, y):
        return cross_entropy(jax.vmap(model)(x), y).mean()

    def mapped(model, x, y):
        return jax.vmap(lambda x, y: cross_entropy(model(x), y))(x, y).mean()

    rules = [[n.describe_rule() for n in graph_of(f, model, X, Y).nodes] for f in (batched, mapped)]
    assert sorted(rules[0]) == sorted(rules[1])
    assert "prox (cross_entropy)" in rules[1]
