"""Side effects: what a program does beside computing, such as `jax.debug.print`, callbacks, and checks that raise.

Transforms a jaxpr into the same one without effects. Effects belong to the forward pass, where they happen once; on the
way back, functions are evaluated again, and silently. Limits: reads and writes of mutable arrays do not count as side
effects, and what has results that are read stays, since they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def acts(effects: Iterable[Any]) -> bool:
    """Whether some of the effects of a jaxpr or of one of its equations are side effects."""
    return any(map(_is_outward, effects))


def _is_outward(effect: Any) -> bool:
    """Not of the effects that JAX only keeps books with: on mutable inputs, and of named axes."""
    return not hasattr(effect, "input_index") and not hasattr(effect, "name")


def silenced(value: Any) -> Any:
    """A jaxpr without side effects, as far as nothing reads their results; also those that a tuple or a dict holds."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=silenced(value.jaxpr))
    if isinstance(value, tuple):
        return tuple(map(silenced, value)) if any(isinstance(x, ClosedJaxpr | Jaxpr) for x in value) else value
    if isinstance(value, Mapping):
        return {name: silenced(x) for name, x in value.items()}
    if not isinstance(value, Jaxpr) or not acts(value.effects):
        return value
    read, kept = {v for v in value.outvars if not isinstance(v, Literal)}, []
    for equation in reversed(value.eqns):
        if acts(equation.effects):
            if not any(v in read for v in equation.outvars):
                continue
            equation = _silent(equation)
        read |= {v for v in equation.invars if not isinstance(v, Literal)}
        kept.append(equation)
    return value.replace(eqns=kept[::-1], effects=_remaining(value.effects, (e.effects for e in kept)))


def _silent(equation: JaxprEqn) -> JaxprEqn:
    """An equation with the jaxprs that it holds silenced; itself where it holds none."""
    if not any(True for _ in inner_programs(equation.params)):
        return equation
    params = silenced(equation.params)
    return equation.replace(
        params=params, effects=_remaining(equation.effects, (j.effects for j in inner_programs(params)))
    )


def _remaining(before: Iterable[Any], parts: Iterable[Iterable[Any]]) -> set[Any]:
    """The effects of a whole, of which the parts have these: side effects that none of them has any more are gone."""
    found = {effect for part in parts for effect in part}
    return {effect for effect in before if effect in found or not _is_outward(effect)}


def inner_programs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that the parameters of an equation hold."""
    for value in params.values():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield x.jaxpr if isinstance(x, ClosedJaxpr) else x


def check_derivative(
    bind: Callable[..., Sequence[Any]], params: Mapping[str, Any], operands: Sequence[Any], moved: Sequence[bool]
) -> None:
    """Raises what JAX raises under a gradient, of an operation with effects that admit of none, as of `io_callback`.

    **Arguments:**

    - `bind`, `params`: the operation, from operands to results, and its parameters.
    - `operands`: their shapes. `moved`: which of them are unknown, and would have a tangent.
    """
    inner = list(inner_programs(params))
    if inner and not any(map(_refuses, inner)):
        return
    _differentiate(bind, operands, moved)


def _refuses(jaxpr: Jaxpr) -> bool:
    """Whether an effect in a jaxpr, or in those that it holds, has no derivative."""
    for equation in jaxpr.eqns:
        if not acts(equation.effects):
            continue
        inner = list(inner_programs(equation.params))
        if any(map(_refuses, inner)):
            return True
        avals = [v.aval for v in equation.invars]
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]  # pyright: ignore[reportAttributeAccessIssue]
        params, primitive = equation.params, equation.primitive
        try:
            if not inner:
                bind = lambda *x, p=primitive, params=params: p.bind(*x, **params)  # noqa: E731
                _differentiate(bind, shapes, [True] * len(shapes))
        except Exception:  # each primitive without a derivative raises an error of its own
            return True
    return False


def _differentiate(bind: Callable[..., Any], operands: Sequence[Any], moved: Sequence[bool]) -> None:
    """Takes the derivative of an operation by those of its operands that are floats and move, in shapes alone."""
    places = [i for i, m in enumerate(moved) if m and jnp.issubdtype(operands[i].dtype, jnp.inexact)]

    def once(*values):
        def function(*primals):
            full = dict(enumerate(values)) | dict(zip(places, primals, strict=True))
            bind(*full.values())
            return jnp.zeros(())

        primals = tuple(values[i] for i in places)
        return jax.jvp(function, primals, primals)

    if places:
        jax.eval_shape(once, *operands)
