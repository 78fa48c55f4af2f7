"""Recurrences: one graph whatever the number of steps, in order or all steps at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqxproj


class Elman(eqx.Module):
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    reverse: bool = False
    unrolled: bool = False

    def __call__(self, x):
        def step(h, xt):
            h = jax.nn.relu(self.inner(jnp.concatenate([h, xt])))
            return h, h

        h = jnp.zeros(self.outer.in_features)
        if self.unrolled:
            for xt in x[::-1] if self.reverse else x:
                h, _ = step(h, xt)
        else:
            h, _ = jax.lax.scan(step, h, x, reverse=self.reverse)
        return self.outer(h)


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def case(steps, **options):
    k = jr.split(jr.key(0), 4)
    model = Elman(eqx.nn.Linear(11, 8, key=k[0]), eqx.nn.Linear(8, 2, key=k[1]), **options)
    return model, jr.normal(k[2], (6, steps, 3)), jr.normal(k[3], (6, 2))


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_steps_at_once_move_as_the_unrolled_graph(reverse):
    """Two-color steps on the graph of a `scan` and on the graph of a Python loop, which has other identity nodes."""
    moved = []
    for unrolled in (False, True):
        model, x, y = case(5, reverse=reverse, unrolled=unrolled)
        problem = eqxproj.feasibility_problem(loss, model, x, y, tau=1.0)
        solution = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=12)
        moved.append([a - b for a, b in zip(arrays(solution.model), arrays(model))])
    for a, b in zip(*moved):
        size = jnp.linalg.norm(a) * jnp.linalg.norm(b)
        assert float(jnp.vdot(a, b) / size) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("solver", [eqxproj.DouglasRachford(), eqxproj.DifferenceMap(), eqxproj.CyclicProjections()])
def test_solvers_run_on_the_cycle(solver):
    model, x, y = case(4)
    problem = eqxproj.feasibility_problem(loss, model, x, y, tau=1.0)
    assert any(edge.delayed for edge in problem.graph.edges)
    assert not problem.graph.conflicts
    solution = eqxproj.solve(problem, solver, steps=5)
    assert np.all(np.isfinite(solution.stats["violation"])) and solution.stats["change"][0] > 0


def test_sums_over_many_steps_are_not_kept_in_a_small_type():
    """In bfloat16 a sum of ones stops at 256."""

    def total(w, x):
        return jax.lax.scan(lambda h, _: (h + w.astype(jnp.float32), None), jnp.zeros(2), length=1000)[0] @ x

    found = eqxproj.filter_displacement(total)(jnp.ones(2, jnp.bfloat16), jnp.asarray([1.0, -2.0]))
    np.testing.assert_allclose(found.astype(jnp.float32), [1000.0, -2000.0], rtol=0.01)


def equations(function, *args):
    def count(jaxpr):
        inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=lambda v: hasattr(v, "jaxpr"))]
        return len(jaxpr.eqns) + sum(count(p.jaxpr) for p in inner if hasattr(p, "jaxpr"))

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_on_the_way_back_no_product_of_the_forward_pass_is_computed_again():
    model, x, y = case(7)
    dynamic, static = eqx.partition(model, eqx.is_inexact_array)

    def count(direction):
        step = jax.jit(lambda d: direction(loss)(eqx.combine(d, static), x, y))
        return step.lower(dynamic).compile().as_text().count(" dot(")

    assert count(eqxproj.filter_displacement) == count(eqx.filter_grad) > 0


@pytest.mark.parametrize("in_order", [True, False])
def test_the_program_does_not_grow_with_the_number_of_steps(in_order):
    sizes = []
    for steps in (8, 512):
        model, x, y = case(steps)
        dynamic, static = eqx.partition(model, eqx.is_inexact_array)
        solver = eqxproj.CyclicProjections() if in_order else eqxproj.AlternatingProjections()

        def displaced(dynamic, x, y, static=static, solver=solver):
            return eqxproj.filter_displacement(loss, solver=solver)(eqx.combine(dynamic, static), x, y)

        sizes.append(equations(displaced, dynamic, x, y))
    assert sizes[0] == sizes[1]


def test_a_carry_that_only_moves_along_is_no_circle():
    """A shift register: the leaving carry is a mere view of the entering one."""

    def delayed_sum(w, x):
        def step(register, xt):
            register = jnp.concatenate([register[1:], (w * xt)[None]])
            return register, register[0]

        return jnp.sum(jax.lax.scan(step, jnp.zeros(3), x)[1] ** 2)

    w, x = jnp.asarray(0.7), jr.normal(jr.key(0), (9,))
    steep = eqxproj.Metric(1e6, 1e6)
    moved = eqxproj.filter_displacement(delayed_sum, metric=steep, tau=1e-4)(w, x)
    np.testing.assert_allclose(moved, jax.grad(delayed_sum)(w, x), rtol=1e-3)
    problem = eqxproj.feasibility_problem(delayed_sum, w, x)
    solution = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=3)
    assert np.all(np.isfinite(solution.stats["change"]))


def test_a_counter_in_the_carry_is_known():
    def counted(w, x):
        def step(carry, xt):
            i, h = carry
            return (i + 1, jnp.tanh(h + w * xt) / (1.0 + i)), None

        return jax.lax.scan(step, (0, jnp.zeros(())), x)[0][1] ** 2

    w, x = jnp.asarray(0.7), jr.normal(jr.key(0), (5,))
    moved = eqxproj.filter_displacement(counted, metric=eqxproj.Metric(1e6, 1e6), tau=1e-4)(w, x)
    np.testing.assert_allclose(moved, jax.grad(counted)(w, x), rtol=1e-3)
    assert eqxproj.feasibility_problem(counted, w, x).explain().endswith("without a rule: none.")


def test_a_missing_rule_in_a_body_is_named():
    def loss(w, x):
        def step(h, xt):
            return jax.lax.while_loop(lambda v: v < 3, lambda v: v * 2, h * w + xt), None

        return jax.lax.scan(step, jnp.ones(()), x)[0] ** 2

    for build in (eqxproj.feasibility_problem, lambda *args: eqxproj.filter_displacement(args[0])(*args[1:])):
        with pytest.raises(eqxproj.UnsupportedPrimitiveError, match="while"):
            build(loss, jnp.asarray(2.0), jnp.ones(4))


def test_the_branch_of_the_forward_pass_is_taken():
    def loss(w, x):
        return jax.lax.cond(jnp.sum(w) > 0, lambda v: jnp.sum(jnp.tanh(v * x)), lambda v: jnp.sum(v**2), w)

    x = jnp.linspace(0.1, 1.0, 4)
    for w in (x, -x):
        moved = eqxproj.filter_displacement(loss, metric=eqxproj.Metric(1e6, 1e6), tau=1e-4)(w, x)
        np.testing.assert_allclose(moved, jax.grad(loss)(w, x), rtol=1e-3, atol=1e-6)


class Gated(eqx.Module):
    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __call__(self, x):
        def step(h, xt):
            h = self.cell(xt, h)
            return h, h

        return jax.vmap(self.last)(jax.lax.scan(step, jnp.zeros(6), x)[1])


@pytest.mark.slow
@pytest.mark.parametrize("metric", [eqxproj.Metric(1e3, 1e4), eqxproj.Metric(1e18, 1e4)], ids=["1e3", "1e18"])
@pytest.mark.parametrize(
    "solver",
    [eqxproj.AlternatingProjections(), eqxproj.RelaxedReflectReflect(), eqxproj.CyclicDouglasRachford()],
    ids=lambda s: type(s).__name__,
)
def test_many_steps_in_a_steep_metric_give_the_gradient(solver, metric):
    """All time steps at once: each step of the solver passes on by one time step, and those far back add up to less."""
    k = jr.split(jr.key(0), 3)
    model = Gated(eqx.nn.GRUCell(3, 6, key=k[0]), eqx.nn.Linear(6, 2, key=k[1]))
    x = jr.normal(k[2], (4, 8, 3))
    y = jnp.roll(x, 2, 1)[..., :2]
    copies = "none" if solver.store_copies else "neuron"
    displacement = eqxproj.filter_displacement(loss, solver=solver, steps=90, metric=metric, copies=copies)
    gradient = arrays(eqx.filter_grad(loss)(model, x, y))
    ratios = []
    for moved, wanted in zip(arrays(displacement(model, x, y)), gradient, strict=True):
        sizes = float(jnp.linalg.norm(moved)), float(jnp.linalg.norm(wanted))
        assert float(jnp.vdot(moved, wanted)) / (sizes[0] * sizes[1]) > 0.995
        ratios.append(sizes[0] / sizes[1])
    assert max(ratios) < 1.2 * min(ratios)
