"""Operations with several outputs of which some are not read, or are no floats: the answer is the gradient's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import eqxproj


def assert_gradient(loss, *args):
    """The displacement is the gradient, which is finite."""
    wanted = ravel_pytree(jax.grad(loss)(*args))[0]
    got = ravel_pytree(eqxproj.filter_displacement(loss)(*args))[0]
    assert np.all(np.isfinite(wanted)) and np.any(wanted != 0)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5 * np.max(np.abs(wanted)))


# Equal eigenvalues and singular values.

MATRICES = {
    "all equal": jnp.eye(3),
    "two equal": jnp.diag(jnp.array([1.0, 1.0, 2.0])),
    "none equal": jnp.asarray(np.diag([1.0, 2.0, 4.0]) + np.random.default_rng(0).normal(size=(3, 3)), jnp.float32),
}
eigh = jnp.linalg.eigh


def values_and_stopped_vectors(p):
    w, v = eigh(p @ p.T)
    return (w**2).sum() + (jax.lax.stop_gradient(v) * p).sum() + jnp.linalg.eigvalsh(p).prod()


def chosen_by_vectors(p):
    w, v = eigh(p @ p)
    return jnp.sum(jnp.where(v[0] > 0, w, 2 * w) @ p)


def in_a_scan(p):
    def body(c, _):
        w, v = eigh(p @ p + jnp.diag(c))
        return w, (v, w)

    return jax.lax.scan(body, jnp.zeros(3), None, length=2)[1][1].sum()


def in_a_cond(p):
    w, _ = jax.lax.cond(p[0, 0] > -9, lambda p: tuple(eigh(p @ p)), lambda p: (p[0], p), p)
    return w.sum() + p.sum()


def in_batches(p):
    apart = jax.vmap(lambda a: eigh(a * p @ p)[0])(jnp.arange(1, 4.0))
    return apart.prod() + jax.lax.map(lambda a: eigh(a * p @ p), jnp.arange(1, 3.0))[0].prod()


def again(p):
    return jax.checkpoint(lambda p: eigh(p @ p))(p)[0].prod()


def singular(p):
    norms = jnp.linalg.norm(p @ p, "nuc") + jnp.linalg.norm(p, 2)
    return jnp.sum(jnp.linalg.svd(p @ p)[1] ** 3) + jnp.linalg.svd(p, compute_uv=False).sum() + norms


def factors(p):
    triangle = jnp.abs(jnp.diag(jnp.linalg.qr(p @ p)[1])).sum()
    lower = jnp.log(jnp.diag(jnp.linalg.cholesky(p @ p.T))).sum()
    upper = jnp.log(jnp.abs(jnp.diag(jax.scipy.linalg.lu(p @ p)[2]))).sum()
    return triangle + lower + upper + jnp.linalg.slogdet(p @ p.T)[1] + jnp.linalg.det(p)


DECOMPOSITIONS = (values_and_stopped_vectors, chosen_by_vectors, in_a_scan, in_a_cond, in_batches, again, singular)
DECOMPOSITIONS += (factors,)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("loss", DECOMPOSITIONS, ids=lambda f: f.__name__)
def test_parts_of_a_decomposition(loss, matrix):
    assert_gradient(loss, MATRICES[matrix])


def test_vectors_as_auxiliary_output():
    def loss(p):
        w, v = eigh(p)
        return jnp.sum(jnp.log(w)), v

    moved, v = eqxproj.filter_displacement(loss, has_aux=True)(jnp.eye(3))
    np.testing.assert_allclose(moved, jnp.eye(3), rtol=1e-5)
    np.testing.assert_allclose(v, eigh(jnp.eye(3))[1], atol=1e-6)


@pytest.mark.parametrize("metric", [None, eqxproj.Metric()], ids=["gradient", "projection"])
def test_equal_eigenvalues_in_both_regimes(metric):
    moved = eqxproj.filter_displacement(lambda p: (eigh(p @ p.T)[0] ** 2).sum(), metric=metric)(jnp.eye(3))
    assert np.all(np.diag(moved) > 0) and np.all(np.isfinite(moved))


# Outputs of branches, and carries, that are no floats.

P = {"w": jnp.array([1.0, 2.0]), "v": jnp.array([0.5, 0.3])}
X = jnp.array([3.0, 4.0])
KEY = jax.random.key(0)


@pytest.mark.parametrize("kind", ["float", "int", "bool"])
def test_a_branch_with_a_further_output(kind):
    make = {"float": jnp.sum, "int": jnp.argmax, "bool": lambda h: h.sum() > 0}[kind]

    def loss(p, x, go):
        h, a = jax.lax.cond(go, lambda h: (jnp.tanh(h), make(h)), lambda h: (h, make(-h)), p["w"] * x)
        return jnp.mean((jnp.where(a > 0, h, 2.0 * h) * p["v"]) ** 2)

    assert_gradient(loss, P, X, jnp.array(True))
    assert_gradient(loss, P, X, jnp.array(False))


@pytest.mark.parametrize("branch", [0, 2])
def test_a_switch_with_keys_and_masks(branch):
    def loss(p, x, i, key):
        branches = [
            lambda h, k: (jnp.sin(h), k, 1, h > 0),
            lambda h, k: (h**2, jax.random.split(k)[0], jnp.argmin(h), h < 0),
            lambda h, k: (h, jax.random.split(k)[1], 2, h == h),
        ]
        h, k, j, mask = jax.lax.switch(i, branches, p["w"] * x, key)
        noise = jax.random.normal(k, h.shape) * p["v"]
        return jnp.mean((h * p["v"] + noise) ** 2 * jnp.where(mask, 1.0, 0.5)) * j

    assert_gradient(loss, P, X, branch, KEY)


def keys_in_a_scan(p, x):
    def body(carry, k):
        h, key, n, flag = carry
        own, key = jax.random.split(key)
        h = jnp.tanh(h * p["w"] + 0.1 * jax.random.normal(own, h.shape) + jax.random.normal(k, h.shape))
        return (h, key, n + 1, h.sum() > 0), (h, h > 0, n, key)

    start = (x, jax.random.key(1), 0, True)
    (h, _, n, flag), (hs, positive, _, keys) = jax.lax.scan(body, start, jax.random.split(jax.random.key(2), 3))
    noise = jax.random.normal(keys[1], ())
    return jnp.mean((h * p["v"] * jnp.where(flag, 1.0, 2.0) + (hs * positive).sum(0) * n) ** 2) + noise


def a_cond_in_a_scan(p, x):
    def body(carry, _):
        h, b = carry
        tanh, plus = (lambda h: (jnp.tanh(h * p["w"]), h.sum() > 0.5, jnp.argmax(h))), lambda h: (h * p["v"], True, 0)
        h, b, i = jax.lax.cond(b, tanh, plus, h)
        return (h, b), (i, b, h)

    (h, _), (i, _, hs) = jax.lax.scan(body, (x, True), None, length=4)
    return jnp.mean((h * p["v"]) ** 2) + hs[1].sum() * (i[1] + 1)


def a_position_alone(p, x):
    n = jax.lax.cond(x[0] > 0, lambda h: jnp.argmax(h), lambda h: 0, p["w"] * x)
    return jnp.mean((p["v"] * x)[n] ** 2)


def a_loop_with_a_key(p, x):
    def body(s):
        i, k, h = s
        k, own = jax.random.split(k)
        return i + 1, k, h + jax.random.normal(own, h.shape)

    i, _, h = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, KEY, x))
    count, f = jax.lax.fori_loop(0, 3, lambda i, s: (s[0] + 1, s[1] * p["w"]), (0, x))
    return jnp.mean((p["w"] * h + p["v"] * i) ** 2) + jnp.mean((f * p["v"] * count) ** 2)


def a_count_by_parameters(p, x):
    n = jax.lax.while_loop(lambda i: i * p["v"].sum() < 3, lambda i: i + 1, 0)
    return jnp.mean((p["w"] * x * n) ** 2)


def mapped_keys(p, x):
    pairs = (x, jax.random.split(KEY))
    y, mask = jax.lax.map(lambda t: (t[0] * p["w"] + jax.random.normal(t[1], (2,)), t[0] > 3), pairs)
    return jnp.mean((y * p["v"] * mask[:, None]) ** 2)


def batched_branches(p, x):
    def each(go):
        return jax.lax.cond(go, lambda h: (jnp.tanh(h), h > 0), lambda h: (h, h < 0), p["w"] * x)

    h, mask = jax.vmap(each)(jnp.array([True, False]))
    return jnp.mean((jnp.where(mask, h, 2 * h) * p["v"]) ** 2)


def an_infinite_slope_that_nobody_reads(p, x):
    h, _ = jax.lax.cond(x[0] > 0, lambda h: (h, jnp.sqrt(h - h)), lambda h: (-h, h), p["w"] * x)
    return jnp.mean((h * p["v"]) ** 2)


OTHERS = (keys_in_a_scan, a_cond_in_a_scan, a_position_alone, a_loop_with_a_key, a_count_by_parameters, mapped_keys)
OTHERS += (batched_branches, an_infinite_slope_that_nobody_reads)


@pytest.mark.parametrize("loss", OTHERS, ids=lambda f: f.__name__)
def test_outputs_and_carries_that_are_no_floats(loss):
    assert_gradient(loss, P, X)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [keys_in_a_scan, a_cond_in_a_scan, mapped_keys], ids=lambda f: f.__name__)
def test_they_train_by_the_defaults(loss):
    losses = eqxproj.train(
        P, (jnp.full((8, 2), 4.0),), lambda p, x: jax.vmap(lambda x: loss(p, x))(x).mean(), steps=10
    ).history["loss"]
    assert losses[-1] < losses[1]
