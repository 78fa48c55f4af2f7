"""Displacements: a drop-in for gradients in shape and size, and the gradient itself in the limit of a steep metric."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.linalg import expm
from jax.scipy.special import gamma
from jaxprs import primitives

import eqxproj
from eqxproj.losses import cross_entropy, squared_error

STEEP = eqxproj.Metric(grade=1e6, parameter=1e6)
COPIES = ("neuron", "none")


def random(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = random(0, 6, 4), jnp.array([0, 1, 2, 0, 1, 2])
MODEL = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))


def loss(model, x, y):
    return cross_entropy(jax.vmap(model)(x), y).mean()


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def assert_like_gradient(f, *args, least=0.999, ratio=None, **options):
    """The displacement of each parameter has the direction of the gradient, and, with `ratio`, its size."""
    moved = eqxproj.filter_displacement(f, metric=STEEP, tau=0.1, **options)(*args)
    gradient = eqx.filter_grad(f)(*args)
    assert jax.tree_util.tree_structure(moved) == jax.tree_util.tree_structure(gradient)
    for (path, d), (_, g) in zip(leaves(moved), leaves(gradient), strict=True):
        name = jax.tree_util.keystr(path)
        assert cosine(d, g) >= least, name
        if ratio is not None:
            size = float(jnp.linalg.norm(d) / jnp.linalg.norm(g))
            assert 1 / ratio <= size <= ratio, (name, size)


# The same structure as a gradient.


def assert_drop_in(f, model, *args, has_aux=False, rtol=1e-5, **kwargs):
    want = eqx.filter_value_and_grad(f, has_aux=has_aux)(model, *args, **kwargs)
    got = eqxproj.filter_value_and_displacement(f, has_aux=has_aux)(model, *args, **kwargs)
    assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
    for (_, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
        assert eqx.is_array(a) == eqx.is_array(b)
        if eqx.is_array(a):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert eqx.tree_equal(*(eqx.filter(x[0], eqx.is_array) for x in (got, want)), rtol=rtol, atol=1e-6)
    return got


def test_value_and_structure():
    assert_drop_in(loss, MODEL, X, Y)


def test_displacement_alone():
    _, want = eqxproj.filter_value_and_displacement(loss)(MODEL, X, Y)
    assert eqx.tree_equal(eqxproj.filter_displacement(loss)(MODEL, X, Y), want)


@pytest.mark.usefixtures("full_precision")
def test_its_forward_derivative_is_that_of_the_gradient():
    """Products of the Hessian with a direction. (Backward, the solvers' loops are in the way.)"""

    def smooth(model, x, y):
        return cross_entropy(jax.nn.softmax(jnp.tanh(x @ model["a"])) @ model["d"], y).mean()

    model = {"a": random(1, 4, 8), "d": random(2, 8, 3)}
    along = ({"a": random(3, 4, 8), "d": random(4, 8, 3)},)
    moved, gradient = eqxproj.filter_displacement(smooth), jax.grad(smooth)
    got, want = (jax.jvp(lambda m, f=f: f(m, X, Y), (model,), along)[1] for f in (moved, gradient))
    assert eqx.tree_equal(got, want, rtol=1e-3, atol=1e-5)


def test_auxiliary_output():
    def with_aux(model, x, y):
        logits = jax.vmap(model)(x)
        return cross_entropy(logits, y).mean(), {
            "logits": logits,
            "name": "aux",
            "n": 3,
            "data": x,
            "sorted": jnp.sort(logits),
        }

    (value, aux), _ = assert_drop_in(with_aux, MODEL, X, Y, has_aux=True)
    assert aux["name"] == "aux" and aux["n"] == 3
    moved, again = eqxproj.filter_displacement(with_aux, has_aux=True)(MODEL, X, Y)
    np.testing.assert_allclose(again["logits"], aux["logits"])
    assert jax.tree_util.tree_structure(moved) == jax.tree_util.tree_structure(eqx.filter(MODEL, eqx.is_inexact_array))


def test_keyword_arguments_and_static_ones():
    def f(model, x, y, *, scale, kind, key=None):
        noise = 0.0 if key is None else 0.1 * jax.random.normal(key, x.shape)
        values = {"ce": cross_entropy, "other": None}[kind](jax.vmap(model)(x + noise), y)
        return scale * values.mean()

    assert_drop_in(f, MODEL, X, Y, scale=2.0, kind="ce")
    assert_drop_in(f, MODEL, X, y=Y, scale=jnp.asarray(0.5), kind="ce", key=jax.random.key(1))


def test_dropout_key():
    """The mask is that of the key: what it drops does not move the layer below."""
    dropout = eqx.nn.Dropout(0.5)

    def f(p, x, y, key):
        return cross_entropy(dropout(jnp.tanh(x @ p["a"]), key=key) @ p["d"], y).mean()

    model = {"a": random(1, 4, 8), "d": random(2, 8, 3)}
    keys = jax.random.split(jax.random.key(0), 2)
    displacement = eqxproj.filter_displacement(f)
    first, again, other = (displacement(model, X, Y, k) for k in (keys[0], keys[0], keys[1]))
    assert eqx.tree_equal(first, again) and not eqx.tree_equal(first, other)
    assert_drop_in(f, model, X, Y, keys[0])


def test_frozen_leaves():
    """Frozen as `None` through a partition, and by `stop_gradient`."""
    trained, frozen = eqx.partition(MODEL, eqx.is_inexact_array)
    trained = eqx.tree_at(lambda m: m.layers[0].weight, trained, None)
    frozen = eqx.tree_at(lambda m: m.layers[0].weight, frozen, MODEL.layers[0].weight, is_leaf=lambda x: x is None)

    def split(trained, frozen, x, y):
        return loss(eqx.combine(trained, frozen), x, y)

    _, moved = assert_drop_in(split, trained, frozen, X, Y)
    assert moved.layers[0].weight is None and moved.layers[0].bias is not None

    def stopped(model, x, y):
        return loss(eqx.tree_at(lambda m: m.layers[0].weight, model, replace_fn=jax.lax.stop_gradient), x, y)

    _, moved = assert_drop_in(stopped, MODEL, X, Y)
    assert not moved.layers[0].weight.any() and moved.layers[0].bias.any()


def test_other_leaves_of_the_model():
    """Integer arrays, Booleans, functions and strings of a model get `None`, and are used as they are."""
    model = {
        "w": random(0, 4, 3),
        "order": jnp.array([2, 0, 1, 3]),
        "on": jnp.array(True),
        "f": jnp.tanh,
        "name": "x",
        "n": 2,
    }

    def f(p, x, y):
        h = p["f"](x[:, p["order"]]) * p["n"]
        return cross_entropy(jnp.where(p["on"], h, 0.0) @ p["w"], y).mean()

    _, moved = assert_drop_in(f, model, X, Y)
    assert {k for k, v in moved.items() if v is None} == set(model) - {"w"}


def test_unused_parameters_get_zeros():
    model = {"w": random(0, 4, 3), "spare": random(1, 5)}
    _, moved = assert_drop_in(lambda p, x, y: cross_entropy(x @ p["w"], y).mean(), model, X, Y)
    assert not moved["spare"].any() and moved["w"].any()


def test_under_jit_and_with_optax():
    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(model, state):
        value, moved = eqxproj.filter_value_and_displacement(loss)(model, X, Y)
        updates, state = optimizer.update(moved, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    model, state, values = MODEL, optimizer.init(eqx.filter(MODEL, eqx.is_inexact_array)), []
    for _ in range(100):
        model, state, value = step(model, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_name_of_the_loss_is_kept():
    assert eqxproj.filter_value_and_displacement(loss).__name__ == "loss"
    assert eqxproj.filter_displacement(loss).__name__ == "loss"


def test_bfloat16_parameters():
    model = jax.tree_util.tree_map(lambda w: w.astype(jnp.bfloat16) if eqx.is_inexact_array(w) else w, MODEL)

    def f(model, x, y):
        return cross_entropy(jax.vmap(model)(x.astype(jnp.bfloat16)).astype(jnp.float32), y).mean()

    _, moved = assert_drop_in(f, model, X, Y, rtol=1e-2)
    assert all(bool(jnp.isfinite(m).all()) and bool((m != 0).any()) for _, m in leaves(moved))


# The raw displacement is what `solve` does.


@pytest.mark.slow
@pytest.mark.parametrize("copies", COPIES)
def test_raw_displacement_is_one_step_of_solve(copies):
    solver = eqxproj.CyclicProjections()
    metric = eqxproj.Metric(grade=2.0, parameter=10.0)
    moved = eqxproj.filter_displacement(loss, solver=solver, metric=metric, copies=copies, tau=1.0, raw=True)(
        MODEL, X, Y
    )
    parameters = eqx.filter(MODEL, eqx.is_inexact_array)
    optimizer = optax.sgd(1.0)
    updates, _ = optimizer.update(moved, optimizer.init(parameters), parameters)
    got = eqx.apply_updates(MODEL, updates)
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y, metric=metric, copies=copies, tau=1.0)
    want = eqxproj.solve(problem, solver, steps=1).model
    assert eqx.tree_equal(got, want, rtol=1e-5, atol=1e-6)
    assert not eqx.tree_equal(got, MODEL, rtol=1e-5, atol=1e-5)


def test_raw_defaults_to_the_unit_metric():
    raw = eqxproj.filter_displacement(loss, raw=True)(MODEL, X, Y)
    unit = eqxproj.filter_displacement(loss, raw=True, metric=eqxproj.Metric())(MODEL, X, Y)
    assert eqx.tree_equal(raw, unit)


def test_several_steps():
    metric = eqxproj.Metric(parameter=10.0)
    moved = eqxproj.filter_displacement(loss, metric=metric, steps=5, raw=True, solver=eqxproj.AlternatingProjections())
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y, metric=metric)
    want = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=5).model
    got = eqx.apply_updates(MODEL, jax.tree_util.tree_map(jnp.negative, moved(MODEL, X, Y)))
    assert eqx.tree_equal(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [eqxproj.AlternatingProjections(), eqxproj.CyclicProjections()])
