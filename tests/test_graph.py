"""The factor graph: its order, its two colors on random graphs, and what `explain` prints."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj
from eqxproj.losses import cross_entropy, squared_error

WIDTH, BATCH = 6, 5


def weight(p, k):
    return p[f"w{k % 4}"]


LAYERS = (
    lambda p, a, b, k: jax.nn.relu(b @ weight(p, k)),
    lambda p, a, b, k: jnp.tanh(b @ weight(p, k) + p["b"]),
    lambda p, a, b, k: b + jax.nn.relu(b @ weight(p, k)),
    lambda p, a, b, k: a + b,
    lambda p, a, b, k: a * b,
    lambda p, a, b, k: jnp.concatenate([a, b], -1) @ p[f"c{k % 2}"],
    lambda p, a, b, k: jnp.maximum(a, b @ weight(p, k)),
    lambda p, a, b, k: b[:, ::-1] @ weight(p, k).T,
    lambda p, a, b, k: jax.nn.silu(b) @ jax.nn.softmax(weight(p, k)),
    lambda p, a, b, k: b @ (weight(p, k) @ p["w0"]),
)


def random_loss(seed):
    """A random network: layers, residuals, concatenating skips, products, shared and tied weights, maxima."""
    rng = np.random.default_rng(seed)
    model = {f"w{i}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for i in range(4)}
    model |= {f"c{i}": jnp.asarray(rng.normal(size=(2 * WIDTH, WIDTH)), jnp.float32) for i in range(2)}
    model["b"] = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)
    steps = rng.integers(0, len(LAYERS), size=(rng.integers(1, 9), 4))

    def loss(p, x, y):
        pool = [x @ p["w0"]]
        for kind, i, j, k in steps:
            a, b = pool[i % len(pool)], pool[-1 - j % len(pool)]
            pool.append(LAYERS[kind](p, a, b, k))
        out = sum(pool[-2:])
        values = squared_error(out, y).mean()
        return values + 1e-3 * jnp.sum(p["w1"] ** 2) if seed % 3 == 0 else values

    x = jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)
    return loss, model, x, jnp.zeros((BATCH, WIDTH))


def assert_ordered(graph):
    """An edge leads from a greater depth to a smaller one, and the forward order from producers to consumers."""
    place = {node: i for i, node in enumerate(graph.forward_order)}
    assert sorted(place) == list(range(len(graph.nodes)))
    for edge in graph.edges:
        for value in edge.sources:
            producer = graph.producers[value]
            assert graph.depth[producer] > graph.depth[edge.consumer]
            assert graph.distance[producer] <= graph.distance[edge.consumer] + 1
            assert place[producer] < place[edge.consumer]


def assert_consistent(problem):
    """Positions refer to one another as they must, and all of the graph leads to the objective."""
    graph = problem.graph
    for i, node in enumerate(graph.nodes):
        assert all(graph.edges[e].consumer == i for e in node.edges)
        assert all(graph.producers[v] == i for v in node.outputs)
        assert (node.kind == "objective") == (graph.depth[i] == 0)
        assert bool(node.edges) == (node.kind not in ("parameter", "data"))
    for value in range(len(graph.values)):
        assert all(value in graph.edges[e].sources for e in graph.readers[value])
    assert sorted(e for n in graph.nodes for e in n.edges) == list(range(len(graph.edges)))
    for order in ("topological", "breadth_first"):
        layers = eqxproj.as_published(problem).graph.layers if order == "breadth_first" else graph.layers
        listed = [n for layer in layers for n in layer]
        # A breadth-first walk meets a node once for each length of way to it.
        assert sorted(set(listed) if order == "breadth_first" else listed) == list(range(len(graph.nodes)))
        assert set(layers[0]) == set(graph.objectives)
    assert sorted(graph.color(0) + graph.color(1)) == list(range(len(graph.nodes)))


@pytest.mark.parametrize("data", ["constant", "pinned"])
@pytest.mark.parametrize("seed", range(40))
def test_two_colors_of_random_graphs(seed, data):
    loss, *args = random_loss(seed)
    plain = eqxproj.feasibility_problem(loss, *args, data=data, two_colors=False).graph
    assert_ordered(plain)
    problem = eqxproj.feasibility_problem(loss, *args, data=data)
    graph = problem.graph
    assert_ordered(graph)
    assert_consistent(problem)
    assert graph.conflicts == ()
    for edge in graph.edges:
        assert all(graph.colors[graph.producers[v]] != graph.colors[edge.consumer] for v in edge.sources)
    assert all(graph.colors[i] == 0 for i in graph.objectives)
    added = [n for n in graph.nodes if n.kind == "identity"]
    assert len(graph.nodes) == len(plain.nodes) + len(added)
    assert bool(added) == bool(plain.conflicts)


def test_random_graphs_are_various():
    """The property above means something: some graphs have conflicts, and some edges show several values."""
    plain = [eqxproj.feasibility_problem(*case, two_colors=False).graph for case in map(random_loss, range(40))]
    assert 5 <= sum(bool(g.conflicts) for g in plain) <= 38
    assert any(len(e.sources) > 1 for g in plain for e in g.edges)
    assert any(len(readers) > 2 for g in plain for readers in g.readers)


def test_a_chain_needs_no_identity():
    model = eqx.nn.MLP(4, 3, 5, 3, key=jax.random.key(0))
    problem = eqxproj.feasibility_problem(
        lambda m, x, y: squared_error(jax.vmap(m)(x), y).mean(), model, jnp.ones((5, 4)), jnp.ones((5, 3))
    )
    assert problem.graph.conflicts == ()
    assert "identity" not in {node.kind for node in problem.graph.nodes}


def test_identity_on_the_conflicting_value_alone():
    """An edge that shows two values, of which one conflicts, gets an identity node on that one."""

    def loss(p, x, y):
        h = x @ p["a"]
        return squared_error(jnp.concatenate([h, jnp.tanh(h)], -1) @ p["b"], y).mean()

    model = {"a": jnp.ones((4, 6)), "b": jnp.ones((12, 3))}
    graph = eqxproj.feasibility_problem(loss, model, jnp.ones((5, 4)), jnp.ones((5, 3))).graph
    assert [n.kind for n in graph.nodes].count("identity") == 1
    (edge,) = [e for e in graph.edges if len(e.sources) > 1]
    kinds = {graph.nodes[graph.producers[v]].kind for v in edge.sources}
    assert len(edge.sources) == 2 and "operation" in kinds


def test_depth_is_the_longest_way_and_distance_the_shortest():
    def loss(p, x, y):
        h = x @ p["a"]
        return squared_error(h + jnp.tanh(h @ p["b"]), y).mean()

    model = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 6))}
    graph = eqxproj.feasibility_problem(loss, model, jnp.ones((5, 4)), jnp.ones((5, 6)), two_colors=False).graph
    found = {(n.operation, graph.depth[i], graph.distance[i]) for i, n in enumerate(graph.nodes)}
    assert found == {
        ("objective", 0, 0),
        ("add", 1, 1),
        ("tanh", 2, 2),
        ("dot_general", 3, 3),
        ("['b']", 4, 4),
        ("dot_general", 4, 2),
        ("['a']", 5, 3),
    }


def test_solvers_of_two_colors_need_them():
    def loss(p, x, y):
        h = x @ p["a"]
        return squared_error(h + h @ p["b"], y).mean()

    args = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 6))}, jnp.ones((5, 4)), jnp.ones((5, 6))
    problem = eqxproj.feasibility_problem(loss, *args, two_colors=False)
    assert problem.graph.conflicts
    with pytest.raises(ValueError, match="DouglasRachford projects all nodes of one color together.*two_colors=True"):
        eqxproj.solve(problem, eqxproj.DouglasRachford(), steps=1)
    assert eqxproj.solve(problem, eqxproj.CyclicProjections(), steps=1).stats["steps"] == 1


# What `explain` prints.


class Net(eqx.Module):
    first: jax.Array
    gate: jax.Array
    last: jax.Array
    spare: jax.Array

    def __call__(self, x):
        h = jnp.tanh(x @ self.first)
        h = h * jax.nn.softmax(h @ self.gate)
        return h @ self.last


def net_loss(net, x, y):
    return cross_entropy(net(x), y).mean()


def explained(loss=net_loss, **options):
    shapes = ((4, 6), (6, 6), (6, 3), (2,))
    keys = jax.random.split(jax.random.key(0), 4)
    net = Net(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))
    return eqxproj.feasibility_problem(loss, net, jnp.ones((5, 4)), jnp.array([0, 1, 2, 0, 1]), **options)


@pytest.fixture(scope="module")
def problem():
    return explained()


def test_explain_has_a_line_a_node(problem):
    head, rule, *lines = problem.explain().split("\n")
    assert head.split() == ["node", "operation", "rule", "shapes", "color", "source"]
    assert set(rule) == {"-", " "}
    body = lines[: lines.index("")]
    assert sorted(int(line.split()[0]) for line in body) == list(range(len(problem.graph.nodes)))
    depths = [problem.graph.depth[int(line.split()[0])] for line in body]
    assert depths == sorted(depths)
    start, stop = head.index("color"), head.index("source")
    for line in body:
        node = int(line.split()[0])
        spec = problem.graph.nodes[node]
        assert line[head.index("operation") :].startswith(spec.operation)
        assert line[head.index("rule") :].startswith(spec.describe_rule())
        assert line[start:stop].strip() == "AB"[problem.graph.colors[node]]
        assert line[stop:] == spec.source
        assert all(problem.graph.values[v].describe() in line for v in spec.outputs)
        assert all(problem.graph.edges[e].variable.describe() in line for e in spec.edges)


def test_explain_shows_shapes_and_sources(problem):
    text = problem.explain()
    first = Net.__call__.__code__.co_firstlineno
    (line,) = [x for x in text.split("\n") if "tanh" in x]
    assert "float32[5, 6] -> float32[5, 6]" in line
    assert f"test_graph.py:{first + 1} (Net.__call__)" in line
    (line,) = [x for x in text.split("\n") if x.split()[1:2] == ["last"]]
    assert "all copies equal" in line and "float32[6, 3]" in line
    assert f"test_graph.py:{net_loss.__code__.co_firstlineno + 1} (net_loss)" in text


def test_explain_ends_with_what_to_know(problem):
    closing = problem.explain().split("\n\n")[1].split("\n")
    local = [i for i, n in enumerate(problem.graph.nodes) if n.rule is not None and "local" in n.rule.label]
    assert local and closing[0] == f"Through the generic local solver (derivatives of the node alone): nodes {local}."
    assert closing[1:] == ["Parameters that the loss does not depend on: spare.", "Operations without a rule: none."]


def test_explain_without_local_nodes():
    text = explained(lambda net, x, y: cross_entropy(x @ net.first @ net.last, y).mean()).explain()
    assert "local" not in text
    assert text.endswith("Operations without a rule: none.")


def test_describe_names_operation_and_source(problem):
    node = problem.graph.objectives[0]
    assert problem.describe(node) == f"{node} (objective, objective) at {problem.graph.nodes[node].source}"
