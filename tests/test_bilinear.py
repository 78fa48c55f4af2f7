"""The projection onto bilinear operations, against minimization over all copies written out by their definition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bilinear_oracle import (
    CASES,
    STIFF,
    UNEQUAL,
    UNIT,
    Setup,
    Written,
    copy_counts,
    expand,
    instances,
    node,
    pairs_of,
    project,
    projector,
    slots,
    sums,
    unknown_of,
    with_known,
)

pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_knows_the_operation(name):
    case, (left, right) = CASES[name], pairs_of(name)
    rng = np.random.default_rng(0)
    a, w = (rng.normal(size=s) for s in case.shapes)
    want = (np.append(a.ravel(), 0)[left] * w.ravel()[right]).sum(1)
    np.testing.assert_allclose(np.ravel(case.function(jnp.float32(a), jnp.float32(w))), want, rtol=1e-4, atol=1e-5)


HOLDING = [name for name in CASES if name not in ("mul", "batch-grouped conv")]
KNOWN = [(True, True), (True, False), (False, True)]
STORED = [Setup(name, "neuron", unknown, store_copies=True) for name in HOLDING for unknown in KNOWN]


def id_of(x):
    if not isinstance(x, Setup):
        return None
    known = {(True, True): "", (True, False): ", second known", (False, True): ", first known"}[x.unknown]
    return f"{x.name}, {x.copies}{known}{', stored' if x.store_copies else ''}"


@pytest.mark.parametrize("name", HOLDING)
def test_copies_are_laid_out_as_defined(name):
    setup = Setup(name, store_copies=True)
    (left, of_left), (right, of_right) = slots(setup)
    a, w = pairs_of(name)
    for o in range(len(a)):
        assert sorted(zip(of_left[left[o]], of_right[right[o]])) == sorted(zip(a[o], w[o]))
    copied = np.concatenate([left, left.max() + 1 + right], 1)
    assert len(np.unique(copied)) == copied.size
    # The number of copies of each element is the same counted here and by the rule.
    rule, ctx = node(setup)
    for side, elements in enumerate((of_left, of_right)):
        shape = CASES[name].shapes[side]
        counted = np.bincount(elements[elements >= 0], minlength=math.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(
            np.broadcast_to(rule.copy_counts(ctx.equation, ctx.unknown, side, "neuron"), shape), counted
        )


def displacements(setup, weights, nus, i):
    """Of every variable of the instance, where each element is its own variable or every copy is held."""
    found = []
    for side, (nu, weight) in enumerate(zip(nus, weights)):
        size = len(slots(setup)[side][1])
        found.append(nu[i].ravel() / weight if setup.unknown[side] else np.zeros(size))
    return found


def assert_settled(setup, weights, operands, nus, out):
    """Nothing moves for a zero dual: neither where the operands were nor where they have gone."""
    for side, (nu, weight) in enumerate(zip(nus, weights)):
        if setup.unknown[side] and nu.shape == operands[side].shape:
            operands = [*operands[:side], operands[side] + nu / weight, *operands[side + 1 :]]
    again, same, evaluated = project(setup, weights, operands, np.zeros_like(out))
    assert not any(nu.any() for nu in again)
    np.testing.assert_allclose(same, evaluated, rtol=1e-5, atol=1e-5)


SMALL, MODERATE, LARGE = [0.03, 0.3], [1.0], [5.0]


@pytest.mark.parametrize("setup", STORED, ids=id_of)
def test_held_copies_are_the_nearest(setup):
    weights = STIFF if setup.name == "dot" else UNEQUAL
    operands, dual, problems = instances(setup, SMALL + MODERATE + LARGE, weights)
    nus, out, _ = project(setup, weights, operands, dual)
    rng = np.random.default_rng(1)
    for i, problem in enumerate(problems):
        moved = displacements(setup, weights, nus, i)
        point = problem.moved(moved)
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-4, atol=1e-5)
        cost = problem.cost(*point)
        assert cost <= problem.stay() * (1 + 1e-5)
        assert cost <= problem.minimum()[0] * (1 + 1e-3)
        for size in (1e-4, 1e-2, 0.1, 1.0):
            near = [m + size * u * rng.normal(size=m.shape) for m, u in zip(moved, setup.unknown)]
            assert cost <= problem.cost(*problem.moved(near)) * (1 + 1e-3)
    assert_settled(setup, weights, operands, nus, out)


@pytest.mark.slow
@pytest.mark.parametrize("setup", STORED, ids=id_of)
def test_equal_copies_need_not_be_held(setup):
    lean = setup._replace(store_copies=False)
    operands, dual, _ = instances(lean, SMALL + MODERATE + LARGE, UNIT)
    held = [
        np.asarray(jax.vmap(lambda x: expand(setup, side, x))(x)) if u else x  # noqa: B023
        for side, (x, u) in enumerate(zip(operands, setup.unknown))
    ]
    (lean_nus, lean_out, _), (nus, out, _) = project(lean, UNIT, operands, dual), project(setup, UNIT, held, dual)
    np.testing.assert_allclose(lean_out, out, rtol=1e-5, atol=1e-5)
    for side, (lean_nu, nu) in enumerate(zip(lean_nus, nus)):
        if setup.unknown[side]:
            total = np.stack([sums(setup, side, x) for x in nu]).reshape(lean_nu.shape)
            np.testing.assert_allclose(lean_nu, total, rtol=1e-5, atol=1e-5 * np.abs(total).max())
    assert_settled(lean, UNIT, operands, lean_nus, lean_out)


SHARED = [Setup("mul")]
SHARED += [Setup(name, "none") for name in ("dot", "batched dot", "conv", "grouped conv")]
SHARED += [Setup("odd dot", "none", (True, False)), Setup("conv", "none", (False, True))]
SHARED += [Setup("dot", "none", (False, True)), Setup("batched dot", "none", (True, False))]
SHARED += [Setup("batched dot", "none", (False, True))]
SHARED += [Setup("batch-grouped conv"), Setup("batch-grouped conv", "neuron", (True, False))]


@pytest.mark.parametrize("setup", SHARED, ids=id_of)
def test_shared_operands_are_the_nearest(setup):
    weights = UNIT if "odd" in setup.name or "batch" in setup.name else UNEQUAL
    operands, dual, problems = instances(setup, SMALL + MODERATE + LARGE, weights)
    nus, out, _ = project(setup, weights, operands, dual)
    both = all(setup.unknown)
    for i, problem in enumerate(problems):
        moved = displacements(setup, weights, nus, i)
        if setup.copies == "neuron" and setup.name != "mul":
            # The copies are not returned, only the sums of their displacements.
            point = problem.minimum()[1]
            for side in range(2):
                want = sums(setup, side, (point[side] - problem.starts[side])[:-1])
                if setup.unknown[side]:
                    np.testing.assert_allclose(
                        nus[side][i].ravel() / weights[side], want, atol=1e-3 * np.abs(want).max()
                    )
            np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-3, atol=1e-4)
            continue
        point = problem.moved(moved)
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-3, atol=1e-4)
        cost = problem.cost(*point)
        assert cost <= problem.stay() * (1 + 1e-5)
        # Where products share operands that move both, the set is no stack of small ones: a local minimum is found.
        if not both or setup.name == "mul" or i < len(SMALL):
            assert cost <= problem.minimum()[0] * (1 + 2e-3)
    assert_settled(setup, weights, operands, nus, out)


VARYING = [Setup("dot", store_copies=True), Setup("dot", "neuron", (True, False), store_copies=True)]
VARYING += [Setup("odd dot", store_copies=True), Setup("dot", "none"), Setup("mul")]


@pytest.mark.parametrize("setup", VARYING, ids=id_of)
def test_weights_may_vary_over_the_output(setup):
    """As they do where a value's consumers show only parts of it."""
    operands, dual, problems = instances(setup, SMALL + MODERATE, UNIT)
    counts = copy_counts(setup)
    nus, out, _ = project(setup, UNIT, operands, dual * counts, varying=True)
    for i, problem in enumerate(problems):
        problem.kappa = counts.ravel()
        point = problem.moved(displacements(setup, UNIT, nus, i))
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-3, atol=1e-3)
        assert problem.cost(*point) <= problem.minimum()[0] * (1 + 2e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Scales, degenerate operands, and the limit
# ----------------------------------------------------------------------------------------------------------------------

WILD = [Setup("mul"), Setup("dot"), Setup("dot", store_copies=True), Setup("dot", "none")]
WILD += [Setup("dot", "none", (False, True)), Setup("conv"), Setup("dot", "neuron", (True, False))]


@pytest.mark.parametrize("setup", WILD, ids=id_of)
def test_always_finite(setup):
    rng = np.random.default_rng(0)
    scales = [0.0, 1e-6, 1.0, 1e6]
    sizes = np.asarray(list(itertools.product(scales, scales, [0.0, 1e-6, 1.0, 1e6])))
    operands, dual, _ = instances(setup, np.ones(len(sizes)), UNIT)
    for kind in ("random", "constant", "opposite"):
        made = [
            x if kind == "random" else (-1.0 if side and kind == "opposite" else 1.0) * np.ones(x.shape)
            for side, x in enumerate(operands)
        ]
        made = [x * s.reshape((-1,) + (1,) * (x.ndim - 1)) for x, s in zip((*made, dual), sizes.T)]
        signs = rng.choice([-1.0, 1.0], dual.shape) if kind == "random" else 1.0
        nus, out, _ = project(setup, UNIT, made[:2], made[2] * signs)
        assert all(np.isfinite(x).all() for x in (*nus, out))


@pytest.mark.parametrize("weights", [UNIT, UNEQUAL])
@pytest.mark.parametrize("setup", [Setup("mul"), Setup("dot of vectors", store_copies=True)], ids=id_of)
def test_equal_and_opposite_operands_part(setup, weights):
    r"""Where $a = \mp w$ in the metric the minimizers are many. Near to it, they are nearly so."""
    tilts = [0.0, 1e-6, 1e-3, 1e-2]
    cases = list(itertools.product([1.0, -1.0], [30.0, -3.0], tilts))
    operands, dual, _ = instances(setup, np.ones(len(cases)), weights)
    a, noise = operands
    sign, residual, tilt = (np.reshape(x, (-1,) + (1,) * (a.ndim - 1)) for x in np.transpose(cases))
    w = (sign * np.sqrt(weights[0] / weights[1]) * a * (1 + tilt * noise)).astype(np.float32)
    dual = (weights[2] * residual.reshape((-1,) + (1,) * (dual.ndim - 1)) * np.ones(dual.shape)).astype(np.float32)
    a[-1], w[-1] = 0.0, 0.0
    nus, out, _ = project(setup, weights, (a, w), dual)
    for i in range(len(cases)):
        problem = Written(setup, weights, [x[i].ravel().astype(float) for x in (a, w)], dual[i].astype(float))
        point = problem.moved(displacements(setup, weights, nus, i))
        # Where they are nearly equal, the output of the moved operands magnifies their rounding.
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-2, atol=3e-2)
        assert problem.cost(*point) <= problem.minimum()[0] * (1 + 2e-3)


