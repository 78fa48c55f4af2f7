"""Functions with `jax.custom_vjp`: their own answer is what the sweep passes on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj

KEYS = jax.random.split(jax.random.key(0), 5)
X, Y = jax.random.normal(KEYS[0], (12, 6)), jax.random.normal(KEYS[1], (12, 6))
MODEL = {name: 0.5 * jax.random.normal(key, (6, 6)) for name, key in zip("abc", KEYS[2:], strict=True)}


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def clipped(x):
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.clip(g * jnp.cos(x), -1e-3, 1e-3),))


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 0.7),))


@jax.custom_vjp
def fixed_point(w, x):
    """The solution of z = tanh(z w + x), by a loop that has no derivative of its own."""
    return jax.lax.while_loop(
        lambda c: c[1] < 40, lambda c: (jnp.tanh(c[0] @ w + x), c[1] + 1), (jnp.zeros_like(x), 0)
    )[0]


def _solved(w, x):
    z = fixed_point(w, x)
    return z, (w, x, z)


def _implicit(saved, g):
    w, x, z = saved
    back = jax.vjp(lambda z: jnp.tanh(z @ w + x), z)[1]
    u = jax.lax.fori_loop(0, 40, lambda _, u: g + back(u)[0], g)
    return jax.vjp(lambda w, x: jnp.tanh(z @ w + x), w, x)[1](u)


fixed_point.defvjp(_solved, _implicit)


def inside(f):
    return lambda m, x: f(jnp.tanh(x @ m["a"])) @ m["b"]


def mapped(f):
    return lambda m, x: jax.vmap(lambda row: f(jnp.tanh(row @ m["a"])))(x) @ m["b"]


def recurrent(f):
    def outputs(m, x):
        step = lambda h, row: (f(jnp.tanh(row @ m["a"] + 0.3 * h)), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(6), x)[0] @ m["b"]

    return outputs


def last(f):
    return lambda m, x: f(x @ m["a"])


PLACES = {"inside": inside, "mapped": mapped, "recurrent": recurrent, "last": last}
FUNCTIONS = {"reversed": reversed_gradient, "clipped": clipped, "straight through": straight_through}
CASES = {f"{name}, {place}": make(f) for name, f in FUNCTIONS.items() for place, make in PLACES.items()}
CASES["fixed point"] = lambda m, x: fixed_point(0.3 * m["c"], x @ m["a"]) @ m["b"]
CASES["fixed point, mapped"] = lambda m, x: jax.vmap(lambda r: fixed_point(0.3 * m["c"], r @ m["a"]))(x) @ m["b"]


def loss_of(outputs):
    return lambda m, x, y: jnp.mean((outputs(m, x) - y) ** 2)


@pytest.mark.parametrize("name", list(CASES))
def test_the_displacement_is_what_the_gradient_would_be(name):
    loss = loss_of(CASES[name])
    wanted = jax.grad(loss)(MODEL, X, Y)
    found = eqxproj.filter_displacement(loss)(MODEL, X, Y)
    for key, g in wanted.items():
        np.testing.assert_allclose(found[key], g, rtol=0.03, atol=0.01 * float(jnp.max(jnp.abs(g))) + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [eqxproj.CyclicProjections(), eqxproj.AlternatingProjections()])
@pytest.mark.parametrize("name", ["straight through, inside", "fixed point"])
def test_in_a_flat_metric_solvers_come_nearer(name, solver):
    loss = loss_of(CASES[name])
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y, tau=1.0)
    assert "its own derivative" in str(problem.explain())
    assert loss(eqxproj.solve(problem, solver, steps=30).model, X, Y) < 0.9 * loss(MODEL, X, Y)


@pytest.mark.usefixtures("full_precision")
def test_for_one_linear_output_it_is_the_projection():
    """Onto y = a x, from (x, y0): the closed form is the oracle."""
    slopes = jnp.asarray([2.0, -1.0, 0.5])

    @jax.custom_vjp
    def weighted(x):
        return slopes @ x

    weighted.defvjp(lambda x: (slopes @ x, None), lambda _, g: (g * slopes,))
    moved = {}
    for name, f in (("own", weighted), ("plain", lambda x: slopes @ x)):

        def loss(x, f=f):
            return (f(x) - 3.0) ** 2

        problem = eqxproj.feasibility_problem(loss, jnp.asarray([0.3, 0.1, -0.2]), tau=1.0)
        moved[name] = eqxproj.solve(problem, eqxproj.CyclicProjections(), steps=1).model
    np.testing.assert_allclose(moved["own"], moved["plain"], rtol=1e-5)
