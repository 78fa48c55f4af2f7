r"""The local solver: the projection onto the graph of any differentiable operation.

A few damped Gauss-Newton steps in duals. With $J$ the Jacobian at the present operands $x_0 + d$,
$d_i = J_i^T\lambda/w_i$, the multiplier of the linearized constraint solves

$$\Big(I + \sum_i \tfrac{\kappa}{w_i} J_i J_i^T\Big)\lambda = \mu - \kappa\,(f(x_0+d) - f(x_0) - J d)$$

by conjugate gradients that start from the multiplier before, preconditioned where the caller knows how. $J$ and $J^T$
are the jvp and vjp *of this one node*, never of the model. A step that does not lower the cost is halved. The steps end
where the right side stays as it was, for an affine operation at once.

Limits: one damping factor a node, and the minimum found is a local one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._numerics._conjugate_gradients import conjugate_gradients
from .._numerics._newton import descend
from .._program._calls import is_transposable
from .._program._equations import Equation, Program
from .._program._fragment import Fragment
from .._program._primitives import ELEMENTWISE, FLAT, REDUCTIONS, VIEWS
from ._base import AbstractRule, Context, Scale, step, transposed

_OUTER, _HALVINGS, _SMALL = 12, 5, 1e-3
Preconditioner: TypeAlias = Callable[[Sequence[Array]], Callable[[list[Array]], list[Array]]]
"""From the operands of a node to an approximate inverse of the left side above, which is linear and symmetric."""

_LINEAR = 0.1
"""What may be left of the linearized equations, as a part of what the context allows for the others."""


def is_differentiable(fragment: Fragment, program: Program) -> bool:
    """Whether the fragment has a jvp and a vjp, with floats on both sides."""
    if not all(v.is_float for v in (*fragment.operands, *fragment.outputs)):
        return False
    known = {i: v for i, v in _shapes(program).items() if i in fragment.known}
    operands = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in fragment.operands]
    return is_transposable(fragment, operands, known) and not flattened_by(fragment)


def has_derivative(equation: Equation, unknown: Collection[int]) -> bool:
    """Whether one equation has a jvp and a vjp in its unknown operands, which may be complex."""
    if equation.name in _SURE:
        return True
    moved = [v for v in equation.inputs if v.index in unknown and jnp.issubdtype(v.dtype, jnp.inexact)]
    outputs = tuple(v for v in equation.outputs if jnp.issubdtype(v.dtype, jnp.inexact))
    shapes = {v: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs}
    function = Fragment((equation,), tuple(dict.fromkeys(moved)), outputs)
    known = {v.index: shape for v, shape in shapes.items() if v.index in function.known}
    return not moved or not outputs or is_transposable(function, [shapes[v] for v in function.operands], known)


_SURE = ELEMENTWISE | VIEWS | REDUCTIONS | {"dot_general", "conv_general_dilated"}
"""Operations that need not be asked."""


def flattened_by(fragment: Fragment) -> tuple[str, ...]:
    """The flat operations that an output is computed from: as from numbers or positions, not as from predicates."""
    found: dict[int, dict[str, None]] = {}
    for equation in fragment.equations:
        names = {name: None for v in equation.inputs for name in found.get(v.index, ())}
        if equation.name in FLAT and equation.outputs[0].is_float:
            names[equation.name] = None
        found.update((v.index, names) for v in equation.outputs if v.dtype != jnp.bool_)
    return tuple({name: None for v in fragment.outputs for name in found.get(v.index, ())})


def _shapes(program: Program):
    variables = {v.index: v for e in program.equations for v in (*e.inputs, *e.outputs)}
    variables.update((v.index, v) for v in program.inputs)
    return {i: jax.ShapeDtypeStruct(v.shape, v.dtype) for i, v in variables.items()}


class LocalSolver(AbstractRule):
    """Damped Gauss-Newton on one node."""

    label: ClassVar[str] = "local solver"

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return transposed(self, ctx, inputs, duals)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return nearest_locally(ctx, inputs, duals)


def nearest_locally(
    ctx: Context, inputs: Sequence[Array], duals: Sequence[Array], preconditioner: Preconditioner | None = None
) -> list[Array]:
    """The duals of a node's operands at the nearest point that Gauss-Newton steps find.

    The answer of the constraint linearized at the operands is exact for small steps. It is refined where a step is so
    large that costs can be compared beside rounding.
    """
    inputs, duals = list(inputs), list(duals)
    multiplier = _linearized(ctx, inputs, duals, preconditioner)
    first = _pull(ctx, inputs, multiplier)
    large = [
        jnp.max(jnp.abs(d), initial=0.0) > _SMALL * (jnp.max(jnp.abs(x), initial=0.0) + _SMALL)
        for d, x in zip(_divide(first, ctx.weights), inputs, strict=True)
    ]
    return jax.lax.cond(
        jnp.any(jnp.stack(large)),
        lambda m, n: _refine(ctx, inputs, duals, m, n, preconditioner),
        lambda _, n: n,
        multiplier,
        first,
    )


def _divide(input_duals: Sequence[Array], weights: Sequence[float]) -> list[Array]:
    return [step(w, nu) for nu, w in zip(input_duals, weights, strict=True)]


def _pull(ctx: Context, at: Sequence[Array], multiplier: Sequence[Array]) -> list[Array]:
    back = jax.vjp(ctx.function, *at)[1]
    return list(back(list(multiplier)))


def _linearized(
    ctx: Context,
    at: Sequence[Array],
    right: Sequence[Array],
    preconditioner: Preconditioner | None,
    start: Sequence[Array] | None = None,
) -> list[Array]:
    r"""The multiplier of the constraint linearized at `at`, as $\lambda = \sqrt\kappa m$: that makes it symmetric.

    With a multiplier to `start` from, only what it lacks is solved for, to the same accuracy.
    """
    forward = jax.linearize(ctx.function, *at)[1]
    back = jax.vjp(ctx.function, *at)[1]
    top = largest(ctx.output_weights)
    ratios = [largest([r[i] for r in ctx.ratios]) for i in range(len(at))]
    roots = [jnp.sqrt(jnp.asarray(k / top, r.dtype)) for k, r in zip(ctx.output_weights, right, strict=True)]

    def operator(m):
        pulled = back([x * root for x, root in zip(m, roots, strict=True)])
        images = forward(*(p * jnp.asarray(ratio, p.dtype) for p, ratio in zip(pulled, ratios, strict=True)))
        return [x + root * image for x, root, image in zip(m, roots, images, strict=True)]

    tol = _LINEAR * ctx.accuracy

    inverse = None if preconditioner is None else preconditioner(at)

    def solve(b: list[Array], part: float | Array = 1.0) -> list[Array]:
        return conjugate_gradients(operator, b, inverse, tol=tol / part, max_steps=30)

    scaled = [_quotient(r, root) for r, root in zip(right, roots, strict=True)]
    if start is None:
        found = solve(scaled)
    else:
        old = [_quotient(r, root) for r, root in zip(start, roots, strict=True)]
        lacking = [b - image for b, image in zip(scaled, operator(old), strict=True)]
        part = _size(lacking) / jnp.maximum(_size(scaled), jnp.finfo(jnp.float32).tiny)
        more = solve(lacking, jnp.clip(part, ctx.accuracy, 1.0))
        found = [a + b for a, b in zip(old, more, strict=True)]
    return [x * root for x, root in zip(found, roots, strict=True)]


def _size(values: Sequence[Array]) -> Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32) for x in values]))


def _quotient(x: Array, divisor: Scale) -> Array:
    """Zero where the divisor is: of an output without readers nothing is wanted, and it weighs nothing."""
    divisor = jnp.asarray(divisor, x.dtype)
    return jnp.where(divisor > 0, x / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def largest(values: Sequence[Scale]) -> Scale:
    """The largest of numbers, or of the elements of arrays."""
    if all(isinstance(x, (int, float)) for x in values):
        return max(values)
    return jnp.max(jnp.stack([jnp.max(jnp.asarray(x)) for x in values]))


def _cost(ctx: Context, inputs, duals, input_duals) -> Array:
    r"""The cost, times one over kappa of the first output: $\sum w|d|^2 + \kappa|f(x_0+d) - f(x_0) - r|^2$."""
    steps = _divide(input_duals, ctx.weights)
    total = sum(jnp.vdot(nu, d) for nu, d in zip(input_duals, steps, strict=True))
    before, after = ctx.function(*inputs), ctx.function(*[x + d for x, d in zip(inputs, steps, strict=True)])
    for y, new, dual, kappa in zip(before, after, duals, ctx.output_weights, strict=True):
        gap = (new - y) - _quotient(dual, kappa)
        total = total + jnp.sum(kappa * gap * gap)
    return jnp.where(jnp.isfinite(total), total, jnp.inf)


def _refine(ctx: Context, inputs, duals, multiplier, first, preconditioner: Preconditioner | None) -> list[Array]:
    """Gauss-Newton steps from the linearized answer, each taken only as far as it lowers the cost."""

    def moved(input_duals):
        steps = _divide(input_duals, ctx.weights)
        return steps, [x + d for x, d in zip(inputs, steps, strict=True)]

    def right_side(input_duals):
        steps, at = moved(input_duals)
        before = ctx.function(*inputs)
        after, slope = jax.jvp(ctx.function, tuple(at), tuple(steps))
        return [
            (mu - kappa * ((new - y) - jd)).astype(mu.dtype)
            for mu, kappa, new, y, jd in zip(duals, ctx.output_weights, after, before, slope, strict=True)
        ]

    def gauss_newton(input_duals, right, multiplier):
        at = moved(input_duals)[1]
        multiplier = _linearized(ctx, at, right, preconditioner, multiplier)
        return [new - nu for new, nu in zip(_pull(ctx, at, multiplier), input_duals, strict=True)], multiplier

    def is_done(right, before):
        return _size([a - b for a, b in zip(right, before, strict=True)]) <= ctx.accuracy * _size(duals)

    def cost(input_duals):
        return _cost(ctx, inputs, duals, input_duals)

    zero = [jnp.zeros_like(x) for x in first]
    limits = {"max_steps": 1 + _OUTER, "max_halvings": _HALVINGS}
    return descend(cost, right_side, gauss_newton, is_done, zero, list(duals), multiplier, **limits)
