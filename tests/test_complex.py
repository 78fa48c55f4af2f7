"""Complex parameters: displacements as JAX has gradients, training by both methods, and the projection regime."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqxproj


def random(seed, *shape):
    parts = np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(parts[0] + 1j * parts[1], jnp.complex64)


X = random(0, 5, 4).real
Z = random(1, 5, 4)
P = {"w": random(2, 4, 3), "b": random(3, 3), "r": random(4, 4, 4).real, "lam": 0.8 * jnp.exp(1j * jnp.arange(4.0))}
P["c"] = random(5, 4, 2)


def products(p, x):
    z = x @ p["w"] + p["b"]
    squares = jnp.mean(jnp.abs(z) ** 2) + jnp.sum((jnp.conj(z) * p["b"]).imag ** 2)
    return squares + jnp.sum(z.real) + jnp.mean(jnp.abs(Z @ p["w"] * p["b"])) + jnp.mean(jnp.angle(z) ** 2)


def elementwise(p, x):
    z = jnp.where(x[:, :3] > 0, jnp.exp(0.3 * x @ p["w"]), jnp.sin(p["b"]))
    picked = jnp.concatenate([p["w"][1:3], p["b"][None]]).T.reshape(-1)[jnp.array([0, 2, 2])]
    return jnp.sum(jnp.abs(z)) + jnp.sum(jnp.abs(picked) ** 2 * jnp.arange(3.0)) + jnp.abs(jnp.prod(p["b"]))


def fourier(p, x):
    spectrum = jnp.fft.rfft(x @ p["r"]) * p["w"][0]
    both = jnp.fft.ifft(jnp.fft.fft(p["w"], axis=0) * p["b"], axis=0)
    return jnp.mean(jnp.fft.irfft(spectrum, n=4) ** 2) + jnp.mean(jnp.abs(both) ** 3)


def decompositions(p, x):
    gram = p["w"] @ jnp.conj(p["w"].T)
    solved = jnp.linalg.solve(gram + 1j * jnp.eye(4) + p["r"], p["c"])
    singular = jnp.linalg.svd(p["w"], compute_uv=False).sum()
    return jnp.sum(jnp.abs(solved) ** 2) + jnp.sum(jnp.linalg.eigvalsh(gram) ** 2) + singular


def state_space(p, x):
    """A scan of a complex state, with its real part read out, as in S4."""

    def body(s, u):
        s = p["lam"] * s + u
        return s, s @ p["c"]

    s, ys = jax.lax.scan(body, jnp.zeros(4, jnp.complex64), x @ p["r"])
    return jnp.mean(jnp.real(ys) ** 2) + jnp.sum(jnp.abs(s))


def complex_slices(p, x):
    """A state that starts from a parameter, complex slices, and a switch in the body."""

    def body(s, now):
        i, u = now
        s = jax.lax.switch(i % 2, [lambda s: s * p["lam"], lambda s: jnp.conj(s) + u * p["b"][0]], s)
        return s, jnp.abs(s)

    return jnp.sum(jax.lax.scan(body, p["c"][:, 0], (jnp.arange(5), Z))[1])


def associative(p, x):
    """A linear recurrence by an associative scan, as in the LRU."""
    h = (x @ p["r"]).astype(jnp.complex64)
    factors = jnp.broadcast_to(p["lam"], h.shape)
    _, s = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (factors, h))
    return jnp.mean(jax.nn.gelu((s @ p["c"]).real) ** 2)


def control_flow(p, x):
    h = jax.lax.cond(x[0, 0] > -9, lambda h: h * p["b"], lambda h: h, x @ p["w"])
    mapped = jax.lax.map(lambda u: u @ p["w"], x)
    again = jax.checkpoint(lambda u: jnp.sin(u @ p["w"]))(x)
    return jnp.sum(jnp.abs(h) ** 2) + jnp.sum(jnp.abs(mapped)) + jnp.sum(jnp.abs(again))


def gated(p, x):
    """Several complex layers, each scaled by its own absolute value."""
    z = x @ p["w"]
    for _ in range(3):
        size = jnp.abs(z)
        z = jax.nn.relu(size + 0.1) / (size + 1e-3) * z * p["b"]
    return jnp.mean(jnp.abs(z) ** 2)


def parts_alone(p, x):
    return jnp.mean(jnp.tanh(x @ p["w"].real + p["b"].imag) ** 2) + 0.1 * jnp.sum(jnp.abs(p["lam"]) ** 2)


LOSSES = (products, elementwise, fourier, decompositions, state_space, complex_slices)
LOSSES += (associative, control_flow, gated, parts_alone)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_displacements_are_gradients(loss):
    wanted = eqx.filter_value_and_grad(loss)(P, X)
    got = eqxproj.filter_value_and_displacement(loss)(P, X)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-5 * float(jnp.max(jnp.abs(w))) + 1e-7)


W, B = random(6, 4, 3), random(7, 3)
DATA = np.asarray(random(8, 64, 4))
START = {"w": 0.5 * random(9, 4, 3), "b": jnp.zeros(3, jnp.complex64)}


def distance(p, x, y):
    return jnp.mean(jnp.abs(x @ p["w"] + p["b"] - y) ** 2)


@pytest.mark.parametrize("method", ["projection", "gradient"])
def test_training_lowers_the_loss_along_both_parts(method):
    """Complex data, too. Without the conjugate, gradients of imaginary parts lead away from the least loss."""
    data = (DATA, np.asarray(DATA @ W + B))
    options = {"steps": 120, "batch_size": 32, "method": method}
    result = eqxproj.train(START, data, distance, optimizer=optax.sgd(0.2), **options)
    np.testing.assert_allclose(result.model["w"], W, atol=1e-3)
    np.testing.assert_allclose(result.model["b"], B, atol=1e-3)


def test_training_by_the_defaults():
    """Beside a real layer, whose coordinates the preconditioner changes."""

    def loss(p, x, y):
        return jnp.mean((jnp.abs(jnp.tanh(x @ p["v"] + p["a"]) @ p["z"]) - y) ** 2)

    x = np.asarray(DATA.real)
    model = {"z": random(10, 3, 2), "v": random(11, 4, 3).real, "a": jnp.zeros(3)}
    result = eqxproj.train(model, (x, np.abs(x[:, :2])), loss, steps=100, batch_size=32)
    assert result.model["z"].dtype == jnp.complex64
    assert result.history["loss"][-1] < 0.7 * result.history["loss"][1]
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), result.model, model)
    assert all(m > 0.01 for m in moved.values()), moved


def test_projections_take_the_parts_as_two_arrays():
    x, y = jnp.asarray(DATA[:8]), jnp.asarray(DATA[:8] @ W + B)
    problem = eqxproj.feasibility_problem(distance, START, x, y)
    assert "['w'].real" in problem.explain() and "['w'].imag" in problem.explain()
    solution = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=40)
    assert solution.model["w"].dtype == jnp.complex64
    assert distance(solution.model, x, y) < 1e-3 * distance(START, x, y)


def test_raw_displacements_are_taken_off_as_they_are():
    x, y = jnp.asarray(DATA[:8]), jnp.asarray(DATA[:8] @ W + B)
    raw = eqxproj.filter_displacement(distance, raw=True)(START, x, y)
    back = jax.tree.map(lambda d, g: jnp.vdot(jnp.conj(g), d).real, raw, eqx.filter_grad(distance)(START, x, y))
    assert all(b > 0 for b in jax.tree.leaves(back))
    assert distance(jax.tree.map(jnp.subtract, START, raw), x, y) < distance(START, x, y)


def test_projection_to_a_complex_target():
    out, project = eqxproj.projection(lambda w: X @ w, P["w"], steps=2000)
    target = X @ (P["w"] + 0.1j)
    (new,) = project(target)
    assert jnp.max(jnp.abs(X @ new - target)) < 0.05 * jnp.max(jnp.abs(target - out))


def test_no_set_of_complex_arrays():
    data = (DATA, DATA @ np.asarray(W))
    with pytest.raises(ValueError, match="floating-point array"):
        eqxproj.train(START, data, distance, steps=1, constraints=[(lambda p: p["w"], eqxproj.sets.Sparse(0.5))])
