"""Convolutions written in the one order that XLA's compiler for CPUs has fast programs for.

Transforms a traced program: convolutions get the order (batch, space, channels), and groups of the batch become groups
of channels. The results are the same, to rounding. Limits: programs for accelerators stay as they are, and so do
convolutions of groups with few channels, which are slow in that order too.

XLA brings convolutions into that order by itself where they stand in the outermost computation. In the body of a
`while_loop` or `scan`, or a branch of a `cond`, it does not. There, a convolution in another order, such as the
transpose of any, takes up to fifty times as long; sweeps of a solver are such a loop. And wherever it stands, the
transpose of a grouped convolution to its kernel, whose groups are parts of the batch, takes up to a hundred times as
long as the same with groups of channels.
"""

from __future__ import annotations

import functools as ft
import operator
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, PyTree

from ._equations import Equation, Program

_CONVOLUTION = "conv_general_dilated"
_REPEATED = ("while", "scan", "cond")
"""Operations that own computations of their own."""
_FEW = 8
"""Channels of a group below which the plain program, as it is in a loop, is the faster one."""


def canonicalised(function: Callable[[], Any], program: Program) -> Any:
    """Calls a function with its convolutions canonicalised.

    To be called inside of a `jit`: outside of one, the function would be traced on each call.

    **Arguments:**

    - `function`: a function without arguments, which computes from what it closes over.
    - `program`: the program that it works on. Without a convolution in it, the function is called as it is.

    **Returns:**

    What the function returns, any pytree.
    """
    if jax.default_backend() != "cpu" or not _has_convolution(program.equations):
        return function()
    fixed: list[Any] = []  # what is no array is known while tracing, but tracing returns arrays alone

    def pure():
        arrays, others = eqx.partition(function(), eqx.is_array)
        fixed.append(others)
        return arrays

    closed, shape = jax.make_jaxpr(pure, return_shape=True)()
    return eqx.combine(_evaluated(_rewritten(closed, inside=False), shape)(), fixed[0])


def lowered(function: Callable[..., Any], *args: PyTree) -> jax.stages.Lowered:
    """`jax.jit(function).lower(*args)`, with the convolutions of the function canonicalised."""
    traced = jax.jit(function).trace(*args)
    new = _rewritten(traced.jaxpr, inside=False)
    if jax.default_backend() != "cpu" or new is traced.jaxpr:
        return traced.lower()
    return jax.jit(_evaluated(new, traced.out_info)).lower(*args)


def _evaluated(closed: ClosedJaxpr, shape: PyTree) -> Callable[..., Any]:
    """A program as a function from pytrees to a pytree of the structure of `shape`."""

    def function(*args: PyTree) -> PyTree:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jtu.tree_leaves(args))
        return jtu.tree_unflatten(jtu.tree_structure(shape), leaves)

    return function


def _has_convolution(equations: Iterable[Equation] | Iterable[JaxprEqn]) -> bool:
    for equation in equations:
        if equation.primitive.name == _CONVOLUTION:
            return True
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        if any(_has_convolution(x.eqns) for x in inner if isinstance(x, (ClosedJaxpr, Jaxpr))):
            return True
    return False


def _rewritten(closed: ClosedJaxpr, inside: bool) -> ClosedJaxpr:
    """A program with its slow convolutions rewritten; the program itself where it has none.

    `inside` says whether it belongs to a loop or branch.
    """
    jaxpr = _rewritten_open(closed.jaxpr, inside)
    return closed if jaxpr is closed.jaxpr else closed.replace(jaxpr=jaxpr)


def _rewritten_open(jaxpr: Jaxpr, inside: bool) -> Jaxpr:
    equations: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == _CONVOLUTION and _is_slow(equation, inside):
            equations.extend(_transposed(equation))
            continue
        inner = inside or equation.primitive.name in _REPEATED
        params = {name: _rewritten_param(value, inner) for name, value in equation.params.items()}
        same = all(value is equation.params[name] for name, value in params.items())
        equations.append(equation if same else equation.replace(params=params))
    same = len(equations) == len(jaxpr.eqns) and all(map(operator.is_, equations, jaxpr.eqns))
    return jaxpr if same else jaxpr.replace(eqns=equations)


def _is_slow(equation: JaxprEqn, inside: bool) -> bool:
    """Whether a convolution is faster in the canonical order."""
    params = equation.params
    batch, channels = params["dimension_numbers"][0][:2]
    shape = equation.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if params["batch_group_count"] > 1:  # outermost, groups of one channel are fast as they are
        return inside or shape[batch] > params["batch_group_count"]
    groups = params["feature_group_count"]
    return inside and (groups == 1 or shape[channels] // groups >= _FEW)


def _rewritten_param(value: Any, inside: bool) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _rewritten(value, inside)
    if isinstance(value, Jaxpr):
        return _rewritten_open(value, inside)
    if isinstance(value, tuple) and any(isinstance(x, ClosedJaxpr) for x in value):
        new = tuple(_rewritten_param(x, inside) for x in value)
        return value if all(map(operator.is_, new, value)) else new
    return value


def _transposed(equation: JaxprEqn) -> list[JaxprEqn]:
    """The equations of a convolution in the order (batch, space, channels)."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]  # pyright: ignore
    inner = jax.make_jaxpr(ft.partial(_convolution, equation.params))(*shapes).jaxpr
    names = {**dict(zip(inner.invars, equation.invars, strict=True)), inner.outvars[0]: equation.outvars[0]}

    def renamed(variables):
        return [v if isinstance(v, Literal) else names.get(v, v) for v in variables]

    return [
        e.replace(invars=renamed(e.invars), outvars=renamed(e.outvars), source_info=equation.source_info)
        for e in inner.eqns
    ]


def _convolution(params: dict[str, Any], x: Array, w: Array) -> Array:
    """A convolution in the canonical order, and its result in the order that was asked for.

    Groups of the batch, as of the transpose of a grouped convolution, become groups of channels.
    """
    (batch, channels, *space), (out_channels, in_channels, *window), (out_batch, out_last, *out_space) = params[
        "dimension_numbers"
    ]
    groups, ndim = params["batch_group_count"], x.ndim
    x = jnp.transpose(x, (batch, *space, channels))
    if groups > 1:
        apart = x.reshape(groups, -1, *x.shape[1:])
        x = jnp.moveaxis(apart, 0, -2).reshape(*apart.shape[1:-1], -1)
    batch_first = (0, ndim - 1, *range(1, ndim - 1))
    out = jax.lax.conv_general_dilated(
        x,
        jnp.transpose(w, (*window, in_channels, out_channels)),
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            batch_first, (ndim - 1, ndim - 2, *range(ndim - 2)), batch_first
        ),
        feature_group_count=groups * params["feature_group_count"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    order = (out_batch, *out_space, out_last)
    return jnp.transpose(out, sorted(range(ndim), key=lambda i: order[i]))
