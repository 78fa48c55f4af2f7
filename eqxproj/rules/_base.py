"""What every rule is: a projection onto the graph of one operation, in dual form.

A node computes $y = f(x_1, \\dots, x_n)$. Its rule solves

$$\\min_{x'} \\; \\sum_i w_i |x'_i - x_i|^2 + \\kappa |f(x') - (f(x) + r)|^2 .$$

It receives $x$ and the *dual* $\\mu = \\kappa r$ of each output, and returns the duals $\\nu_i = w_i (x'_i - x_i)$
of the inputs and the new output $f(x')$. Where the metric is steep the weights exceed what float32 holds: `weights`
and `kappa` are clamped (`_metric.py`), while `ratio(i)`, $\\kappa / w_i$, is exact. A rule that uses the ratio where
the step is small returns $J^T \\mu$ to rounding in the limit, whatever the scale.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._errors import Unsupported
from .._metric import Metric
from .._program._equations import Equation

Scale = float | Array


@dataclass(frozen=True, eq=False)
class Context:
    """What a rule may know of its node.

    - `function`: the operation, from the unknown operands to a list of outputs.
    - `known`: values of the program's known variables.
    - `equation`: the equation of an operation that is one primitive, else `None`.
    - `unknown`: for each operand of `equation`, whether it is unknown.
    - `weights`: weight of each unknown operand, clamped. `kappa`: weight of each output, clamped.
    - `log_weights`: logarithms of the weights, not clamped.
    - `ratios`: `ratios[o][i]` is kappa of output o over weight of operand i, exact.
    - `copies`: `"neuron"` or `"none"`. `memory`: the operands hold one entry per copy.
    - `weight_like`: for each unknown operand, whether it shows a parameter and nothing else.
    - `scale`: for an objective, the factor of the loss in its prox.
    - `metric`: of the problem, for rules that hold a problem of their own.
    - `unit`: what divides a dual to give it the size of a gradient of the loss.
    - `unmoved`: whether the operands are those of the forward pass, so that what it kept for the rule holds.
    - `as_published`: whether to follow the software of arXiv 2506.05878 where it departs from the projection.
    """

    function: Callable[..., list[Array]]
    known: Mapping[int, Any]
    equation: Equation | None
    unknown: tuple[bool, ...]
    weights: tuple[float, ...]
    log_weights: tuple[float, ...]
    kappa: tuple[Scale, ...]
    ratios: tuple[tuple[Scale, ...], ...]
    copies: str = "neuron"
    memory: bool = False
    weight_like: tuple[bool, ...] = ()
    scale: float = 1.0
    metric: Metric = Metric()
    unit: float = 1.0
    as_published: bool = False
    unmoved: bool = False

    @classmethod
    def plain(cls, unknown: Sequence[bool] = ()) -> Context:
        """A context that says nothing, to find out what a rule needs without projecting anything."""
        return cls(lambda *values: list(values), {}, None, tuple(unknown), (), (), (), ())

    def ratio(self, operand: int, output: int = 0) -> Scale:
        r"""$\kappa / w_i$."""
        return self.ratios[output][operand]

    def relative(self, i: int, j: int) -> float:
        """$w_i / w_j$, clamped to [1e-30, 1e30]."""
        return math.exp(min(max(self.log_weights[i] - self.log_weights[j], -69.0), 69.0))

    def swapped(self) -> Context:
        """The context of the same node with its two operands exchanged."""
        return replace(
            self,
            unknown=self.unknown[::-1],
            weights=self.weights[::-1],
            log_weights=self.log_weights[::-1],
            ratios=tuple(r[::-1] for r in self.ratios),
            weight_like=self.weight_like[::-1],
        )

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the primitive."""
        return {} if self.equation is None else self.equation.params

    def operands(self, unknown: Sequence[Array]) -> list[Array]:
        """All operands of the primitive, the known ones looked up."""
        assert self.equation is not None
        values = iter(unknown)
        return [
            next(values) if is_unknown else self.known[v.index]
            for v, is_unknown in zip(self.equation.inputs, self.unknown, strict=True)
        ]


class AbstractRule(abc.ABC):
    """A projection rule. Rules are stateless: what they need to know is in the context."""

    label: ClassVar[str]
    takes_precedence: ClassVar[bool] = False
    """Whether the rule is asked before its operation is fused or made part of the objective."""

    @property
    def leaps(self) -> bool:
        """Whether the output may leap where an operand hardly moves. A steep metric then minds the duals alone."""
        return False

    @abc.abstractmethod
    def project(
        self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]
    ) -> tuple[Sequence[Array], Sequence[Array]]:
        """Projects onto the graph of the operation.

        **Arguments:**

        - `ctx`: the node.
        - `inputs`: the unknown operands.
        - `duals`: weight times wanted change of each output.

        **Returns:**

        The duals of the inputs, and the new outputs.
        """

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        """Whether the rule can project onto this equation with these operands unknown."""
        return True

    def missing(self, equation: Equation, unknown: Sequence[bool]) -> Sequence[Unsupported]:
        """What has no rule inside of an operation that is a program of its own."""
        return ()

    def describe(self, equation: Equation | None) -> str:
        """What `explain()` prints in the column of the rule."""
        return self.label

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        """The function value of these inputs (which are expanded where the context says so)."""
        return ctx.function(*inputs)

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        """The copies that the node owns of an operand: a linear map, the identity unless a rule owns several."""
        return value

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        """How many copies the node owns of each element of its unknown operand number `operand`."""
        return 1.0


def is_negligible(ratios: Sequence[Scale]) -> bool:
    """Whether, as is known while tracing, what a node moves its operands by cannot be told from nothing in its output.

    Its multiplier is then the dual of its output. In float32 this changes nothing but where a gain is above $10^3$.
    """
    return all(isinstance(r, (int, float)) and r <= _NEGLIGIBLE for r in ratios)


_NEGLIGIBLE = 1e-13
"""Above what the default metric gives to an operand with a hundred thousand copies."""


def step(weight: Scale, dual: Array) -> Array:
    """The displacement that belongs to a dual. Weights are beyond what float16 holds."""
    wide = jnp.promote_types(dual.dtype, jnp.float32)
    return (dual.astype(wide) / jnp.asarray(weight, wide)).astype(dual.dtype)
