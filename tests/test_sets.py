"""Sets of parameters: their projections against brute force."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from set_members import PATTERN, TWO_BITS, WIDER, error_of

import eqxproj
from eqxproj import sets

LEVELS = (-1.0, 0.0, 0.25, 2.0)

SETS = {
    "box": (sets.Box(-0.5, 0.75), lambda x: (x >= -0.5).all() and (x <= 0.75).all()),
    "point": (sets.Box(0.3, 0.3), lambda x: (x == np.float32(0.3)).all()),
    "half": (sets.Box(-np.inf, 0.0), lambda x: (x <= 0).all()),
    "non_negative": (sets.NonNegative(), lambda x: (x >= 0).all()),
    "sparse": (sets.Sparse(0.3), lambda x: (x != 0).sum() <= max(1, int(0.3 * x.size + 1e-9))),
    "one": (sets.Sparse(1e-6), lambda x: (x != 0).sum() <= 1),
    "dense": (sets.Sparse(1.0), lambda x: True),
    "quantized": (sets.Quantized(LEVELS), lambda x: np.isin(x, np.float32(LEVELS)).all()),
    "sign": (sets.Quantized([-1.0, 1.0]), lambda x: np.isin(x, [-1, 1]).all()),
}

arrays = st.integers(0, 2**16).map(lambda seed: np.random.default_rng(seed))
seeded = hypothesis.settings(derandomize=True, deadline=None, max_examples=25, database=None)


def nearest(name, x):
    """The least distance of x to the set, by brute force."""
    x = np.asarray(x, np.float64).ravel()
    if name in ("box", "point", "half", "non_negative"):
        low, high = {"box": (-0.5, 0.75), "point": (0.3, 0.3), "half": (-np.inf, 0.0), "non_negative": (0.0, np.inf)}[
            name
        ]
        return np.sqrt(sum(max(low - v, 0, v - high) ** 2 for v in x))
    if name in ("quantized", "sign"):
        levels = LEVELS if name == "quantized" else (-1.0, 1.0)
        return min(np.linalg.norm(x - np.array(p)) for p in itertools.product(levels, repeat=len(x)))
    kept = {"sparse": max(1, int(0.3 * len(x) + 1e-9)), "one": 1, "dense": len(x)}[name]
    return min(np.linalg.norm(np.delete(x, list(support))) for support in itertools.combinations(range(len(x)), kept))


@pytest.mark.parametrize("name", SETS)
@seeded
@hypothesis.given(rng=arrays)
def test_projection_is_feasible_idempotent_and_nearest(name, rng):
    chosen, contains = SETS[name]
    x = jnp.asarray(
        rng.normal(size=[(5,), (2, 3), (7,), (1,), (1, 1)][rng.integers(5)]) * rng.choice([0.1, 1, 10]), jnp.float32
    )
    y = chosen(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert contains(np.asarray(y))
    np.testing.assert_array_equal(chosen(y), y)
    distance = np.linalg.norm(np.asarray(y - x, np.float64))
    np.testing.assert_allclose(distance, nearest(name, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fraction, size, kept", [(0.1, 10, 1), (0.1, 9, 1), (0.3, 10, 3), (0.29, 10, 2), (1.0, 4, 4), (0.5, 1, 1)]
)
def test_how_many_are_kept(fraction, size, kept):
    x = jnp.arange(1.0, size + 1)
    assert int((sets.Sparse(fraction)(x) != 0).sum()) == kept


def test_sparse_keeps_exactly_as_many_among_equals():
    assert int((sets.Sparse(0.5)(jnp.ones((4, 4))) != 0).sum()) == 8


def test_sparse_over_all_axes():
    x = jnp.asarray([[1.0, -5.0, 0.1], [4.0, 0.2, -3.0]])
    np.testing.assert_array_equal(sets.Sparse(0.5)(x), [[0, -5.0, 0], [4.0, 0, -3.0]])


def test_ties_between_levels():
    y = sets.Quantized([0.0, 1.0])(jnp.array([0.5, -3.0, 7.0]))
    assert y[0] in (0.0, 1.0)
    np.testing.assert_array_equal(y[1:], [0.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SETS)
def test_dtypes_are_kept(name, dtype):
    y = SETS[name][0](jnp.linspace(-2, 2, 9).astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(SETS[name][0](y), y)


def test_under_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    for chosen, _ in SETS.values():
        rows = jnp.stack([chosen(row) for row in x])
        np.testing.assert_array_equal(jax.jit(jax.vmap(chosen))(x), rows)


def test_empty_arrays():
    for name, (chosen, _) in SETS.items():
        assert chosen(jnp.zeros((0, 3))).shape == (0, 3), name


# ----------------------------------------------------------------------------------------------------------------------
# Sets of slices and of matrices, and levels with a scale
# ----------------------------------------------------------------------------------------------------------------------

LOCAL = ("two_bits", "pattern")  # local optima only
SHAPES = ((3, 5), (40, 30), (6, 2), (1, 7), (2, 3, 3))


def sample(rng, dtype, shapes=SHAPES):
    return jnp.asarray(rng.normal(size=shapes[rng.integers(len(shapes))]) * rng.choice([1e-3, 0.3, 1, 20]), dtype)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (jnp.bfloat16, jnp.float16))]
)
@pytest.mark.parametrize("name", WIDER)
def test_wider_sets_are_feasible_idempotent_and_nearer_than_other_members(name, dtype):
    chosen, contains = WIDER[name]
    jitted, rng = jax.jit(chosen), np.random.default_rng(0)
    for shape in SHAPES if dtype == jnp.float32 else SHAPES[:2]:
        for spread in (0.01, 0.3, 20):
            x = jnp.asarray(rng.normal(size=shape) * spread, dtype)
            y = jitted(x)
            assert y.shape == x.shape and y.dtype == dtype
            exact = np.asarray(y, np.float64)
            assert contains(exact, error_of(dtype))
            np.testing.assert_array_equal(jitted(y), y)
            if name in LOCAL:
                continue
            start, room = np.asarray(x, np.float64), error_of(dtype) * (np.linalg.norm(exact) + 1e-30)
            for width in (0.01, 0.3, 1):
                other = np.asarray(jitted(x + jnp.asarray(rng.normal(size=shape) * width, dtype)), np.float64)
                assert np.linalg.norm(exact - start) <= np.linalg.norm(other - start) + 2 * room


def by_rows(x, axis, project):
    """Applies a projection of vectors along one axis, or to all entries."""
    return project(x.ravel()).reshape(x.shape) if axis is None else np.apply_along_axis(project, axis, x)


def root_simplex(v, total):
    level = scipy.optimize.brentq(lambda t: np.maximum(v - t, 0).sum() - total, v.min() - total, v.max(), xtol=1e-14)
    return np.maximum(v - level, 0)


def root_l1(v, radius):
    return v if abs(v).sum() <= radius else np.sign(v) * root_simplex(abs(v), radius)


def numpy_polar(x):
    u, _, v = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)
    return (u @ v).reshape(x.shape)


def positive_ball(x):
    """Of a cone and a ball around its tip: the nearest point of the cone, shortened."""
    y = np.maximum(x, 0)
    return y * min(1, 1.5 / max(np.linalg.norm(y), 1e-30))


def numpy_clipped(x):
    u, s, v = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)
    return (u * np.minimum(s, 0.8) @ v).reshape(x.shape)


def numpy_truncated(x):
    u, s, v = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)
    return (u[:, :2] * s[:2] @ v[:2]).reshape(x.shape)


ORACLES = {
    "simplex": lambda x: by_rows(x, -1, lambda v: root_simplex(v, 1.0)),
    "simplex_all": lambda x: by_rows(x, None, lambda v: root_simplex(v, 2.5)),
    "l1": lambda x: by_rows(x, None, lambda v: root_l1(v, 1.0)),
    "l1_rows": lambda x: by_rows(x, -1, lambda v: root_l1(v, 0.7)),
    "l2": lambda x: x * min(1, 1.5 / np.linalg.norm(x)),
    "l2_columns": lambda x: x * np.minimum(1, 0.3 / np.sqrt((x**2).sum(0))),
    "sphere": lambda x: x * 2 / np.linalg.norm(x),
    "sphere_rows": lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True)),
    "increasing": lambda x: by_rows(x, -1, lambda v: scipy.optimize.isotonic_regression(v).x),
    "decreasing": lambda x: by_rows(x, 0, lambda v: scipy.optimize.isotonic_regression(v, increasing=False).x),
    "orthogonal": numpy_polar,
    "rank": numpy_truncated,
    "spectral": numpy_clipped,
    "equal": lambda x: np.broadcast_to(x.mean(-1, keepdims=True), x.shape),
    "equal_all": lambda x: np.full(x.shape, x.mean()),
    "positive_ball": positive_ball,
    "k_rows": lambda x: by_rows(x, -1, lambda v: np.where(np.argsort(np.argsort(-abs(v))) < 2, v, 0)),
    "given_scale": lambda x: np.clip(np.round(x / 0.3), -1, 1) * 0.3,
    "given_bits": lambda x: (np.clip(np.floor(x / 0.2), -4, 3) + 0.5) * 0.2,
    "sign_scale": lambda x: np.where(x >= 0, 1, -1) * abs(x).mean(),
}


@pytest.mark.parametrize("name", ORACLES)
def test_against_independent_projections(name):
    jitted, rng = jax.jit(WIDER[name][0]), np.random.default_rng(1)
    for _ in range(20):
        x = sample(rng, jnp.float32)
        y, wanted = np.asarray(jitted(x)), ORACLES[name](np.asarray(x, np.float64))
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=4e-6 * (1 + float(jnp.abs(x).max())))


@pytest.mark.parametrize("levels", [TWO_BITS, PATTERN, (1.0, 3.0), (-1.0, 0.0, 1.0)])
def test_learned_scale_against_all_assignments(levels):
    jitted, rng = jax.jit(sets.Quantized(levels, scale="learned")), np.random.default_rng(2)
    choices, ratios = np.array(list(itertools.product(levels, repeat=5))), []
    square = np.where((choices**2).sum(1) > 0, (choices**2).sum(1), 1)
    for _ in range(100):
        x = rng.normal(size=5).astype(np.float32)
        scale = np.maximum(choices @ x, 0) / square
        best = np.linalg.norm(x - scale[:, None] * choices, axis=1).min()
        ratios.append(np.linalg.norm(x - jitted(x)) / best)
    assert min(ratios) > 1 - 1e-5
    assert np.mean(np.array(ratios) < 1 + 1e-5) > 0.8 and np.mean(ratios) < 1.05


@pytest.mark.parametrize("bits, wanted", [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_learned_scale_is_the_optimal_uniform_quantizer_of_a_normal_sample(bits, wanted):
    """The mean squared errors are those of Max, Quantizing for minimum distortion, 1960, table II."""
    x = np.random.default_rng(0).normal(size=20000).astype(np.float32)
    y = jax.jit(sets.Quantized(bits, scale="learned"))(x)
    np.testing.assert_allclose(np.mean((y - x) ** 2), wanted, rtol=0.05)
    assert len(np.unique(y)) <= 2**bits


def test_learned_scale_of_members_zeros_and_one_sign():
    chosen = jax.jit(sets.Quantized([0.0, 1.0, 10.0, 100.0], scale="learned"))
    rare = np.ones(1000, np.float32)
    rare[0] = 100
    np.testing.assert_array_equal(chosen(jnp.asarray(rare * 0.37)), np.float32(rare * np.float32(0.37)))
    assert not chosen(jnp.zeros(4)).any()
    assert not chosen(-jnp.ones(4)).any()
    assert bool(jnp.isnan(chosen(jnp.array([1.0, jnp.nan]))).any())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETS, *WIDER])
def test_rounded_arrays_are_projected_inside_a_larger_program(name):
    """XLA may leave out a rounding to bfloat16 between two operations; the sets may not."""
    chosen, contains = WIDER[name] if name in WIDER else (SETS[name][0], None)
    update, project = jax.jit(lambda x, dx: chosen(x + dx)), jax.jit(chosen)
    rng = np.random.default_rng(0)
    y = project(jnp.asarray(rng.normal(size=(6, 5)), jnp.bfloat16))
    for size in (0.1, 0.01, 0.01, 0.003, 0.003, 0.003, 0.001, 0.001, 0.001, 0.0003, 0.0003):
        y = update(y, jnp.asarray(size * rng.normal(size=(6, 5)), jnp.bfloat16))
        if contains is not None:
            assert contains(np.asarray(y, np.float64), error_of(jnp.bfloat16))
        np.testing.assert_array_equal(project(y), y)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDER)
def test_wider_sets_under_vmap(name):
    chosen, contains = WIDER[name]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5, 3)), jnp.float32)
    y, jitted = jax.jit(jax.vmap(chosen))(x), jax.jit(chosen)
    for array, got in zip(x, y):
        np.testing.assert_allclose(got, jitted(array), rtol=1e-5, atol=1e-5)
        assert contains(np.asarray(got, np.float64), error_of(jnp.float32))


@pytest.mark.parametrize("chosen", [sets.Orthogonal(), sets.LowRank(2)])
def test_a_decomposition_that_does_not_converge_is_taken_of_the_transposed_matrix(monkeypatch, chosen):
    x, svd = jax.random.normal(jax.random.key(0), (4, 7)).at[0].multiply(1e-2), jnp.linalg.svd
    want = chosen(x)
    monkeypatch.setattr(jnp.linalg, "svd", lambda a, **how: [p if len(a) == 7 else p + jnp.nan for p in svd(a, **how)])
    np.testing.assert_allclose(chosen(x), want, rtol=1e-4, atol=1e-6)


def test_large_arrays_keep_their_sets():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(500, 400)), jnp.float32)
    for name in ("l1", "l2", "l2_columns", "sphere", "simplex", "simplex_all", "increasing", "two_bits", "sign_scale"):
        chosen, contains = WIDER[name]
        y = jax.jit(chosen)(x)
        assert contains(np.asarray(y, np.float64), error_of(jnp.float32)), name
        np.testing.assert_array_equal(jax.jit(chosen)(y), y)


def test_zero_is_projected_to_a_constant_on_the_sphere():
    np.testing.assert_allclose(sets.Sphere(2.0)(jnp.zeros((2, 2))), np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_allclose(sets.Orthogonal()(jnp.zeros((3, 2))).T @ sets.Orthogonal()(jnp.zeros((3, 2))), np.eye(2))


def test_scalars_and_empty_arrays():
    two = jnp.array(2.0)
    assert [float(s(two)) for s in (sets.L1Ball(), sets.Sparse(k=1), sets.Quantized(2, scale="learned"))] == [
        pytest.approx(1, abs=2e-6), 2, 2,
    ]  # fmt: skip
    np.testing.assert_allclose([sets.Simplex(None)(two), sets.Sphere(3.0)(-two), sets.L2Ball(0.5)(two)], [1, -3, 0.5],
                               rtol=2e-6)  # fmt: skip
    for chosen in (sets.L1Ball(), sets.L2Ball(axis=-1), sets.Monotone(), sets.LowRank(2), sets.Sparse(k=2, axis=0),
                   sets.Quantized(2, scale="learned")):  # fmt: skip
        assert chosen(jnp.zeros((0, 3))).shape == (0, 3)
    assert sets.Simplex()(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("name", [*SETS, *WIDER])
def test_nan_is_not_hidden(name):
    chosen = WIDER[name][0] if name in WIDER else SETS[name][0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32).at[2, 1].set(jnp.nan)
    assert bool(jnp.isnan(jax.jit(chosen)(x)).any())


@pytest.mark.parametrize(
    "make, part, kind",
    [
        (lambda: sets.Box(1.0, -1.0), "`low` must be at most `high`", ValueError),
        (lambda: sets.Box(float("nan"), 1.0), "`low` must be at most `high`", ValueError),
        (lambda: sets.Box(float("inf"), float("inf")), "`low` must be at most `high`", ValueError),
        (lambda: sets.Sparse(0.0), "`kept_fraction`", ValueError),
        (lambda: sets.Sparse(1.5), "`kept_fraction`", ValueError),
        (lambda: sets.Sparse(float("nan")), "`kept_fraction`", ValueError),
        (lambda: sets.Sparse(), "exactly one of `kept_fraction` and `k`", ValueError),
        (lambda: sets.Sparse(0.1, k=1), "exactly one of `kept_fraction` and `k`", ValueError),
        (lambda: sets.Sparse(k=0), "`k` must be at least 1", ValueError),
        (lambda: sets.Sparse(k=True), "`k` must be an integer", TypeError),
        (lambda: sets.Sparse(k=1, axis=()), "`axis` must be", TypeError),
        (lambda: sets.L2Ball(axis=True), "`axis` must be", TypeError),
        (lambda: sets.Quantized([]), "`levels`", ValueError),
        (lambda: sets.Quantized([0.0, float("inf")]), "`levels`", ValueError),
        (lambda: sets.Quantized([0.0], scale="learned"), "`levels` must hold one that is not zero", ValueError),
        (lambda: sets.Quantized(2), "must come with a `scale`", ValueError),
        (lambda: sets.Quantized(0, scale="learned"), "`levels` as a number of bits", ValueError),
        (lambda: sets.Quantized(9, scale=1.0), "`levels` as a number of bits", ValueError),
        (lambda: sets.Quantized(True, scale=1.0), "`levels` must be a sequence", TypeError),
        (lambda: sets.Quantized([1.0], scale=-1.0), "`scale` must be", ValueError),
        (lambda: sets.Quantized([1.0], scale=float("nan")), "`scale` must be", ValueError),
        (lambda: sets.Simplex(total=0.0), "`total` must be a positive number", ValueError),
        (lambda: sets.L1Ball(-1.0), "`radius` must be a positive number", ValueError),
        (lambda: sets.L2Ball(float("inf")), "`radius` must be a positive number", ValueError),
        (lambda: sets.Sphere(float("nan")), "`radius` must be a positive number", ValueError),
        (lambda: sets.LowRank(0), "`rank` must be at least 1", ValueError),
        (lambda: sets.LowRank(True), "`rank` must be an integer", TypeError),
        (lambda: sets.Monotone(True), "`axis` must be an integer", TypeError),
        (lambda: sets.Sparse(k=1, of=0), "`of` must be at least 1", ValueError),
        (lambda: sets.Sparse(k=1, of=2.0), "`of` must be an integer", TypeError),
        (lambda: sets.SpectralBall(0.0), "`radius` must be a positive number", ValueError),
        (lambda: sets.Equal(axis="all"), "`axis` must be", TypeError),
        (lambda: sets.Intersection(sets.Box(0.0, 1.0)), "must be two or more, got 1", ValueError),
        (lambda: sets.Intersection(sets.Box(0.0, 1.0), 3), r"`sets\[1\]` must be a set of arrays, got 3", TypeError),
    ],
)
def test_bad_sets(make, part, kind):
    with pytest.raises(kind, match=part) as error:
        make()
    named = str(error.value).split("`")[1]
    assert issubclass(getattr(sets, named), sets.AbstractSet)


def test_which_sets_are_discrete():
    every = [chosen for chosen, _ in [*SETS.values(), *WIDER.values()]]
    assert {type(chosen) for chosen in every if chosen.is_discrete} == {sets.Sparse, sets.Quantized}
    assert not sets.Intersection(sets.NonNegative(), sets.L2Ball()).is_discrete
    assert sets.Intersection(sets.NonNegative(), sets.Sparse(0.5)).is_discrete
    assert sets.Together(sets.Sparse(0.5)).is_discrete and sets.Together(sets.L2Ball()).is_convex
    public = {c for c in vars(sets).values() if isinstance(c, type) and issubclass(c, sets.AbstractSet)}
    assert {type(chosen) for chosen in every} == public - {sets.AbstractSet}


def test_sets_show_their_arguments():
    assert repr(sets.Box(-1.0, 2.5)) == "Box(low=-1.0, high=2.5)"
    assert repr(sets.Quantized([1.0, -1.0], scale="learned")) == "Quantized(levels=(-1.0, 1.0), scale='learned')"
    assert sets.Simplex(axis=0) == sets.Simplex(0, 1.0) != sets.Simplex(1)


@pytest.mark.parametrize(
    "chosen, shape, part",
    [
        (sets.Simplex(2), (3, 4), "`axis` 2 is out of range"),
        (sets.Simplex(), (), "`axis` -1 is out of range"),
        (sets.Sparse(k=2, axis=(0, -2)), (3, 4), "names an axis twice"),
        (sets.Monotone(-3), (3, 4), "`axis` -3 is out of range"),
        (sets.L1Ball(axis=1), (3,), "`axis` 1 is out of range"),
        (sets.Sparse(k=2, of=4, axis=-1), (4, 6), "needs a multiple of that along its `axis`, got 6"),
        (sets.SpectralBall(), (3,), "two axes or more, got shape"),
        (sets.Intersection(sets.NonNegative(), sets.Simplex(2)), (3, 4), "`axis` 2 is out of range"),
        (sets.Orthogonal(), (3,), "two axes or more, got shape"),
        (sets.Orthogonal(), (0, 3), "an array with entries"),
        (sets.LowRank(1), (), "two axes or more, got shape"),
        (sets.Simplex(), (3, 0), "no entries that could be on a simplex"),
        (sets.Sphere(), (0,), "no entries that could be on a sphere"),
    ],
)
def test_sets_that_do_not_fit(chosen, shape, part):
    array = jnp.zeros(shape)
    with pytest.raises(ValueError, match=part):
        chosen(array)
    constraints = [(lambda m: m["a"], sets.NonNegative()), (lambda m: m["b"], chosen)]
    with pytest.raises(ValueError, match=r"`constraints\[1\]` does not fit an array of shape .*" + part):
        eqxproj.apply_constraints({"a": jnp.zeros(2), "b": array}, constraints)
