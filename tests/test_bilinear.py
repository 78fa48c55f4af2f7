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
    expand,
    instances,
    node,
    pairs_of,
    project,
    projector,
    shares,
    slots,
    sums,
)

from eqxproj.rules._bilinear_forms import BilinearForm


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_knows_the_operation(name):
    case, (left, right) = CASES[name], pairs_of(name)
    rng = np.random.default_rng(0)
    a, w = (rng.normal(size=s) for s in case.shapes)
    want = (np.append(a.ravel(), 0)[left] * w.ravel()[right]).sum(1)
    np.testing.assert_allclose(np.ravel(case.function(jnp.float32(a), jnp.float32(w))), want, rtol=1e-4, atol=1e-5)


def setups(memory):
    """Every operation with every way to know its operands, copies changing along."""
    for name in CASES:
        if memory and name in ("mul", "batch-grouped conv"):
            continue
        for copies in ("neuron", "sample"):
            yield Setup(name, copies, memory=memory)
    for i, name in enumerate(CASES):
        if name == "mul" or (memory and name == "batch-grouped conv"):
            continue
        for unknown in ((True, False), (False, True)):
            copies = ("neuron", "sample")[(i + unknown[0]) % 2]
            yield Setup(name, copies, unknown, weight_like=(not unknown[0], unknown[1] and i % 3 > 0), memory=memory)
    yield Setup("odd dot", "sample", weight_like=(True, False), memory=memory)


def id_of(x):
    if not isinstance(x, Setup):
        return None
    known = {(True, True): "", (True, False): ", second known", (False, True): ", first known"}[x.unknown]
    return f"{x.name}, {x.copies}{known}{', swapped' if x.weight_like == (True, False) else ''}"


@pytest.mark.parametrize("copies", ["neuron", "sample"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("mul", "batch-grouped conv")])
def test_copies_are_laid_out_as_defined(name, copies):
    setup = Setup(name, copies, memory=True)
    (left, of_left), (right, of_right) = slots(setup)
    a, w = pairs_of(name)
    for o in range(len(a)):
        assert sorted(zip(of_left[left[o]], of_right[right[o]])) == sorted(zip(a[o], w[o]))
    copied, shared = (right, left) if copies == "sample" else (np.concatenate([left, left.max() + 1 + right], 1), None)
    assert len(np.unique(copied)) == copied.size
    assert shared is None or np.array_equal(np.unique(shared), np.arange(len(of_left)))
    # The number of copies of each element is the same counted here and by the rule.
    rule, ctx = node(setup)
    for side, elements in enumerate((of_left, of_right)):
        shape = CASES[name].shapes[side]
        counted = np.bincount(elements[elements >= 0], minlength=math.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(np.broadcast_to(rule.count(ctx, side, jnp.zeros(shape)), shape), counted)


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


@pytest.mark.parametrize("setup", list(setups(memory=True)), ids=id_of)
def test_held_copies_are_the_nearest(setup):
    weights = STIFF if setup.name == "dot" else UNEQUAL if setup.copies == "neuron" else UNIT
    operands, dual, problems = instances(setup, SMALL + MODERATE + LARGE, weights)
    nus, out, _ = project(setup, weights, operands, dual)
    rng = np.random.default_rng(1)
    for i, problem in enumerate(problems):
        moved = displacements(setup, weights, nus, i)
        point = problem.moved(moved)
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-4, atol=1e-5)
        cost = problem.cost(*point)
        assert cost <= problem.stay() * (1 + 1e-5)
        # The products of a row share an operand under "sample": a large step may end in a local minimum there.
        if setup.copies == "neuron" or not all(setup.unknown) or i < len(SMALL):
            assert cost <= problem.minimum()[0] * (1 + 1e-3)
            for size in (1e-4, 1e-2, 0.1, 1.0):
                near = [m + size * u * rng.normal(size=m.shape) for m, u in zip(moved, setup.unknown)]
                assert cost <= problem.cost(*problem.moved(near)) * (1 + 1e-3)
    assert_settled(setup, weights, operands, nus, out)


