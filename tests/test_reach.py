"""Where a gradient reaches, a displacement is the gradient; elsewhere, jumps answer under noise."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax import lax, nn

import eqxproj

pytestmark = pytest.mark.usefixtures("full_precision")

X, Y = jr.normal(jr.key(0), (12, 4)), jr.normal(jr.key(1), (12, 3))
stop = lax.stop_gradient


def parameters(**shapes):
    return {name: 0.7 * jr.normal(jr.fold_in(jr.key(2), i), s) for i, (name, s) in enumerate(shapes.items())}


def error(y):
    return jnp.mean((y - Y) ** 2)


def quantized(z, codes):
    """The nearest code; the straight-through value; the two losses of a vector quantization."""
    q = codes[jnp.argmin(jnp.sum((z[:, None] - codes) ** 2, -1), -1)]
    return z + stop(q - z), jnp.mean((stop(z) - q) ** 2) + 0.25 * jnp.mean((z - stop(q)) ** 2)


def vq_vae(m, x):
    z, losses = quantized(jnp.tanh(x @ m["e"]), m["codes"])
    return error(z @ m["d"]) + losses


def finite_scalars(m, x):
    z = 2 * jnp.tanh(x @ m["e"])
    return error((z + stop(jnp.round(z) - z)) @ m["d"])


def switch(m, x):
    """Top-1 routing with the value of the gate, and the loss that balances the load."""
    p = nn.softmax(nn.relu(x * m["s"]) @ m["g"])
    k = jnp.argmax(p, -1)
    y = jnp.take_along_axis(p, k[:, None], 1) * jnp.einsum("bi,bij->bj", x, m["w"][k])
    return error(y) + jnp.sum(nn.one_hot(k, 5).mean(0) * p.mean(0))


def two_experts(m, x):
    values, k = lax.top_k(x @ m["g"], 2)
    return error(jnp.einsum("bk,bi,bkij->bj", nn.softmax(values), x, m["w"][k]))


def residual_signs(m, x):
    h = x @ m["a"]
    for _ in range(2):
        h = h + jnp.sign(h @ m["w"])
    return error(h @ m["d"])


def one_value_read_in_parts(m, x):
    h = x @ m["a"]
    return error((h[:, :3] * jnp.sign(h[:, 3:])) @ m["d"])


def functions_with_a_slope(m, x):
    h = x @ m["a"]
    h = h - jnp.floor(h) + jnp.where(jnp.abs(h) > 1, h, 0.0) + jnp.mod(h, 1.0) + jnp.clip(h, -1, 1)
    return error(h @ m["d"] + jnp.sign(x @ m["w"]))


def flat_without_saying_so(m, x):
    """A sign in the shape of a straight-through path, which lacks its `stop_gradient`."""
    h = x @ m["w"]
    return error((h + (jnp.sign(h) - h)) @ m["d"])


def jumps_in_the_objective(m, x):
    logits = x @ m["a"]
    rows, y = jnp.arange(12), jnp.arange(12) % 3
    return (
        jnp.mean(jnp.argmax(logits, -1) != y) - jnp.mean(nn.log_softmax(logits)[rows, y]) + jnp.mean(jnp.sign(m["a"]))
    )


def indices(m, x):
    h, s = x @ m["a"], x @ m["s"]
    k = jnp.argmax(h.mean(0))
    rows = lax.dynamic_slice_in_dim(m["t"], k, 1, 0)
    ordered = jnp.take_along_axis(h, jnp.argsort(s, -1), -1) * jnp.arange(4.0)
    return error(rows + jnp.sort(h, -1) @ m["d"]) + jnp.mean(ordered)


def chosen(m, x):
    """The cases of a choice have a derivative, its predicate has none."""
    h = jnp.sign(x @ m["w"]) @ m["v"]
    return error(jnp.where(x @ m["g"] > 0, x @ m["a"], h) @ m["d"])


def attention(m, x):
    scores = (x @ m["q"]) @ (x @ m["k"]).T
    return error(nn.one_hot(jnp.argmax(scores, -1), 12) @ nn.relu(x @ m["v"]))


def signs_in_time(m, x):
    h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ m["a"]) + jnp.sign(h @ m["w"]), None), x, None, 3)
    return error(h @ m["d"])


def nothing_but_signs_in_time(m, x):
    """The gradient reaches `b` at the last step alone; before, answers under noise go on through the carry."""
    h, _ = lax.scan(lambda h, _: (jnp.sign(h @ m["w"]) + m["b"] * x, None), x, None, 3)
    return error(h @ m["d"])


def sign_of_the_last_carry(m, x):
    """The gradient reaches the carry through the stacked outputs, and not through the last carry."""
    h, hs = lax.scan(lambda h, _: (jnp.tanh(h @ m["a"]),) * 2, x @ m["w"], None, 3)
    return error(jnp.sign(h) @ m["d"]) + error(hs[0] @ m["d"])


def quantized_in_time(m, x):
    z, losses = lax.scan(lambda z, _: quantized(jnp.tanh(z @ m["a"]), m["codes"]), x @ m["e"], None, 3)
    return error(z @ m["d"]) + losses.sum()


def layers_of_a_scan(m, x):
    h, _ = lax.scan(lambda h, p: (h + jnp.sign(h @ p[1]) + jnp.tanh(h @ p[0]), None), x, (m["a"], m["w"]))
    return error(h @ m["d"])


def branches(m, x):
    def first(h):
        return h @ m["a"] + jnp.sign(h @ m["w"])

    def second(h):
        return h @ m["a"] + jnp.round(h @ m["w"])

    return error(lax.cond(x[0, 0] > 0, first, second, x) @ m["d"])


A, W, D = (4, 4), (4, 4), (4, 3)
MODELS = {
    vq_vae: (dict(e=(4, 2), codes=(6, 2), d=(2, 3)), ""),
    finite_scalars: (dict(e=(4, 2), d=(2, 3)), ""),
    switch: (dict(s=(4,), g=(4, 5), w=(5, 4, 3)), ""),
    two_experts: (dict(g=(4, 5), w=(5, 4, 3)), ""),
    residual_signs: (dict(a=A, w=W, d=D), "w"),
    one_value_read_in_parts: (dict(a=(4, 6), d=(3, 3)), ""),
    functions_with_a_slope: (dict(a=A, w=D, d=D), "w"),
    flat_without_saying_so: (dict(w=W, d=D), "w"),
    jumps_in_the_objective: (dict(a=D), ""),
    indices: (dict(a=A, s=A, t=D, d=D), "s"),
    chosen: (dict(w=W, v=D, g=D, a=D, d=(3, 3)), "w"),
    attention: (dict(q=A, k=A, v=D), "qk"),
    signs_in_time: (dict(a=A, w=W, d=D), "w"),
    nothing_but_signs_in_time: (dict(w=W, b=(4,), d=D), "w"),
    sign_of_the_last_carry: (dict(a=A, w=W, d=D), ""),
    quantized_in_time: (dict(e=(4, 2), a=(2, 2), codes=(6, 2), d=(2, 3)), ""),
    layers_of_a_scan: (dict(a=(2, 4, 4), w=(2, 4, 4), d=D), "w"),
    branches: (dict(a=A, w=W, d=D), "w"),
}
"""Losses, the shapes of their parameters, and which of these only an answer under noise reaches."""


@pytest.mark.parametrize("loss", MODELS, ids=lambda loss: loss.__name__)
def test_gradient_where_it_reaches_and_noise_elsewhere(loss):
    shapes, noisy = MODELS[loss]
    model = parameters(**shapes)
    moved, gradient = eqxproj.filter_displacement(loss)(model, X), eqx.filter_grad(loss)(model, X)
    for name, g in gradient.items():
        size = float(jnp.linalg.norm(g))
        if size > 0:
            np.testing.assert_allclose(moved[name], g, rtol=1e-3, atol=1e-4 * size, err_msg=name)
        else:
            assert (float(jnp.linalg.norm(moved[name])) > 1e-3) is (name in noisy), name
    assert all(not np.any(gradient[name]) for name in noisy)


def test_noise_everywhere_and_never():
    model = parameters(**MODELS[residual_signs][0])
    found = {n: eqxproj.filter_displacement(residual_signs, noise=n)(model, X) for n in ("everywhere", "never")}
    gradient = eqx.filter_grad(residual_signs)(model, X)
    for name, g in gradient.items():
        np.testing.assert_allclose(found["never"][name], g, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(found["everywhere"]["a"] - gradient["a"]) > 0.1 * np.linalg.norm(gradient["a"])
    assert np.any(found["everywhere"]["w"])


def test_explain_says_what_jumps_answer():
    def lines(loss, **options):
        problem = eqxproj.feasibility_problem(loss, parameters(**MODELS[loss][0]), X, **options)
        return [line for line in problem.explain().splitlines() if line.startswith("Jumps")], problem.graph.nodes

    (noisy,), nodes = lines(residual_signs)
    signs = [i for i, node in enumerate(nodes) if node.operation == "sign"]
    assert noisy == f"Jumps that answer under noise in the gradient regime: nodes {signs}."
    (plain,), _ = lines(vq_vae)
    assert plain.startswith("Jumps that answer by their derivative alone in the gradient regime: nodes [")
    assert lines(vq_vae, noise="everywhere")[0][0].startswith("Jumps that answer under noise")
    assert lines(residual_signs, noise="never")[0][0].startswith("Jumps that answer by their derivative alone")


def test_the_projection_regime_does_not_use_it():
    def loss(m, x):
        h = x @ m["a"]
        return error(h + jnp.where(x @ m["b"] > 0, 0.5, -0.5))

    model, options = parameters(a=D, b=D), dict(metric=eqxproj.Metric(2.0, 3.0), tau=1.0)
    one, other = (eqxproj.filter_displacement(loss, noise=n, **options)(model, X) for n in ("never", "everywhere"))
    assert np.any(one["a"])
    for name, moved in one.items():
        np.testing.assert_array_equal(moved, other[name])


def test_training_takes_the_option():
    """A threshold that nothing else reaches is learned, unless it is told not to be."""
    y = jnp.where(X[:, :1] > 0.5, 1.0, -1.0)
    model = {"w": jnp.eye(4)[:, :1], "b": jnp.zeros(1)}

    def loss(m, x, y):
        return jnp.mean((jnp.sign(x @ m["w"] - m["b"]) - y) ** 2)

    options = dict(steps=100, optimizer=optax.adam(2e-2), batch_size=12)
    last = {n: eqxproj.train(model, (X, y), loss, noise=n, **options).model for n in ("unreached", "never")}
    assert float(loss(last["unreached"], X, y)) < 0.5 * float(loss(model, X, y))
    assert np.array_equal(last["never"]["w"], model["w"])


@eqxproj.custom_projection
def step(x):
    return jnp.where(x > 0, 1.0, 0.0)


@step.def_projection
def _(ctx, inputs, target):
    return inputs[0] + target - step(inputs[0])


def test_a_rule_of_a_user_counts_as_a_gradient():
    """Also where a gradient reaches what it reads, as of a penalty. This one answers as a straight-through path."""

    def loss(m, x, f):
        h = x @ m["a"]
        return error((h + f(h @ m["w"]) + jnp.sign(h @ m["s"])) @ m["d"]) + jnp.sum(m["w"] ** 2)

    model = parameters(a=A, w=W, d=D, s=W)
    moved = eqxproj.filter_displacement(loss)(model, X, step)
    gradient = eqx.filter_grad(loss)(model, X, lambda s: s + stop(step(s) - s))
    for name in "awd":
        np.testing.assert_allclose(moved[name], gradient[name], rtol=1e-3, atol=1e-4)
    assert np.any(moved["s"])


PENALTIES = {
    "absolute values": lambda m: sum(jnp.sum(jnp.abs(w)) for w in m.values()),
    "squares of some": lambda m: jnp.sum(m["a"] ** 2),
    "norms of rows": lambda m: sum(jnp.sum(jnp.sqrt(jnp.sum(w**2, 1) + 1e-3)) for w in m.values()),
    "a product": lambda m: jnp.sum((m["a"] @ m["w"]) ** 2),
    "an entropy": lambda m: jnp.sum(nn.softmax(m["a"]) * nn.log_softmax(m["a"])),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=list(PENALTIES))
@pytest.mark.parametrize("closes_over", [False, True], ids=["data given", "data closed over"])
def test_a_penalty_adds_its_gradient_to_answers_under_noise(penalty, closes_over):
    """The weights before a jump hear it as if there were no penalty."""

    def loss(m, x):
        x = X if closes_over else x
        return error(jnp.tanh(jnp.sign(x @ m["a"]) @ m["w"]) @ m["d"])

    model, batch = parameters(a=A, w=W, d=D), jnp.zeros(()) if closes_over else X
    moved = eqxproj.filter_displacement(loss)(model, batch)
    both = eqxproj.filter_displacement(lambda m, x: loss(m, x) + 0.1 * penalty(m))(model, batch)
    gradient = eqx.filter_grad(penalty)(model)
    assert np.linalg.norm(moved["a"]) > 1e-3
    for name in model:
        np.testing.assert_allclose(both[name], moved[name] + 0.1 * gradient[name], rtol=1e-3, atol=1e-4)
