"""The losses' values against Optax, and their proximal maps against optimality conditions and SciPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

from eqxproj._numerics._cross_entropy import _wright, cross_entropy_displacement, cross_entropy_value
from eqxproj._numerics._losses import (
    hinge_displacement,
    hinge_value,
    margin_displacement,
    margin_value,
    squared_error_displacement,
    squared_error_value,
)
from eqxproj._numerics._water_level import water_level

TAUS = (0.01, 0.1, 1.0, 5.0, 20.0, 100.0)
EXTREME_TAUS = (1e-8, 1e-3, 1.0, 1e4)

seeded = hypothesis.settings(derandomize=True, deadline=None, max_examples=30, database=None)
exponents = st.floats(-6, 6)
seeds = st.integers(0, 2**16)


def batch(seed, shape, scale=1.0):
    """Random logits, and labels for them."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32)


def one_hot(labels, n):
    return np.eye(n)[np.asarray(labels)]


def softmax(u):
    e = np.exp(u - u.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def residual(z, d, y, tau):
    """Of the optimality condition of the cross-entropy, in float64, over the scale of the logits."""
    z, d, y, tau = (np.asarray(x, np.float64) for x in (z, d, y, tau))
    scale = np.maximum(1, np.abs(z).max(axis=-1, keepdims=True))
    r = d + tau * (y.sum(axis=-1, keepdims=True) * softmax(z + d) - y)
    return np.abs(r / scale).max()


def cosine(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1)[norms > 0] / norms[norms > 0]


@pytest.fixture
def double():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def unchecked():
    """Without the checks of the annotations, as for a user, where the functions' own errors come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("shape", [(3,), (7, 10), (2, 5, 4)])
def test_values_are_those_of_optax(shape):
    z, labels = batch(0, shape, 3.0)
    soft = jax.nn.softmax(batch(1, shape)[0])
    signs = jnp.sign(batch(2, shape)[0])

    def close(found, want):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)

    want = optax.softmax_cross_entropy_with_integer_labels(z, labels)
    close(cross_entropy_value(z, labels), want)
    one = jax.nn.one_hot(labels, shape[-1])
    close(cross_entropy_value(z, one), want)
    close(cross_entropy_value(z, soft), optax.softmax_cross_entropy(z, soft))
    close(squared_error_value(z, soft), optax.squared_error(z, soft))
    close(hinge_value(z, signs), optax.hinge_loss(z, signs))
    want = optax.losses.multiclass_hinge_loss(z, labels)
    close(hinge_value(z, labels), want)


def test_margin_is_half_the_squared_distance_to_its_set():
    z = jnp.array([[2.0, -1.0, 0.5], [-0.1, 3.0, -2.0], [1.0, 0.0, 0.0]])
    labels = jnp.array([0, 1, 0])
    np.testing.assert_allclose(margin_displacement(z, labels), [[0, 0, -0.5], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(margin_value(z, labels), [0.125, 0, 0])
    np.testing.assert_allclose(margin_displacement(jnp.array([-0.5, 4.0]), jnp.array(0)), [1.5, -4.0])


@seeded
@hypothesis.given(seeds, exponents)
def test_margin_projects_and_its_gradient_is_the_way_there(seed, exponent):
    z, labels = batch(seed, (5, 4), 10.0**exponent)
    d = margin_displacement(z, labels)
    gradient = jax.grad(lambda z: jnp.sum(margin_value(z, labels)))(z)
    np.testing.assert_allclose(gradient, -d, rtol=1e-6)
    p = np.asarray(z, np.float64) + np.asarray(d, np.float64)
    right = one_hot(labels, 4) > 0
    tiny = 1e-6 * 10.0 ** max(exponent, 0)
    assert (p[right] >= 1 - tiny).all() and (p[~right] <= tiny).all()


# Cross-entropy --------------------------------------------------------------------------------------------------------


def logits_of_kind(kind, n):
    rng = np.random.default_rng(3)
    return {
        "random": rng.uniform(-50, 50, (200, n)),
        "ordinary": 3 * rng.normal(size=(200, n)),
        "extreme": 100 * one_hot(rng.integers(0, n, 200), n) - 50,
        "corners": rng.choice([-50.0, 50.0], (200, n)),
        "equal": np.full((n, n), 50.0),
        "zero": np.zeros((n, n)),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "ordinary", "extreme", "corners", "equal", "zero"])
@pytest.mark.parametrize("n", [2, 10, 100])
def test_cross_entropy_reaches_the_optimum(kind, n):
    z = jnp.asarray(logits_of_kind(kind, n), jnp.float32)
    prox = jax.jit(cross_entropy_displacement)
    rng = np.random.default_rng(4)
    for labels in (rng.integers(0, n, len(z)), np.asarray(z).argmin(-1), np.asarray(z).argmax(-1)):
        y = one_hot(labels, n)
        for tau in TAUS:
            d = prox(z, jnp.asarray(labels), tau)
            assert residual(z, d, y, tau) <= 1e-5, tau


@pytest.mark.slow
def test_cross_entropy_with_probabilities():
    z, labels = batch(5, (50, 6), 4.0)
    for y in (jax.nn.softmax(batch(6, (50, 6))[0]), 2.5 * jax.nn.softmax(z), jnp.zeros_like(z)):
        for tau in TAUS:
            d = cross_entropy_displacement(z, y, tau)
            assert residual(z, d, y, tau) <= 1e-5
    d = cross_entropy_displacement(z, jax.nn.one_hot(labels, 6), 2.0)
    np.testing.assert_array_equal(d, cross_entropy_displacement(z, labels, 2.0))


@pytest.mark.parametrize("n", [7, 40])
@pytest.mark.parametrize("tau", [1e-6, 1.9e-6, 2e-6, 1e-4, 0.01, 0.039, 0.04])
def test_small_steps_on_cross_entropy_are_exact_in_every_class(tau, n):
    """On both sides of the steps up to which no loop runs."""
    z, labels = batch(8, (300, n), 4.0)
    wide, y = np.asarray(z, float), one_hot(np.asarray(labels), n)
    want = np.zeros_like(wide)
    for _ in range(30):
        want = tau * (y - softmax(wide + want))  # a contraction, by half of tau
    np.testing.assert_allclose(cross_entropy_displacement(z, labels, tau), want, rtol=5e-6)


@pytest.mark.parametrize("tau", [0.1, 3.0, 100.0])
def test_cross_entropy_against_scipy(double, tau):
    rng = np.random.default_rng(7)
    z, y = 5 * rng.normal(size=6), one_hot(2, 6)

    def objective(u):
        top = u.max()
        value = top + np.log(np.exp(u - top).sum()) - u @ y
        return 0.5 * np.sum((u - z) ** 2) + tau * value, u - z + tau * (softmax(u) - y)

    found = scipy.optimize.minimize(objective, z, jac=True, method="BFGS", options=dict(gtol=1e-9, maxiter=1000))
    d = cross_entropy_displacement(jnp.asarray(z), jnp.asarray(2), tau)
    assert d.dtype == jnp.float64
    assert residual(z, d, y, tau) < 1e-12
    np.testing.assert_allclose(z + np.asarray(d), found.x, rtol=1e-5, atol=1e-6)


def test_the_wright_function(double):
    xi = np.concatenate([np.linspace(-700, 700, 1001), np.linspace(-5, 5, 1001), [-1e30, 1e6, 1e30]])
    np.testing.assert_allclose(_wright(jnp.asarray(xi)), scipy.special.wrightomega(xi), rtol=1e-8)


@seeded
@hypothesis.given(seeds, exponents, st.floats(-8, 4), st.integers(1, 6))
def test_cross_entropy_at_any_scale(seed, exponent, log_tau, n):
    z, labels = batch(seed, (4, n), 10.0**exponent)
    tau = np.float32(10.0**log_tau)
    d = jax.jit(cross_entropy_displacement)(z, labels, tau)
    assert np.isfinite(d).all()
    # From a hundred on, the rounding of the logits alone weighs more than 1e-5.
    assert residual(z, d, one_hot(labels, n), tau) <= 1e-5 * max(1, tau / 100)
    np.testing.assert_allclose(jnp.sum(d, axis=-1), 0, atol=1e-5 * np.abs(d).max())


def test_cross_entropy_keeps_its_samples_apart():
    z, labels = batch(8, (20, 10), 20.0)
    tau = jnp.logspace(-3, 3, 20)
    together = cross_entropy_displacement(z, labels, tau)
    mapped = jax.vmap(cross_entropy_displacement)(z, labels, tau)
    np.testing.assert_allclose(together, mapped, rtol=1e-5, atol=1e-6)
    for i in (0, 10, 19):
        alone = cross_entropy_displacement(z[i], labels[i], tau[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 1e-6])
def test_cross_entropy_keeps_small_displacements(tau):
    z = jnp.array([40.0, 0.0, 5.0])  # softmax is within rounding of the label
    d = np.asarray(cross_entropy_displacement(z, jnp.array(0), tau), np.float64)
    s = softmax(np.asarray(z, np.float64))
    np.testing.assert_allclose(d, tau * np.array([s[1] + s[2], -s[1], -s[2]]), rtol=1e-5)


@pytest.mark.slow
def test_masked_classes_do_not_move():
    z = jnp.array([[1.0, -jnp.inf, 0.5], [-jnp.inf, -jnp.inf, 2.0]])
    labels = jnp.array([2, 2])
    for tau in EXTREME_TAUS:
        d = cross_entropy_displacement(z, labels, tau)
        assert np.isfinite(d).all()
        np.testing.assert_array_equal(jnp.where(z == -jnp.inf, d, 0), 0)
        bare = cross_entropy_displacement(z[:1, ::2], jnp.array([1]), tau)
        np.testing.assert_allclose(d[:1, ::2], bare, rtol=1e-5)
        d = hinge_displacement(z, labels, tau)
        assert np.isfinite(d).all()
        np.testing.assert_array_equal(jnp.where(z == -jnp.inf, d, 0), 0)
    for y in (labels, jax.nn.one_hot(labels, 3)):
        value, gradient = jax.value_and_grad(lambda z: jnp.sum(cross_entropy_value(z, y)))(z)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        np.testing.assert_array_equal(jnp.where(z == -jnp.inf, gradient, 0), 0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_the_gradient_of_cross_entropy_keeps_small_entries(n, soft):
    """Also where softmax is within rounding of the label, where float32 would lose the right class's entry."""
    z, labels = batch(20, (200, n), 10.0)
    labels = labels.at[::2].set(jnp.argmax(z[::2], axis=-1))
    z = z + jnp.where(jnp.arange(200) % 4 == 0, 30.0, 0.0)[:, None] * jax.nn.one_hot(labels, n)
    gradient = jax.grad(lambda z: jnp.sum(cross_entropy_value(z, jax.nn.one_hot(labels, n) if soft else labels)))(z)
    right = one_hot(labels, n) > 0
    want = np.where(right, 0, softmax(np.asarray(z, np.float64)))
    want = np.where(right, -want.sum(-1, keepdims=True), want)
    assert np.isfinite(gradient).all()
    large = np.abs(want) > 1e-37
    np.testing.assert_allclose(np.asarray(gradient)[large], want[large], rtol=2e-5)


@pytest.mark.parametrize("value", [cross_entropy_value, hinge_value, margin_value])
def test_gradients_of_values_neither_gather_nor_scatter(value):
    z, labels = batch(21, (6, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda z: jnp.sum(value(z, labels))))(z))
    assert "gather" not in text and "scatter" not in text


