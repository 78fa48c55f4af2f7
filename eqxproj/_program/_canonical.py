"""Convolutions written in the one order that XLA's compiler for CPUs has fast programs for.

Transforms a traced program: convolutions get the order (batch, space, channels), and groups of the batch become groups
of channels. The results are the same, to rounding. Limits: programs for accelerators stay as they are, and so do
convolutions of groups with few channels, which are slow in that order too.

XLA does so by itself in the outermost computation, but not in the body of a loop, such as a solver's, nor in a branch:
there another order, such as a transpose has, is much slower. Wherever it stands, the transpose of a grouped convolution
to its kernel, whose groups are parts of the batch, is much slower than the same with groups of channels.
"""

from __future__ import annotations

import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, PyTree

from ._effects import inner_programs
from ._equations import Equation, Program

_CONVOLUTION = "conv_general_dilated"
_REPEATED = ("while", "scan", "cond")  # operations that own computations of their own
_FEW = 8  # channels of a group below which the plain program, as it is in a loop, is the faster one


def canonicalised(function: Callable[[], Any], program: Program) -> Any:
    """Calls a function that works on a program, with its convolutions canonicalised.

    To be called inside of a `jit`: outside of one, the function would be traced on each call.
    """
    if jax.default_backend() != "cpu" or not _has_convolution(program.equations):
        return function()
    closed, shape, others = eqx.filter_make_jaxpr(function)()
    return eqx.combine(_evaluated(_rewritten(closed, inside=False), shape)(), others)


def lowered(function: Callable[..., Any], *args: PyTree, donated: tuple[int, ...] = ()) -> jax.stages.Lowered:
    """`jax.jit(function).lower(*args)`, with the convolutions of the function canonicalised.

    `donated`: positions of the arguments whose memory the results may take over.
    """
    traced = jax.jit(function, donate_argnums=donated).trace(*args)
    new = _rewritten(traced.jaxpr, inside=False)
    if jax.default_backend() != "cpu" or new is traced.jaxpr:
        return traced.lower()
    return jax.jit(_evaluated(new, traced.out_info), donate_argnums=donated).lower(*args)


def _evaluated(closed: ClosedJaxpr, shape: PyTree) -> Callable[..., Any]:
    """A program as a function from pytrees to a pytree of the structure of `shape`."""

    def function(*args: PyTree) -> PyTree:
        leaves = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jtu.tree_leaves(args))
        return jtu.tree_unflatten(jtu.tree_structure(shape), leaves)

    return function


def _has_convolution(equations: Sequence[Equation] | Sequence[JaxprEqn]) -> bool:
    return any(e.primitive.name == _CONVOLUTION for e in equations) or any(
        _has_convolution(x.eqns) for e in equations for x in inner_programs(e.params)
    )


def _rewritten(value: Any, inside: bool) -> Any:
    """A program, or a parameter that holds some, with slow convolutions rewritten; itself where it has none.

    `inside` says whether it belongs to a loop or branch.
    """
    if isinstance(value, ClosedJaxpr):
        jaxpr = _rewritten(value.jaxpr, inside)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if isinstance(value, tuple):
        new = tuple(_rewritten(x, inside) for x in value)
        return value if all(map(operator.is_, new, value)) else new
    if not isinstance(value, Jaxpr):
        return value
    equations: list[JaxprEqn] = []
    for equation in value.eqns:
        if equation.primitive.name == _CONVOLUTION and _is_slow(equation, inside):
            equations.extend(_transposed(equation))
            continue
        inner = inside or equation.primitive.name in _REPEATED
        params = {name: _rewritten(x, inner) for name, x in equation.params.items()}
        same = all(x is equation.params[name] for name, x in params.items())
        equations.append(equation if same else equation.replace(params=params))
    same = len(equations) == len(value.eqns) and all(map(operator.is_, equations, value.eqns))
    return value if same else value.replace(eqns=equations)


def _is_slow(equation: JaxprEqn, inside: bool) -> bool:
    """Whether a convolution is faster in the canonical order."""
    params = equation.params
    batch, channels = params["dimension_numbers"][0][:2]
    shape = equation.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if params["batch_group_count"] > 1:  # outermost, groups of one channel are fast as they are
        return inside or shape[batch] > params["batch_group_count"]
    groups = params["feature_group_count"]
    return inside and (groups == 1 or shape[channels] // groups >= _FEW)


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
    """A convolution in the canonical order, with its result in the order that was asked for."""
    lhs, (out_channels, in_channels, *window), (out_batch, out_last, *out_space) = params["dimension_numbers"]
    groups, ndim = params["batch_group_count"], x.ndim
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    if groups > 1:  # groups of the batch become groups of channels
        apart = x.reshape(groups, -1, *x.shape[1:])
        x = jnp.moveaxis(apart, 0, -2).reshape(*apart.shape[1:-1], -1)
    w = jnp.transpose(w, (*window, in_channels, out_channels))
    channels_last, kernel_last = (0, ndim - 1, *range(1, ndim - 1)), (ndim - 1, ndim - 2, *range(ndim - 2))
    kept = "window_strides padding lhs_dilation rhs_dilation precision preferred_element_type".split()
    out = jax.lax.conv_general_dilated(
        x,
        w,
        dimension_numbers=jax.lax.ConvDimensionNumbers(channels_last, kernel_last, channels_last),
        feature_group_count=groups * params["feature_group_count"],
        **{name: params[name] for name in kept},
    )
    order = (out_batch, *out_space, out_last)
    return jnp.transpose(out, sorted(range(ndim), key=order.__getitem__))
