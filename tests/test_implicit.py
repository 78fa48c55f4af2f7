"""Implicit derivatives: linear solvers, roots, loops with checkpoints, differential equations, equilibria.

The models are small forms of the examples of Diffrax and Optimistix. The gradient is the oracle.
"""

from __future__ import annotations

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as sparse
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import eqxproj

KEYS = jax.random.split(jax.random.key(0), 6)
X, Y = jax.random.normal(KEYS[0], (3, 2)), jax.random.normal(KEYS[1], (3, 2))
TS = jnp.linspace(0.0, 1.0, 4)
FILTERED = "ignore::DeprecationWarning"  # of the packages beside JAX


class Field(eqx.Module):
    """A vector field, as of a neural differential equation."""

    mlp: eqx.nn.MLP

    def __init__(self, key, inputs=2, outputs=2):
        self.mlp = eqx.nn.MLP(inputs, outputs, 4, 1, activation=jax.nn.softplus, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


def assert_is_gradient(loss, model, *args):
    wanted = eqx.filter_jit(eqx.filter_grad(loss))(model, *args)
    found = eqx.filter_jit(eqxproj.filter_displacement(loss))(model, *args)
    pairs = zip(*(jax.tree_util.tree_leaves(eqx.filter(t, eqx.is_inexact_array)) for t in (wanted, found)))
    sizes = [float(jnp.max(jnp.abs(g))) for g, _ in pairs]
    assert max(sizes) > 0
    for g, d in zip(*(jax.tree_util.tree_leaves(eqx.filter(t, eqx.is_inexact_array)) for t in (wanted, found))):
        np.testing.assert_allclose(d, g, rtol=2e-3, atol=1e-3 * float(jnp.max(jnp.abs(g))) + 1e-7)


def mapped(solution):
    """The loss of solutions, one a sample."""
    return lambda m, x, y: jnp.mean((jax.vmap(lambda row: solution(m, row))(x) - y) ** 2)


def well_posed(a):
    return a.T @ a + jnp.eye(2)


def root_by_hand(a, x):
    """The root of z = tanh(a z + x) / 2, by `custom_root`."""

    def gap(z):
        return z - 0.5 * jnp.tanh(a @ z + x)

    def solve(f, start):
        return jax.lax.fori_loop(0, 30, lambda _, z: z - f(z), start)

    return jax.lax.custom_root(gap, jnp.zeros(2), solve, lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y))


def by_hand(a, x):
    """The solution of a linear system, by `custom_linear_solve`."""
    matrix = well_posed(a)
    solve = lambda matvec, b: jnp.linalg.solve(jax.jacobian(matvec)(b), b)  # noqa: E731
    return jax.lax.custom_linear_solve(lambda v: matrix @ v, x, solve, symmetric=True)


def recurrent(solve):
    """Solutions of systems, each with the last one in its right side."""
    return lambda a, x: jax.lax.scan(lambda z, b: (solve(a, b + 0.1 * z), None), jnp.zeros(2), jnp.stack([x, 2 * x]))[0]


SOLVES = {
    name: lambda a, x, f=f: f(lambda v: well_posed(a) @ v, x)[0]
    for name, f in (("cg", sparse.cg), ("gmres", sparse.gmres), ("bicgstab", sparse.bicgstab))
}
SOLVES |= {"root": root_by_hand, "linear": by_hand, "gmres in a loop": recurrent(SOLVES["gmres"])}
SOLVES["lineax"] = lambda a, x: lx.linear_solve(lx.MatrixLinearOperator(well_posed(a)), x).value


@pytest.mark.filterwarnings(FILTERED)
@pytest.mark.parametrize("name", ["gmres", "linear", "root"])
def test_solutions_have_their_implicit_derivative(name):
    def loss(m, x, y):
        inside = jax.vmap(lambda row: SOLVES[name](m["a"], row))(x @ m["b"])
        return jnp.mean((inside @ m["c"] - y) ** 2)

    assert_is_gradient(loss, {k: jax.random.normal(key, (2, 2)) for k, key in zip("abc", KEYS)}, X, Y)


@pytest.mark.slow
@pytest.mark.filterwarnings(FILTERED)
@pytest.mark.parametrize("name", list(SOLVES))
def test_solutions_at_the_end_of_a_loss_too(name):
    assert_is_gradient(mapped(SOLVES[name]), jax.random.normal(KEYS[2], (2, 2)), X, Y)


def looped(kind):
    def solution(m, x):
        step = lambda c: (jnp.tanh(m.mlp(c[0])), c[1] + 1)  # noqa: E731
        return eqxi.while_loop(lambda c: c[1] < 5, step, (x, 0), max_steps=16, kind=kind)[0]

    return solution


def equilibrium(m, x):
    """A deep equilibrium model."""
    step = lambda z, args: 0.5 * jnp.tanh(args[0](z) + args[1])  # noqa: E731
    return optx.fixed_point(step, optx.FixedPointIteration(1e-6, 1e-6), jnp.zeros(2), args=(m.mlp, x)).value


def root(m, x):
    gap = lambda z, args: z - 0.5 * jnp.tanh(args[0](z) + args[1])  # noqa: E731
    return optx.root_find(gap, optx.Newton(1e-6, 1e-6), jnp.zeros(2), args=(m.mlp, x)).value


