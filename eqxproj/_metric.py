r"""The metric: one weight for every edge, from the objective back.

The weight of an edge is $g^{d}$ with `grade` $g$ and $d$ the depth of its consumer (the longest way to the objective,
whose own operands weigh one), times `parameter` where it shows parameters alone. Weights are kept as logarithms, so
that their ratios, on which small steps depend, are exact at any depth, while their values are clamped: those of copies
to [1e-30, 1e30], those of outputs to [1e-30, 1e24]. So far down nothing moves by more than rounding. Were both clamped
to the same number, a node would move its operands, and write an output that moves, as far as is wanted of it where its
exact ratio says hardly at all; and iterations of such moves grow without bound.
"""

from __future__ import annotations

import math

import equinox as eqx

from ._errors import described, positive_number

_CLAMP = 69.0
_OUTPUT_CLAMP = 55.0
_STEEP = 100.0


class Metric(eqx.Module):
    r"""How far a change of each variable counts.

    **Arguments:**

    - `grade`: factor of the weights from each node to the one behind it, seen from the objective.
    - `parameter`: factor of the weights of parameters over those of states.

    `grade=1, parameter=1` is the unit metric of the paper. As both grow, one cyclic sweep returns the gradient.
    """

    grade: float = eqx.field(static=True)
    parameter: float = eqx.field(static=True)

    def __init__(self, grade: float = 1.0, parameter: float = 1.0):
        self.grade = positive_number("grade", grade)
        self.parameter = positive_number("parameter", parameter)

    @property
    def in_gradient_regime(self) -> bool:
        """Whether nodes answer by their pullback: the gradient regime, from a grade of 100 on.

        So steep a metric lets no node move farther than its function is straight, or across a jump.
        """
        return self.grade >= _STEEP

    def log_weight(self, depth: int, is_parameter: bool) -> float:
        """The logarithm of the weight of an edge into a node of this depth."""
        return depth * math.log(self.grade) + (math.log(self.parameter) if is_parameter else 0.0)


def check_metric(metric: object) -> None:
    """Raises a `TypeError` for what is no metric."""
    if not isinstance(metric, Metric):
        raise TypeError(f"`metric` must be a metric such as `eqxproj.Metric(grade=10.0)`, got {described(metric)}.")


def clamped(log_weight: float) -> float:
    """The weight of a copy from its logarithm, within what float32 can square-root and divide."""
    return math.exp(min(max(log_weight, -_CLAMP), _CLAMP))


def clamped_output(log_weight: float) -> float:
    """The weight of an output from its logarithm: at most a millionth of the largest weight of a copy."""
    return math.exp(min(max(log_weight, -_CLAMP), _OUTPUT_CLAMP))


def ratio(log_numerator: float, log_denominator: float) -> float:
    """The exact ratio of two weights, zero where it is below what a float64 holds."""
    return math.exp(min(max(log_numerator - log_denominator, -700.0), _CLAMP))
