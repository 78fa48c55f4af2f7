"""What rules of users are asked for: those that are exact in their weights, those that ignore them, and jumps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from custom_models import X, cosine, random

import eqxproj

METRICS = {"default": None, "1e5": eqxproj.Metric(1e5, 10.0), "1e3": eqxproj.Metric(1e3, 10.0)}


def with_rule(function, rule, **options):
    made = eqxproj.custom_projection(function, **options)
    made.def_projection(rule)
    return made


def linear_rule(scale, number=lambda x: x):
    """The exact projection onto the graph of a multiple."""

    def rule(ctx, inputs, target):
        (u,), (w,), (k,) = inputs, map(number, ctx.weights), map(number, ctx.kappa)
        return (w * u + scale * k * target) / (w + scale**2 * k)

    return rule


def newton_rule(ctx, inputs, target):
    """The exact projection onto the graph of tanh, by Newton steps."""
    (u,), (w,), (k,) = inputs, ctx.weights, ctx.kappa
    v = u
    for _ in range(6):
        y, error = jnp.tanh(v), jnp.tanh(v) - target
        bend = jnp.maximum(-2 * k * (1 - y * y) * y * error, 0)
        v = v - (w * (v - u) + k * (1 - y * y) * error) / (w + k * (1 - y * y) ** 2 + bend)
    return v


def gradient_rule(ctx, inputs, target):
    y = jnp.tanh(inputs[0])
    return inputs[0] + (1 - y * y) * (target - y)


def relu_rule(ctx, inputs, target):
    """The exact projection onto the graph of relu: the nearer one of two candidates."""
    (u,), (w,), (k,) = inputs, ctx.weights, ctx.kappa
    right, left = jnp.maximum((w * u + k * target) / (w + k), 0), jnp.minimum(u, 0)

    def cost(v):
        return w * (v - u) ** 2 + k * (jnp.maximum(v, 0) - target) ** 2

    return jnp.where(cost(right) < cost(left), right, left)


def sum_rule(ctx, inputs, target):
    (u,), k = inputs, ctx.ratio(0)
    return u + (k / (1 + k * u.shape[-1]) * (target - u.sum(-1)))[..., None]


def row_sum(u):
    return u.sum(-1)


def size_ratio(got, want):
    got, want = np.asarray(got, float), np.asarray(want, float)
    return np.linalg.norm(got) / np.linalg.norm(want)


def agree(moved, gradient, tolerance=0.01):
    for got, want in zip(jax.tree_util.tree_leaves(moved), jax.tree_util.tree_leaves(gradient), strict=True):
        assert cosine(got, want) > 0.9999
        assert abs(size_ratio(got, want) - 1) < tolerance


POINT = random(0, 40)
WIDE = jnp.where(jnp.arange(1000) % 2 == 0, 1.0, -1.0) * jnp.ones((20, 1))  # the sums cancel

CASES = {
    **{
        f"linear {c} at {s}": (lambda u, c=c: c * u, linear_rule(c), s * POINT, c * s)
        for c, s in ((1e-4, 1e3), (1.0, 1e-3), (1.0, 1.0), (1e4, 1.0), (1e4, 1e3))
    },
    **{
        f"linear {c} in numbers": (lambda u, c=c: c * u, linear_rule(c, number), POINT, c)
        for c, number in ((1e-3, float), (2.0, lambda x: math.sqrt(x) ** 2), (1e3, np.asarray))
    },
    "tanh": (jnp.tanh, newton_rule, POINT, 1.0),
    "tanh, a step along the gradient": (jnp.tanh, gradient_rule, POINT, 1.0),
    "thousandth of tanh, a step along the gradient": (
        lambda u: 1e-3 * jnp.tanh(u),
        lambda ctx, i, t: i[0] + 1e-3 * (1 - jnp.tanh(i[0]) ** 2) * (t - 1e-3 * jnp.tanh(i[0])),
        POINT,
        1e-3,
    ),
    "relu": (jax.nn.relu, relu_rule, POINT, 1.0),
    "sum of many": (row_sum, sum_rule, random(1, 20, 1000), 30.0),
    "sum that cancels": (row_sum, sum_rule, WIDE, 30.0),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_gives_the_gradient_by_default(name):
    function, rule, point, scale = CASES[name]

    def loss(f):
        return lambda u: jnp.mean((f(u) / scale - jnp.cos(jnp.arange(f(u).size))) ** 2)

    agree(eqxproj.filter_displacement(loss(with_rule(function, rule)))(point), jax.grad(loss(function))(point))


@pytest.mark.slow
@pytest.mark.parametrize("metric", [*METRICS, "99"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", [newton_rule, gradient_rule])
def test_rule_trains_in_every_metric_and_dtype(rule, dtype, metric):
    """As well as the plain function; outside of the gradient regime what a rule answers is the projection."""
    f = with_rule(jnp.tanh, rule)
    model = {"a": random(0, 3, 8) / 2, "b": random(1, 8, 1)}
    x, y = random(2, 32, 3), random(3, 32, 1)

    def loss(f):
        return lambda p, x, y: jnp.mean(((f(x @ p["a"]) @ p["b"] - y) ** 2).astype(jnp.float32))

    rounded = jax.tree_util.tree_map(lambda v: v.astype(dtype), (model, x, y))
    chosen = METRICS.get(metric, eqxproj.Metric(99.0, 1.0))
    moved = eqxproj.filter_displacement(loss(f), metric=chosen)(*rounded)
    gradient = jax.grad(loss(jnp.tanh))(*jax.tree_util.tree_map(lambda v: v.astype(jnp.float32), rounded))
    for name in model:
        assert moved[name].dtype == dtype
        assert cosine(moved[name].astype(jnp.float32), gradient[name]) > (0.98 if metric == "99" else 0.9995)
        if metric != "99" or rule is newton_rule:  # there the inputs go where a rule says, whatever the weights
            assert abs(size_ratio(moved[name], gradient[name]) - 1) < (0.35 if metric == "99" else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weighted", "unweighted", "jump"])
def test_train_by_default(kind):
    rules = {"weighted": newton_rule, "unweighted": gradient_rule, "jump": straight_through}
    function = sign if kind == "jump" else jnp.tanh
    f = with_rule(function, rules[kind])
    model = {"a": random(0, 3, 8) / 2, "b": random(1, 8, 1)}
    x = random(2, 64, 3)
    y = jnp.sign(x[:, :1])

    def loss(f):
        return lambda p, x, y: jnp.mean((f(x @ p["a"]) @ p["b"] - y) ** 2)

    history = eqxproj.train(model, (x, y), loss(f), steps=100).history["loss"]
    assert history[-1] < 0.5 * history[1]
    if kind != "jump":
        gradient = eqxproj.train(model, (x, y), loss(function), steps=100, method="gradient").history["loss"]
        assert history[-1] < 1.1 * gradient[-1] + 1e-4


def two(u):
    return 1e4 * u, 1e-4 * jnp.sin(u)


def two_exact(ctx, inputs, target):
    (u,), (w,), (k, m) = inputs, ctx.weights, ctx.kappa
    v = u
    for _ in range(6):
        slope = 1e-4 * jnp.cos(v)
        pull = w * (v - u) + k * 1e4 * (1e4 * v - target[0]) + m * slope * (1e-4 * jnp.sin(v) - target[1])
        v = v - pull / (w + k * 1e8 + m * slope**2)
    return v


def two_along_the_gradient(ctx, inputs, target):
    (u,), (a, b) = inputs, two(inputs[0])
    return [u + 1e4 * (target[0] - a) + 1e-4 * jnp.cos(u) * (target[1] - b)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [two_exact, two_along_the_gradient])
def test_outputs_of_unlike_scale(rule):
    f = with_rule(two, rule)
    for first, second in ((1e-4, 1e4), (0.0, 1.0), (1.0, 0.0)):

        def loss(f, first=first, second=second):
            return lambda u: jnp.mean((first * f(u)[0] - 1) ** 2) + jnp.mean((second * f(u)[1] - 2) ** 2)

        agree(eqxproj.filter_displacement(loss(f))(POINT), jax.grad(loss(two))(POINT))


def test_inputs_of_unlike_scale():
    def rule(ctx, inputs, target):
        (a, b), error = inputs, target - inputs[0] * inputs[1]
        return a + b * error, b + a * error

    f, model = with_rule(jnp.multiply, rule), (1e3 * POINT, 1e-3 * random(1, 40))

    def loss(f):
        return lambda p: jnp.mean((f(*p) - 1) ** 2)

    agree(eqxproj.filter_displacement(loss(f))(model), jax.grad(loss(jnp.multiply))(model))


# Operands that a batch shares.


def product_rule(ctx, inputs, target):
    (w, x), error = inputs, target - inputs[0] * inputs[1]
    return w + error * x, x + error * w


SHARED = {
    "vmap": lambda f, w, x: jax.vmap(f, (None, 0))(w, x),
    "vmap, swapped": lambda f, w, x: jax.vmap(f, (1, None), 1)(x.T, w),
    "vmap of vmap": lambda f, w, x: jax.vmap(lambda r: jax.vmap(f, (0, None))(w, r))(x[:, 0]),
    "vmap of vmap, both shared": lambda f, w, x: jax.vmap(lambda _: jax.vmap(f, (None, 0))(w, x))(jnp.arange(2.0)),
    "vmap in vmap, one each": lambda f, w, x: jax.vmap(lambda r: jax.vmap(lambda s: f(r * w, s))(x))(x),
    "scan": lambda f, w, x: jax.lax.scan(lambda c, r: (c + 1.0, f(w, r) + 0.0 * c), 0.0, x)[1],
    "scan, no carry": lambda f, w, x: jax.lax.scan(lambda c, r: (c, f(w, r)), None, x)[1],
    "scan of parameters": lambda f, w, x: jax.lax.scan(lambda h, r: (f(w, h) + r, h), w, x)[0],
    "lax.map": lambda f, w, x: jax.lax.map(lambda r: f(w, r), x),
    "vmap of scan": lambda f, w, x: jax.vmap(lambda r: jax.lax.scan(lambda h, s: (f(w, h), h), r, x)[0])(x),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_operand_gets_the_sum(name):
    f, way = with_rule(jnp.multiply, product_rule), SHARED[name]
    w, x = jnp.array([1.0, 0.5, -0.7]), random(5, 5, 3)

    def loss(f):
        return lambda p: jnp.mean((way(f, *p) - 1) ** 2)

    agree(eqxproj.filter_displacement(loss(f))((w, x)), jax.grad(loss(jnp.multiply))((w, x)))


@pytest.mark.slow
def test_shared_operand_in_the_projection_regime():
    """As in the broadcast form, in a solver that stores copies too."""
    f, (w, x) = with_rule(jnp.multiply, product_rule), (jnp.array([1.0, 0.5, -0.7]), X)
    ways = (lambda w: jax.vmap(f, (None, 0))(w, x), lambda w: f(jnp.broadcast_to(w, x.shape), x))
    for solver in (eqxproj.AlternatingProjections(), eqxproj.DouglasRachford()):
        options = dict(metric=eqxproj.Metric(), solver=solver, steps=4, tau=0.1)
        one, other = (
            eqxproj.filter_displacement(lambda w, way=way: jnp.mean((way(w) - 1) ** 2), **options)(w) for way in ways
        )
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(one).max()) > 1e-3


# Jumps.


def sign(u):
    return jnp.where(u > 0, 1.0, -1.0)


def straight_through(ctx, inputs, target):
    (u,) = inputs
    return jnp.where(jnp.abs(u) < 1, u + target - sign(u), u)


def margin_rule(ctx, inputs, target):
    """It keeps a margin, whatever is wanted."""
    return jnp.where(target > 0, jnp.maximum(inputs[0], 1.0), jnp.minimum(inputs[0], -1.0))


def jumps_found(f, point=POINT):
    problem = eqxproj.feasibility_problem(lambda u: jnp.mean((f(3 * u) - 1) ** 2), point)
    (node,) = [n for n in problem.graph.nodes if n.equation is not None and n.equation.name == "custom_projection"]
    return node.rule.is_discontinuous


JUMPING = {
    "where": sign,
    "sign": jnp.sign,
    "round": lambda u: u + jnp.round(u),
    "cast": lambda u: (u > 0).astype(jnp.float32),
    "to integers": lambda u: u.astype(jnp.int32) * 1.0,
    "argmax": lambda u: jnp.argmax(u) * 1.0,
    "under vmap": lambda u: jax.vmap(sign)(u),
}


def test_jumps_are_found():
    for name, function in JUMPING.items():
        assert jumps_found(with_rule(function, straight_through)), name
        assert not jumps_found(with_rule(function, straight_through, is_discontinuous=False)), name
    for function in (jnp.tanh, jax.nn.relu, lambda u: jnp.where(jnp.arange(40) > 3, u, 2 * u), jax.nn.softmax):
        assert not jumps_found(with_rule(function, gradient_rule))
        assert jumps_found(with_rule(function, gradient_rule, is_discontinuous=True))
    decorator = eqxproj.custom_projection(is_discontinuous=True)
    assert decorator(jnp.tanh).is_discontinuous
    with pytest.raises(TypeError, match="is_discontinuous"):
        eqxproj.custom_projection(jnp.tanh, is_discontinuous=1)  # pyright: ignore[reportArgumentType]


def test_jump_is_no_violation():
    """After a step the operand has crossed the jump; what is wanted of it is as much in each step."""

    def size(is_discontinuous, steps):
        f = with_rule(sign, straight_through, is_discontinuous=is_discontinuous)
        options = dict(metric=eqxproj.Metric(100.0, 1.0), tau=0.01, steps=steps)
        moved = eqxproj.filter_displacement(lambda a: jnp.sum((f(3 * a) + 1) ** 2), **options)(jnp.full(8, 1e-4))
        return float(jnp.abs(moved).max())

    one, three = size(None, 1), size(None, 3)
    assert abs(one - 12) < 0.1 and abs(three - 3 * one) < 0.1
    assert size(False, 3) > 10 * three


def test_margin_is_no_wish():
    """What a rule does about no wish at all is no answer to a small one."""
    moved = eqxproj.filter_displacement(lambda a: jnp.mean((with_rule(sign, margin_rule)(3 * a) - 2) ** 2))(POINT)
    assert float(jnp.abs(moved).max()) < 1e-3


def test_projections_are_solved_in_full_precision():
    """Products of a rule's projection, not those of the user's function, nor those of the gradient regime."""
    seen = {"function": set(), "rule": set()}

    def precision():
        return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]

    def function(x):
        seen["function"].add(precision())
        return 2.0 * x

    def rule(ctx, inputs, target):
        seen["rule"].add(precision())
        return inputs

    double = with_rule(function, rule)

    def loss(w):
        return jnp.sum(jnp.square(double(w) - 1.0))

    problem = eqxproj.feasibility_problem(loss, X, copies="none")
    eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=1)
    assert seen["rule"] == {"highest"} and None in seen["function"]
    seen["rule"].clear()
    eqxproj.filter_displacement(loss)(X)
    assert seen["rule"] == {None}