# Squared error and hinge ----------------------------------------------------------------------------------------------


@seeded
@hypothesis.given(seeds, exponents, st.floats(-8, 4))
def test_squared_error(seed, exponent, log_tau):
    p, _ = batch(seed, (3, 4), 10.0**exponent)
    t, _ = batch(seed + 1, (3, 4), 10.0**exponent)
    tau = 10.0**log_tau
    d = np.asarray(squared_error_displacement(p, t, tau), np.float64)
    gap = np.asarray(t, np.float64) - np.asarray(p, np.float64)
    np.testing.assert_allclose(d, 2 * tau / (1 + 2 * tau) * gap, rtol=1e-5, atol=1e-6 * 10.0**exponent * min(1, tau))


def multiclass_prox(s, label, tau):
    """By trying every set of classes that end at the same height."""
    r = 1.0 - one_hot(label, len(s))
    v = s + r + tau * one_hot(label, len(s))
    # prox of tau * max: cut at the level above which there is tau; the largest candidate is the right one.
    ordered = np.sort(v)[::-1]
    level = max((ordered[: k + 1].sum() - tau) / (k + 1) for k in range(len(s)))
    return np.minimum(v, level) - r


@seeded
@hypothesis.given(seeds, exponents, st.floats(-6, 4), st.integers(1, 12))
def test_multiclass_hinge(seed, exponent, log_tau, n):
    s, labels = batch(seed, (6, n), 10.0**exponent)
    tau = 10.0**log_tau
    d = np.asarray(jax.jit(hinge_displacement)(s, labels, tau), np.float64)
    s = np.asarray(s, np.float64)
    want = np.stack([multiclass_prox(a, b, tau) for a, b in zip(s, np.asarray(labels), strict=True)])
    np.testing.assert_allclose(s + d, want, rtol=1e-5, atol=1e-5 * max(1, 10.0**exponent))
    assert np.abs(d).max() <= tau * 1.000001


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_multiclass_hinge_against_scipy(tau):
    rng = np.random.default_rng(9)
    for n in (2, 5):
        s, label = 2 * rng.normal(size=n), int(rng.integers(n))
        r = 1.0 - one_hot(label, n)

        def objective(x, s=s, label=label, n=n):  # x holds the new scores and the maximum
            return 0.5 * np.sum((x[:n] - s) ** 2) + tau * (x[n] - x[label])

        constraint = dict(type="ineq", fun=lambda x, r=r, n=n: x[n] - x[:n] - r)
        start = np.append(s, (s + r).max())
        found = scipy.optimize.minimize(
            objective, start, constraints=constraint, method="SLSQP", options=dict(ftol=1e-14, maxiter=500)
        )
        d = hinge_displacement(jnp.asarray(s, jnp.float32), jnp.asarray(label), tau)
        np.testing.assert_allclose(s + np.asarray(d), found.x[:n], atol=1e-4)


