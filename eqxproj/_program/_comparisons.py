"""Comparisons of two unknowns, rewritten as comparisons of their difference with zero.

`x > y` as a number is a step of `x - y`: a scalar node with two terms, as `relu(x - y)` is one. Only comparisons that
are read as numbers are rewritten; a predicate that chooses between values stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.extend.core import primitives as jp

from ._equations import Equation, Fresh, Program, Variable, dependents

_COMPARISONS = ("gt", "ge", "lt", "le")


def with_differences(program: Program, seeds: Sequence[Variable]) -> Program:
    """The program with its comparisons of two unknowns rewritten; `seeds` are its unknown inputs."""
    unknown = dependents(program.equations, seeds)
    readers: dict[int, list[str]] = {v.index: ["output"] for v in program.outputs}
    for equation in program.equations:
        for v in equation.inputs:
            readers.setdefault(v.index, []).append(equation.name)

    def compares(equation: Equation) -> bool:
        both = all(v.index in unknown and v.is_float for v in equation.inputs)
        numbers = all(name == "convert_element_type" for name in readers.get(equation.outputs[0].index, ()))
        return equation.name in _COMPARISONS and both and numbers

    if not any(map(compares, program.equations)):
        return program
    fresh = Fresh(program)
    equations: list[Equation] = []
    for equation in program.equations:
        if not compares(equation):
            equations.append(equation)
            continue
        difference = fresh.like(equation.inputs[0])
        zero = fresh.constant(np.zeros((), difference.dtype))
        equations.append(Equation(jp.sub_p, {}, equation.inputs, (difference,), equation.source))
        full = fresh.like(difference)
        params = dict(shape=full.shape, broadcast_dimensions=(), sharding=None)
        equations.append(Equation(jp.broadcast_in_dim_p, params, (zero,), (full,), equation.source))
        fresh.static[full.index] = 0.0
        compared = (difference, full)
        equations.append(Equation(equation.primitive, equation.params, compared, equation.outputs, equation.source))
    return Program(program.inputs, tuple(equations), program.outputs, fresh.constants, fresh.static)
