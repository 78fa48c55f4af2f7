"""The step with a margin: as a function, as one constraint with what leads to it, and its projection by brute force."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import eqxproj
from eqxproj._numerics._margin import reach_margin
from eqxproj._problem._readers import context, copies_of

MARGIN = 0.7


def step(s):
    return eqxproj.threshold(s, margin=MARGIN)


# ----------------------------------------------------------------------------------------------------------------------
# The function
# ----------------------------------------------------------------------------------------------------------------------


def test_it_is_a_step_under_every_transformation():
    s = jnp.asarray([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, jnp.nan, jnp.inf])
    want = [-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0]
    for function in (step, jax.jit(step), jax.vmap(step), jax.vmap(jax.jit(jax.vmap(step)))):
        x = s.reshape(2, 4) if function.__name__ == "step" else s[:, None] if "vmap" in repr(function) else s
        np.testing.assert_array_equal(np.ravel(function(s[:, None] if function is not step else x)), want)
    value, slope = jax.value_and_grad(lambda s: jnp.sum(s * step(s)))(s[:6])
    np.testing.assert_array_equal(slope, want[:6])  # the step itself passes nothing on
    assert value == 5.0
    assert step(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
    assert jax.hessian(lambda s: s**2 * step(s))(-1.0) == -2.0


@pytest.mark.parametrize("margin", [-1.0, float("inf"), float("nan"), "wide", None, True, jnp.ones(2)])
def test_a_margin_is_a_number(margin):
    with pytest.raises(ValueError, match="`margin` must be a finite number, zero or above"):
        eqxproj.threshold(jnp.ones(2), margin=margin)


@pytest.mark.parametrize("s", [jnp.ones(2, int), jnp.ones(2, bool), jnp.ones(2, complex)])
def test_its_argument_is_real(s):
    with pytest.raises(TypeError, match="`s` must be a floating-point array"):
        eqxproj.threshold(s)


# ----------------------------------------------------------------------------------------------------------------------
# The pattern
# ----------------------------------------------------------------------------------------------------------------------

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 4))


def problem_of(function, model, *args, **options):
    def loss(model, *args):
        y = function(model, *args)
        return jnp.sum(eqxproj.losses.equal(y, jnp.ones(y.shape)))

    return eqxproj.feasibility_problem(loss, model, *args, **options)


def rules_of(problem):
    return sorted(n.describe_rule() for n in problem.graph.nodes if n.kind in ("operation", "identity"))


WEIGHT = jax.random.normal(KEY, (2, 4))
PATTERNS = {
    "linear": (lambda m, x: step(jax.vmap(m)(x)), eqx.nn.Linear(4, 2, key=KEY)),
    "linear without bias": (lambda m, x: step(jax.vmap(m)(x)), eqx.nn.Linear(4, 2, use_bias=False, key=KEY)),
    "of each item": (lambda m, x: jax.vmap(lambda v: step(m @ v))(x), WEIGHT),
    "matrices": (lambda m, x: step(x @ m.T), WEIGHT),
    "scaled": (lambda m, x: step(0.5 - 2.0 * (x @ m.T) / 3.0), WEIGHT),
    "reshaped": (lambda m, x: step((x @ m.T).reshape(2, 3)), WEIGHT),
    "one output": (lambda m, x: step(jax.vmap(m)(x)), eqx.nn.Linear(4, "scalar", key=KEY)),
    "two biases": (lambda m, x: step(x @ m[0].T + m[1] - m[2] + m[2].sum()), (WEIGHT, jnp.ones(2), jnp.ones(2))),
    "convolution": (
        lambda m, x: step(jax.vmap(m)(x[:, None, :])),
        eqx.nn.Conv1d(1, 2, 3, padding=1, key=KEY),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_leads_to_a_step_is_one_constraint(name):
    function, model = PATTERNS[name]
    problem = problem_of(function, model, X)
    assert "threshold neuron" in rules_of(problem) and "bilinear" not in rules_of(problem), problem.explain()
    # In the gradient regime the product stays a layer of its own, as before a sign.
    steep = problem_of(function, model, X, metric=eqxproj.Metric(1e18, 1e4))
    assert "scalar: piecewise affine (2 pieces)" in rules_of(steep) or "scalar: sign" in rules_of(steep)
    assert "bilinear" in rules_of(steep)


APART = {
    "read twice": lambda m, x: step(x @ m.T) * jnp.tanh(x @ m.T),
    "not a sum": lambda m, x: step(jnp.tanh(x @ m.T)),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_no_sum_or_read_elsewhere_stays_apart(name):
    def function(m, x):
        z = x @ m.T
        return step(z) * jnp.tanh(z) if name == "read twice" else step(jnp.tanh(z))

    found = rules_of(problem_of(function, WEIGHT, X))
    assert "threshold" in found and "bilinear" in found and "threshold neuron" not in found


def test_neurons_meet_in_identities():
    def function(m, x):
        h = step(x @ m[0].T)
        return step(step(h @ m[1]) + h)

    graph = problem_of(function, (WEIGHT, jnp.ones((2, 2))), X).graph
    neurons = [i for i, n in enumerate(graph.nodes) if n.operation == "threshold_neuron"]
    assert len(neurons) == 3 and {graph.colors[i] for i in neurons} == {1}
    assert not graph.conflicts


# ----------------------------------------------------------------------------------------------------------------------
# The projection
# ----------------------------------------------------------------------------------------------------------------------


def neuron_of(function, unknown, known=(), logs=None, store_copies=True):
    """The rule, its context, and the operands, one entry a copy, of a problem with one threshold."""
    problem = problem_of(lambda m, *rest: function(*m, *rest), unknown, *known)
    (index,) = [i for i, n in enumerate(problem.graph.nodes) if n.operation == "threshold_neuron"]
    ctx = context(problem, index, store_copies)
    if logs is not None:
        ctx = ctx.reweighted(logs[: len(ctx.weights)], logs[-1:])
    return problem.graph.nodes[index].rule, ctx


def nearest(x0, weights, total, wanted, kappa, rng):
    """The cost of the nearest point with a margin, by SciPy from many starts on either side."""
    best = np.inf
    for y in (-1.0, 1.0):
        limit = {"type": "ineq", "fun": lambda x, y=y: y * total(x) - MARGIN}
        for attempt in range(3):
            start = x0 + (attempt > 0) * rng.normal(size=x0.shape) * (1 + np.abs(x0))
            found = scipy.optimize.minimize(
                lambda x: np.sum(weights * (x - x0) ** 2),
                start,
                jac=lambda x: 2 * weights * (x - x0),
                constraints=[limit],
                method="SLSQP",
                options={"maxiter": 300, "ftol": 1e-12},
            )
            if y * total(found.x) >= MARGIN - 1e-6:
                best = min(best, found.fun + kappa * (y - wanted) ** 2)
    return best


LOGS = {"unit": (0.0, 0.0, 0.0, 0.0), "unequal": (0.7, -0.5, 1.1, -0.3), "stiff output": (0.0, 0.4, 0.0, 2.0)}


def check(points, new, weights, total, wanted, kappa, y, rng):
    """Every new point has the margin, is as near as the nearest that SciPy finds, and nearer than sampled ones."""
    for x0, x1, goal, sign in zip(points, new, wanted, y, strict=True):
        assert sign * total(x1) >= MARGIN - 2e-5 * (1 + np.sum(x1**2))
        cost = np.sum(weights * (x1 - x0) ** 2) + kappa * (sign - goal) ** 2
        best = nearest(x0, weights, total, goal, kappa, rng)
        assert cost <= best * (1 + 1e-4) + 1e-5 and cost >= best * (1 - 1e-4) - 1e-5
        near = x0 + rng.normal(size=(500, len(x0))) * rng.uniform(0, 2 * np.sqrt(cost), (500, 1)) / np.sqrt(weights)
        for other in (-1.0, 1.0):
            feasible = np.array([other * total(x) >= MARGIN for x in near])
            costs = np.sum(weights * (near - x0) ** 2, 1) + kappa * (other - goal) ** 2
            assert not np.any(costs[feasible] < cost * (1 - 1e-4) - 1e-5)


@pytest.mark.parametrize("weights", LOGS)
@pytest.mark.parametrize(
    ("factor", "has_bias", "offset"), [(1.0, False, 0.0), (1.0, True, 0.0), (-1.5, False, 0.0), (2.0, True, -1.3)]
)
def test_the_projection_of_a_neuron_is_the_nearest_point(factor, has_bias, offset, weights):
    rng, logs, k = np.random.default_rng(0), LOGS[weights], 3
    a, w, b = (rng.normal(size=s) for s in ((4, k), (2, k), (2,)))

    def function(a, w, *b):
        s = a @ w.T * factor
        s = s + (b[0] if b else 0.0)
        return step(s + offset if offset else s)

    unknown = tuple(jnp.float32(x) for x in ((a, w, b) if has_bias else (a, w)))
    rule, ctx = neuron_of(function, unknown, logs=logs)
    copies = [rng.normal(size=(1, 4, 2, k)) * scale for scale in (1.0, 0.8)]
    copies[1][0, 0, 0], copies[0][0, 1, 0] = copies[0][0, 0, 0], -copies[1][0, 1, 0]  # equal, and opposite
    inputs = [jnp.float32(x) for x in copies] + [jnp.float32(rng.normal(size=(4, 2)))] * has_bias
    dual = jnp.float32(rng.normal(size=(4, 2)) * 2)
    before = rule.evaluate(ctx, inputs)
    answer = jax.jit(lambda *x: rule.project(ctx, x[:-1], x[-1:]))(*inputs, dual)
    (after,) = eqxproj.rules.outputs_after(rule, ctx, inputs, before, answer)
    wanted = np.ravel(before[0] + dual / ctx.output_weights[0])
    duals = eqxproj.rules.as_duals(answer)
    moved = [np.float64(x) + np.float64(nu) / v for x, nu, v in zip(inputs, duals, ctx.weights)]

    def flat(parts):
        rows = [np.reshape(parts[0], (8, k)), np.reshape(parts[1], (8, k))]
        return np.concatenate(rows + [np.reshape(p, (8, 1)) for p in parts[2:]], 1)

    def total(x):
        return factor * x[:k] @ x[k : 2 * k] + sum(x[2 * k :]) + offset

    each = np.concatenate([np.full(k, ctx.weights[0]), np.full(k, ctx.weights[1]), ctx.weights[2:]])
    check(flat(inputs), flat(moved), each, total, wanted, float(ctx.output_weights[0]), np.ravel(after), rng)


@pytest.mark.parametrize("weights", LOGS)
@pytest.mark.parametrize("kind", ["weights alone", "inputs alone", "weights and bias", "one value", "a difference"])
def test_the_projection_of_an_affine_step_is_the_nearest_point(kind, weights):
    rng, logs, k = np.random.default_rng(1), LOGS[weights], 3
    a, w = np.float32(rng.normal(size=(4, k))), np.float32(rng.normal(size=(2, k)))
    b = jnp.float32(rng.normal(size=(4, 2)))
    copies = [np.broadcast_to(a[:, None], (4, 2, k)), np.broadcast_to(w[None], (4, 2, k))]
    own = jnp.float32(rng.normal(size=(1, 4, 2, k)))
    function, unknown, known, inputs = {
        "weights alone": (lambda w, a: step(a @ w.T), (w,), (a,), [own]),
        "inputs alone": (lambda a, w: step(-2.0 * (a @ w.T)), (a,), (w,), [own]),
        "weights and bias": (lambda w, b, a: step(a @ w.T + b), (w, b), (a,), [own, b]),
        "one value": (lambda b: step(b), (b,), (), [b]),
        "a difference": (lambda b, c: step(b - 2.0 * c + 0.3), (b, b + 1), (), [b, b + 0.5]),
    }[kind]
    rule, ctx = neuron_of(function, tuple(map(jnp.asarray, unknown)), tuple(map(jnp.asarray, known)), logs)
    dual = jnp.float32(rng.normal(size=(4, 2)) * 2)
    before = rule.evaluate(ctx, inputs)
    answer = rule.project(ctx, inputs, [dual])
    (after,) = eqxproj.rules.outputs_after(rule, ctx, inputs, before, answer)
    wanted = np.ravel(before[0] + dual / ctx.output_weights[0])
    duals = eqxproj.rules.as_duals(answer)
    moved = [np.float64(x) + np.float64(nu) / v for x, nu, v in zip(inputs, duals, ctx.weights)]
    each = np.concatenate([np.full(np.size(x) // 8, v) for x, v in zip(inputs, ctx.weights)])
    for i in range(8):
        point, new = (np.concatenate([np.reshape(x, (8, -1))[i] for x in parts]) for parts in (inputs, moved))

        def total(x):
            if kind in ("one value", "a difference"):
                return x[0] if kind == "one value" else x[0] - 2.0 * x[1] + 0.3
            other = np.reshape(copies[kind == "inputs alone"], (8, k))[i]
            return (-2.0 if kind == "inputs alone" else 1.0) * x[:k] @ other + sum(x[k:])

        goal, y = wanted[i : i + 1], np.ravel(after)[i : i + 1]
        check([point], [new], each, total, goal, float(ctx.output_weights[0]), y, rng)


def test_what_nothing_can_move_stays_finite():
    function = lambda w, a: step(a @ w.T)  # noqa: E731
    rule, ctx = neuron_of(function, (WEIGHT,), (jnp.zeros((3, 4)),))
    inputs = [jnp.ones((1, 3, 2, 4))]
    for dual in (-3.0, 3.0):
        answer = rule.project(ctx, inputs, [jnp.full((3, 2), dual)])
        (after,) = eqxproj.rules.outputs_after(rule, ctx, inputs, rule.evaluate(ctx, inputs), answer)
        np.testing.assert_array_equal(after, np.sign(dual))
        np.testing.assert_array_equal(eqxproj.rules.as_duals(answer)[0], 0.0)


def test_operands_of_zero_part():
    rule, ctx = neuron_of(lambda a, w: step(a @ w.T), (X, WEIGHT))
    inputs = [jnp.zeros((1, 3, 2, 4))] * 2
    answer = rule.project(ctx, inputs, [jnp.asarray(np.linspace(-3, 3, 6).reshape(3, 2), jnp.float32)])
    a, w = eqxproj.rules.as_duals(answer)
    np.testing.assert_allclose(np.abs((a * w).sum(-1)), MARGIN, rtol=1e-5)
    np.testing.assert_allclose((a * a).sum(-1) + (w * w).sum(-1), 2 * MARGIN, rtol=1e-5)


@pytest.mark.usefixtures("full_precision")
def test_equal_copies_need_not_be_stored():
    """The sums of the copies' duals, without holding them."""

    def function(a, w, b):
        return step(a @ w.T + b)

    rng = np.random.default_rng(3)
    b = jnp.float32(rng.normal(size=(3, 2)))
    dual = jnp.float32(rng.normal(size=(3, 2)) * 2)
    found = []
    for store_copies in (True, False):
        rule, ctx = neuron_of(function, (X, WEIGHT, b), logs=(0.3, -0.2, 0.1, 0.4), store_copies=store_copies)
        values = [X, WEIGHT.T, b]
        inputs = [rule.expand(ctx, i, v) for i, v in enumerate(values)] if store_copies else values
        answer = rule.project(ctx, inputs, [dual])
        duals = eqxproj.rules.as_duals(answer)
        if store_copies:
            duals = [duals[0].sum((0, 2)), duals[1].sum((0, 1)).T, duals[2]]
        found.append([*duals, *eqxproj.rules.outputs_after(rule, ctx, inputs, rule.evaluate(ctx, inputs), answer)])
    for stored, summed in zip(*found):
        np.testing.assert_allclose(stored, summed, rtol=2e-4, atol=2e-5)