LIMIT = [Setup(name) for name in CASES] + [Setup(name, store_copies=True) for name in ("conv", "odd dot")]
LIMIT += [Setup("dot", "none"), Setup("conv", "none")]
LIMIT += [Setup("conv", "neuron", (False, True)), Setup("dot", "neuron", (True, False))]
LIMIT = [(s, 400.0 if i % 2 else 0.0) for i, s in enumerate(LIMIT)]
LIMIT += [(Setup("dot"), 400.0), (Setup("dot", "none"), 0.0), (Setup("mul"), 400.0)]


@pytest.mark.parametrize(("setup", "log_kappa"), LIMIT, ids=id_of)
def test_a_steep_metric_gives_the_vjp(setup, log_kappa):
    """Also where the weights are beyond float32 and only their ratios are known."""
    operands, dual, ins = of_equal_copies(setup)
    logs = [log_kappa + x * math.log(10) for x in (6, 12)]
    nus, _, _ = projector(setup, tuple(logs), log_kappa)([jnp.asarray(x) for x in ins], jnp.asarray(dual))
    assert_vjp(setup, operands, dual, nus, 1e-4)


@pytest.mark.parametrize("setup", [s for s, _ in LIMIT[:-3]], ids=id_of)
def test_the_pullback_is_the_vjp_whatever_the_weights(setup):
    operands, dual, ins = of_equal_copies(setup)
    rule, ctx = node(setup)
    found = []
    for logs in ((0.0, 0.0), (3.0, -2.0), (400.0, 1e4)):
        weighed = ctx.reweighted(unknown_of(setup, logs), [1.0])

        def pull(x, mu, weighed=weighed):
            return rule.pullback(with_known(weighed, x), unknown_of(setup, x), [mu])

        found.append(jax.jit(jax.vmap(pull))([jnp.asarray(x) for x in ins], jnp.asarray(dual)))
    assert_vjp(setup, operands, dual, found[0], 1e-6)
    for others in zip(*found, strict=True):
        assert all(np.array_equal(others[0], x) for x in others)


