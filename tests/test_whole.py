"""One constraint for a whole matrix product: its nearest point against a minimizer of scipy, and prepared inverses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from bilinear_oracle import node_of

from eqxproj._problem._readers import context
from eqxproj.rules._base import as_duals
from eqxproj.rules._whole import Basis

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

# The equation of a product, and the shapes of its operands: batches of one, two and none; tall, wide and square; with
# more columns than the inner length, and rows not as many, or more too.
PRODUCTS = {
    "tall": ("ik,jk->ij", (7, 2), (3, 2)),
    "wide": ("ik,jk->ij", (2, 6), (3, 6)),
    "square": ("ik,jk->ij", (4, 4), (4, 4)),
    "many columns": ("ik,jk->ij", (2, 4), (7, 4)),
    "thin": ("ik,jk->ij", (5, 2), (6, 2)),
    "vector": ("k,jk->j", (5,), (3, 5)),
    "batched": ("bik,bjk->bij", (2, 5, 2), (2, 3, 2)),
    "batched wide": ("bik,kjb->bij", (3, 2, 4), (4, 2, 3)),
}
# The logarithms of the weights of both operands and the output, and how far the output is to move.
SETTINGS = {
    "small step": (0.0, 0.0, 0.0, 0.01),
    "step": (0.0, 0.0, 0.0, 0.6),
    "large step": (0.0, 0.0, 0.0, 4.0),
    "stiff first": (4.0, -1.0, 0.5, 0.6),
    "stiff second": (-2.0, 3.0, 1.0, 0.6),
    "stiff output": (0.0, 1.0, 4.0, 0.6),
    "soft output": (1.0, 0.0, -4.0, 2.0),
}


def setting(name, dtype, seed=0):
    """A function, its operands, and where its output is to go from there."""
    formula, *shapes = PRODUCTS[name]
    rng = np.random.default_rng(seed)
    a, w = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    function = lambda a, w: jnp.einsum(formula, a, w, precision="highest")  # noqa: E731
    return function, (a, w), rng.normal(size=np.einsum(formula, a, w).shape).astype(dtype)


def projected(function, operands, wanted, logs, dtype, counts=1.0):
    """The operands where the rule puts them; `counts` are the copies of each entry of the output."""
    problem, number = node_of(function, *map(jnp.asarray, operands), copies="none")
    node = problem.graph.nodes[number]
    ctx = context(problem, number, False)
    swapped = node.rule is not None and ctx.equation.inputs[0].shape != operands[0].shape
    assert not swapped
    ctx = ctx.reweighted(list(logs[:2]), [logs[2]], [counts])
    dual = jnp.asarray(wanted * np.exp(logs[2]) * counts, dtype)
    project = jax.jit(lambda inputs, dual: as_duals(node.rule.project(ctx, inputs, [dual])))
    nus = project(list(map(jnp.asarray, operands)), dual)
    return [x + np.asarray(nu) / np.exp(log) for x, nu, log in zip(operands, nus, logs[:2], strict=True)]


def cost_of(name, operands, wanted, logs, counts=1.0):
    """The weighted squared distance, and its slope, as functions of both operands in one vector."""
    formula, shape_a, shape_w = PRODUCTS[name]
    (left, right), out = formula.split("->")[0].split(","), formula.split("->")[1]
    a0, w0 = (x.astype(np.float64) for x in operands)
    target = np.einsum(formula, a0, w0) + wanted.astype(np.float64)
    alpha, omega, kappa = *np.exp(logs[:2]), np.exp(logs[2]) * np.broadcast_to(counts, target.shape)

    def cost(flat):
        a, w = flat[: a0.size].reshape(shape_a), flat[a0.size :].reshape(shape_w)
        gap = np.einsum(formula, a, w) - target
        value = alpha * np.sum((a - a0) ** 2) + omega * np.sum((w - w0) ** 2) + np.sum(kappa * gap**2)
        slope_a = alpha * (a - a0) + np.einsum(f"{out},{right}->{left}", kappa * gap, w)
        slope_w = omega * (w - w0) + np.einsum(f"{out},{left}->{right}", kappa * gap, a)
        return value, 2 * np.concatenate([slope_a.ravel(), slope_w.ravel()])

    return cost


def assert_nearest(name, logs, size, dtype, counts=1.0):
    function, operands, direction = setting(name, dtype)
    wanted = (size * direction).astype(dtype)
    found = np.concatenate([x.ravel() for x in projected(function, operands, wanted, logs, dtype, counts)])
    found = found.astype(np.float64)
    start = np.concatenate([x.ravel() for x in operands]).astype(np.float64)
    cost = cost_of(name, operands, wanted, logs, counts)
    best = scipy.optimize.minimize(cost, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    stays = cost(start)[0]
    value = cost(found)[0]
    assert value <= best.fun + (1e-2 if size > 1 else 1e-3) * (stays - best.fun), (value, best.fun, stays)
    if size < 1:  # a step that is not small may go to the local solver, which stops earlier
        within = 1e-2 if size < 0.1 else 0.1
        np.testing.assert_allclose(found - start, best.x - start, atol=within * np.abs(best.x - start).max())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("wide", "small step"), ("batched", "stiff first"), ("many columns", "step"), ("thin", "stiff second")],
)
def test_it_is_the_nearest_point(name, kind):
    *logs, size = SETTINGS[kind]
    assert_nearest(name, logs, size, np.float32)


@pytest.mark.parametrize(("name", "kind"), [("square", "step"), ("many columns", "step"), ("thin", "stiff output")])
def test_entries_of_an_output_may_weigh_differently(name, kind):
    """As where one part of it has more readers than another. Steps are so small that corrections find the point."""
    *logs, _ = SETTINGS[kind]
    function, operands, _ = setting(name, np.float32)
    shape = function(*operands).shape
    counts = np.where(np.arange(shape[1]) % 2, 3.0, 1.0) * np.ones(shape)
    assert_nearest(name, logs, 0.09, np.float32, counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_it_is_the_nearest_point_everywhere(name, kind):
    *logs, size = SETTINGS[kind]
    assert_nearest(name, logs, size, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("tall", "step"), ("batched wide", "stiff output")])
def test_it_is_the_nearest_point_in_float64(name, kind):
    *logs, size = SETTINGS[kind]
    with jax.enable_x64(True):
        assert_nearest(name, logs, size, np.float64)


@pytest.mark.parametrize("name", ["tall", "wide", "batched", "thin"])
def test_the_equation_is_inverted(name):
    """The left side of the equation at two matrices, written out, applied to what its inverse returns."""
    rng = np.random.default_rng(1)
    formula, *shapes = PRODUCTS[name]
    a, w = (rng.normal(size=(1, *s) if len(s) == 2 else s).astype(np.float32) for s in shapes)
    right = rng.normal(size=(a.shape[0], a.shape[1], w.shape[1])).astype(np.float32)
    of_a, of_w = 0.7, 3.0
    basis = Basis.of(jnp.asarray(a), jnp.asarray(w))
    found = np.asarray(basis.inverse(jnp.asarray(right), jnp.float32(of_a), jnp.float32(of_w)))
    t = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    np.testing.assert_allclose(found + of_w * a @ t(a) @ found + of_a * found @ w @ t(w), right, rtol=1e-3, atol=1e-4)


def answer(name, logs, wanted, **changes):
    """The context, the operands, the duals wanted, and what the rule answers, with changes of the context."""
    function, operands, _ = setting(name, np.float32)
    problem, number = node_of(function, *map(jnp.asarray, operands), copies="none")
    ctx = replace(context(problem, number, False).reweighted(list(logs[:2]), [logs[2]], [1.0]), **changes)
    mu = jnp.asarray(wanted * np.exp(logs[2]), jnp.float32)
    rule = problem.graph.nodes[number].rule
    project = jax.jit(lambda inputs, mu: rule.project(ctx, inputs, [mu]))
    return function, operands, mu, project(list(map(jnp.asarray, operands)), mu)


@pytest.mark.parametrize(("name", "kind"), [("wide", "step"), ("batched", "stiff first")])
def test_eigenvectors_of_other_matrices_do_no_harm(name, kind):
    """Those of a forward pass that is long ago: as with those of the operands themselves."""
    *logs, _ = SETTINGS[kind]
    wanted = 0.1 * setting(name, np.float32)[2]
    *_, own = answer(name, logs, wanted)
    shapes = [s if len(s) == 3 else (1, *s) for s in PRODUCTS[name][1:]]
    other = Basis.of(*(jnp.asarray(np.random.default_rng(5).normal(size=s), jnp.float32) for s in shapes))
    *_, kept = answer(name, logs, wanted, prepared=other)
    for a, b in zip(as_duals(own), as_duals(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())


@pytest.mark.parametrize(("name", "kind", "accuracy"), [("wide", "step", 1e-2), ("batched", "stiff first", 1e-4)])
def test_what_is_left_of_the_equations(name, kind, accuracy):
    """The slope of the cost vanishes, to the accuracy that was asked for; the output moves as the function does."""
    *logs, size = SETTINGS[kind]
    wanted = size * setting(name, np.float32)[2]
    function, operands, _, found = answer(name, logs, wanted, accuracy=accuracy)
    nus = as_duals(found)
    flat = np.concatenate([np.ravel(x + nu / np.exp(log)) for x, nu, log in zip(operands, nus, logs[:2], strict=True)])
    slope = cost_of(name, operands, wanted, logs)(flat.astype(np.float64))[1]
    start = cost_of(name, operands, wanted, logs)(np.concatenate([x.ravel() for x in operands]).astype(float))[1]
    assert np.abs(slope).max() <= 20 * accuracy * np.abs(start).max()
    moved = [jnp.asarray(x + nu / np.exp(log)) for x, nu, log in zip(operands, nus, logs[:2], strict=True)]
    move = function(*moved) - function(*map(jnp.asarray, operands))
    np.testing.assert_allclose(found.output_moves[0], move, atol=1e-4 * float(np.abs(move).max()))


def test_where_nothing_is_wanted_nothing_moves():
    found = answer("batched", SETTINGS["step"][:3], np.zeros((2, 5, 3), np.float32))[-1]
    for x in (*found.input_duals, *found.output_moves):
        assert np.all(np.asarray(x) == 0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["tall", "wide", "batched"])
def test_the_nearest_point_with_one_operand_known(name, first):
    """With the prepared inverse and without; the output moves as the function does, and by nothing for no dual."""
    function, (a, w), direction = setting(name, np.float32)
    known, unknown = (jnp.asarray(w), jnp.asarray(a)) if first else (jnp.asarray(a), jnp.asarray(w))
    one = lambda x: function(x, known) if first else function(known, x)  # noqa: E731
    problem, number = node_of(one, unknown, copies="none")
    rule, ctx = problem.graph.nodes[number].rule, context(problem, number, False)
    assert problem.prepared[number] is not None
    assert ctx.prepared is not None
    dual = jnp.asarray(0.5 * direction)
    answers = [rule.project(c, [unknown], [dual]) for c in (ctx, replace(ctx, prepared=None))]
    nus = [as_duals(found)[0] for found in answers]
    np.testing.assert_allclose(nus[0], nus[1], rtol=1e-5, atol=1e-6)
    change = one(unknown + nus[0] / ctx.weights[0]) - one(unknown)
    np.testing.assert_allclose(answers[0].output_moves[0], change, rtol=1e-4, atol=1e-5)
    nothing = rule.project(ctx, [unknown], [jnp.zeros_like(dual)])
    assert not any(np.any(np.asarray(x)) for x in (*nothing.input_duals, *nothing.output_moves))
    # A linear problem, by the normal equations of its definition.
    jacobian = np.asarray(jax.jacobian(one)(unknown), np.float64).reshape(dual.size, unknown.size)
    weight, kappa = ctx.weights[0], float(np.ravel(ctx.output_weights[0])[0])
    matrix = weight * np.eye(unknown.size) + kappa * jacobian.T @ jacobian
    move = np.linalg.solve(matrix, jacobian.T @ np.asarray(dual, np.float64).ravel())
    np.testing.assert_allclose(np.ravel(nus[0]) / weight, move, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("knows_one", [True, False])
def test_a_product_of_bfloat16_that_adds_up_in_float32_is_projected(knows_one):
    """LAPACK has no such operands: the local solver answers, near to what is done in float32."""
    _, (a, w), direction = setting("tall", np.float32)

    def function(a, w):
        return jax.lax.dot_general(a, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    moves = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        operands = [jnp.asarray(a, dtype), jnp.asarray(w, dtype)]
        unknown = operands[:1] if knows_one else operands
        one = lambda *x, o=operands: function(*x, *o[len(x) :])  # noqa: E731
        problem, number = node_of(one, *unknown, copies="none")
        rule, ctx = problem.graph.nodes[number].rule, context(problem, number, False)
        moves[dtype] = as_duals(rule.project(ctx, unknown, [jnp.asarray(0.3 * direction, jnp.float32)]))
    for exact, rough in zip(moves[jnp.float32], moves[jnp.bfloat16], strict=True):
        np.testing.assert_allclose(np.asarray(rough, np.float32), exact, atol=0.05 * np.abs(exact).max())
