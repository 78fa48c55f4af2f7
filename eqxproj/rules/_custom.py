"""Functions decorated with `custom_projection`, and primitives with a registered projection: answered by a user's rule.

Limits: a rule in points is asked for a target near the present output in the gradient regime, so its answer must be
proportional to small wanted changes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxtyping import Array

from .._errors import check_shapes
from .._program._equations import Equation
from ._base import AbstractRule, Context
from ._points import of_visible_step, of_whole_step


class AbstractUserRule(AbstractRule):
    """A rule in points, `answer(ctx, inputs, targets) -> new inputs`, in both regimes."""

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return of_visible_step(lambda targets: self.answer(ctx, inputs, targets), inputs, ctx.function(*inputs), duals)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        outputs, weights = ctx.function(*inputs), (ctx.weights, ctx.output_weights)
        return of_whole_step(lambda targets: self.answer(ctx, inputs, targets), inputs, outputs, duals, *weights)

    @abc.abstractmethod
    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        """The new unknown operands."""


class Custom(AbstractUserRule):
    """Calls the rule that the function was given."""

    label: ClassVar[str] = "custom"
    takes_precedence: ClassVar[bool] = True

    def describe(self, equation: Equation | None) -> str:
        return "custom" if equation is None else f"custom ({equation.params['call'].name})"

    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        new = ctx.params["call"].rule(ctx, ctx.operands(inputs), targets)
        return [n for n, is_unknown in zip(new, ctx.unknown, strict=True) if is_unknown]


class RegisteredRule(AbstractUserRule):
    """A rule in points that a user wrote for one primitive."""

    label: ClassVar[str] = "registered"

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name

    def describe(self, equation: Equation | None) -> str:
        return _described(self.function, self.name)

    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        return _called(self.function, self.name, ctx, inputs, targets)


class RegisteredDualRule(AbstractRule):
    """A rule in duals that a user wrote for one primitive: the same answer in both regimes."""

    label: ClassVar[str] = "registered"

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name

    def describe(self, equation: Equation | None) -> str:
        return _described(self.function, self.name)

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return _called(self.function, self.name, ctx, inputs, duals)

    project = pullback


def _described(function: Callable[..., Any], name: str) -> str:
    return f"registered ({getattr(function, '__name__', name)})"


def _called(
    function: Callable[..., Any], name: str, ctx: Context, inputs: Sequence[Array], wanted: Sequence[Array]
) -> list[Array]:
    """What a user's function answers for the unknown operands, checked."""
    new = function(ctx, tuple(ctx.operands(inputs)), wanted[0] if len(wanted) == 1 else tuple(wanted))
    new = list(new) if isinstance(new, (tuple, list)) else [new]
    unknown = ctx.unknown
    if len(new) == len(unknown):
        new = [x for x, is_unknown in zip(new, unknown, strict=True) if is_unknown]
    elif len(new) != sum(unknown):
        raise ValueError(
            f"The projection rule of primitive {name!r} returned {len(new)} inputs, but the primitive has "
            f"{len(unknown)} operands, {sum(unknown)} of them unknown. Return one new value an operand, in their order."
        )
    check_shapes(new, inputs, f"The projection rule of primitive {name!r}")
    return new
