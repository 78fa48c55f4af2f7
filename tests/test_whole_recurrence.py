"""A recurrence as one constraint, where nothing jumps: its nearest point against an oracle, and what it reaches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from bilinear_oracle import node_of

import eqxproj
from eqxproj._graph._recurrences import is_smooth
from eqxproj._problem._readers import context
from eqxproj._program._normal_form import normal_form
from eqxproj._program._recurrence import Recurrence
from eqxproj.rules._base import as_duals

pytestmark = pytest.mark.usefixtures("full_precision")

X = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)


def states(matrix, start, x=X, numpy=jnp):
    """The states of a recurrence, with each step in the slices of a `scan`, or in a loop of Python."""
    if numpy is jnp:
        return jax.lax.scan(lambda h, xt: (jnp.tanh(matrix @ h + xt),) * 2, start, x)[1]
    found = [start]
    for xt in x:
        found.append(np.tanh(matrix @ found[-1] + xt))
    return np.stack(found[1:])


def straight(start, x):
    """A recurrence that is linear in its start and in what it reads."""
    return jax.lax.scan(lambda h, xt: (jnp.asarray([[0.9, 0.3], [-0.2, 0.8]]) @ h + xt,) * 2, start, x)[1]


def answered(function, operands, wanted, logs):
    """The operands where the rule of the one recurrence puts them."""
    problem, number = node_of(function, *map(jnp.asarray, operands), copies="none")
    assert problem.graph.nodes[number].equation.name == "scan"
    ctx = context(problem, number, False).reweighted(list(logs[:-1]), [logs[-1]])
    dual = jnp.asarray(wanted * np.exp(logs[-1]), jnp.float32)
    nus = as_duals(problem.graph.nodes[number].rule.project(ctx, list(map(jnp.asarray, operands)), [dual]))
    return [x + np.asarray(nu) / np.exp(log) for x, nu, log in zip(operands, nus, logs, strict=False)]


def test_a_linear_recurrence_is_projected_exactly():
    """The linearized constraint of all steps is a linear least-squares problem, here with its matrix written out."""
    start, wanted = np.asarray([0.5, -1.0], np.float32), np.linspace(-1, 1, X.size).reshape(X.shape)
    logs = (0.5, -0.5, 1.0)
    found = answered(straight, (start, X), wanted, logs)
    flat = np.concatenate([start, X.ravel()])
    jacobian = jax.jacobian(lambda z: straight(z[:2], z[2:].reshape(X.shape)).ravel())(jnp.asarray(flat))
    weights = np.exp(np.repeat(logs[:2], (start.size, X.size)))
    j, kappa = np.asarray(jacobian, np.float64), np.exp(logs[2])
    moved = np.linalg.solve(np.diag(weights) + kappa * j.T @ j, kappa * j.T @ wanted.ravel())
    answer = np.concatenate([x.ravel() for x in found]) - flat
    np.testing.assert_allclose(answer, moved, atol=2e-3 * np.abs(moved).max())


@pytest.mark.parametrize(
    "logs", [(0.0, 0.0, 0.0), pytest.param((3.0, -1.0, 0.5), marks=pytest.mark.slow)], ids=["unit", "unequal"]
)
def test_it_is_the_nearest_point(logs):
    matrix, start = np.asarray([[0.7, -0.4], [0.5, 0.6]], np.float32), np.asarray([0.3, -0.6], np.float32)
    wanted = 0.3 * np.random.default_rng(1).normal(size=X.shape)
    found = answered(states, (matrix, start), wanted, logs)
    flat = np.concatenate([matrix.ravel(), start]).astype(np.float64)
    target = states(matrix.astype(np.float64), start.astype(np.float64), X, np) + wanted
    weights = np.exp(np.repeat(logs[:2], (4, 2)))

    def cost(z):
        gap = states(z[:4].reshape(2, 2), z[4:], X, np) - target
        return np.sum(weights * (z - flat) ** 2) + np.exp(logs[2]) * np.sum(gap**2)

    best = scipy.optimize.minimize(cost, flat, method="BFGS", options={"gtol": 1e-9})
    value = cost(np.concatenate([x.ravel() for x in found]).astype(np.float64))
    assert value <= best.fun + 1e-3 * (cost(flat) - best.fun)


@jax.custom_vjp
def clipped(h):
    return h


clipped.defvjp(lambda h: (h, None), lambda _, ct: (jnp.clip(ct, -1, 1),))
doubled = eqxproj.custom_projection(lambda h: 2.0 * h)
doubled.def_projection(lambda ctx, inputs, target: [0.5 * target])


def through_branches(h):
    return jax.lax.cond(jnp.sum(h) > 0, jnp.sign, jnp.tanh, h)


def through_a_loop(h):
    return jax.lax.scan(lambda c, _: (jnp.sign(c) + c, None), h, length=2)[0]


BODIES = {
    "tanh": (jnp.tanh, True),
    "relu": (jax.nn.relu, True),
    "softmax": (jax.nn.softmax, True),
    "largest": (lambda h: h - jnp.max(h), True),
    "smooth loop": (lambda h: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), h, length=2)[0], True),
    "clamped": (lambda h: jnp.clip(h, -1.0, 1.0), True),
    "known jumps": (lambda h: h * jnp.sign(X[0]) + (X[1] > 0), True),
    "sign": (jnp.sign, False),
    "step": (lambda h: jnp.where(h > 0, 1.0, -1.0), False),
    "rounded": (jnp.round, False),
    "position": (lambda h: jax.nn.one_hot(jnp.argmax(h), 2), False),
    "its own derivative": (clipped, False),
    "its own projection": (doubled, False),
    "branches": (through_branches, False),
    "inner loop": (through_a_loop, False),
}


def loss_of(body):
    def loss(w, x):
        return jnp.sum(jnp.square(jax.lax.scan(lambda h, xt: (body(w * h + xt),) * 2, jnp.zeros(2), x)[1]))

    return loss


@pytest.mark.parametrize("name", BODIES)
def test_what_jumps_or_has_a_rule_keeps_its_time_steps(name):
    body, smooth = BODIES[name]
    problem = eqxproj.feasibility_problem(loss_of(body), jnp.ones(2), X, copies="none")
    assert any(edge.delayed for edge in problem.graph.edges) != smooth
    names = [node.equation.name for node in problem.graph.nodes if node.equation is not None]
    assert ("scan" in names) == smooth


def test_a_registered_rule_is_not_passed_over(registry):
    program = normal_form(jax.make_jaxpr(loss_of(jnp.tanh))(jnp.ones(2), X))
    (equation,) = (e for e in program.equations if e.name == "scan")
    recurrence, unknown = Recurrence.of(equation), [True] * len(equation.inputs)
    assert is_smooth(recurrence, unknown)
    eqxproj.register_projection("tanh")(lambda ctx, inputs, target: [jnp.arctanh(jnp.clip(target, -0.999, 0.999))])
    assert not is_smooth(recurrence, unknown)


def test_time_steps_are_nodes_elsewhere():
    """With copies of each neuron, and in the gradient regime."""
    for options in ({"copies": "neuron"}, {"copies": "none", "metric": eqxproj.Metric(1e6, 1e6)}):
        problem = eqxproj.feasibility_problem(loss_of(jnp.tanh), jnp.ones(2), X, **options)
        assert any(edge.delayed for edge in problem.graph.edges)


@pytest.mark.parametrize("solver", [eqxproj.AlternatingProjections(), eqxproj.CyclicProjections()], ids=["two", "one"])
def test_one_step_reaches_the_beginning(solver):
    """What is wanted of the last state moves the first input at once."""

    def loss(x):
        return jnp.square(jax.lax.scan(lambda h, xt: (jnp.tanh(h + xt), None), jnp.zeros(2), x)[0] - 0.5).sum()

    colors = not isinstance(solver, eqxproj.CyclicProjections)
    found = {}
    for copies in ("none", "neuron"):
        problem = eqxproj.feasibility_problem(loss, jnp.zeros((40, 2)), copies=copies, two_colors=colors, tau=1.0)
        found[copies] = eqxproj.solve(problem, solver, steps=3).model
    assert float(jnp.abs(found["none"][0]).min()) > 1e-4
    if colors:
        assert not np.any(found["neuron"][0])


class Remembers(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, x):
        last, _ = jax.lax.scan(lambda h, xt: (self.cell(xt, h), None), jnp.zeros(8), x)
        return self.head(last)


def remembered(model, x, y):
    return eqxproj.losses.cross_entropy(jax.vmap(model)(x), y).mean()


@pytest.mark.slow
def test_training_hears_the_beginning_of_a_sequence():
    """The label is the sign of the first of twelve numbers."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1024, 12, 1))
    y = (x[:, 0, 0] > 0).astype(jnp.int32)
    model = Remembers(eqx.nn.GRUCell(1, 8, key=keys[1]), eqx.nn.Linear(8, 2, key=keys[2]))
    options = {"solver": eqxproj.AlternatingReflections(), "metric": eqxproj.Metric(1.0, 31.0)}
    found = eqxproj.train(model, (x[:768], y[:768]), remembered, steps=40, batch_size=64, key=keys[0], **options)
    right = jnp.argmax(jax.vmap(found.model)(x[768:]), -1) == y[768:]
    assert float(right.mean()) > 0.9
