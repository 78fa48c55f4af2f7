"""Comparisons of two unknowns, rewritten as comparisons of their difference with zero.

Transforms a program: `x > y` as a number is a step of `x - y`, a scalar node with two terms, as `relu(x - y)` is one.
Limits: only comparisons that are read as numbers; a predicate that chooses between values stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax.extend.core import primitives as jp

from ._equations import Equation, Fresh, Program, Variable, dependents


def with_differences(program: Program, seeds: Sequence[Variable]) -> Program:
    """The program with its comparisons of unknowns rewritten; itself where it has none. `seeds` are unknown inputs."""
    unknown = dependents(program.equations, seeds)
    others = (e for e in program.equations if e.name != "convert_element_type")
    chosen = {v.index for v in (*program.outputs, *(v for e in others for v in e.inputs))}

    def compares(equation: Equation) -> bool:
        both = all(v.index in unknown and v.is_float for v in equation.inputs)
        return equation.name in ("gt", "ge", "lt", "le") and both and equation.outputs[0].index not in chosen

    return program.rewritten(compares, _of_difference)


def _of_difference(equation: Equation, fresh: Fresh) -> list[Equation]:
    """The equations of one comparison: the difference, a zero of its shape, and the comparison of the two."""
    difference = fresh.like(equation.inputs[0])
    zero = fresh.constant(np.zeros((), difference.dtype))
    full = fresh.like(difference)
    fresh.static[full.index] = 0.0
    params = dict(shape=full.shape, broadcast_dimensions=(), sharding=None)
    return [
        Equation(jp.sub_p, {}, equation.inputs, (difference,), equation.source),
        Equation(jp.broadcast_in_dim_p, params, (zero,), (full,), equation.source),
        replace(equation, inputs=(difference, full)),
    ]
