"""States that are iterated: many steps in one call are as many single steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqxproj
from eqxproj._problem._state import iterate, prepared
from eqxproj.losses import cross_entropy

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), jnp.array([0, 1, 2, 0, 1])
MODEL = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in {"a": (4, 6), "b": (6,), "d": (6, 3)}.items()}
SOLVERS = (eqxproj.AlternatingProjections(), eqxproj.DouglasRachford(), eqxproj.CyclicProjections())


def loss(p, x, y):
    return cross_entropy(jax.nn.relu(x @ p["a"] + p["b"]) @ p["d"], y).mean()


def setting(solver):
    problem = eqxproj.feasibility_problem(loss, MODEL, X, Y)

    def step(state):
        return solver.step(problem, state)

    return problem, step, solver.init(problem)


@pytest.mark.parametrize("solver", [SOLVERS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS[1:])])
@pytest.mark.parametrize("count", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 7])
def test_many_steps_are_single_steps(solver, count):
    problem, step, start = setting(solver)
    state = prepared(step, start)
    for _ in range(count):
        state = iterate(step, state, 1)
    together = jax.jit(lambda: solver.postprocess(problem, iterate(step, start, count)))()
    for a, b in zip(together, solver.postprocess(problem, state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_prepared_state_keeps_its_structure(solver):
    _, step, start = setting(solver)
    state = prepared(step, start)
    structure = jax.tree_util.tree_structure(state)
    assert structure == jax.tree_util.tree_structure(prepared(step, state))
    assert structure == jax.tree_util.tree_structure(iterate(step, state, 1))
