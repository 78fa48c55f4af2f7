r"""One backward sweep through a function: from duals of its outputs to duals of its inputs.

An operation that is a program of its own (the body of a scan, a branch of a `cond`) is projected by the projections of
its parts: its problem is the function with the objective $-\sum_k \langle \mu_k, y_k \rangle$, whose prox moves each
output by its dual, and the cyclic sweep of that problem accumulates on the inputs, as on parameters, their duals.
Inner programs may hold programs again. In a steep metric the answer is $J^T \mu$, by the chain rule of the sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._errors import Unsupported, UnsupportedPrimitiveError
from .._graph._build import build
from .._problem._make import make_problem
from .._problem._problem import FeasibilityProblem
from .._program._custom import custom_loss
from .._program._equations import Equation, dependents
from .._program._trace import Trace, trace
from ..rules._base import Context
from ..solvers._cyclic import CyclicProjections

_linear = custom_loss(lambda output, dual: -(output * dual), lambda output, dual, tau: tau * dual)


def sweep(
    function: Callable[..., Sequence[Array]],
    inputs: Sequence[Array],
    duals: Sequence[Array],
    is_parameter: Sequence[bool],
    ctx: Context,
    residuals: Sequence[Array] = (),
    reached: Sequence[bool] = (),
) -> list[Array]:
    """The dual of each input of a function, zero where no output depends on it.

    `duals` belong to the outputs, `is_parameter` says which inputs are parameters, `ctx` is the node whose function it
    is (or part of it), and `residuals` are the function's products at these inputs, where they are known. `reached`
    says for each output whether its dual is a gradient.
    """
    zeros = [jnp.zeros_like(x) for x in inputs]
    traced = _traced(function, inputs, duals, is_parameter) if inputs else None
    if traced is None or not _depends(traced):
        return zeros
    problem = _problem_of(traced, ctx, residuals, reached)
    solver = CyclicProjections()
    state = solver.last_step(problem, solver.init(problem))
    shifts = [None if v is None else state.shifts[v] for v in problem.graph.parameters]
    return [z if s is None else s.astype(z.dtype) for z, s in zip(zeros, shifts, strict=True)]


def problem_of(
    function: Callable[..., Sequence[Array]],
    inputs: Sequence[Array],
    duals: Sequence[Array],
    is_parameter: Sequence[bool],
    ctx: Context,
    residuals: Sequence[Array] = (),
) -> FeasibilityProblem:
    """The problem that [`sweep`][] runs through, of the same arguments. The inputs are its parameters, in order."""
    return _problem_of(_traced(function, inputs, duals, is_parameter), ctx, residuals, ())


def _problem_of(traced: Trace, ctx: Context, residuals: Sequence[Array], reached: Sequence[bool]) -> FeasibilityProblem:
    problem = make_problem(
        traced,
        ctx.metric,
        ctx.copies,  # pyright: ignore[reportArgumentType]
        1.0,
        "constant",
        False,
        _offset(ctx),
        residuals=residuals,
        noise=ctx.noise,
        sends=reached,
    )
    return replace(problem, outer_unit=ctx.unit, accuracy=ctx.accuracy)


def _traced(
    function: Callable[..., Sequence[Array]],
    inputs: Sequence[Array],
    duals: Sequence[Array] | None,
    likes: Sequence[bool],
) -> Trace:
    r"""The loss $-\sum_k \langle \mu_k, y_k \rangle$ of the inputs. `likes` says which of them are parameters.

    Without `duals` they are ones.
    """

    def loss(values: Sequence[Array], duals: Sequence[Array] | None) -> Array:
        outputs = function(*values)
        duals = [jnp.ones_like(y) for y in outputs] if duals is None else duals
        return sum((jnp.sum(_linear(y, mu)) for y, mu in zip(outputs, duals, strict=True)), start=jnp.asarray(0.0))

    return trace(loss, list(inputs), (None if duals is None else list(duals),), is_parameter=likes)


def _depends(traced: Trace) -> bool:
    """Whether the value of a loss depends on its parameters."""
    program = traced.program
    found = dependents(program.equations, program.inputs[: len(traced.parameters)])
    return program.outputs[0].index in found


def _offset(ctx: Context) -> float:
    """The logarithm of the weight of a node's outputs, from those of its operands, one step farther back."""
    factor = math.log(ctx.metric.parameter)
    logs = [log - flag * factor for log, flag in zip(ctx.log_weights, ctx.is_parameter, strict=True)]
    return min(logs, default=0.0) - math.log(ctx.metric.grade)


def missing_in(
    part: Callable[..., tuple[Callable[..., Sequence[Array]], Sequence[Array]]], equation: Equation
) -> Sequence[Unsupported]:
    """What has no rule inside of an operation: the graph of a part of it is built, and nothing is projected.

    `part` gives a function and its inputs, from the operands of the equation.
    """

    def built(*operands: Array) -> None:
        function, inputs = part(*operands)
        traced = _traced(function, inputs, None, [False] * len(inputs)) if inputs else None
        if traced is not None and _depends(traced):
            build(traced, recurrences="whole")

    try:
        jax.eval_shape(built, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs))
    except UnsupportedPrimitiveError as error:
        return error.missing
    return ()
