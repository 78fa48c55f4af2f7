"""Convolutions that XLA's compiler for CPUs has no fast program for, written as ones that it has.

It brings convolutions into the order (batch, space, channels), for which it has fast programs, where they stand in the
outermost computation; in the body of a `while_loop` or `scan`, or a branch of a `cond`, it does not, and a convolution
in another order, as of the transposes of any, takes up to fifty times as long. Sweeps of a solver are such a loop. And
wherever it stands, the transpose of a grouped convolution to its kernel, whose groups are parts of the batch, takes up
to a hundred times as long as the same with groups of channels.

`canonicalised` and `lowered` write the transpositions and groups into the traced program; the results are the same, to
rounding.

Limits: programs for accelerators stay as they are; so do convolutions of groups with few channels, which are slow in
that order too.
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
    """What `function()` returns, any pytree, with its convolutions as XLA has fast programs for them.

    To be called inside of a `jit`: outside of one, the function would be traced on each call.

    **Arguments:**

    - `function`: a function without arguments, which computes from what it closes over.
    - `program`: what it works on; without a convolution in it, nothing is looked for.
    """
    if jax.default_backend() != "cpu" or not _has_convolution(program.equations):
        return function()
    fixed: list[Any] = []

    def pure():
        arrays, others = eqx.partition(function(), eqx.is_array)
        fixed.append(others)
        return arrays

    closed, shape = jax.make_jaxpr(pure, return_shape=True)()
    return eqx.combine(_evaluated(_changed(closed, inside=False), shape)(), fixed[0])


def lowered(function: Callable[..., Any], *args: PyTree) -> jax.stages.Lowered:
    """`jax.jit(function).lower(*args)`, with its convolutions as XLA has fast programs for them."""
    traced = jax.jit(function).trace(*args)
    new = _changed(traced.jaxpr, inside=False)
    if jax.default_backend() != "cpu" or new is traced.jaxpr:
        return traced.lower()
    return jax.jit(_evaluated(new, traced.out_info)).lower(*args)


def _evaluated(closed: ClosedJaxpr, shape: PyTree) -> Callable[..., Any]:
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


def _changed(closed: ClosedJaxpr, inside: bool) -> ClosedJaxpr:
    """The program itself where there is nothing to change in it."""
    jaxpr = _changed_open(closed.jaxpr, inside)
    return closed if jaxpr is closed.jaxpr else closed.replace(jaxpr=jaxpr)


def _changed_open(jaxpr: Jaxpr, inside: bool) -> Jaxpr:
    equations: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == _CONVOLUTION and _is_slow(equation, inside):
            equations.extend(_transposed(equation))
            continue
        inner = inside or equation.primitive.name in _REPEATED
        params = {name: _changed_param(value, inner) for name, value in equation.params.items()}
        same = all(value is equation.params[name] for name, value in params.items())
        equations.append(equation if same else equation.replace(params=params))
    same = len(equations) == len(jaxpr.eqns) and all(map(operator.is_, equations, jaxpr.eqns))
    return jaxpr if same else jaxpr.replace(eqns=equations)


def _is_slow(equation: JaxprEqn, inside: bool) -> bool:
    params = equation.params
    batch, channels = params["dimension_numbers"][0][:2]
    shape = equation.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if params["batch_group_count"] > 1:  # those of one channel have a program of their own, outermost
        return inside or shape[batch] > params["batch_group_count"]
    groups = params["feature_group_count"]
    return inside and (groups == 1 or shape[channels] // groups >= _FEW)


def _changed_param(value: Any, inside: bool) -> Any:
    if isinstance(value, ClosedJaxpr):
        return _changed(value, inside)
    if isinstance(value, Jaxpr):
        return _changed_open(value, inside)
    if isinstance(value, tuple) and any(isinstance(x, ClosedJaxpr) for x in value):
        new = tuple(_changed_param(x, inside) for x in value)
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
    """Groups of the batch, as of the transpose of a grouped convolution, become groups of channels."""
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