@pytest.mark.parametrize(
    "setup", [s for s in setups(memory=True) if s.copies == "neuron" or "conv" not in s.name], ids=id_of
)
def test_equal_copies_need_not_be_held(setup):
    lean = setup._replace(memory=False)
    operands, dual, _ = instances(lean, SMALL + MODERATE + LARGE, UNIT)
    held = [
        np.asarray(jax.vmap(lambda x: expand(setup, side, x))(x)) if u else x  # noqa: B023
        for side, (x, u) in enumerate(zip(operands, setup.unknown))
    ]
    (lean_nus, lean_out, _), (nus, out, _) = project(lean, UNIT, operands, dual), project(setup, UNIT, held, dual)
    accuracy = 1e-5 if setup.copies == "neuron" else 1e-3  # conjugate gradients stop at a residual of 1e-5
    np.testing.assert_allclose(lean_out, out, rtol=accuracy, atol=accuracy)
    for side, (lean_nu, nu) in enumerate(zip(lean_nus, nus)):
        if setup.unknown[side]:
            total = np.stack([sums(setup, side, x) for x in nu]).reshape(lean_nu.shape)
            np.testing.assert_allclose(lean_nu, total, rtol=accuracy, atol=accuracy * np.abs(total).max())
    assert_settled(lean, UNIT, operands, lean_nus, lean_out)


SHARED = [Setup("mul")]
SHARED += [Setup(name, "none") for name in ("dot", "batched dot", "conv", "grouped conv")]
SHARED += [Setup("odd dot", "none", (True, False)), Setup("conv", "none", (False, True))]
SHARED += [Setup("dot", "none", (False, True)), Setup("batched dot", "none", (True, False))]
SHARED += [Setup("batched dot", "none", (False, True))]
SHARED += [Setup(name, "sample") for name in CASES if "conv" in name] + [
    Setup("conv", "sample", (True, False), (False, False))
]
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
        if setup.copies == "sample" and both:
            moved[1] = best_copies(problem, moved[0])
            total = sums(setup, 1, moved[1])
            np.testing.assert_allclose(nus[1][i].ravel() / weights[1], total, atol=1e-3 * np.abs(total).max())
        point = problem.moved(moved)
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-3, atol=1e-4)
        cost = problem.cost(*point)
        assert cost <= problem.stay() * (1 + 1e-5)
        # Where products share operands that move both, the set is no stack of small ones: a local minimum is found.
        if not both or setup.name == "mul" or i < len(SMALL):
            assert cost <= problem.minimum()[0] * (1 + 2e-3)
    assert_settled(setup, weights, operands, nus, out)


VARYING = [Setup("dot", "sample", memory=True), Setup("dot", "sample", (True, False), (False, False))]
VARYING += [Setup("odd dot", memory=True), Setup("dot", "none"), Setup("conv", "sample"), Setup("mul")]


@pytest.mark.parametrize("setup", VARYING, ids=id_of)
def test_weights_may_vary_over_the_output(setup):
    """As they do where a value's consumers show only parts of it."""
    operands, dual, problems = instances(setup, SMALL + MODERATE, UNIT)
    share = shares(setup)
    nus, out, _ = project(setup, UNIT, operands, dual * share, varying=True)
    for i, problem in enumerate(problems):
        problem.kappa = share.ravel()
        moved = displacements(setup, UNIT, nus, i)
        if setup.name == "conv":
            moved[1] = best_copies(problem, moved[0])
        point = problem.moved(moved)
        np.testing.assert_allclose(problem.function(*point), out[i].ravel(), rtol=1e-3, atol=1e-3)
        assert problem.cost(*point) <= problem.minimum()[0] * (1 + 2e-3)


def best_copies(problem, moved):
    """Displacements of the second operand's copies, one for every product, that are best for those of the first."""
    a = problem.starts[0] + np.append(moved, 0.0)
    w = problem.starts[1]
    gap = problem.p0 + problem.residual - problem.function(a, w)
    multiplier = gap / (1 / problem.kappa + np.sum(a[problem.left] ** 2, -1) / problem.weights[1])
    found = np.zeros(len(w))
    found[problem.right] = multiplier[:, None] * a[problem.left] / problem.weights[1]
    return found[:-1]


# ----------------------------------------------------------------------------------------------------------------------
# Scales, degenerate operands, and the limit
# ----------------------------------------------------------------------------------------------------------------------

WILD = [Setup("mul"), Setup("dot"), Setup("dot", memory=True), Setup("dot", "sample"), Setup("dot", "none")]
WILD += [
    Setup("dot", "none", (False, True)),
    Setup("conv"),
    Setup("conv", "sample"),
    Setup("dot", "sample", (True, False), (False, True)),
]


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
@pytest.mark.parametrize("setup", [Setup("mul"), Setup("dot of vectors", memory=True)], ids=id_of)
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


