r"""Reads an elementwise equation as an affine function $\sum_i c_i x_i + d$ of its unknown operands.

Transforms an equation into its terms. Limits: it names the coefficients $c_i$, not the constant $d$, and reads one
equation alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from ._equations import Equation, Variable
from ._primitives import AFFINE


@dataclass(frozen=True)
class AffineTerm:
    """`scale` times the known `factors` (each to the power 1 or -1) times `variable`, summed over `axes`."""

    variable: Variable
    scale: float = 1.0
    factors: tuple[tuple[Variable, int], ...] = ()
    axes: tuple[int, ...] = ()

    def coefficient(self, known: Mapping[int, Any]) -> float | Array:
        """The scale times the factors, whose values are in `known`."""
        value: float | Array = self.scale
        for variable, power in self.factors:
            value = value * known[variable.index] if power > 0 else value / known[variable.index]
        return value


def affine_terms(
    equation: Equation, unknown: frozenset[int], static: Mapping[int, float]
) -> tuple[AffineTerm, ...] | None:
    """One term for each unknown operand of an equation, with `static` factors in its scale.

    `None` where the equation is not affine in its unknown operands, or divides by the number zero.
    """
    name, inputs = equation.name, equation.inputs
    if name not in AFFINE or not equation.outputs[0].is_float:
        return None
    is_unknown = [v.index in unknown for v in inputs]
    if name in ("add", "add_any", "sub"):
        signs = (1.0, -1.0 if name == "sub" else 1.0)
        return tuple(AffineTerm(v, s) for v, s, picked in zip(inputs, signs, is_unknown, strict=True) if picked)
    if name in ("neg", "copy", "convert_element_type"):
        return (AffineTerm(inputs[0], -1.0 if name == "neg" else 1.0),) if inputs[0].is_float else None
    if sum(is_unknown) != 1 or (name == "div" and is_unknown[1]):
        return None
    variable, factor = inputs[is_unknown.index(True)], inputs[is_unknown.index(False)]
    power = 1 if name == "mul" else -1
    if factor.index not in static:
        return (AffineTerm(variable, 1.0, ((factor, power),)),)
    number = static[factor.index]
    return None if power < 0 and number == 0 else (AffineTerm(variable, number**power),)