def test_with_one_copy_for_all_a_product_stays_apart():
    problem = problem_of(lambda m, x: step(x @ m.T - 0.1), WEIGHT, X, copies="none")
    assert {"threshold", "bilinear"} <= set(rules_of(problem))
    found = eqxproj.solve(problem, eqxproj.RelaxedReflectReflect(0.5), steps=300, tol=1e-4)
    assert np.all(np.asarray(X @ found.model.T - 0.1) >= MARGIN - 1e-2)


def assert_gathered_alike(problem, number):
    """Copies that are equal are added up without them as with them."""
    node, ctx, rng = problem.graph.nodes[number], context(problem, number, True), np.random.default_rng(1)
    zeros = [jnp.zeros(copies_of(problem, e).shape) for e in node.edges]
    outputs = [jnp.zeros(problem.graph.values[v].shape) for v in node.outputs]
    for place, edge in enumerate(node.edges):
        u = jnp.asarray(rng.normal(size=problem.graph.edges[edge].variable.shape), jnp.float32)
        alone = [node.rule.expand(ctx, i, u) if i == place else x for i, x in enumerate(zeros)]
        found = node.rule.gathered_alike(ctx, place, u, zeros, outputs)
        np.testing.assert_allclose(found, node.rule.gathered(ctx, alone, outputs), rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(found) != 0)


