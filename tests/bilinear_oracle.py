"""Bilinear operations and their oracle: minimization over all copies, written out by their definition.

The oracle knows an operation as a list of pairs: output o is the sum over k of a[left[o, k]] * w[right[o, k]], where -1
stands for a zero of padding or dilation. How many copies there are is then a matter of which pairs share a variable.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import eqxproj


def node_of(function, *unknown, copies: Any = "neuron", operation=None) -> Any:
    """The problem of a loss that reads `function(*unknown)`, and its one operation (or the one of this name)."""
    y = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *unknown))

    def loss(model, y):
        return eqxproj.losses.squared_error(function(*model), y).sum()

    problem = eqxproj.feasibility_problem(loss, unknown, y, copies=copies)
    nodes = problem.graph.nodes
    (index,) = [i for i, n in enumerate(nodes) if n.kind == "operation" and operation in (None, n.operation)]
    return problem, index


def projected(rule, ctx, inputs, duals):
    """The duals of the operands, and the outputs, of a rule's projection."""
    outputs = rule.evaluate(ctx, inputs)
    answer = rule.project(ctx, inputs, duals)
    input_duals = eqxproj.rules.as_duals(answer)
    return input_duals, eqxproj.rules.outputs_after(rule, ctx, inputs, outputs, answer)


# ----------------------------------------------------------------------------------------------------------------------
# Operations, and their pairs by definition
# ----------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    function: Callable
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    pairs: Callable[[], tuple[np.ndarray, np.ndarray]]


def dot(shape_a, shape_w, contract, batch):
    def function(a, w):
        return jax.lax.dot_general(a, w, (contract, batch))

    def pairs():
        free = [[d for d in range(len(s)) if d not in (*c, *b)] for s, c, b in zip((shape_a, shape_w), contract, batch)]
        sizes = [shape_a[d] for d in batch[0]] + [shape_a[d] for d in free[0]] + [shape_w[d] for d in free[1]]
        left, right = [], []
        for out in np.ndindex(*sizes):
            b, i, j = np.split(np.asarray(out, int), np.cumsum([len(batch[0]), len(free[0])]))
            terms: list[Any] = []
            for k in np.ndindex(*(shape_a[d] for d in contract[0])):
                at = [np.zeros(len(s), int) for s in (shape_a, shape_w)]
                for side, mine in enumerate((i, j)):
                    at[side][list(batch[side])] = b
                    at[side][list(free[side])] = mine
                    at[side][list(contract[side])] = k
                terms.append((np.ravel_multi_index(at[0], shape_a), np.ravel_multi_index(at[1], shape_w)))
            left.append([t[0] for t in terms])
            right.append([t[1] for t in terms])
        return np.asarray(left), np.asarray(right)

    return Case(function, (shape_a, shape_w), pairs)