def least(m, x):
    gap = lambda z, args: jnp.concatenate([z - args[1], 0.3 * args[0](z)])  # noqa: E731
    return optx.least_squares(gap, optx.LevenbergMarquardt(1e-6, 1e-6), jnp.zeros(2), args=(m.mlp, x)).value


def ode(adjoint=None, adaptive=True, steps=32, solver=None):
    """A neural ordinary differential equation."""
    options = {} if adjoint is None else {"adjoint": adjoint}
    solver = solver or (diffrax.Tsit5() if adaptive else diffrax.Euler())
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-5) if adaptive else diffrax.ConstantStepSize()

    def solution(m, x):
        kinds = {"stepsize_controller": controller, "max_steps": steps if adaptive else 4, **options}
        return diffrax.diffeqsolve(diffrax.ODETerm(m), solver, 0.0, 1.0, 0.25, x, **kinds).ys[-1]

    return solution


IMPLICIT = {
    "bounded loop": looped("bounded"),
    "checkpointed loop": looped("checkpointed"),
    "equilibrium": equilibrium,
    "root": root,
    "least squares": least,
    "neural ODE": ode(),
    "neural ODE, direct": ode(diffrax.DirectAdjoint(), adaptive=False),
    "neural ODE, direct and adaptive": ode(diffrax.DirectAdjoint(), steps=64),
    "neural ODE, backward": ode(diffrax.BacksolveAdjoint(), steps=64),
    "neural ODE, implicit adjoint": ode(diffrax.ImplicitAdjoint(), steps=64),
    "stiff neural ODE": ode(solver=diffrax.Kvaerno5()),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(FILTERED)
@pytest.mark.parametrize("name", list(IMPLICIT))
def test_models_with_implicit_layers_run_unchanged(name):
    assert_is_gradient(mapped(IMPLICIT[name]), Field(KEYS[3]), X, Y)


class Controlled(eqx.Module):
    """A neural controlled differential equation, which reads a path."""

    field: Field
    start: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.field, self.start = Field(a, 2, 4), eqx.nn.Linear(2, 2, key=b)
        self.readout = eqx.nn.Linear(2, 1, key=c)

    def __call__(self, path):
        control = diffrax.CubicInterpolation(TS, diffrax.backward_hermite_coefficients(TS, path))
        vector_field = lambda t, y, args: jnp.tanh(self.field(t, y, args)).reshape(2, 2)  # noqa: E731
        term = diffrax.ControlTerm(vector_field, control).to_ode()
        y0 = self.start(path[0])
        last = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.25, y0, max_steps=16).ys[-1]
        return self.readout(last)


class Latent(eqx.Module):
    """A latent differential equation: a recurrence encodes a path, a sample is solved, and decoded."""

    cell: eqx.nn.GRUCell
    field: Field
    decoder: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.cell, self.field = eqx.nn.GRUCell(2, 4, key=a), Field(b)
        self.decoder = eqx.nn.Linear(2, 2, key=c)

    def __call__(self, path, key):
        code, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), jnp.zeros(4), path, reverse=True)
        mean, log_scale = code[:2], code[2:]
        start = mean + jnp.exp(log_scale) * jax.random.normal(key, (2,))
        saved = diffrax.SaveAt(ts=TS)
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(self.field), diffrax.Tsit5(), 0.0, 1.0, 0.25, start, saveat=saved, max_steps=16
        ).ys
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_scale) - 2 * log_scale - 1)
        return jnp.sum((jax.vmap(self.decoder)(solved) - path) ** 2) + kl


def flow_loss(m, x):
    """A continuous normalizing flow: the negative log density of data, by the trace of the field's Jacobian."""

    def with_density(t, state, args):
        y, _ = state
        return m(t, y, None), jnp.trace(jax.jacfwd(lambda y: m(t, y, None))(y))

    def log_density(y):
        term = diffrax.ODETerm(with_density)
        start = (y, jnp.asarray(0.0))
        z, change = diffrax.diffeqsolve(term, diffrax.Tsit5(), 1.0, 0.0, -0.25, start, max_steps=16).ys
        return -0.5 * jnp.sum(z[-1] ** 2) - change[-1]

    return -jnp.mean(jax.vmap(log_density)(x))


PATHS = jnp.cumsum(jax.random.normal(KEYS[4], (2, 4, 2)), 1)


def controlled_loss(m, paths, y):
    return jnp.mean((jax.vmap(m)(paths)[:, 0] - y) ** 2)


def latent_loss(m, paths, keys):
    return jnp.mean(jax.vmap(m)(paths, keys))


EXAMPLES = {
    "controlled": (controlled_loss, lambda: Controlled(KEYS[5]), PATHS, Y[:2, 0]),
    "latent": (latent_loss, lambda: Latent(KEYS[5]), PATHS, jax.random.split(KEYS[0], 2)),
    "flow": (flow_loss, lambda: Field(KEYS[5]), X),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(FILTERED)
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_examples_of_differential_equations_run_unchanged(name):
    loss, make, *args = EXAMPLES[name]
    assert_is_gradient(loss, make(), *args)
