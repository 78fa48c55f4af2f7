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
from .._program._normal_form import normal_form
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
    if not depends(function, inputs):
        return zeros
    problem = problem_of(function, inputs, duals, is_parameter, ctx, residuals, reached)
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
    reached: Sequence[bool] = (),
) -> FeasibilityProblem:
    """The problem that [`sweep`][] runs through, of the same arguments. The inputs are its parameters, in order."""

    traced = _traced(function, inputs, duals, is_parameter)
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
    return replace(problem, outer_unit=ctx.unit)


def _traced(
    function: Callable[..., Sequence[Array]], inputs: Sequence[Array], duals: Sequence[Array], likes: Sequence[bool]
) -> Trace:
    r"""The loss $-\sum_k \langle \mu_k, y_k \rangle$ of the inputs. `likes` says which of them are parameters."""

    def loss(values: Sequence[Array], duals: Sequence[Array]) -> Array:
        outputs = function(*values)
        return sum((jnp.sum(_linear(y, mu)) for y, mu in zip(outputs, duals, strict=True)), start=jnp.asarray(0.0))

    return trace(loss, list(inputs), (list(duals),), is_parameter=likes)


def depends(function: Callable[..., Sequence[Array]], inputs: Sequence[Array]) -> bool:
    """Whether any output of a function depends on its inputs."""
    program = normal_form(jax.make_jaxpr(lambda *values: tuple(function(*values)))(*inputs))
    found = dependents(program.equations, program.inputs)
    return any(v.index in found for v in program.outputs)


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
        if depends(function, inputs):
            build(_traced(function, inputs, function(*inputs), [False] * len(inputs)), in_order=True)

    try:
        jax.eval_shape(built, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs))
    except UnsupportedPrimitiveError as error:
        return error.missing
    return ()
