"""Functions decorated with `custom_projection`: one node each, projected by the user's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Array

from .._program._equations import Equation
from ._base import AbstractRule, Context
from ._points import through_points


class Custom(AbstractRule):
    """Calls the rule that the function was given."""

    label: ClassVar[str] = "custom"
    takes_precedence: ClassVar[bool] = True

    def describe(self, equation: Equation | None) -> str:
        return "custom" if equation is None else f"custom ({equation.params['call'].name})"

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
        operands = ctx.operands(inputs)
        call = ctx.params["call"]
        outputs = ctx.function(*inputs)

        def rule(targets):
            new = call.rule(ctx, operands, targets)
            return [n for n, is_unknown in zip(new, ctx.unknown, strict=True) if is_unknown]

        nus = through_points(rule, inputs, outputs, duals, ctx.weights, ctx.kappa)
        moved = [x + nu / w for x, nu, w in zip(inputs, nus, ctx.weights, strict=True)]
        return nus, ctx.function(*moved)