LIMIT = [Setup(name) for name in CASES] + [Setup("conv", memory=True), Setup("odd dot", memory=True)]
LIMIT += [Setup(name, "sample") for name in ("dot", "odd dot", "conv", "grouped conv")]
LIMIT += [Setup("dot", "none"), Setup("conv", "none"), Setup("dot", "sample", (True, False), (False, True))]
LIMIT += [Setup("conv", "neuron", (False, True)), Setup("dot", "neuron", (True, False))]
LIMIT = [(s, 400.0 if i % 2 else 0.0) for i, s in enumerate(LIMIT)]
LIMIT += [(Setup("dot"), 400.0), (Setup("dot", "sample"), 400.0), (Setup("dot", "none"), 0.0), (Setup("mul"), 400.0)]


@pytest.mark.parametrize(("setup", "log_kappa"), LIMIT, ids=id_of)
def test_a_steep_metric_gives_the_vjp(setup, log_kappa):
    """Also where the weights are beyond float32 and only their ratios are known."""
    operands, dual, _ = instances(setup._replace(memory=False), [1e-12, 1e-3, 1.0], UNIT)
    logs = [log_kappa + x * math.log(10) for x in (6, 12)]
    ins = operands
    if setup.memory:
        ins = [np.asarray(jax.vmap(lambda x: expand(setup, side, x))(x)) for side, x in enumerate(operands)]  # noqa: B023
    nus, _, _ = projector(setup, tuple(logs), log_kappa)([jnp.asarray(x) for x in ins], jnp.asarray(dual))
    function = CASES[setup.name].function
    for i in range(len(dual)):
        want = jax.vjp(function, *(x[i] for x in map(jnp.asarray, operands)))[1](jnp.asarray(dual[i]))
        for nu, side in zip(nus, [s for s in range(2) if setup.unknown[s]]):
            got = np.asarray(nu[i], float)
            got = sums(setup, side, got) if setup.memory else got.ravel()
            true = np.asarray(want[side], float).ravel()
            assert np.linalg.norm(got - true) <= 1e-4 * np.linalg.norm(true)


# ----------------------------------------------------------------------------------------------------------------------
# The special forms
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_forms_agree_with_their_definition(name):
    r"""Products with ones, over the pairs of each output. The zeros of padding count: they are variables as well."""
    setup = Setup(name, "neuron")
    left, right = pairs_of(name)
    if name == "batch-grouped conv":
        assert (left >= 0).all()
    rng = np.random.default_rng(0)
    a, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in CASES[name].shapes)
    rule, ctx = node(setup)
    form = rule._operands(ctx, [a, w])[0]
    g = jnp.asarray(rng.normal(size=jax.eval_shape(form.f, a, w).shape), jnp.float32)
    flat = np.broadcast_to(g.ravel()[:, None], left.shape)

    def gather(x, pairs):
        return np.append(x.ravel(), 0)[pairs].sum(1).reshape(g.shape)

    def scatter(values, pairs, shape):
        values = np.asarray(values)
        return np.bincount(pairs[pairs >= 0], values[pairs >= 0], math.prod(shape)).reshape(shape)

    table = [
        (form.f(a, w), (np.append(a, 0)[left] * w.ravel()[right]).sum(1).reshape(g.shape)),
        (form.sum_a(a), gather(a, left)),
        (form.sum_w(w), gather(w, right)),
        (form.spread_a(g), scatter(flat, left, a.shape)),
        (form.spread_w(g), scatter(flat, right, w.shape)),
        (form.back_a(g, w), scatter(flat * w.ravel()[right], left, a.shape)),
        (form.back_w(a, g), scatter(flat * np.append(a, 0)[left], right, w.shape)),
    ]
    for got, want in table:
        np.testing.assert_allclose(np.broadcast_to(got, want.shape), want, rtol=1e-5, atol=1e-5)
    # The base class does the same through the function alone, except that it sees no zeros of padding in `w`.
    base = BilinearForm(form.f, a, w)
    np.testing.assert_allclose(np.broadcast_to(form.sum_a(a), g.shape), base.sum_a(a), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.broadcast_to(form.spread_a(g), a.shape), base.spread_a(g), rtol=1e-5, atol=1e-5)
    if (left >= 0).all():
        np.testing.assert_allclose(np.broadcast_to(form.sum_w(w), g.shape), base.sum_w(w), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.broadcast_to(form.spread_w(g), w.shape), base.spread_w(g), rtol=1e-5, atol=1e-5)


def test_batch_groups_hold_no_copies():
    setup = Setup("batch-grouped conv", memory=True)
    rule, ctx = node(setup)
    with pytest.raises(ValueError, match='`batch_group_count` above 1 has no materialized copies. Use copies="none"'):
        rule.expand(ctx, 0, jnp.zeros(CASES[setup.name].shapes[0]))
