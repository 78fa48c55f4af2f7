"""Calls that are kept whole for a derivative of their own, as functions of real arrays that close over nothing.

Transforms a call of a `jax.custom_vjp` or `jax.custom_jvp` into a function of its operands and of what its derivative
closes over. Limits: what the derivative closes over must be made around the loop, the branch or the `vmap` in which the
function is called; JAX takes nothing else either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from ._complex import is_complex
from ._equations import Equation, Variable

_Function = Callable[..., list[Any]]


@dataclass(frozen=True, eq=False)
class Kept(Equation):
    """A call that is evaluated by a function of its own."""

    function: _Function = field(kw_only=True)

    def bind(self, *operands: Any) -> list[Any]:
        return self.function(*operands)


def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def on_reals(function: _Function, dtypes: Sequence[Any]) -> _Function:
    """The function of the real and imaginary parts of its operands, of these types, to those of its results."""

    def of_parts(*parts: Any) -> list[Any]:
        rest = iter(parts)
        full = [jax.lax.complex(next(rest), next(rest)) if is_complex(d) else next(rest) for d in dtypes]
        results = [[y.real, y.imag] if is_complex(y.dtype) else [y] for y in function(*full)]
        return [part for found in results for part in found]

    return of_parts


def with_closure(
    equation: Any, unknown: Sequence[bool], seen: Mapping[Any, Variable]
) -> tuple[_Function, list[Variable]] | None:
    """A call as a function of its operands and of what its derivative closes over; `None` where that is nothing.

    `unknown` says which operands depend on parameters, and `seen` are the variables of the program, by the variables
    of the jaxpr that was traced.
    """
    first = equation.params.get("num_consts", 0)  # nothing is passed on to what the function itself closes over
    floats = [_is_inexact(v.aval.dtype) for v in equation.invars]
    moving = [i for i, (u, f) in enumerate(zip(unknown, floats, strict=True)) if u and f and i >= first]
    call = Equation(equation.primitive, equation.params, (), (), "")
    closed = pulled(call.bind, moving, _shapes(equation.invars), _shapes(equation.outvars)) if moving else None
    found = {} if closed is None else {k: _origin(c, seen) for k, c in enumerate(closed.consts)}
    held = {k: v for k, v in found.items() if v is not None}
    if closed is None or not held:
        return None
    count = len(equation.invars)
    inner = next(x for x in equation.params.values() if isinstance(x, (ClosedJaxpr, Jaxpr)))
    plain = jaxpr_as_fun(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()))
    function = jax.custom_vjp(lambda operands, arrays: list(plain(*operands)))

    def back(saved, duals):
        operands, arrays = saved
        values = dict(zip(held, arrays, strict=True))
        consts = [values.get(k, c) for k, c in enumerate(closed.consts)]
        wanted = [mu for mu, v in zip(duals, equation.outvars, strict=True) if _is_inexact(v.aval.dtype)]
        found = iter(jax.core.eval_jaxpr(closed.jaxpr, consts, *operands, *wanted))
        return [next(found) if i in moving else None for i in range(count)], None

    function.defvjp(lambda *args: (function(*args), args), back)
    return (lambda *values: function(list(values[:count]), list(values[count:]))), list(held.values())


def reached(call: Equation, moving: Sequence[int], outputs: Sequence[Variable]) -> list[int]:
    """Those of the places `moving` of operands that some of the outputs have a derivative by.

    All of them where that depends on which move: a derivative may ask so, by symbolic zeros.
    """
    found = _passing(call, moving, outputs)
    return found if len(found) == len(moving) or _passing(call, found, outputs) == found else list(moving)


def _passing(call: Equation, moving: Sequence[int], outputs: Sequence[Variable]) -> list[int]:
    if not moving:
        return []
    places = [i for i, v in enumerate(call.outputs) if v in outputs]
    closed = pulled(lambda *x: [call.bind(*x)[i] for i in places], moving, _shapes(call.inputs), _shapes(outputs))
    if closed is None:
        return list(moving)
    duals = {v for v in closed.jaxpr.invars[len(call.inputs) :]}
    for equation in closed.jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in duals for v in equation.invars):
            duals.update(equation.outvars)
    return [i for i, v in zip(moving, closed.jaxpr.outvars, strict=True) if not isinstance(v, Literal) and v in duals]


def pulled(
    function: _Function, moving: Sequence[int], operands: Sequence[Any], results: Sequence[Any]
) -> ClosedJaxpr | None:
    """The derivative by the operands at the places `moving`, from operands and duals; `None` where JAX knows none."""

    def back(operands, duals):
        def of_moving(*moved):
            full = list(operands)
            for i, x in zip(moving, moved, strict=True):
                full[i] = x
            return [y for y in function(*full) if _is_inexact(y.dtype)]

        return jax.vjp(of_moving, *(operands[i] for i in moving))[1](duals)

    try:
        return jax.make_jaxpr(back)(operands, [y for y in results if _is_inexact(y.dtype)])
    except Exception:  # each primitive without a derivative raises an error of its own
        return None


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    avals = [getattr(v, "aval", v) for v in variables]
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]


def _origin(value: Any, seen: Mapping[Any, Variable]) -> Variable | None:
    """The variable that a value of the trace stands for; `None` of arrays, and of other traces' values."""
    variable = getattr(value, "val", None) if isinstance(value, jax.core.Tracer) else None
    return seen.get(variable) if isinstance(variable, Var) else None