@pytest.mark.parametrize("hard", [jnp.sign, jnp.round, lambda s: jax.nn.one_hot(jnp.argmax(s, -1), 8)])
def test_a_leap_on_the_way_is_no_wish(hard, solver):
    """In a steep metric, sweeps move arguments on a jump past it; that says nothing, whatever the weights."""

    def f(p, x, y):
        return cross_entropy(hard(hard(x @ p["a"]) @ p["b"]) @ p["c"], y).mean()

    model = {"a": random(1, 4, 8), "b": random(2, 8, 8), "c": random(3, 8, 3)}
    x, y = random(4, 64, 4).at[:4].set(0.0), jnp.arange(64) % 3  # on the jump of a sign; all positions tie
    one = eqxproj.filter_displacement(f)(model, x, y)
    options = {"metric": eqxproj.Metric(1e3, 1e4), "tau": 0.1}
    many = eqxproj.filter_displacement(f, solver=solver, steps=24, **options)(model, x, y)
    for name in model:
        a, b = np.ravel(one[name]), np.ravel(many[name])
        assert np.linalg.norm(b) < 100 * np.linalg.norm(a)
        assert a @ b > 0.95 * np.linalg.norm(a) * np.linalg.norm(b)


# The limit of a steep metric is the gradient.


def chain(depth, activation):
    def f(ws, x, y):
        for w in ws[:-1]:
            x = activation(x @ w)
        return cross_entropy(x @ ws[-1], y).mean()

    sizes = [4, *[8] * depth, 3]
    ws = [random(i, n, m, scale=(2 / n) ** 0.5) for i, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False))]
    return f, ws, X, Y


