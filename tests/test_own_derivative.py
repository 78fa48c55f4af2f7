"""Functions whose author wrote a derivative: its answer, whatever they return, close over, or stand inside of."""

from __future__ import annotations

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj

pytestmark = pytest.mark.usefixtures("full_precision")

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


def by_parts(function, slope):
    made = jax.custom_jvp(function)
    made.defjvps(slope)
    return made


class Tripled:
    def __call__(self, primals, tangents):
        return jnp.sin(*primals), 3 * tangents[0]


by_object = jax.custom_jvp(jnp.sin)
by_object.defjvp(Tripled())


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
    "of a function of JAX": with_jvp(jnp.sin, lambda v, t: 3 * t),
    "of a function of JAX, by parts": by_parts(jnp.sin, lambda t, y, v: 3 * t),
    "of an activation": by_parts(jax.nn.relu, lambda t, y, v: t),
    "by an object": by_object,
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


def hidden_vjp(u, held):
    """Closes over an array in its derivative alone."""
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda u: (jnp.sin(u), None), lambda _, g: (g * jnp.cos(held),))
    return f(u)


def hidden_jvp(u, held):
    return with_jvp(jnp.sin, lambda u, t: t * jnp.cos(held))(u)


def looped(f, s, m, x, kind):
    """A loop of at most four steps, of which three are taken."""
    step = lambda c: (f(c[0] @ m["a"] + x, s), c[1] + 1)  # noqa: E731
    return eqxi.while_loop(lambda c: c[1] < 3, step, (x, 0), max_steps=4, kind=kind)[0]


def recurrent(f, s, m, x):
    """A recurrence that nothing unknown enters, so that its carry is unknown from the second step on."""
    return jax.lax.scan(lambda h, r: (f(jnp.tanh(r @ m["a"] + 0.3 * h), s), h), jnp.zeros(4), x)[1]


WITHIN = {
    "scan": recurrent,
    "map": lambda f, s, m, x: jax.lax.map(lambda r: f(r @ m["a"], s), x),
    "loop": lambda f, s, m, x: jax.lax.fori_loop(0, 3, lambda _, h: f(h @ m["a"] + x, s), x),
    "bounded": lambda *args: looped(*args, kind="bounded"),
    "checkpointed": lambda *args: looped(*args, kind="checkpointed"),
    "cond": lambda f, s, m, x: jax.lax.cond(x[0, 0] > -9, lambda u: f(u, s), jnp.sin, x @ m["a"]),
    "switch": lambda f, s, m, x: jax.lax.switch(7, [jnp.sin, lambda u: f(u, s)], x @ m["a"]),
    "branches in a map": lambda f, s, m, x: jax.lax.map(
        lambda r: jax.lax.cond(r[0] > 0, lambda u: f(u, s), jnp.sin, r @ m["a"]), x
    ),
    "map in a map": lambda f, s, m, x: jax.lax.map(
        lambda r: jax.lax.map(lambda u: f(u * jnp.ones(4), s)[0], r @ m["a"]), x
    ),
    "map in a branch": lambda f, s, m, x: jax.lax.cond(
        x[0, 0] > -9, lambda u: jax.lax.map(lambda r: f(r, s), u), jnp.sin, x @ m["a"]
    ),
    "calls": lambda f, s, m, x: jax.checkpoint(
        lambda x: jax.lax.map(jax.checkpoint(jax.jit(lambda r: f(r @ m["a"], s))), x)
    )(x),
    "samples": lambda f, s, m, x: jax.vmap(
        lambda r: jax.lax.scan(lambda h, _: (f(h @ m["a"] + r, s), None), jnp.zeros(4), None, length=3)[0]
    )(x),
    "complex": lambda f, s, m, x: jnp.abs(
        jax.lax.scan(lambda c, r: (c * jnp.exp(1j * f(r @ m["a"], s)), None), jnp.ones(4) + 0j, x)[0] + x
    ),
}
CLOSING = [closing_vjp, closing_jvp, hidden_vjp, hidden_jvp]


def within(place, f, held):
    return lambda m, x, y: jnp.mean((WITHIN[place](f, held(m, x, y), m, x) @ m["b"] - y) ** 2)


def assert_is_gradient_of_known_data(loss):
    """The gradient outside of a `jit`: inside of one, JAX refuses what is closed over in the body of a loop."""
    wanted, found = jax.grad(loss)(MODEL, X, Y), eqxproj.filter_displacement(loss)(MODEL, X, Y)
    for name, g in wanted.items():
        np.testing.assert_allclose(found[name], g, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(g))))
    assert float(jnp.max(jnp.abs(wanted["a"]))) > 0


@pytest.mark.parametrize("place", ["scan", "branches in a map", "checkpointed"])
@pytest.mark.parametrize("f", [closing_vjp, hidden_jvp])
def test_a_derivative_in_a_loop_may_close_over_what_is_made_outside(place, f):
    assert_is_gradient_of_known_data(within(place, f, lambda m, x, y: jnp.sin(2 * y[0])))


@pytest.mark.slow
@pytest.mark.parametrize("place", WITHIN)
@pytest.mark.parametrize("f", CLOSING)
def test_a_derivative_in_any_control_flow_may_close_over_data(place, f):
    assert_is_gradient_of_known_data(within(place, f, lambda m, x, y: y[0]))
    assert_is_gradient_of_known_data(within(place, f, lambda m, x, y: jnp.sin(x[0] @ jax.lax.stop_gradient(m["c"]))))


@pytest.mark.parametrize("f", CLOSING)
@pytest.mark.parametrize("place", [None, "scan", "cond"])
def test_to_close_over_a_parameter_is_an_error_as_under_the_gradient(place, f):
    def outermost(m, x, y):
        return jnp.mean(jax.jit(lambda u: f(u, m["c"][0]))(x @ m["a"]) ** 2)

    loss = within(place, f, lambda m, x, y: jnp.sin(m["c"][0])) if place else outermost
    with pytest.raises(Exception, match="."):
        jax.grad(loss)(MODEL, X, Y)
    with pytest.raises(ValueError, match=r"closes over an array that depends on parameters, float32\[4\]"):
        eqxproj.filter_displacement(loss)(MODEL, X, Y)


@pytest.mark.parametrize("f", CLOSING)
@pytest.mark.parametrize("place", ["scan", "cond"])
def test_a_mask_that_parameters_make_is_closed_over_as_it_is(place, f):
    """It has no derivative, and JAX takes it."""
    assert_is_gradient_of_known_data(within(place, f, lambda m, x, y: (m["c"][0] > 0) + jnp.sign(m["c"][1])))


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
