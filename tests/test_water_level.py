"""The projection onto the graph of the maximum, against a search over all levels."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.optimize

from eqxproj._numerics._water_level import first_order_max_dual, max_dual

seeded = hypothesis.settings(derandomize=True, deadline=None, max_examples=30, database=None)
exponents = st.floats(-6, 6)
seeds = st.integers(0, 2**16)


@pytest.fixture
def double():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def solve(x0, y0, weights, kappa):
    """The new entries for a wanted maximum, in the dtype of `x0`."""
    x0 = jnp.asarray(x0)
    mu = kappa * (jnp.asarray(y0) - x0.max(-1))
    ratio = tuple(kappa / w for w in weights) if isinstance(weights, tuple) else kappa / weights
    nu = jax.jit(max_dual, static_argnums=2)(x0, mu, weights, ratio)
    assert nu.shape == x0.shape and nu.dtype == x0.dtype
    return np.asarray(x0, np.float64) + np.asarray(nu, np.float64) / np.asarray(weights)


def objective(x, x0, y0, weights, kappa):
    x0 = np.asarray(x0, np.float64)
    moved = np.sum(np.asarray(weights) * (x - x0) ** 2, axis=-1)
    return moved + kappa * (x.max(-1) - y0) ** 2


def cost_of_level(level, x0, y0, weights, kappa):
    """The least cost of entries with the maximum `level`: lower what is above it, or raise the cheapest to it."""
    weights = np.broadcast_to(weights, x0.shape)
    down = np.sum(weights * np.maximum(x0 - level, 0) ** 2)
    up = np.min(weights * (level - x0) ** 2)
    return (down if level <= x0.max() else up) + kappa * (level - y0) ** 2


def least_cost(x0, y0, weights, kappa):
    levels = np.linspace(min(x0.min(), y0), max(x0.max(), y0), 801)
    costs = [cost_of_level(level, x0, y0, weights, kappa) for level in levels]
    best = int(np.argmin(costs))
    low, high = levels[max(best - 1, 0)], levels[min(best + 1, 800)]
    arguments = (x0, y0, weights, kappa)
    level = scipy.optimize.fminbound(cost_of_level, low, high, args=arguments, xtol=1e-12)
    return min(cost_of_level(level, *arguments), costs[best])


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("weights", [0.3, (1.0, 1.0), (0.1, 4.0), (5.0, 0.2, 1.0), (1.0, 30.0, 2.0, 0.5, 7.0, 1.0)])
def test_no_level_is_cheaper(double, kind, weights):
    rng = np.random.default_rng(0)
    sizes = (len(weights),) if isinstance(weights, tuple) else (1, 2, 3, 5, 20)
    for n in sizes:
        x0 = {"random": rng.normal(size=(6, n)), "ties": rng.integers(0, 3, (6, n)), "zeros": np.zeros((6, n))}[kind]
        x0 = x0.astype(float)
        for kappa in (0.05, 1.0, 40.0):
            y0 = x0.max(-1) + rng.normal(size=6) * 2
            x = solve(x0, y0, weights, kappa)
            found = objective(x, x0, y0, weights, kappa)
            for i in range(6):
                assert found[i] <= least_cost(x0[i], y0[i], weights, kappa) * (1 + 1e-9)


@seeded
@hypothesis.given(seeds, exponents, st.floats(-6, 6), st.integers(1, 8), st.booleans())
def test_no_level_is_cheaper_at_any_scale(seed, exponent, log_kappa, n, weighted):
    rng = np.random.default_rng(seed)
    scale, kappa = 10.0**exponent, 10.0**log_kappa
    weights = tuple(float(w) for w in 10 ** rng.uniform(-3, 3, n)) if weighted else 1.0
    x0 = jnp.asarray(scale * rng.normal(size=(3, n)), jnp.float32)
    y0 = jnp.asarray(scale * 3 * rng.normal(size=3), jnp.float32)
    x = solve(x0, y0, weights, kappa)
    assert np.isfinite(x).all()
    x0, y0 = np.asarray(x0, np.float64), np.asarray(y0, np.float64)
    found = objective(x, x0, y0, weights, kappa)
    for i in range(3):
        # Entries are known to 1e-7 of the scale, so where one goes is known no better.
        slack = 1e-12 * scale**2 * (kappa + np.sum(weights))
        assert found[i] <= least_cost(x0[i], y0[i], weights, kappa) * (1 + 1e-5) + slack


def test_upward_raises_the_first_of_the_largest_alone():
    x0 = jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    nu = max_dual(x0, jnp.array([1.0, 2.0]), 1.0, 1.0)
    np.testing.assert_allclose(nu, [[0, 0.5, 0], [1, 0, 0]])
    # A soft entry below the maximum is cheaper than a stiff one at it, but not from any depth.
    x0 = jnp.array([[1.0, 0.9], [1.0, -9.0]])
    nu = max_dual(x0, jnp.array([1.0, 1.0]), (100.0, 1.0), (0.01, 1.0))
    np.testing.assert_allclose(nu, [[0, 0.55], [1 / 1.01, 0]], rtol=1e-6)
    nu = max_dual(jnp.array([[0.0, 0.0]]), jnp.array([1.0]), (2.0, 1.0), (0.5, 1.0))
    np.testing.assert_allclose(nu, [[0, 0.5]])


def test_downward_sinks_to_one_level():
    x0 = jnp.array([[3.0, 1.0, 3.0, 2.0, -5.0]])
    nu = max_dual(x0, jnp.array([-9.0]), 1.0, 1.0)  # 2 (3 - L) + (2 - L) + (1 - L) = L + 6
    np.testing.assert_allclose(nu, [[-2.4, -0.4, -2.4, -1.4, 0]], rtol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 30])
@pytest.mark.parametrize("mu", [1e-20, -1e-20, -1e-3, 1e20])
@pytest.mark.parametrize("ratio", [1e-6, 1.0, 1e6])
def test_a_small_demand_goes_to_the_largest_alone(n, mu, ratio):
    rng = np.random.default_rng(1)
    x0 = jnp.asarray(3 * rng.permutation(n).astype(np.float32))
    heavy = 1e30 if abs(mu) > 1 else 1.0  # both weights clamped, or neither
    want = mu / (1 + ratio) * jax.grad(jnp.max)(x0)
    nu = max_dual(x0, jnp.asarray(mu), heavy, ratio)
    np.testing.assert_allclose(nu, want, rtol=3e-7)
    nu = max_dual(x0, jnp.asarray(mu), (heavy,) * n, (ratio,) * n)
    np.testing.assert_allclose(nu, want, rtol=5e-7)


@pytest.mark.parametrize("weights", [2.0, (2.0, 3.0, 1.0, 7.0, 2.0)])
def test_what_has_arrived_stays(double, weights):
    rng = np.random.default_rng(2)
    x0 = rng.normal(size=(50, 5))
    y0 = x0.max(-1) + rng.normal(size=50)
    x = solve(x0, y0, weights, 0.7)
    again = solve(x, x.max(-1), weights, 0.7)
    np.testing.assert_array_equal(again, x)
    assert np.abs(x.max(-1) - y0).max() < np.abs(x0.max(-1) - y0).max()


@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("pad", [-np.inf, np.finfo(np.float32).min, np.nan])
@pytest.mark.parametrize("weighted", [False, True])
def test_padding_stays(n, pad, weighted):
    rng = np.random.default_rng(3)
    x0 = rng.normal(size=(6, n)).astype(np.float32)
    x0[:, [0, n - 1]] = pad
    weights, ratio = ((2.0,) * n, (0.5,) * n) if weighted else (2.0, 0.5)
    for mu in (-100.0, -0.1, 0.0, 1e-20, 50.0):
        nu = max_dual(jnp.asarray(x0), jnp.full(6, mu), weights, ratio)
        np.testing.assert_array_equal(nu[:, [0, n - 1]], 0)
        inner = ((2.0,) * (n - 2), (0.5,) * (n - 2)) if weighted else (2.0, 0.5)
        bare = max_dual(jnp.asarray(x0[:, 1:-1]), jnp.full(6, mu), inner[0], inner[1])
        np.testing.assert_allclose(nu[:, 1:-1], bare, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, 0.0, 3e38, -3e38])
def test_never_nan(n, value):
    x0 = jnp.full((2, n), value, jnp.float32)
    solver = jax.jit(max_dual, static_argnums=2)
    for weights, ratio in (
        (1.0, 1.0),
        (1e30, 1e30),
        (1e30, 1e-30),
        ((1e30,) * n, (1e-6,) * n),
        ((1.0,) * n, (0.0,) * n),
    ):
        for mu in (-1e36, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1e36):
            nu = solver(x0, jnp.full(2, mu), weights, ratio)
            assert np.isfinite(nu).all()
            assert np.isfinite(value) or not np.any(nu)


def test_weights_and_ratios_may_be_arrays_and_vmap():
    rng = np.random.default_rng(4)
    x0 = jnp.asarray(rng.normal(size=(4, 6, 3)), jnp.float32)
    mu = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    kappa = jnp.asarray(rng.uniform(0.1, 3, (4, 1)), jnp.float32)
    nu = max_dual(x0, mu, 2.0, kappa / 2)
    mapped = jax.vmap(lambda x, m, k: max_dual(x, m, 2.0, k / 2))(x0, mu, kappa)
    np.testing.assert_allclose(nu, mapped, rtol=1e-6)
    same = max_dual(x0, mu, (2.0, 2.0, 2.0), (kappa / 2, kappa / 2, kappa / 2))
    np.testing.assert_allclose(nu, same, rtol=1e-5, atol=1e-6)


def test_half_precision():
    x0 = jnp.asarray([[1.0, 2.0, 1.5, 0.0, 1.9]], jnp.bfloat16)
    nu = max_dual(x0, jnp.asarray([-2.0], jnp.bfloat16), 1.0, 1.0)
    assert nu.dtype == jnp.bfloat16
    want = max_dual(x0.astype(jnp.float32), jnp.array([-2.0]), 1.0, 1.0)
    np.testing.assert_allclose(nu.astype(jnp.float32), want, rtol=1e-2)


@pytest.mark.usefixtures("optimized")
def test_memory_stays_linear():
    n = 4096

    def solve(x, m):
        return max_dual(x, m, 1.0, 1.0)

    x, m = jax.ShapeDtypeStruct((8, n), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    sizes = [v.aval.size for eqn in jax.make_jaxpr(solve)(x, m).eqns for v in eqn.outvars]
    assert max(sizes) <= 8 * n
    used = jax.jit(solve).lower(x, m).compile().memory_analysis()
    assert used is None or used.temp_size_in_bytes < 10 * 4 * 8 * n


def test_errors_name_the_argument():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="`weights` and `ratio` must both have one entry .* 3 entries"):
            max_dual(jnp.zeros((2, 3)), jnp.zeros(2), (1.0, 1.0), (1.0, 1.0))
        with pytest.raises(ValueError, match="got 2 weights and float for `ratio`"):
            max_dual(jnp.zeros((2, 2)), jnp.zeros(2), (1.0, 1.0), 1.0)
        with pytest.raises(ValueError, match="`ratio` must be one number or array where `weights` is"):
            max_dual(jnp.zeros((2, 2)), jnp.zeros(2), 1.0, (1.0, 1.0))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("weights", [1e18, (1e18, 1e22, 3e18, 1e18, 1e20)])
def test_the_limit_of_a_steep_metric(weights):
    """Beside the general one, on entries of which many are equal; what differs is rounding."""
    x = jnp.round(jax.random.normal(jax.random.key(0), (200, 5))).at[:40, 3].set(-jnp.inf)
    mu = jax.random.normal(jax.random.key(1), (200,)).at[::7].set(0.0)
    ratio = tuple(1 / w for w in weights) if isinstance(weights, tuple) else 1 / weights
    want = max_dual(x, mu, weights, ratio)
    np.testing.assert_allclose(first_order_max_dual(x, mu, weights), want, rtol=1e-5, atol=1e-7)
    masked = first_order_max_dual(jnp.full((2, 3), -jnp.inf), jnp.array([1.0, -1.0]), 1e18)
    np.testing.assert_array_equal(masked, jnp.zeros((2, 3)))
