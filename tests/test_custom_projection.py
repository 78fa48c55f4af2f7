"""Functions with a projection of the user's own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from custom_models import STEEP, X, Y, classification, cosine, random

import eqxproj
from eqxproj.losses import cross_entropy, squared_error


def smooth(x, y):
    return jnp.sin(x) * y


wrapped = eqxproj.custom_projection(smooth)


@wrapped.def_projection
def _(ctx, inputs, target):
    """One Gauss-Newton step, by hand: proportional to small wishes."""
    x, y = inputs
    r = target - jnp.sin(x) * y
    dy = jnp.sin(x) * r
    return x + jnp.cos(x) * y * r, y + dy.sum(tuple(range(dy.ndim - y.ndim)))


@eqxproj.custom_projection
def step(x):
    return jnp.where(x > 0, 1.0, 0.0)


@step.def_projection
def _(ctx, inputs, target):
    (x,) = inputs
    return jnp.where(jnp.abs(x) < 1, x + target - (x > 0), x)


# The decorated function is the plain one.

TRANSFORMED = {
    "plain": lambda f: f(X, Y),
    "jit": lambda f: jax.jit(f)(X, Y),
    "filter_jit": lambda f: eqx.filter_jit(f)(X, Y),
    "vmap": lambda f: jax.vmap(f)(X, Y),
    "vmap first": lambda f: jax.vmap(f, in_axes=(0, None))(X, Y[0]),
    "vmap second": lambda f: jax.vmap(f, in_axes=(None, 0))(X[0], Y),
    "vmap last axis": lambda f: jax.vmap(f, in_axes=(1, 1), out_axes=1)(X, Y),
    "vmap mixed": lambda f: jax.vmap(f, in_axes=(0, 1))(X, Y.T),
    "vmap twice": lambda f: jax.vmap(jax.vmap(f), in_axes=(1, 1))(X, Y),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f))(X, Y),
    "grad": lambda f: jax.grad(lambda x, y: f(x, y).sum(), argnums=(0, 1))(X, Y),
    "value_and_grad": lambda f: jax.value_and_grad(lambda x: (f(x, Y) ** 2).sum())(X),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f, (0, None))(x, Y[0]).sum())(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x, y: f(x, y).sum()))(X, Y),
    "hessian": lambda f: jax.hessian(lambda x: f(x, Y[0]).sum())(X[0]),
    "jvp": lambda f: jax.jvp(f, (X, Y), (Y, X)),
    "jacrev": lambda f: jax.jacrev(f)(X[0], Y[0]),
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x, Y).sum())(X),
    "scan": lambda f: jax.lax.scan(lambda c, xy: (f(c, xy[1]), f(*xy)), X[0], (X, Y)),
    "grad of scan": lambda f: jax.grad(lambda c: jax.lax.scan(lambda c, y: (f(c, y), None), c, Y)[0].sum())(X[0]),
    "scan of vmap": lambda f: jax.lax.scan(lambda c, y: (jax.vmap(f, (0, None))(c, y), None), X, Y)[0],
    "cond": lambda f: jax.lax.cond(X.sum() > 0, f, lambda x, y: f(y, x), X, Y),
    "eval_shape": lambda f: jax.eval_shape(f, X, Y).shape,
    "python number": lambda f: f(X, 2.0),
    "numpy": lambda f: f(np.asarray(X), np.asarray(Y)),
    "keywords": lambda f: f(y=Y, x=X),
    "keyword": lambda f: f(X, y=Y),
    "bfloat16": lambda f: f(X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_equals_the_plain_function(name):
    got, want = TRANSFORMED[name](wrapped), TRANSFORMED[name](smooth)
    assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
    for a, b in zip(jax.tree_util.tree_leaves(got), jax.tree_util.tree_leaves(want), strict=True):
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-6)


def test_pytrees_and_static_arguments():
    """Pytrees with other things than arrays in them pass as they are, and so do Python numbers."""

    def affine(params, x, power, scale=1.0):
        return {"y": (params["f"](x) * params["w"]) ** power * scale, "x": x}

    decorated = eqxproj.custom_projection(affine)

    @decorated.def_projection
    def _(ctx, inputs, target):
        return inputs

    args = {"w": random(2, 3), "f": jnp.tanh}, X, 2
    for f in (lambda g: g(*args), lambda g: g(*args, scale=3.0), lambda g: jax.vmap(lambda x: g(args[0], x, 2))(X)):
        assert eqx.tree_equal(f(decorated), f(affine), rtol=1e-6)


def test_inside_a_traced_loss():
    def loss(f):
        return lambda p, x, y: squared_error(f(x @ p["w"], p["v"]), y).mean()

    model, y = {"w": random(0, 3, 5), "v": random(1, 5)}, random(2, 4, 5)
    want = eqx.filter_value_and_grad(loss(smooth))(model, X, y)
    got = eqx.filter_value_and_grad(loss(wrapped))(model, X, y)
    assert eqx.tree_equal(got, want, rtol=1e-5, atol=1e-6)
    value, _ = eqxproj.filter_value_and_displacement(loss(wrapped))(model, X, y)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)


def test_keeps_name_and_documentation():
    assert callable(wrapped.def_projection)
    assert wrapped.__name__ == "smooth" and wrapped.__wrapped__ is smooth


def test_def_projection_returns_the_rule():
    decorated = eqxproj.custom_projection(lambda x: x)

    def rule(ctx, inputs, target):
        return target

    assert decorated.def_projection(rule) is rule


# Errors.


def test_without_a_projection():
    @eqxproj.custom_projection
    def lonely(x):
        return x

    with pytest.raises(ValueError, match="'lonely'.*has no projection.*lonely.def_projection"):
        lonely(X)


def optional(x, scale=2.0, shift=0.0, *, power=1, offset=None):
    out = x**power * scale + shift
    return out if offset is None else out + offset


CALLS = {
    "x": (lambda f, x: f(x), 1),
    "by position": (lambda f, x: f(x, 3.0), 2),
    "by name": (lambda f, x: f(x, scale=3.0), 2),
    "all by name": (lambda f, x: f(scale=3.0, x=x), 2),
    "one left out": (lambda f, x: f(x, shift=1.0), 3),
    "keyword-only": (lambda f, x: f(x, power=2), 2),
    "keyword-only array": (lambda f, x: f(x, offset=Y, power=2), 3),
    "both": (lambda f, x: f(x, shift=Y, offset=Y), 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_by_name_and_position(name):
    """They pass as in Python; the rule sees those that are given, and the defaults between them."""
    call, count = CALLS[name]
    seen = []

    def rule(ctx, inputs, target):
        seen.append(len(inputs))
        return [target, *[None] * (len(inputs) - 1)]

    f = eqxproj.custom_projection(optional)
    f.def_projection(rule)
    np.testing.assert_allclose(call(f, X), call(optional, X), rtol=1e-6)
    eqxproj.filter_displacement(lambda x: squared_error(call(f, x), 0 * Y).mean())(X)
    assert set(seen) == {count}
    with pytest.raises(TypeError, match="positional"):
        f(X, 1.0, 2.0, 3)


def test_required_keyword_only_argument():
    @eqxproj.custom_projection
    def f(x, *, scale):
        return x * scale

    f.def_projection(lambda ctx, i, t: (i[0] + (t - i[0] * i[1]) * i[1], i[1] + (t - i[0] * i[1]) * i[0]))
    with pytest.raises(TypeError, match="scale"):
        f(X)

    def loss(p, g):
        return jnp.mean(g(p["x"], scale=p["s"]) ** 2)

    model = {"x": X, "s": Y}
    moved = eqxproj.filter_displacement(lambda p: loss(p, f))(model)
    assert cosine(moved, jax.grad(lambda p: loss(p, lambda x, scale: x * scale))(model)) > 0.9999


@pytest.mark.parametrize("wrong", [3, None, "tanh", X], ids=["number", "None", "name", "array"])
def test_no_functions(wrong):
    if wrong is not None:  # without a function, a decorator is returned
        with pytest.raises(TypeError, match="`function` must be a function|parameter 'function'"):
            eqxproj.custom_projection(wrong)
    with pytest.raises(TypeError, match="projection of 'smooth' must be a function|parameter 'rule'"):
        eqxproj.custom_projection(smooth).def_projection(wrong)
    for taken in (eqxproj.filter_displacement, eqxproj.filter_value_and_displacement):
        with pytest.raises(TypeError, match="`loss` must be a function|parameter 'loss'"):
            taken(wrong)
    with pytest.raises(TypeError, match="`loss` must be a function|parameter 'loss'"):
        eqxproj.feasibility_problem(wrong, X)  # pyright: ignore[reportArgumentType]


def displacement(f, rule, *shapes, **options):
    f = eqxproj.custom_projection(f)
    f.def_projection(rule)
    model = [random(i, *s) for i, s in enumerate(shapes)]
    x = random(9, 4, shapes[0][0])

    def loss(p, x):
        return squared_error(f(x @ p[0], *p[1:]), 0 * (x @ p[0])).mean()

    return eqxproj.filter_displacement(loss, **options)(model, x)


def product(x, y):
    return x * y


@pytest.mark.parametrize(
    "rule, part",
    [
        (lambda ctx, inputs, target: inputs[0], "must return 2 new inputs.*returned 1"),
        (lambda ctx, inputs, target: (*inputs, target), "must return 2 new inputs.*returned 3"),
        (lambda ctx, inputs, target: [*inputs, target], "must return 2 new inputs.*returned 3"),
        (lambda ctx, inputs, target: (inputs[0][:1], inputs[1]), r"returned shape \(1, 5\) for input 0.*\(4, 5\)"),
        (lambda ctx, inputs, target: (inputs[0], inputs[1].sum()), r"returned shape \(\) for input 1.*\(5,\)"),
        (lambda ctx, inputs, target: (inputs[0], [inputs[1]]), "structured like the arguments"),
    ],
    ids=["too few", "too many", "list", "shape", "scalar", "structure"],
)
def test_what_a_rule_returns_is_checked(rule, part):
    with pytest.raises(ValueError, match=f"(?s)'product'.*{part}|'product' {part}"):
        displacement(product, rule, (3, 5), (5,))


@pytest.mark.parametrize("kind", [jnp.int32, bool, jnp.complex64])
def test_kind_of_what_a_rule_returns_is_checked(kind):
    with pytest.raises(TypeError, match=r"'product' returned dtype \w+ for input 1, which has dtype float32"):
        displacement(product, lambda ctx, inputs, target: [inputs[0], inputs[1].astype(kind)], (3, 5), (5,))


# The rule is used.


def test_rule_is_used_and_shown():
    seen = []

    def rule(ctx, inputs, target):
        seen.append((ctx.unknown, jax.tree_util.tree_map(jnp.shape, inputs), target.shape, ctx.weights, ctx.kappa))
        return tuple(x + 0.25 for x in inputs)

    f = eqxproj.custom_projection(product)
    f.def_projection(rule)
    model = {"w": random(0, 3, 5), "v": random(1, 5)}

    def loss(p, x, y):
        return squared_error(f(x @ p["w"], p["v"]), y).mean()

    problem = eqxproj.feasibility_problem(loss, model, X, jnp.zeros((4, 5)))
    assert any("custom (product)" in line for line in problem.explain().split("\n"))
    moved = eqxproj.filter_displacement(loss, metric=eqxproj.Metric(), raw=True)(model, X, jnp.zeros((4, 5)))
    ((unknown, shapes, target, weights, kappa),) = seen
    assert (unknown, shapes, target) == ((True, True), ((4, 5), (5,)), (4, 5))
    assert (weights, kappa) == ((1.0, 1.0), (1.0,))
    np.testing.assert_allclose(moved["v"], -0.25, rtol=1e-5)


def test_known_arguments_are_ignored():
    """Data, integers and Python numbers may come back changed, in another shape, or as `None`."""

    def f(x, data, index, power):
        return (x * data)[:, index] ** power

    def rule(ctx, inputs, target):
        x, data, index, power = inputs
        assert power == 1
        return x.at[:, index].add((target - f(x, data, index, power)) * data[:, index]), None, index[:1], power

    f = eqxproj.custom_projection(f)
    f.def_projection(rule)
    data, index = random(3, 4, 5), jnp.array([0, 2, 3])

    def loss(p, x, d, i, y):
        return squared_error(f(x @ p, d, i, 1), y).mean()

    moved = eqxproj.filter_displacement(loss, metric=STEEP)(random(0, 3, 5), X, data, index, jnp.zeros((4, 3)))
    want = jax.grad(lambda p: squared_error((X @ p * data)[:, index], jnp.zeros((4, 3))).mean())(random(0, 3, 5))
    np.testing.assert_allclose(moved, want, rtol=0.3, atol=1e-4)


@pytest.mark.parametrize("mapped", [False, True])
def test_proportional_rule_gives_the_gradient_in_a_steep_metric(mapped):
    """Written in points, yet not rounded away: what the rule answers is rescaled."""

    def loss(p, x, y):
        inner = jax.vmap(wrapped, (0, None)) if mapped else wrapped
        h = inner(jnp.tanh(x @ p["a"]), p["v"])
        return squared_error(jnp.tanh(h @ p["b"]) @ p["c"], y).mean()

    model = {"a": random(0, 3, 5), "v": random(1, 5), "b": random(2, 5, 5), "c": random(3, 5, 2)}
    y = random(4, 4, 2)
    moved = eqxproj.filter_displacement(loss, metric=STEEP, tau=0.1)(model, X, y)
    gradient = eqx.filter_grad(loss)(model, X, y)
    for name in model:
        assert cosine(moved[name], gradient[name]) > 0.99, name


def test_outputs_may_be_pytrees():
    def polar(x, y):
        return {"r": jnp.hypot(x, y), "s": (x + y, x)}

    def rule(ctx, inputs, target):
        x, y = inputs
        out = polar(x, y)
        r = jax.tree_util.tree_map(jnp.subtract, target, out)
        dx = r["r"] * x / out["r"] + r["s"][0] + r["s"][1]
        return x + dx, y + r["r"] * y / out["r"] + r["s"][0]

    f = eqxproj.custom_projection(polar)
    f.def_projection(rule)

    def loss(p, x):
        out = f(x @ p["a"], x @ p["b"])
        return (
            squared_error(out["r"] + out["s"][0], 1.0 + 0 * out["s"][1]).mean()
            + squared_error(out["s"][1], 0 * out["r"]).mean()
        )

    model = {"a": random(0, 3, 5), "b": random(1, 3, 5)}
    moved, gradient = eqxproj.filter_displacement(loss, metric=STEEP)(model, X), eqx.filter_grad(loss)(model, X)
    assert cosine(moved, gradient) > 0.99


def step_logits(p, x, f):
    return f(x @ p["a"] + p["b"]) @ p["d"] + p["e"]


def accuracy(f):
    return lambda p, x, y: (jnp.argmax(step_logits(p, x, f), -1) == y).mean()


@pytest.mark.parametrize("metric", [None, eqxproj.Metric()], ids=["default", "unit"])
def test_step_layer_learns(metric):
    """No gradient passes through the step; its rule carries what the layer above wants to the layer below."""
    model, x, y = classification()

    def loss(p, x, y):
        return cross_entropy(step_logits(p, x, step), y).mean()

    options = dict(
        steps=600, batch_size=64, optimizer=optax.adam(1e-2), eval_data=(x, y), evaluate={"a": accuracy(step)}
    )
    result = eqxproj.train(model, (x, y), loss, metric=metric, **options)
    gradient = eqxproj.train(model, (x, y), loss, method="gradient", **options)
    assert result.history["eval_a"][-1] > 0.88
    assert gradient.history["eval_a"][-1] < 0.75


def test_trains_with_gradients():
    model, x, y = classification()

    def loss(p, x, y):
        return cross_entropy(step_logits(p, x, lambda s: wrapped(s, 1.0)), y).mean()

    result = eqxproj.train(
        model, (x, y), loss, steps=200, optimizer=optax.adam(1e-2), method="gradient", eval_data=(x, y)
    )
    assert result.history["eval_loss"][-1] < 0.6 * result.history["eval_loss"][0]