def test_multiclass_hinge_at_ties_and_beyond_the_margin():
    labels = jnp.array([0, 0, 0, 1])
    s = jnp.array([[0.0, 0, 0], [3, 1, 2], [3, 1, 2.5], [5, 4, 5]])
    d = hinge_displacement(s, labels, 0.2)
    want = [[0.2, -0.1, -0.1], [0, 0, 0], [0.2, 0, -0.2], [-0.1, 0.2, -0.1]]
    np.testing.assert_allclose(d, want, atol=1e-7)
    np.testing.assert_array_equal(hinge_displacement(jnp.array([[5.0]]), jnp.array([0]), 1.0), [[0.0]])


@pytest.mark.parametrize("tau", [1e-8, 0.3, 1e4])
def test_binary_hinge(tau):
    s, _ = batch(10, (200,), 3.0)
    t = jnp.sign(batch(11, (200,))[0])
    d = np.asarray(hinge_displacement(s, t, tau), np.float64)
    s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
    want = np.where(s * t >= 1, 0, np.where(s * t <= 1 - tau, tau * t, t - s))
    np.testing.assert_allclose(d, want, rtol=1e-6, atol=1e-7 * min(1, tau))
    np.testing.assert_array_equal(hinge_value(jnp.asarray(s), jnp.asarray(t, int)).shape, (200,))


