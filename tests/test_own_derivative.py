"""Functions whose author wrote a derivative: its answer, whatever they return, close over, or stand inside of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj

KEYS = jax.random.split(jax.random.key(0), 5)
X, Y = jax.random.normal(KEYS[0], (6, 4)), jax.random.normal(KEYS[1], (6, 4))
MODEL = {name: 0.5 * jax.random.normal(key, (4, 4)) for name, key in zip("abc", KEYS[2:])}
NOTHING = np.zeros((), jax.dtypes.float0)


def with_vjp(function, back):
    made = jax.custom_vjp(function)
    made.defvjp(lambda *x: (function(*x), x), back)
    return made


def with_jvp(function, slope):
    made = jax.custom_jvp(function)
    made.defjvp(lambda primals, tangents: (made(*primals), slope(*primals, *tangents)))
    return made


def beside(aux):
    """The sine with another derivative, and what `aux` returns beside it."""
    return with_vjp(lambda u: (jnp.sin(u), aux(u)), lambda saved, g: (-2 * g[0],))


both = with_vjp(lambda u: (jnp.sin(u), jnp.exp(1j * u) * u), lambda saved, g: (3 * g[0] + g[1].real,))
tree = with_vjp(lambda u: {"a": u, "b": (2 * u, jnp.argmax(u))}, lambda saved, g: (g["a"] - 3 * g["b"][0],))
modulus = with_vjp(lambda u: jnp.abs(u) ** 2, lambda saved, g: (-g * jnp.conj(saved[0]),))
times = with_vjp(lambda u, i: u * i, lambda saved, g: (5 * g, NOTHING))
noisy = with_vjp(lambda u, k: u + jax.random.normal(k, u.shape), lambda saved, g: (3 * g, None))
signs = with_jvp(
    lambda u: (jnp.sign(u), jnp.argmax(u)), lambda u, t: (t * (jnp.abs(u) < 1), np.zeros((), jax.dtypes.float0))
)
BY_VJP = {
    "integers": lambda u: beside(jnp.argmax)(u)[0],
    "integers that are read": lambda u: (lambda y, n: y * n)(*beside(lambda u: jnp.sum(u > 0))(u)),
    "booleans that choose": lambda u: (lambda y, p: jnp.where(p, y, 3 * u))(*beside(lambda u: u > 0)(u)),
    "complex": lambda u: (lambda y, z: y + jnp.abs(z) ** 2)(*both(u)),
    "of complex": lambda u: modulus(u * jnp.exp(1j * u)),
    "tree": lambda u: (lambda out: out["a"] * out["b"][0])(tree(u)),
    "of positions": lambda u: times(u, jnp.argmax(u) + 1),
    "of keys": lambda u: noisy(u, jax.random.key(3)),
}
BY_JVP = {
    "spike": with_jvp(lambda v: jnp.where(v > 0, 1.0, 0.0), lambda v, t: t / (1 + 10 * jnp.abs(v)) ** 2),
    "reversal": with_jvp(lambda v: v, lambda v, t: -t),
    "scaled": with_jvp(lambda v: 1.0 * v, lambda v, t: 0.1 * t),
    "rounding": with_jvp(lambda v: jnp.round(v), lambda v, t: t),
    "another slope": with_jvp(lambda v: jnp.maximum(v, 0.0), lambda v, t: jnp.where(v > 0, 1.0, 0.3) * t),
    "one hot": with_jvp(
        lambda v: jax.nn.one_hot(jnp.argmax(v), 4), lambda v, t: jax.jvp(jax.nn.softmax, (v,), (t,))[1]
    ),
    "beside positions": lambda u: signs(u)[0],
}


def in_scan(f):
    def step(m, h, row):
        z = f(row @ m["a"] + 0.3 * h)
        return z, z

    return lambda m, x: jax.lax.scan(lambda h, row: step(m, h, row), jnp.zeros(4), x)[1] @ m["b"]


PLACES = {
    "mapped": lambda f: lambda m, x: jax.vmap(f)(jnp.tanh(x @ m["a"])) @ m["b"],
    "scan": in_scan,
    "cond": lambda f: (
        lambda m, x: (
            jax.vmap(lambda r: jax.lax.cond(r[0] > 0, f, jnp.sin, r @ m["a"]))(x) @ m["b"]
            + jax.lax.cond(x[0, 0] > -9, f, jnp.sin, x[0] @ m["c"])
        )
    ),
    "jit and remat": lambda f: lambda m, x: jax.jit(jax.checkpoint(jax.vmap(f)))(x @ m["a"]) @ m["b"],
    "last": lambda f: lambda m, x: jax.vmap(f)(x @ m["a"]),
}


def assert_is_gradient(loss, *args):
    wanted, found = jax.jit(jax.grad(loss))(*args), eqxproj.filter_displacement(loss)(*args)
    for g, d in zip(jax.tree_util.tree_leaves(wanted), jax.tree_util.tree_leaves(found), strict=True):
        np.testing.assert_allclose(d, g, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(g))) + 1e-9)


@pytest.mark.parametrize("place", ["mapped", "scan"])
@pytest.mark.parametrize("name", [*BY_VJP, *BY_JVP])
def test_the_displacement_is_what_the_gradient_would_be(name, place):
    outputs = PLACES[place]((BY_VJP | BY_JVP)[name])
    assert_is_gradient(lambda m, x, y: jnp.mean((outputs(m, x) - y) ** 2), MODEL, X, Y)


@pytest.mark.slow
@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("mapped", "scan")])
@pytest.mark.parametrize("name", [*BY_VJP, *BY_JVP])
def test_in_other_places_too(name, place):
    outputs = PLACES[place]((BY_VJP | BY_JVP)[name])
    assert_is_gradient(lambda m, x, y: jnp.mean((outputs(m, x) - y) ** 2), MODEL, X, Y)


def closing_vjp(u, held):
    f = jax.custom_vjp(lambda u: u - held)
    f.defvjp(lambda u: (u - held, None), lambda _, g: (g * jnp.cos(held),))
    return f(u)


def closing_jvp(u, held):
    return with_jvp(lambda u: u * held, lambda u, t: t * jnp.cos(held))(u)


@pytest.mark.parametrize("f", [closing_vjp, closing_jvp])
def test_a_derivative_may_close_over_what_the_loss_makes(f):
    """Over data, over what is computed of it, and over a parameter that is stopped."""

    def loss(m, x, y):
        z = f(x @ m["a"], y) + f(x @ m["b"], jnp.sin(2 * y))
        return jnp.mean(f(z, 3 * y) * f(z, jax.lax.stop_gradient(x @ m["c"])))

    assert_is_gradient(loss, MODEL, X, Y)


def test_to_close_over_a_parameter_is_an_error_as_under_the_gradient():
    def loss(m, x):
        return jnp.mean(jax.jit(lambda u: closing_vjp(u, m["c"][0]))(x @ m["a"]) ** 2)

    with pytest.raises(Exception, match="."):
        jax.grad(loss)(MODEL, X)
    with pytest.raises(ValueError, match="closes over an array that depends on parameters"):
        eqxproj.filter_displacement(loss)(MODEL, X)


def rules_of(f):
    problem = eqxproj.feasibility_problem(lambda m, x, y: jnp.mean((f(x @ m["a"]) @ m["b"] - y) ** 2), MODEL, X, Y)
    return str(problem.explain())


def test_other_functions_with_a_custom_jvp_are_seen_through():
    twice = with_jvp(lambda v: jnp.maximum(v, 0.0), lambda v, t: jnp.where(v > 0, 1.0, 0.0) * t)
    for f in (jax.nn.relu, twice):
        assert "scalar: relu" in rules_of(f)
    assert "its own derivative" in rules_of(BY_JVP["another slope"])


def counted(v):
    return jax.lax.while_loop(lambda c: jnp.sum(c) < 3.0, lambda c: c + 1.0, v)


def called(method):
    return lambda v: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(v.shape, v.dtype), v, vmap_method=method)


AROUND = {
    "map": lambda f: lambda w, x: jax.lax.map(f, x @ w),
    "inner": lambda f: lambda w, x: jax.lax.map(lambda r: f(r @ w), x) @ w.T,
    "carried": lambda f: lambda w, x: jax.lax.scan(lambda c, r: (f(c + r @ w), None), jnp.zeros(2), x)[0] @ w.T,
    "nested": lambda f: lambda w, x: jax.lax.map(lambda r: jax.lax.map(f, r @ w), x[:, None]),
    "cond": lambda f: lambda w, x: jax.lax.cond(x[0, 0] > 0, f, jnp.sin, x[0] @ w),
    "last": lambda f: lambda w, x: jax.checkpoint(f)(x @ w),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["while", None, "sequential", "expand_dims"])
def test_without_rule_and_derivative_there_is_an_error_and_no_trace_without_end(name, around):
    outputs = AROUND[around](counted if name == "while" else called(name))
    primitive, where = ("while", "counted") if name == "while" else ("pure_callback", "<lambda>")

    def loss(w, x):
        return jnp.mean(outputs(w, x) ** 2)

    for ask in (eqxproj.filter_displacement(loss), lambda w, x: eqxproj.feasibility_problem(loss, w, x)):
        with pytest.raises(eqxproj.UnsupportedPrimitiveError) as error:
            ask(jnp.ones((3, 2)), jnp.ones((1000, 3)))
        assert [m.primitive for m in error.value.missing] == [primitive]
        assert "test_own_derivative.py" in str(error.value) and where in str(error.value)
        assert "register_projection" in str(error.value)