@pytest.mark.parametrize("name", ["dot_general", "convolution"])
def test_equal_copies_of_a_plain_product_are_gathered_without_them(name):
    """Products that no threshold reads: each scalar product is a constraint."""
    functions = {
        "dot_general": (lambda m, x: x @ m.T, WEIGHT, X),
        "convolution": (
            lambda m, x: jax.lax.conv(x, m, (1, 2), "SAME"),
            jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 2)), jnp.float32),
            jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 3, 4)), jnp.float32),
        ),
    }
    function, model, x = functions[name]
    problem = eqxproj.feasibility_problem(lambda m, x: jnp.sum(jnp.tanh(function(m, x)) ** 2), model, x)
    (index,) = [i for i, n in enumerate(problem.graph.nodes) if n.rule is not None and n.rule.label == "bilinear"]
    assert_gathered_alike(problem, index)


MORE = {
    "two products": (lambda m, x: step((x @ m[0].T).T.reshape(3, 2) - (x @ m[1].T).reshape(3, 2)), (WEIGHT, WEIGHT)),
    "a difference": (lambda m, x: step(m[0] - 2.0 * m[1][::-1]), (X, X)),
}


@pytest.mark.parametrize("name", ["linear", "reshaped", "one output", "convolution", *MORE])
def test_gaps_and_gains_belong_to_one_neuron_and_item(name):
    """What a constraint counts as its own is what its output depends on."""
    problem = problem_of(*{**PATTERNS, **MORE}[name], X)
    (index,) = [i for i, n in enumerate(problem.graph.nodes) if n.operation == "threshold_neuron"]
    rule, ctx, rng = problem.graph.nodes[index].rule, context(problem, index, True), np.random.default_rng(0)
    inputs = [
        jnp.asarray(rng.normal(size=copies_of(problem, e).shape), jnp.float32) for e in problem.graph.nodes[index].edges
    ]
    (out,) = rule.evaluate(ctx, inputs)

    def gathered(copies, outputs):
        return rule.gathered(ctx, copies, outputs)

    total = gathered(inputs, [out])
    assert total.size == out.size
    np.testing.assert_allclose(total.sum(), sum(x.sum() for x in (*inputs, out)), rtol=1e-4)
    assert_gathered_alike(problem, index)
    spread = jax.jit(jax.linear_transpose(gathered, inputs, [out]))
    pullback = jax.jit(lambda mine: rule.pullback(ctx, inputs, [mine]))
    for place in range(total.size):
        copies, (mine,) = spread(jnp.zeros(total.size).at[place].set(1.0).reshape(total.shape))
        assert mine.sum() == 1.0
        for nu, mask in zip(pullback(mine), copies, strict=True):
            assert np.any(np.asarray(nu) != 0) and not np.any(np.asarray(nu)[np.asarray(mask) == 0])


