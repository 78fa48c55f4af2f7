"""Which operands of a function its derivative depends on, found out without computing anything.

Transforms a function into one number an operand, whose bit k says that output k has a derivative by it: that the
transpose of the derivative, as JAX writes it, leads from the dual of the output to that of the operand. Limits: this is
structure; a derivative that happens to be zero counts, and of a function that JAX cannot transpose every operand does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._normal_form import scan_counts

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def slopes_of(function: Callable[..., Any], operands: Sequence[Any], known: Any = None) -> list[int]:
    """For each operand of `function(known, operands) -> [outputs]` the outputs with a derivative by it, as bits.

    `operands` and `known` are arrays or their shapes.
    """
    outputs = jax.eval_shape(function, known, operands)
    shown = [i for i, y in enumerate(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]

    def back(known: Any, operands: Sequence[Any], duals: Sequence[Any]) -> Any:
        def chosen(*values: Any) -> list[Any]:
            found = function(known, values)
            return [found[i] for i in shown]

        return jax.vjp(chosen, *operands)[1](list(duals))

    try:
        jaxpr = jax.make_jaxpr(back)(known, list(operands), [outputs[i] for i in shown]).jaxpr
    except Exception:  # each primitive without a derivative raises an error of its own
        return [(1 << len(outputs)) - 1] * len(operands)
    others = len(jaxpr.invars) - len(shown)
    return _dependence(jaxpr, [0] * others + [1 << i for i in shown])


def _dependence(jaxpr: Jaxpr, seeds: Sequence[int]) -> list[int]:
    """What each output of a jaxpr depends on, given what each input stands for. All are sets, as bits."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, seeds, strict=True))

    def read(atom: Any) -> int:
        return 0 if isinstance(atom, Literal) else found.get(atom, 0)

    for equation in jaxpr.eqns:
        results = _of_equation(equation, [read(atom) for atom in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, operands: list[int]) -> list[int]:
    """What the results of one equation depend on; on all operands, unless it is a program that can be looked into."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _of_scan(params, operands)
    if name == "cond":
        branches = [_dependence(branch.jaxpr, operands[1:]) for branch in params["branches"]]
        return [_union([*found, operands[0]]) for found in zip(*branches, strict=True)]
    for inner in map(params.get, _INNER):
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == len(operands):
            return _dependence(jaxpr, operands)
    return [_union(operands)] * len(equation.outvars)


def _of_scan(params: Any, operands: list[int]) -> list[int]:
    """Carries hand on what they depend on, until there is nothing new."""
    constants, carries = scan_counts(params)
    held, carried, rows = (
        operands[:constants],
        operands[constants : constants + carries],
        operands[constants + carries :],
    )
    while True:
        found = _dependence(params["jaxpr"].jaxpr, [*held, *carried, *rows])
        more = [a | b for a, b in zip(carried, found[:carries], strict=True)]
        if more == carried:
            return [*carried, *found[carries:]]
        carried = more


def _union(sets: Sequence[int]) -> int:
    total = 0
    for one in sets:
        total |= one
    return total
