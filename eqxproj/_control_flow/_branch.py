"""`cond` and `switch`: the projection onto the graph of the branch that the forward pass takes.

Which branch is taken stays as the forward pass has it, whether or not the predicate depends on unknowns. Each branch
is a program of its own, projected by one sweep through its constraints ([`sweep`][]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from .._errors import Unsupported
from .._program._equations import Equation
from ..rules._base import AbstractRule, Context
from ._sweep import missing_in, sweep


class Branch(AbstractRule):
    """The projection onto the graph of one of several functions."""

    label: ClassVar[str] = "branch"
    answers_for_some: ClassVar[bool] = True

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return all(v.is_float for v, u in zip(equation.inputs[1:], unknown[1:], strict=True) if u)

    def missing(self, equation: Equation, unknown: Sequence[bool]) -> Sequence[Unsupported]:
        found: list[Unsupported] = []
        for branch in equation.params["branches"]:

            def once(index, *operands, branch=branch):
                start = [x for x, u in zip(operands, unknown[1:], strict=True) if u]
                return _function(branch, operands, unknown[1:], [v.is_float for v in equation.outputs]), start

            found.extend(missing_in(once, equation))
        return found

    def describe(self, equation: Equation | None) -> str:
        return "branch of the forward pass"

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        """The duals of the operands; the sweep through the branch is in the regime of the metric."""
        index, *operands = ctx.operands(inputs)
        choices = []
        for branch in ctx.params["branches"]:
            function = _function(branch, operands, ctx.unknown[1:], ctx.read)

            def back(start, duals, function=function):
                return sweep(function, start, duals, ctx.is_parameter, ctx, reached=ctx.reached)

            choices.append(back)
        return jax.lax.switch(jnp.asarray(index, jnp.int32), choices, list(inputs), list(duals))

    project = pullback


def _function(branch: Any, operands: Sequence[Any], unknown: Sequence[bool], read: Sequence[bool]):
    """A branch as a function from its unknown operands to the outputs that are read."""

    def function(*values):
        rest = iter(values)
        outputs = jaxpr_as_fun(branch)(*(next(rest) if u else x for x, u in zip(operands, unknown, strict=True)))
        return [y for y, is_read in zip(outputs, read, strict=True) if is_read]

    return function