def test_the_pullback_is_that_of_a_sign():
    function, model = PATTERNS["linear"]

    def with_signs(m, x):
        return jnp.sign(jax.vmap(m)(x))

    for noise, options in itertools.product(("unreached", "never"), ({}, {"copies": "none"})):
        found = [
            eqxproj.filter_displacement(
                lambda m, x, f=f: jnp.sum((f(m, x) - 0.3) ** 2 * jnp.arange(2.0)), noise=noise, **options
            )(model, X)
            for f in (function, with_signs)
        ]
        for own, sign in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(own, sign, rtol=1e-6)
            assert np.any(np.asarray(own) != 0) == (noise == "unreached")
    # The rule of the joined node answers the same as the chain of a product, a sum and a sign.
    rule, ctx = neuron_of(lambda w, b, x: step(x @ w.T + b), (model.weight, model.bias), (X,), store_copies=False)
    dual = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    inputs = [model.weight.T, jnp.broadcast_to(model.bias, (3, 2))]
    nu_w, nu_b = rule.pullback(ctx, inputs, [dual])
    s = np.asarray(X @ model.weight.T + model.bias, np.float64)
    size = 0.4 * np.sqrt(np.mean(s**2))
    passed = 2 * np.exp(-((s / size) ** 2) / 2) / np.sqrt(2 * np.pi) / size * dual
    np.testing.assert_allclose(nu_b, passed, rtol=1e-5)
    np.testing.assert_allclose(nu_w, X.T @ passed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rho", [None, 0.0, 3.0])
def test_margins_are_reached_from_anywhere(rho):
    """The root of the secular equation, over many orders of magnitude."""
    rng = np.random.default_rng(0)
    u, v = (10 ** rng.uniform(-6, 2, 20000) for _ in range(2))
    goal = 10 ** rng.uniform(-2, 2, 20000) * (1 if rho is None else rng.choice([-1, 1], 20000))
    u, v, goal = (np.float32(x) for x in (u, v, goal))
    found = reach_margin(*map(jnp.asarray, (u, v, goal)), None if rho is None else jnp.float32(rho), 1.0)
    s = np.float64(found.s)
    t, grown, shrunk = 1 - 1 / s, s - 1, s / (2 * s - 1) - 1
    missing = (np.float64(found.along_v) ** 2 * v + np.float64(found.along_ones) ** 2).clip(0)
    reached = u * (1 + grown) ** 2 + missing - v * (1 + shrunk) ** 2 + 4 * (rho or 0) * t
    size = np.abs(goal) + u + v + 4 * (rho or 0)
    short = u - v < goal
    np.testing.assert_allclose((reached - goal)[short] / size[short], 0.0, atol=3e-6)
    np.testing.assert_array_equal(t[~short], 0.0)


def test_equal_is_a_hard_loss():
    y, t = jnp.asarray([1.0, -1.0, 0.5]), jnp.asarray([1, 1, 0])
    np.testing.assert_allclose(eqxproj.losses.equal(y, t), [0.0, 4.0, 0.25])
    np.testing.assert_allclose(jax.grad(lambda y: eqxproj.losses.equal(y, t).sum())(y), 2 * (y - t))
    problem = eqxproj.feasibility_problem(lambda m, t: eqxproj.losses.equal(m * 1.0, t).mean(), y, t)
    assert problem.graph.hard
    moved = eqxproj.solve(problem, eqxproj.AlternatingProjections(), steps=60, tol=1e-6).model
    np.testing.assert_allclose(moved, t, atol=1e-5)


@pytest.mark.slow
def test_a_network_learns_an_exclusive_or():
    """Relaxed reflect-reflect finds weights on spheres that make two neurons and a third compute it."""
    x = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=2)))
    y = -x[:, :1] * x[:, 1:]
    model = [jnp.ones((2, 3)), jnp.ones((1, 3))]

    def outputs(model, x):
        for w in model:
            x = eqxproj.threshold(jnp.concatenate([x, jnp.ones((len(x), 1))], 1) @ w.T, margin=1.0)
        return x

    def loss(model, x, y):
        return jnp.sum(eqxproj.losses.equal(outputs(model, x), y))

    spheres = [(lambda m, i=i: m[i], eqxproj.sets.Sphere(radius=3**0.5, axis=-1)) for i in range(2)]
    problem = eqxproj.feasibility_problem(loss, model, x, y, data="pinned", constraints=spheres)
    solver = eqxproj.RelaxedReflectReflect(0.2, reweight=1e-3)

    @jax.jit
    def solve(keys):
        def one(key):
            return eqxproj.solve(problem, solver, steps=3000, tol=1e-3, start="random", key=key, every=50)

        found = jax.vmap(one)(keys)
        return found.model, found.stats["gap"], found.stats["steps"]

    weights, gaps, steps = solve(jax.random.split(jax.random.key(0), 8))
    solved = np.asarray(steps) < 3000
    assert solved.sum() >= 4
    for i in np.flatnonzero(solved):
        assert np.nanmin(gaps[i]) <= 1e-3
        np.testing.assert_array_equal(outputs([w[i] for w in weights], x), y)
        # Gates: all weights are alike, in size.
        for w in weights:
            np.testing.assert_allclose(np.linalg.norm(w[i], axis=-1), 3**0.5, rtol=1e-5)
            np.testing.assert_allclose(np.abs(w[i]), 1.0, atol=0.01)