def of_equal_copies(setup):
    """Operands, duals of very different sizes, and the operands' copies where they are held."""
    operands, dual, _ = instances(setup._replace(store_copies=False), [1e-12, 1e-3, 1.0], UNIT)
    if not setup.store_copies:
        return operands, dual, operands
    held = [np.asarray(jax.vmap(lambda x: expand(setup, side, x))(x)) for side, x in enumerate(operands)]  # noqa: B023
    return operands, dual, held


def assert_vjp(setup, operands, dual, nus, tolerance):
    function = CASES[setup.name].function
    for i in range(len(dual)):
        want = jax.vjp(function, *(x[i] for x in map(jnp.asarray, operands)))[1](jnp.asarray(dual[i]))
        for nu, side in zip(nus, [s for s in range(2) if setup.unknown[s]], strict=True):
            got = np.asarray(nu[i], float)
            got = sums(setup, side, got) if setup.store_copies else got.ravel()
            true = np.asarray(want[side], float).ravel()
            assert np.linalg.norm(got - true) <= tolerance * np.linalg.norm(true)


# ----------------------------------------------------------------------------------------------------------------------
# The formulas
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", [UNIT, UNEQUAL])
@pytest.mark.parametrize(
    ("name", "unknown"), [("mul", KNOWN[0]), *itertools.product([n for n in CASES if n != "mul"], KNOWN)]
)
def test_duals_are_sums_over_the_pairs_of_each_output(name, unknown, weights):
    r"""The cheaper ways to sums over copies agree with their definition, $d_i = (\lambda w + t^2 \alpha a)/(1 - t^2)$.

    The zeros of padding count: they are variables as well.
    """
    setup, (left, right), (alpha, omega, kappa) = Setup(name, "neuron", unknown), pairs_of(name), weights
    operands, dual, _ = instances(setup, SMALL + MODERATE, weights)
    nus, out, _ = project(setup, weights, operands, dual)
    for i in range(len(dual)):
        a, w = (np.append(x[i], 0.0)[pairs].astype(float) for x, pairs in zip(operands, (left, right)))
        wanted = (a * w).sum(1) + dual[i].ravel().astype(float) / kappa

        def moves(multiplier, a=a, w=w):
            m, t2 = multiplier[:, None], multiplier[:, None] ** 2 / (alpha * omega) if all(unknown) else 0.0
            moved = [(m * w + t2 * alpha * a) / (1 - t2), (m * a + t2 * omega * w) / (1 - t2)]
            moved = [nu * u for nu, u in zip(moved, unknown)]
            return moved, ((a + moved[0] / alpha) * (w + moved[1] / omega)).sum(1)

        # The multiplier is kappa times what is still wanted: a root in double precision, by bisection.
        size = np.sqrt(alpha * omega) if all(unknown) else np.abs(dual[i]).max()
        low, high = np.full(wanted.shape, -size), np.full(wanted.shape, size)
        for _ in range(100):
            middle = (low + high) / 2
            is_low = middle < kappa * (wanted - moves(middle)[1])
            low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
        moved, reached = moves((low + high) / 2)
        np.testing.assert_allclose(reached, out[i].ravel(), rtol=1e-4, atol=1e-4)
        for side, nu in enumerate(moved):
            total = sums(setup, side, nu).reshape(nus[side][i].shape)
            np.testing.assert_allclose(nus[side][i], total, rtol=1e-4, atol=1e-5 * np.abs(total).max())


def test_batch_groups_hold_no_copies():
    setup = Setup("batch-grouped conv", store_copies=True)
    rule, ctx = node(setup)
    with pytest.raises(ValueError, match='`batch_group_count` above 1 has no materialized copies. Use copies="none"'):
        rule.expand(ctx, 0, jnp.zeros(CASES[setup.name].shapes[0]))
