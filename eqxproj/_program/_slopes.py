"""Which operands of a function its derivative depends on, found out without computing anything.

Transforms a function into one number an operand, whose bit k says that output k has a derivative by it: that a way of
operations with a derivative leads from the operand to the output. A call with a derivative of its own is asked for its
transpose, as JAX writes it. Limits: this is structure; a derivative that happens to be zero counts, and of an operation
that JAX cannot transpose every operand does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._calls import inner_jaxpr
from ._effects import inner_programs
from ._equations import Equation
from ._normal_form import scan_counts
from ._primitives import FLAT

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_NO_SLOPE = frozenset((*FLAT, "stop_gradient", "bitcast_convert_type", "nextafter"))
_HOLDS_FUNCTIONS = ("custom_projection", "custom_loss")


def slopes_of(function: Callable[..., Any], operands: Sequence[Any], known: Any = None) -> list[int]:
    """For each operand of `function(known, operands) -> [outputs]` the outputs with a derivative by it, as bits.

    `operands` and `known` are arrays or their shapes.
    """
    jaxpr = jax.make_jaxpr(function)(known, list(operands)).jaxpr
    others = len(jaxpr.invars) - len(operands)
    found = _followed(jaxpr, [0] * others + [1 << i for i in range(len(operands))], _by_derivative)
    return _turned(found, len(operands))


def _turned(sets: Sequence[int], members: int) -> list[int]:
    """For each member of some sets, given as bits, those that hold it."""
    return [sum(1 << k for k, one in enumerate(sets) if one >> i & 1) for i in range(members)]


_Step = Callable[[Any, list[int]], list[int]]


def _followed(jaxpr: Jaxpr, seeds: Sequence[int], step: _Step) -> list[int]:
    """What each output of a jaxpr stands for, given what each input does. All are sets, as bits.

    `step` says so of the results of one equation, given its operands.
    """
    found: dict[Any, int] = dict(zip(jaxpr.invars, seeds, strict=True))

    def read(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else found.get(atom, 0)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if any(operands):
            found.update(zip(equation.outvars, step(equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _by_derivative(equation: Any, operands: list[int]) -> list[int]:
    """What the results of one equation have a derivative by. What is no float has none."""
    name, inner = equation.primitive.name, inner_jaxpr(equation)
    if name in ("scan", "cond"):
        found = _through(equation, [0, *operands[1:]] if name == "cond" else operands, _by_derivative)
    elif inner is not None:
        found = _followed(inner[0], operands, _by_derivative)
    elif name in _HOLDS_FUNCTIONS or any(True for _ in inner_programs(equation.params)) or _is_of_many(equation):
        found = _by_transpose(equation, operands)
    else:
        found = [0 if name in _NO_SLOPE else _union(operands)] * len(equation.outvars)
    return [one if _is_inexact(v) else 0 for v, one in zip(equation.outvars, found, strict=True)]


def _is_of_many(equation: Any) -> bool:
    """Whether some of several results may depend on some of several operands, as those of a sort do."""
    return len(equation.outvars) > 1 and len(equation.invars) > 1


def _is_inexact(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def _by_transpose(equation: Any, operands: list[int]) -> list[int]:
    """What the results of one equation have a derivative by: where its transpose leads from their duals."""
    bind = Equation(equation.primitive, equation.params, (), (), "").bind
    moved = [i for i, (v, one) in enumerate(zip(equation.invars, operands, strict=True)) if one and _is_inexact(v)]
    shown = [k for k, v in enumerate(equation.outvars) if _is_inexact(v)]

    def back(values: Sequence[Any], duals: Sequence[Any]) -> Any:
        def chosen(*floats: Any) -> list[Any]:
            full = dict(enumerate(values)) | dict(zip(moved, floats, strict=True))
            found = bind(*full.values())
            return [found[k] for k in shown]

        return jax.vjp(chosen, *(values[i] for i in moved))[1](list(duals))

    values, results = (
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
        for variables in (equation.invars, [equation.outvars[k] for k in shown])
    )
    try:
        jaxpr = jax.make_jaxpr(back)(values, results).jaxpr
    except Exception:  # each primitive without a derivative raises an error of its own
        return [_union(operands)] * len(equation.outvars)
    reads = _followed(jaxpr, [0] * len(values) + [1 << k for k in shown], _by_value)
    ways = _turned(reads, len(equation.outvars))
    return [_union([operands[i] for n, i in enumerate(moved) if way >> n & 1]) for way in ways]


def _by_value(equation: Any, operands: list[int]) -> list[int]:
    """What the results of one equation depend on; on all operands, unless it is a program that can be looked into."""
    if equation.primitive.name in ("scan", "cond"):
        return _through(equation, operands, _by_value)
    for inner in map(equation.params.get, _INNER):
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == len(operands):
            return _followed(jaxpr, operands, _by_value)
    return [_union(operands)] * len(equation.outvars)


def _through(equation: Any, operands: list[int], step: _Step) -> list[int]:
    """What the results of a `scan` or `cond` stand for."""
    if equation.primitive.name == "scan":
        return _through_time(equation.params, operands, step)
    branches = [_followed(branch.jaxpr, operands[1:], step) for branch in equation.params["branches"]]
    return [_union([*found, operands[0]]) for found in zip(*branches, strict=True)]


def _through_time(params: Any, operands: list[int], step: _Step) -> list[int]:
    """Carries hand on what they stand for, until there is nothing new."""
    constants, carries = scan_counts(params)
    held, carried, rows = (
        operands[:constants],
        operands[constants : constants + carries],
        operands[constants + carries :],
    )
    while True:
        found = _followed(params["jaxpr"].jaxpr, [*held, *carried, *rows], step)
        more = [a | b for a, b in zip(carried, found[:carries], strict=True)]
        if more == carried:
            return [*carried, *found[carries:]]
        carried = more


def _union(sets: Sequence[int]) -> int:
    total = 0
    for one in sets:
        total |= one
    return total
