"""`projection`: the value of a function, and the way from a wanted output back to inputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj


def random(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_reaches(f, primals, target, steps=100, atol=1e-3, **options):
    """The target is reached from the primals; returns where."""
    out, project = eqxproj.projection(f, *primals, steps=steps, **options)
    assert eqx.tree_equal(out, f(*primals))
    new = project(target)
    assert isinstance(new, tuple) and len(new) == len(primals)
    arrays = [jax.tree_util.tree_leaves(eqx.filter(x, eqx.is_array)) for x in (new, primals)]
    for a, b in zip(*arrays, strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
    for a, b in zip(jax.tree_util.tree_leaves(f(*new)), jax.tree_util.tree_leaves(target), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    return new


def test_linear_function_of_one_input():
    """Known coefficients: the nearest point of the affine set, from least squares."""
    a, x, y = np.asarray(random(0, 3, 6)), random(1, 6), random(2, 3)
    (new,) = assert_reaches(lambda x: jnp.asarray(a) @ x, [x], y, steps=600)
    want = np.asarray(x) + np.linalg.lstsq(a, np.asarray(y) - a @ np.asarray(x), rcond=None)[0]
    np.testing.assert_allclose(new, want, atol=2e-3)


@pytest.mark.usefixtures("full_precision")
def test_linear_function_of_a_batch():
    a, x, y = np.asarray(random(0, 6, 3)), random(1, 4, 6), random(2, 4, 3)
    (new,) = assert_reaches(lambda x: x @ jnp.asarray(a), [x], y, steps=1500, atol=2e-3)
    want = np.asarray(x) + (np.asarray(y) - np.asarray(x) @ a) @ np.linalg.pinv(a)
    np.testing.assert_allclose(new, want, atol=2e-3)


def test_sum_is_shared_equally():
    x, y = random(0, 5), random(1, 5)
    new = assert_reaches(lambda x, y: x + y, [x, y], jnp.zeros(5))
    shift = (x + y) / 2
    np.testing.assert_allclose(new[0], x - shift, atol=1e-3)
    np.testing.assert_allclose(new[1], y - shift, atol=1e-3)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("copies", ["neuron", "none"])
def test_product(copies):
    """Both factors of a matrix product move."""
    a, w = random(0, 4, 5), random(1, 5, 3)
    target = a @ w + random(2, 4, 3, scale=0.3)
    new = assert_reaches(lambda a, w: a @ w, [a, w], target, steps=500, copies=copies)
    assert all(float(jnp.abs(n - o).max()) > 1e-3 for n, o in zip(new, (a, w), strict=True))


def test_elementwise_product_is_nearest():
    """Of all pairs with the wanted product, the pair nearest to the start."""
    x, y, t = random(0, 7), random(1, 7), random(2, 7)
    new = assert_reaches(lambda x, y: x * y, [x, y], t, steps=1000, atol=5e-3)
    grid = np.concatenate([-np.geomspace(1e-2, 30, 60000), np.geomspace(1e-2, 30, 60000)])
    for i in range(7):
        best = np.min((grid - float(x[i])) ** 2 + (float(t[i]) / grid - float(y[i])) ** 2)
        got = float((new[0][i] - x[i]) ** 2 + (new[1][i] - y[i]) ** 2)
        assert got <= 1.2 * best + 0.02


@pytest.mark.slow
def test_relu_network():
    model = eqx.nn.MLP(4, 2, 16, 2, key=jax.random.key(0))
    x = random(0, 5, 4)
    out = jax.vmap(model)(x)
    target = out + random(1, 5, 2, scale=0.2)
    new, moved = assert_reaches(lambda m, x: jax.vmap(m)(x), [model, x], target, steps=2000, atol=1e-2, copies="none")
    assert new.activation is model.activation
    assert float(jnp.abs(moved - x).max()) < 2.0


@pytest.mark.parametrize(
    "solver",
    [pytest.param(eqxproj.DouglasRachford(), marks=pytest.mark.slow), eqxproj.CyclicProjections()],
    ids=lambda s: type(s).__name__,
)
def test_other_solvers(solver):
    a, w = random(0, 4, 5), random(1, 5, 3)
    target = a @ w + random(2, 4, 3, scale=0.1)
    assert_reaches(lambda a, w: jnp.tanh(a) @ w, [a, w], jnp.tanh(a) @ w * 0.9, steps=200, atol=0.02, solver=solver)
    assert target.shape == (4, 3)


def test_stays_where_the_target_is_the_output():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    x = random(0, 5, 4)
    out, project = eqxproj.projection(lambda m, x: jax.vmap(m)(x), model, x, steps=5)
    new, moved = project(out)
    assert eqx.tree_equal((new, moved), (model, x), rtol=1e-5, atol=1e-5)


def test_pytrees():
    """Outputs, targets and primals may be pytrees; integers and functions stay as they are."""

    def f(p, x):
        return {"sum": p["w"].sum(0) + x, "pair": (p["f"](x), p["w"][p["i"]])}

    primals = [{"w": random(0, 3, 2), "f": jax.nn.relu, "i": jnp.array([0, 2])}, jnp.array([1.0, 2.0])]
    out = f(*primals)
    target = jax.tree_util.tree_map(lambda x: x * 0.9, out)
    new = project_to(f, primals, target)
    for a, b in zip(jax.tree_util.tree_leaves(f(*new)), jax.tree_util.tree_leaves(target), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)
    assert new[0]["f"] is jax.nn.relu
    np.testing.assert_array_equal(new[0]["i"], [0, 2])


def project_to(f, primals, target, **options):
    return eqxproj.projection(f, *primals, steps=300, **options)[1](target)


def test_target_may_be_numpy_or_lists_of_numbers():
    _, project = eqxproj.projection(lambda x: 2 * x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(project(np.array([4.0, 6.0]))[0], [2.0, 3.0], atol=1e-4)


def test_project_is_reusable():
    _, project = eqxproj.projection(lambda x: 2 * x, jnp.array([1.0, 2.0]))
    for scale in (1.0, 3.0):
        np.testing.assert_allclose(project(jnp.full(2, scale))[0], scale / 2, atol=1e-4)


@pytest.mark.parametrize("target", [jnp.ones(3), jnp.ones((2, 1)), (jnp.ones(2), jnp.ones(2)), {"y": jnp.ones(2)}, 1.0])
def test_wrong_target(target):
    _, project = eqxproj.projection(lambda x: 2 * x, jnp.ones(2))
    with pytest.raises(ValueError, match=r"`target` must be shaped like the output of `f`: wanted.*\(2,\).*got"):
        project(target)


def test_unsupported_function():
    def looped(x):
        return jax.lax.while_loop(lambda c: c.max() < 0, jnp.tanh, x)

    _, project = eqxproj.projection(looped, jnp.array([2.0, 1.0]))
    with pytest.raises(eqxproj.UnsupportedPrimitiveError, match="while"):
        project(jnp.ones(2))


def test_bad_solver(monkeypatch):
    with pytest.raises((TypeError, ValueError), match="solver"):
        eqxproj.projection(jnp.tanh, jnp.ones(2), solver="ap")  # pyright: ignore[reportArgumentType]
