"""Side effects of a loss: as often as under the gradient, with the same values, and never on the way back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import eqxproj

P = {"w": jnp.array([1.0, 2.0]), "v": jnp.array([0.5, 0.3])}
X = jnp.array([0.3, 0.4])
LOG = []


def noted(tag):
    return lambda *values: LOG.append((tag, *(np.round(np.asarray(v, float), 3).tolist() for v in values)))


def note(tag, *values, **options):
    jax.debug.callback(noted(tag), *values, **options)


def plain(p, x):
    y = p["w"] * x
    note("unknown", y, jnp.tanh(y))  # what only the note reads is computed for it
    note("data", x[0])
    return jnp.sum((y * p["v"]) ** 2)


def in_order(p, x):
    note("first", p["w"], ordered=True)
    note("second", p["v"] * x, ordered=True)
    return jnp.sum(p["w"] * x * p["v"])


def scan(p, x):
    matrix = jnp.stack([p["w"], p["v"]])

    def body(c, _):
        note("step", matrix @ c * 2)
        return jnp.tanh(matrix @ c), (c * p["v"]).sum()

    h, ys = jax.lax.scan(body, x, None, length=3)
    return jnp.sum(h) + ys.sum()


def scan_of_data(p, x):
    def body(c, _):
        note("step", c)
        return jnp.tanh(c), None

    return jnp.sum(p["w"] * jax.lax.scan(body, x, None, length=3)[0])


def mapped(p, x):
    def each(a):
        note("each", a * p["w"])
        return (a * p["w"]).sum()

    return jnp.sum(jax.lax.map(each, x) ** 2 * p["v"]) + jnp.sum(jax.vmap(each)(x))


def cond_in_scan(p, x):
    def taken(h):
        note("taken", h)
        return jnp.tanh(h)

    def body(c, _):
        return jax.lax.cond(c.sum() > 0.5, taken, lambda h: h + 0.1, c * p["w"]), None

    return jnp.sum((jax.lax.scan(body, x, None, length=3)[0] * p["v"]) ** 2)


def scan_in_scan(p, x):
    def inner(c, _):
        note("inner", c)
        return c * p["v"], None

    def body(c, _):
        note("outer", c)
        return jax.lax.scan(inner, jnp.tanh(c * p["w"]), None, length=2)[0], None

    return jnp.sum(jax.lax.scan(body, x, None, length=2)[0])


def while_loop(p, x):
    def body(s):
        note("turn", s[1])
        return s[0] + 1, s[1] * 2

    return jnp.sum(jax.lax.while_loop(lambda s: s[0] < 2, body, (0, x))[1] * p["w"])


def known_to_the_host(p, x):
    io_callback(noted("known"), None, jax.lax.stop_gradient(p["w"]), ordered=True)
    y = io_callback(lambda v: np.asarray(v) * 2, jax.ShapeDtypeStruct((2,), jnp.float32), x)
    return jnp.sum(p["w"] * y * p["v"])


def unused(p, x):
    note("unused", jnp.exp(jnp.tanh(p["w"])))
    return jnp.sum(p["v"] ** 2)


LOSSES = (
    plain,
    in_order,
    scan,
    scan_of_data,
    mapped,
    cond_in_scan,
    scan_in_scan,
    while_loop,
    known_to_the_host,
    unused,
)


def logged(function):
    LOG.clear()
    out = jax.block_until_ready(eqx.filter_jit(function)(P, X))
    jax.effects_barrier()
    return out, sorted(map(str, LOG)), list(LOG)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_effects_happen_once(loss):
    gradient, wanted, order = logged(eqx.filter_grad(loss))
    displacement, got, found = logged(eqxproj.filter_displacement(loss))
    assert wanted and got == wanted
    assert loss is not in_order or found == order
    jax.tree.map(lambda d, g: np.testing.assert_allclose(d, g, rtol=1e-4, atol=1e-6), displacement, gradient)


@pytest.mark.parametrize("loss", [plain, scan, mapped, scan_in_scan], ids=lambda f: f.__name__)
def test_effects_of_an_unrolled_recurrence(loss):
    """The forward pass of two-color solvers, and none of their steps."""
    wanted = logged(loss)[1]
    steps = eqxproj.filter_displacement(loss, solver=eqxproj.AlternatingProjections(), steps=3)
    assert logged(steps)[1] == wanted


def test_effects_in_training():
    LOG.clear()
    eqxproj.train(P, (jnp.ones((4, 2)),), lambda p, x: jax.vmap(lambda x: plain(p, x))(x).mean(), steps=3)
    jax.effects_barrier()
    samples = [entry for entry in LOG if entry[0] == "data"]
    assert len(samples) == 1 + 3 * 4  # one sample before training, four a step


def refused_in_scan(p, x):
    def body(c, _):
        io_callback(noted("io"), None, c)
        return c * p["w"], None

    return jnp.sum(jax.lax.scan(body, x, None, length=2)[0])


def refused_in_cond(p, x):
    def taken(h):
        io_callback(noted("io"), None, h)
        return h

    return jnp.sum(jax.lax.cond(x[0] > 0, taken, lambda h: h, p["w"]) * x)


def refused(p, x):
    io_callback(noted("io"), None, p["w"] * x, ordered=True)
    return jnp.sum(p["w"] * x)


def check_in_scan(p, x):
    def body(c, _):
        return eqx.error_if(c, c[0] > 0.2, "too large") * p["w"], None

    return jnp.sum(jax.lax.scan(body, x, None, length=2)[0])


def check_in_cond(p, x):
    checked = lambda h: eqx.error_if(h, h[0] > 0.2, "too large")  # noqa: E731
    return jnp.sum(jax.lax.cond(x[0] > 0, checked, lambda h: h, p["w"] * x) * p["v"])


RAISING = (refused, refused_in_scan, refused_in_cond, check_in_scan, check_in_cond)


@pytest.mark.parametrize("loss", RAISING, ids=lambda f: f.__name__)
def test_errors_are_those_of_the_gradient(loss):
    message = "too large" if "check" in loss.__name__ else "do not support JVP"
    for function in (eqx.filter_grad(loss), eqxproj.filter_displacement(loss)):
        with pytest.raises((ValueError, RuntimeError), match=message):
            logged(function)