def mlp_with_biases(depth, activation):
    model = eqx.nn.MLP(4, 3, 8, depth, activation, key=jax.random.key(1))
    return loss, model, X, Y


class Convolutional(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first, self.second = eqx.nn.Conv2d(1, 3, 3, key=k1), eqx.nn.Conv2d(3, 4, 2, stride=2, key=k2)
        self.pool, self.last = eqx.nn.MaxPool2d(2, 2), eqx.nn.Linear(4, 3, key=k3)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        x = jax.nn.relu(self.second(self.pool(x)))
        return self.last(x.reshape(-1))


def convolutional():
    return loss, Convolutional(jax.random.key(2)), random(5, 4, 1, 6, 6), Y[:4]


def residual():
    def f(p, x, y):
        h = x @ p["in"]
        for a, b in zip(p["a"], p["b"], strict=True):
            h = h + jax.nn.relu(h @ a) @ b
        return cross_entropy(h @ p["out"], y).mean()

    p = {"in": random(0, 4, 6), "out": random(1, 6, 3)}
    p |= {"a": [random(i, 6, 6, scale=0.5) for i in (2, 3)], "b": [random(i, 6, 6, scale=0.5) for i in (4, 5)]}
    return f, p, X, Y


def attention():
    """A bare attention product: every factor of every product is unknown."""

    def f(p, x, y):
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
        scores = jnp.einsum("btd,bsd->bts", q, k)
        return jnp.mean((jnp.einsum("bts,bsd->btd", scores, v) - y) ** 2)

    return f, {n: random(i, 4, 5, scale=0.5) for i, n in enumerate("qkv")}, random(7, 2, 3, 4), random(8, 2, 3, 5)


LIMITS = {
    "two layers": lambda: chain(2, jax.nn.relu),
    "eight layers": lambda: chain(8, jax.nn.relu),
    "tanh": lambda: mlp_with_biases(2, jnp.tanh),
    "biases": lambda: mlp_with_biases(2, jax.nn.relu),
    "convolution": convolutional,
    "residual": residual,
    "attention": attention,
}


CHECKED = [("two layers", c) for c in COPIES] + [("attention", c) for c in COPIES]
CHECKED += [("residual", "neuron"), ("residual", "none"), ("eight layers", "neuron"), ("tanh", "neuron")]
CHECKED += [("biases", "none"), ("convolution", "none")]


@pytest.mark.parametrize("name, copies", CHECKED, ids=["-".join(c) for c in CHECKED])
def test_gradient_in_the_limit(name, copies):
    assert_like_gradient(*LIMITS[name](), copies=copies, ratio=2.0)


SIZES = [
    (cross_entropy, jnp.sum),
    (squared_error, jnp.mean),
    (optax.softmax_cross_entropy, jnp.mean),
    (optax.l2_loss, jnp.sum),
]


@pytest.mark.parametrize("make, reduce", SIZES, ids=lambda f: f.__name__)
def test_size_of_a_gradient(make, reduce):
    """Whatever the loss and whether it is a mean or a sum."""

    def f(p, x, y):
        return reduce(make(jnp.tanh(x @ p["a"]) @ p["d"], y))

    y = jax.nn.one_hot(Y, 3)
    assert_like_gradient(f, {"a": random(1, 4, 8), "d": random(2, 8, 3)}, X, y, least=0.99, ratio=2.0)


def test_penalty_and_mask():
    """Several terms: each has its own size."""

    def f(p, x, y):
        mask = (y > 0).astype(jnp.float32)
        data = (cross_entropy(jnp.tanh(x @ p["a"]) @ p["d"], y) * mask).sum() / mask.sum()
        return data + 0.05 * sum(jnp.sum(w**2) for w in p.values())

    assert_like_gradient(f, {"a": random(1, 4, 8), "d": random(2, 8, 3)}, X, Y, least=0.99, ratio=2.0)


def test_shared_weights():
    """A weight that is used twice gets the sum of what both uses want."""

    def f(p, x, y):
        return squared_error(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"].T, y).mean()

    assert_like_gradient(f, {"w": random(1, 4, 4)}, X, random(2, 6, 4), ratio=2.0)


@pytest.mark.parametrize("tau", [1e-3, 10.0])
def test_size_does_not_depend_on_tau_to_first_order(tau):
    moved = eqxproj.filter_displacement(loss, metric=STEEP, tau=tau)(MODEL, X, Y)
    gradient = eqx.filter_grad(loss)(MODEL, X, Y)
    for (_, d), (_, g) in zip(leaves(moved), leaves(gradient), strict=True):
        assert cosine(d, g) > (0.999 if tau < 1 else 0.8)
        assert 0.02 < float(jnp.linalg.norm(d) / jnp.linalg.norm(g)) < 1.1


SQUARE = {name: 0.3 * jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate("ab")}
ROWS, WANTED = jax.random.normal(jax.random.key(7), (16, 8)), jax.random.normal(jax.random.key(8), (16, 8))
HALF_MASK = jnp.tril(jnp.ones((8, 8)))


def fitted(outputs):
    return lambda m, x, y: jnp.mean((outputs(m, x) - y) ** 2)


def gaussian(m, x, y):
    """Learned variances, some of them small."""
    log_variance = x @ m["b"] - 5.0
    return jnp.mean(log_variance + (y - x @ m["a"]) ** 2 * jnp.exp(-log_variance))


def in_float16(m, x):
    h = jnp.tanh(x.astype(jnp.float16) @ m["a"].astype(jnp.float16))
    return jax.nn.relu(h @ m["b"].astype(jnp.float16)).astype(jnp.float32)


def convolved(m, x):
    spectrum = jnp.fft.rfft(jnp.tanh(x @ m["a"])) * (m["b"][0, :5] + 1j * m["b"][1, :5])
    return jnp.fft.irfft(spectrum, 8)


def evidence(m, x, y):
    """Minus the log evidence of a Gaussian process with learned features."""
    features = jnp.tanh(x @ m["a"]) @ m["b"]
    apart = jnp.sum(jnp.square(features[:, None] - features), -1)
    root = jnp.linalg.cholesky(jnp.exp(-0.5 * apart) + 0.1 * jnp.eye(len(x)))
    white = jax.scipy.linalg.solve_triangular(root, y, lower=True)
    return 0.5 * jnp.sum(white * white) + y.shape[1] * jnp.sum(jnp.log(jnp.diag(root)))


LOSSES = {
    "gaussian likelihood": (gaussian, 0.05),
    "root of a relu": (lambda m, x, y: jnp.mean(jnp.sqrt(jax.nn.relu(x @ m["a"] @ m["b"]))), 0.05),
    "norm of relus": (lambda m, x, y: jnp.mean(jnp.linalg.norm(jax.nn.relu(x @ m["a"]) @ m["b"], axis=-1)), 0.05),
    "large gain": (fitted(lambda m, x: jnp.tanh(1e3 * (x @ (m["a"] / 1e3))) @ m["b"]), 0.02),
    "huge gain": (fitted(lambda m, x: jnp.tanh(1e6 * (x @ (m["a"] / 1e6))) @ m["b"]), 0.02),
    "matrix exponential": (fitted(lambda m, x: jnp.tanh(x @ expm(m["a"] - m["a"].T)) @ m["b"]), 0.02),
    "evidence of a Gaussian process": (evidence, 0.02),
    "a sign by a rounded number": (fitted(lambda m, x: gamma(jax.nn.softplus(x @ m["a"]) + 0.5) @ m["b"]), 0.02),
    "masked weight": (fitted(lambda m, x: x @ (m["a"] * HALF_MASK) + x @ m["b"]), 0.02),
    "inverse": (fitted(lambda m, x: jnp.tanh(x @ jnp.linalg.inv(jnp.eye(8) + 0.1 * m["a"])) @ m["b"]), 0.02),
    "first of qr": (fitted(lambda m, x: jnp.tanh(x @ jnp.linalg.qr(m["a"])[0]) @ m["b"]), 0.02),
    "second of eigh": (fitted(lambda m, x: jnp.tanh(x @ jnp.linalg.eigh(m["a"] + m["a"].T)[1]) @ m["b"]), 0.05),
    "float16 inside": (fitted(in_float16), 0.1),
    "complex numbers inside": (fitted(convolved), 0.02),
    "product of spectra": (
        fitted(lambda m, x: jnp.fft.irfft(jnp.fft.rfft(jnp.tanh(x @ m["a"])) * jnp.fft.rfft(m["b"][0]), 8)),
        0.02,
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_that_gradients_train_have_about_their_gradient(name):
    """By defaults, and relative to the largest entry."""
    loss, tolerance = LOSSES[name]
    wanted = jax.grad(loss)(SQUARE, ROWS, WANTED)
    found = eqxproj.filter_displacement(loss)(SQUARE, ROWS, WANTED)
    for key, g in wanted.items():
        size = float(jnp.max(jnp.abs(g)))
        assert size > 0
        np.testing.assert_allclose(found[key] / size, g / size, atol=tolerance)


def test_a_likelihood_with_learned_variances_trains():
    t = np.linspace(-1, 1, 256, dtype=np.float32)[:, None]
    y = np.sin(4 * t) + 0.1 * np.random.default_rng(0).normal(size=t.shape).astype(np.float32)

    def loss(model, t, y):
        mean, log_variance = jnp.split(jax.vmap(model)(t), 2, -1)
        return jnp.mean(0.5 * (log_variance + (y - mean) ** 2 * jnp.exp(-log_variance)))

    model = eqx.nn.MLP(1, 2, 32, 2, jnp.tanh, key=jax.random.key(0))
    result = eqxproj.train(model, (t, y), loss, steps=300, batch_size=64)
    assert loss(result.model, t, y) < -1.2


def test_a_derivative_that_is_not_finite_stops_training():
    def loss(model, x):
        z = jax.vmap(model)(x)
        return jnp.mean(jnp.where(z > 0, jnp.sqrt(z), 0.0))

    model = eqx.nn.Linear(8, 3, key=jax.random.key(0))
    with pytest.raises(eqxproj.NonFiniteError):
        eqxproj.train(model, (np.asarray(ROWS),), loss, steps=2)


@pytest.mark.parametrize(
    "losses", [eqxproj.losses.cross_entropy, optax.softmax_cross_entropy_with_integer_labels], ids=["own", "optax"]
)
@pytest.mark.parametrize("tau", [None, 0.5])
def test_the_defaults_compile_no_loops(losses, tau):
    """A loop costs more to compile than a small network, and in the gradient regime the objective answers its slope."""
    parameters, static = eqx.partition(MODEL, eqx.is_inexact_array)

    def moved(parameters, x, y):
        def mean(model, x, y):
            return losses(jax.vmap(model)(x), y).mean()

        return eqxproj.filter_displacement(mean, tau=tau)(eqx.combine(parameters, static), x, y)

    assert "while" not in set(primitives(jax.make_jaxpr(moved)(parameters, X, Y).jaxpr))