@seeded
@hypothesis.given(seeds, st.integers(1, 9), st.booleans())
def test_water_level(seed, n, weighted):
    rng = np.random.default_rng(seed)
    depths = np.round(rng.uniform(0, 1, (5, n)), rng.integers(1, 4))
    depths[np.arange(5), rng.integers(0, n, 5)] = 0
    areas = 10 ** rng.uniform(-6, 0, (5, n)) if weighted else np.ones((5, n))
    rate = rng.choice([0, 1e-6, 1.0, 1e6], 5)
    level = water_level(*(jnp.asarray(x, jnp.float32) for x in (depths, rate, areas)))
    level = np.asarray(level, np.float64)
    volume = rate * level + np.sum(areas * np.maximum(level[:, None] - depths, 0), axis=-1)
    np.testing.assert_allclose(volume, 1, rtol=2e-6)


# All ------------------------------------------------------------------------------------------------------------------


def cases(dtype=jnp.float32):
    """Each loss with its value, its displacement, a prediction and labels."""
    z, labels = batch(12, (16, 5), 2.0)
    other, _ = batch(13, (16, 5))
    z, other = z.astype(dtype), other.astype(dtype)
    return {
        "cross_entropy": (cross_entropy_value, cross_entropy_displacement, z, labels),
        "cross_entropy_soft": (cross_entropy_value, cross_entropy_displacement, z, jax.nn.softmax(other)),
        "squared_error": (squared_error_value, squared_error_displacement, z, other),
        "hinge": (hinge_value, hinge_displacement, z, labels),
        "hinge_binary": (hinge_value, hinge_displacement, z, jnp.sign(other)),
    }