def conv(shape_a, shape_w, specs, strides, padding, lhs_dilation=None, rhs_dilation=None, groups=1, batch_groups=1):
    """Letters in `specs` name the dimensions of image, kernel and output; the kernel's digits order the others."""
    rank = len(strides)
    lhs_dilation, rhs_dilation = lhs_dilation or (1,) * rank, rhs_dilation or (1,) * rank

    def function(a, w):
        names = tuple(s.translate(str.maketrans("01", "HW")) for s in specs)
        return jax.lax.conv_general_dilated(
            a, w, strides, padding, lhs_dilation, rhs_dilation, names, groups, batch_groups
        )

    def pairs():
        size = [dict(zip(s, shape)) for s, shape in zip(specs, (shape_a, shape_w))]
        axes = [d for d in specs[1] if d.isdigit()]
        wide = [(size[0][d] - 1) * lhs_dilation[i] + 1 for i, d in enumerate(axes)]
        span = [(size[1][d] - 1) * rhs_dilation[i] + 1 for i, d in enumerate(axes)]
        if padding == "SAME":
            total = [max((-(-n // s) - 1) * s + p - n, 0) for n, s, p in zip(wide, strides, span)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = padding
        outs = [(n + lo + hi - p) // s + 1 for n, (lo, hi), p, s in zip(wide, pads, span, strides)]
        samples, columns, depth = size[0]["N"] // batch_groups, size[1]["O"], size[1]["I"]
        out_size = {"N": samples, "C": columns, **{d: n for d, n in zip(axes, outs)}}
        left, right = [], []
        for out in np.ndindex(*(out_size[d] for d in specs[2])):
            o = dict(zip(specs[2], out))
            group, of_batch = o["C"] // (columns // groups), o["C"] // (columns // batch_groups)
            mine, its = [], []
            for c, *k in np.ndindex(depth, *(size[1][d] for d in axes)):
                place = {"N": o["N"] + of_batch * samples, "C": c + group * depth}
                inside = True
                for i, d in enumerate(axes):
                    x = o[d] * strides[i] + k[i] * rhs_dilation[i] - pads[i][0]
                    inside &= 0 <= x < wide[i] and x % lhs_dilation[i] == 0
                    place[d] = x // lhs_dilation[i]
                kernel = {"O": o["C"], "I": c, **{d: k[i] for i, d in enumerate(axes)}}
                mine.append(np.ravel_multi_index([place[d] for d in specs[0]], shape_a) if inside else -1)
                its.append(np.ravel_multi_index([kernel[d] for d in specs[1]], shape_w))
            left.append(mine)
            right.append(its)
        return np.asarray(left), np.asarray(right)

    return Case(function, (shape_a, shape_w), pairs)


def element(shape):
    index = np.arange(math.prod(shape))[:, None]
    return Case(jnp.multiply, (shape, shape), lambda: (index, index))


CASES = {
    "mul": element((3, 2)),
    "dot": dot((3, 4), (4, 2), ((1,), (0,)), ((), ())),
    "dot of vectors": dot((5,), (5,), ((0,), (0,)), ((), ())),
    "batched dot": dot((2, 2, 3), (2, 3, 2), ((2,), (1,)), ((0,), (0,))),
    "odd dot": dot((2, 2, 3, 2), (2, 2, 2, 3), ((0, 2), (2, 3)), ((1,), (1,))),
    "conv": conv((2, 2, 5), (2, 2, 3), ("NC0", "OI0", "NC0"), (2,), "SAME"),
    "odd conv": conv((3, 1, 4, 2), (2, 2, 2, 2), ("0N1C", "1O0I", "CN10"), (1, 2), ((1, 0), (0, 2)), None, (1, 2)),
    "dilated conv": conv((1, 2, 3), (2, 2, 2), ("NC0", "OI0", "NC0"), (1,), ((1, 1),), (2,), (2,)),
    "grouped conv": conv((2, 4, 3), (4, 2, 2), ("NC0", "OI0", "NC0"), (1,), ((0, 1),), groups=2),
    "batch-grouped conv": conv((2, 2, 3), (4, 2, 2), ("NC0", "OI0", "NC0"), (1,), ((0, 0),), batch_groups=2),
}
UNIT, UNEQUAL, STIFF = (1.0, 1.0, 1.0), (0.2, 5.0, 3.0), (1.0, 30.0, 100.0)


@functools.cache
def pairs_of(name):
    return CASES[name].pairs()


# ----------------------------------------------------------------------------------------------------------------------
# The rule on many instances at once, and the copies that it means
# ----------------------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """A case with `copies`, which operands are unknown, and whether copies are held."""

    name: str
    copies: str = "neuron"
    unknown: tuple[bool, bool] = (True, True)
    store_copies: bool = False


@functools.cache
def node(setup) -> Any:
    case = CASES[setup.name]
    zeros = [jnp.zeros(s) for s in case.shapes]

    def function(*unknown):
        given = iter(unknown)
        return case.function(*(next(given) if u else z for u, z in zip(setup.unknown, zeros)))

    # With `copies="none"`, a problem has a product of patches in place of a convolution: the rule of a convolution, as
    # it stands in loops, is asked apart from one.
    problem, index = node_of(function, *(z for u, z in zip(setup.unknown, zeros) if u))
    ctx = eqxproj.readers.context(problem, index, setup.store_copies)
    return problem.graph.nodes[index].rule, replace(ctx, copies=setup.copies)


def with_known(ctx, operands):
    """The context with other known operands."""

    def function(*inputs):
        given = iter(inputs)
        return ctx.equation.bind(*(next(given) if u else x for u, x in zip(ctx.unknown, operands)))

    known = {v.index: x for v, x, u in zip(ctx.equation.inputs, operands, ctx.unknown) if not u}
    return replace(ctx, known=known, function=function, prepared=None)  # what was prepared is of the old ones


def unknown_of(setup, operands):
    return [x for x, u in zip(operands, setup.unknown) if u]


def copy_counts(setup):
    """Weights of the output's elements that differ by a factor of up to a hundred."""
    shape = node(setup)[1].equation.outputs[0].shape
    return np.random.default_rng(3).permutation(np.geomspace(0.1, 10, math.prod(shape))).reshape(shape)


@functools.cache
def projector(setup, log_weights, log_kappa, varying=False):
    """From (batches of) both operands, the unknown ones as copies where they are held, and duals."""
    rule, ctx = node(setup)
    counts = [jnp.asarray(copy_counts(setup), jnp.float32)] if varying else []
    ctx = ctx.reweighted(unknown_of(setup, log_weights), [log_kappa], counts)

    def project(operands, dual):
        mine = with_known(ctx, operands)
        nus, (out,) = projected(rule, mine, unknown_of(setup, operands), [dual])
        (evaluated,) = rule.evaluate(mine, unknown_of(setup, operands))
        return list(nus), out, evaluated

    return jax.jit(jax.vmap(project))


def project(setup, weights, operands, dual, varying=False):
    """As float64: the duals of both operands (zero for a known one), and the output."""
    logs = tuple(math.log(x) for x in weights)
    operands = [jnp.asarray(x, jnp.float32) for x in operands]
    nus, out, evaluated = projector(setup, logs[:2], logs[2], varying)(operands, jnp.asarray(dual, jnp.float32))
    given = iter(nus)
    full = [np.asarray(next(given), float) if u else np.zeros(x.shape) for u, x in zip(setup.unknown, operands)]
    return full, np.asarray(out, float), np.asarray(evaluated, float)


def expand(setup, operand, value):
    """The copies of either operand, whether it is known or not: they are laid out alike."""
    rule, ctx = node(setup._replace(unknown=(True, True)))
    return rule.expand(ctx, operand, value)


@functools.cache
def slots(setup):
    """For each operand the variable that stands at each place of a pair, and the element that each variable copies.

    Held copies are laid out by the rule. Otherwise, by the definition of `copies`: places of pairs are variables of
    their own where the operand is copied, elements are where it is shared. The last variable is a zero, held in place.
    """
    left, right = pairs_of(setup.name)
    count = [math.prod(s) for s in CASES[setup.name].shapes]
    rule, ctx = node(setup._replace(unknown=(True, True)))
    found = []
    for side, pairs in enumerate((left, right)):
        if setup.store_copies:
            elements = jnp.arange(1.0, 1 + count[side]).reshape(CASES[setup.name].shapes[side])
            laid = np.asarray(expand(setup, side, elements)).astype(int) - 1
            # Every product reads its copies in order: with ones for the others, it is the number of the one at k.
            ids, terms = np.arange(float(laid.size)).reshape(laid.shape), np.eye(laid.shape[-1])
            products = [rule.evaluate(ctx, [jnp.float32(ids * term), jnp.ones(laid.shape)])[0] for term in terms]
            found.append((np.stack([np.ravel(x) for x in products], -1).astype(int), laid.ravel()))
        elif setup.copies == "neuron":
            found.append((np.arange(pairs.size).reshape(pairs.shape), pairs.ravel()))
        else:
            found.append((np.where(pairs < 0, count[side], pairs), np.arange(count[side])))
    return found


class Written:
    """The problem of one instance in float64: the operands' variables, where they start, and the wanted output."""

    def __init__(self, setup, weights, starts, dual):
        (self.left, _), (self.right, _) = slots(setup)
        self.weights, self.kappa = weights[:2], weights[2]
        self.starts = [np.append(np.ravel(x), 0.0) for x in starts]
        self.free = [np.full(len(x), u) for x, u in zip(self.starts, setup.unknown)]
        for free in self.free:
            free[-1] = False
        self.p0 = self.function(*self.starts)
        self.residual = np.ravel(dual) / self.kappa

    def function(self, a, w):
        return (a[self.left] * w[self.right]).sum(-1)

    def moved(self, displacements):
        return [s + np.append(np.ravel(d), 0.0) for s, d in zip(self.starts, displacements)]

    def terms(self, a, w):
        """The cost of each variable of either operand, and of each output."""
        moved = [c * (x - s) ** 2 for c, x, s in zip(self.weights, (a, w), self.starts)]
        return *moved, self.kappa * (self.function(a, w) - self.p0 - self.residual) ** 2

    def cost(self, a, w):
        return float(sum(t.sum() for t in self.terms(a, w)))

    def stay(self):
        return float(np.sum(self.kappa * self.residual**2))

    def minimum(self, seeds=2, spread=1.0):
        """The least cost found from several starts, and the point."""
        cuts = np.cumsum([f.sum() for f in self.free])
        size = 1 + max(np.abs(x).max() for x in self.starts) + np.sqrt(np.abs(self.residual).max())

        def unpack(v):
            points = []
            for start, free, part in zip(self.starts, self.free, np.split(v, cuts)[:2]):
                points.append(start.copy())
                points[-1][free] = part
            return points

        def fun(v):
            a, w = unpack(v)
            gap = self.kappa * (self.function(a, w) - self.p0 - self.residual)
            da, dw = (2 * c * (x - s) for c, x, s in zip(self.weights, (a, w), self.starts))
            pull = 2 * gap[:, None]
            da = da + np.bincount(self.left.ravel(), (pull * w[self.right]).ravel(), len(a))
            dw = dw + np.bincount(self.right.ravel(), (pull * a[self.left]).ravel(), len(w))
            return self.cost(a, w), np.concatenate([da[self.free[0]], dw[self.free[1]]])

        rng = np.random.default_rng(0)
        start = np.concatenate([x[f] for x, f in zip(self.starts, self.free)])
        found = []
        for seed in range(seeds):
            v = start + (seed > 0) * spread * size * rng.normal(size=start.shape)
            best = scipy.optimize.minimize(
                fun,
                v,
                jac=True,
                method="L-BFGS-B",
                options=dict(maxiter=400, maxfun=500, ftol=1e-15, gtol=1e-9 * size),
            )
            found.append((best.fun, unpack(best.x)))
        return min(found, key=lambda pair: pair[0])


def sums(setup, operand, displacements):
    """The displacements of all variables that copy an element, added up."""
    elements = slots(setup)[operand][1]
    count = math.prod(CASES[setup.name].shapes[operand])
    kept = elements >= 0
    return np.bincount(elements[kept], np.ravel(displacements)[kept], count)


def instances(setup, residuals, weights, seed=0) -> Any:
    """Operands of size one, wanted changes of the output of the sizes `residuals`, and the problems in float64.

    Copies that are held start apart from one another.
    """
    rng = np.random.default_rng(seed)
    n = len(residuals)
    operands = [rng.normal(size=(n, *s)).astype(np.float32) for s in CASES[setup.name].shapes]
    shape = jax.eval_shape(CASES[setup.name].function, *(x[0] for x in operands)).shape
    dual = (weights[2] * np.reshape(residuals, (n,) + (1,) * len(shape)) * rng.normal(size=(n, *shape))).astype(
        np.float32
    )
    starts = [np.stack([np.append(x, 0)[ids] for x in y.reshape(n, -1)]) for y, (_, ids) in zip(operands, slots(setup))]
    if setup.store_copies:
        for side, unknown in enumerate(setup.unknown):
            if unknown:
                held = np.asarray(jax.vmap(lambda x: expand(setup, side, x))(operands[side]))  # noqa: B023
                operands[side] = held + 0.3 * rng.normal(size=held.shape).astype(np.float32)
                starts[side] = operands[side].reshape(n, -1)
    problems = [Written(setup, weights, [s[i].astype(float) for s in starts], dual[i].astype(float)) for i in range(n)]
    return operands, dual, problems
