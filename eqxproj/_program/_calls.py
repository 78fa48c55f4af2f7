"""Which calls inside of a jaxpr are seen through, and which are kept whole for a derivative of their own.

Transforms an equation of a jaxpr into the jaxpr that takes its place, if any. A `custom_vjp` is always kept. A
`custom_jvp` is kept where its author's derivative is not that of what the function does: at random points where that is
cheap to find out, and always where the function holds products or control flow. Limits: those of JAX itself are taken
to differ in rounding alone, and a derivative that differs in a few places only is not found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import CellType, FunctionType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from ._equations import Equation
from ._primitives import ELEMENTWISE, OWN_DERIVATIVE, REDUCTIONS, VIEWS

_CALLS = ("jit", "pjit", "custom_jvp_call", "remat2", "checkpoint", "remat")
_CALLS += ("closed_call", "core_call", "eval_jaxpr")  # the last is the name of `closed_call` from JAX 0.11.1 on
_WRAPPED = ("f", "fun", "func", "jvp")  # how objects call the functions that they wrap
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_POINTS, _SCALES = 96, (0.3, 1.0, 3.0)  # at least so many numbers of each scale
_SAME, _FEW = 0.05, 0.02  # relative distance of two derivatives, and the part of the numbers where they may differ


def inner_jaxpr(equation: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr and the constants that take the place of an equation; `None` where it stays as it is."""
    if equation.primitive.name not in _CALLS:
        return None
    for key in _INNER:
        inner = equation.params.get(key)
        found = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        if isinstance(found[0], Jaxpr):
            whole = equation.primitive.name in OWN_DERIVATIVE and not _has_plain_derivative(equation, *found)
            return None if whole else found
    return None


def holds_only(jaxpr: Jaxpr, names: frozenset[str]) -> bool:
    """Whether all operations of a function, also inside of calls that are inlined, have one of these names."""
    for equation in jaxpr.eqns:
        inner = inner_jaxpr(equation)
        if not (equation.primitive.name in names if inner is None else holds_only(inner[0], names)):
            return False
    return True


def is_transposable(function: Callable[..., Any], operands: Sequence[Any], known: Any = None) -> bool:
    """Whether JAX can transpose the derivative of `function(known, operands)` by the operands, given as shapes."""

    def transposed(known, operands):
        out, back = jax.vjp(lambda *values: function(known, values), *operands)
        return back(out)

    try:
        jax.eval_shape(transposed, known, operands)
    except Exception:  # each primitive without a derivative raises an error of its own
        return False
    return True


def _has_plain_derivative(equation: Any, jaxpr: Jaxpr, consts: Sequence[Any]) -> bool:
    """Whether the derivative of a `custom_jvp` is that of what the function does."""
    if _is_of_jax(equation, jaxpr):
        return _is_differentiable(jaxpr, consts)
    cheap = holds_only(jaxpr, ELEMENTWISE | VIEWS | REDUCTIONS)
    return cheap and _is_same_derivative(equation, jaxpr, consts)


def _is_of_jax(equation: Any, jaxpr: Jaxpr) -> bool:
    """Whether a function and its derivative are JAX's own, and neither is a user's or another library's."""
    source = getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None)
    if not isinstance(source, str) or _JAX not in source:
        return False
    seen: dict[int, Any] = {}
    rules = [x for name, x in equation.params.items() if name not in _INNER]
    return all(f.__code__.co_filename.startswith(_JAX) for f in _functions(rules, seen))


def _functions(value: Any, seen: dict[int, Any]) -> Iterator[FunctionType]:
    """The functions that a callable is made of: those that it wraps, closes over, or is called by."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, FunctionType):
        yield value
        parts = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    elif isinstance(value, tuple | list):
        parts = value
    elif callable(value) or hasattr(value, "f"):
        parts = [type(value).__call__] if callable(value) else []
        parts += [getattr(value, name) for name in _WRAPPED if hasattr(value, name)]
    else:
        return
    for part in parts:
        yield from _functions(part, seen)


def _is_differentiable(jaxpr: Jaxpr, consts: Sequence[Any]) -> bool:
    """Whether JAX can transpose the derivative of what a function does inside, whatever its own derivative."""
    if holds_only(jaxpr, ELEMENTWISE | VIEWS):
        return True

    def outputs(_, values):
        return [y for y in jax.core.eval_jaxpr(jaxpr, consts, *values) if jnp.issubdtype(y.dtype, jnp.inexact)]

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]  # pyright: ignore[reportAttributeAccessIssue]
    return is_transposable(outputs, shapes)


def _is_same_derivative(equation: Any, jaxpr: Jaxpr, consts: Sequence[Any]) -> bool:
    """Whether a function's own derivative and that of what it does agree at random points."""
    whole = Equation(equation.primitive, equation.params, (), (), "")
    avals: list[Any] = [v.aval for v in equation.invars]
    functions = (whole.bind, lambda *values: jax.core.eval_jaxpr(jaxpr, consts, *values))
    moving = [jnp.issubdtype(a.dtype, jnp.inexact) for a in avals]

    def slopes(values, tangents):
        def along(function):
            def of_moving(*moved):
                rest = iter(moved)
                full = [next(rest) if m else x for x, m in zip(values, moving, strict=True)]
                return [y for y in function(*full) if jnp.issubdtype(y.dtype, jnp.inexact)]

            start = tuple(x for x, m in zip(values, moving, strict=True) if m)
            return jax.jvp(of_moving, start, tuple(tangents))[1]

        return [along(function) for function in functions]

    try:
        values, tangents = _points(avals, np.random.default_rng(0))
        arguments = values, [t for t, m in zip(tangents, moving, strict=True) if m]
        if any(isinstance(c, jax.core.Tracer) for c in jax.make_jaxpr(jax.vmap(slopes))(*arguments).consts):
            return False  # it closes over arrays of the loss
        with jax.ensure_compile_time_eval():
            own, plain = jax.jit(jax.vmap(slopes))(*arguments)
        return all(map(_agree, own, plain))
    except Exception:  # a key, or a batching rule that is missing: the author knows better
        return False


def _points(avals: Sequence[Any], rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random operands and directions, a batch of each."""
    count = max(1, _POINTS // max([1, *(int(np.prod(a.shape)) for a in avals)])) * len(_SCALES)

    def drawn(aval: Any, scaled: bool) -> np.ndarray:
        numbers = rng.normal(size=(count, *aval.shape))
        if scaled:
            numbers *= np.resize(_SCALES, count).reshape(-1, *[1] * len(aval.shape))
        if not jnp.issubdtype(aval.dtype, jnp.inexact):
            numbers = numbers > 0
        return numbers.astype(aval.dtype)

    return [drawn(a, True) for a in avals], [drawn(a, False) for a in avals]


def _agree(own: Any, plain: Any) -> bool:
    """Whether two derivatives are the same nearly everywhere. Where one is not finite, it says nothing."""
    a, b = (np.asarray(x).astype(np.complex128) for x in (own, plain))
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    size = np.abs(a) + np.abs(b)
    apart = np.abs(a - b) > _SAME * size + 1e-6 * np.max(size, initial=0.0)
    return bool(np.sum(apart) <= _FEW * apart.size)