@pytest.mark.parametrize("name", cases().keys())
def test_a_small_step_is_the_gradient(name):
    value, displacement, z, labels = cases()[name]
    gradient = jax.grad(lambda z: jnp.sum(value(z, labels)))(z)
    d = displacement(z, labels, 1e-6) / 1e-6
    np.testing.assert_allclose(d, -gradient, rtol=1e-4, atol=1e-5)
    assert cosine(d, -gradient).min() > 0.99999


@pytest.mark.parametrize("name", cases().keys())
def test_the_prox_descends_and_is_local(name):
    value, displacement, z, labels = cases()[name]
    for tau in (0.1, 1.0, 10.0):
        d = displacement(z, labels, tau)
        gain = jnp.sum(tau * (value(z, labels) - value(z + d, labels))) - 0.5 * jnp.sum(d**2)
        assert gain >= 0
    elementwise = value(z, labels).shape == z.shape
    tau = jnp.linspace(0.01, 2, z.size if elementwise else 16).reshape(value(z, labels).shape)
    d = displacement(z, labels, tau)
    for i in (0, 9):
        np.testing.assert_allclose(d[i], displacement(z[i], labels[i], tau[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", cases().keys())
def test_never_nan(name):
    value, displacement, z, labels = cases()[name]
    for scale in (0.0, 1e-20, 1.0, 1e6, 1e18):
        for tau in (0.0, *EXTREME_TAUS):
            d = jax.jit(displacement)(scale * z, labels, tau)
            assert np.isfinite(d).all(), (scale, tau)
    assert np.abs(displacement(z, labels, 0.0)).max() < 1e-20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", cases().keys())
def test_half_precision_stays_half_precision(name, dtype):
    value, displacement, z, labels = cases(dtype)[name]
    full = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in (z, labels)]
    assert value(z, labels).dtype == dtype
    d = displacement(z, labels, 0.5)
    assert d.dtype == dtype and d.shape == z.shape
    np.testing.assert_allclose(d.astype(jnp.float32), displacement(*full, 0.5), rtol=1e-2, atol=1e-3)
    assert margin_displacement(z, jnp.zeros(16, int)).dtype == dtype
    assert margin_value(z, jnp.zeros(16, int)).dtype == dtype


def test_errors_name_the_argument_and_what_was_wanted(unchecked):
    z = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"`labels` must be integers of shape \(4,\) or floating.*got float32"):
        cross_entropy_value(z, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"`labels`.*got int32 of shape \(4, 3\)"):
        cross_entropy_displacement(z, jnp.zeros((4, 3), jnp.int32), 1.0)
    with pytest.raises(ValueError, match=r"`labels` must be integers of shape \(4,\), got float32"):
        margin_value(z, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"`labels` must be integers of shape \(4,\).*got int32 of shape \(3,\)"):
        hinge_displacement(z, jnp.zeros(3, jnp.int32), 1.0)
    with pytest.raises(ValueError, match=r"`targets` must be real, of shape \(4, 3\), got float32 of shape \(4,\)"):
        squared_error_value(z, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"`tau` must be.*\(4,\), got shape \(3,\)"):
        cross_entropy_displacement(z, jnp.zeros(4, jnp.int32), jnp.ones(3))
    with pytest.raises(ValueError, match=r"`logits` must be a floating-point array, got dtype int32"):
        cross_entropy_value(jnp.zeros((4, 3), jnp.int32), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"`logits` must have a last axis"):
        margin_displacement(jnp.zeros(()), jnp.zeros((), jnp.int32))
