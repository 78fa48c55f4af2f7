"""Functions decorated with `custom_projection`, and primitives with a registered projection: answered by a user's rule.

Limits: a rule in points must answer small wanted changes in proportion; `_points.py` says what it is asked for. It is
called with arrays of float32 at least.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._errors import checked_arrays
from .._program._equations import Equation
from .._program._normal_form import normal_form
from ._base import AbstractRule, Context, Scale
from ._points import Point, of_small_steps, of_whole_step

_JUMPS = frozenset(("sign", "threshold", "floor", "ceil", "round", "argmax", "argmin"))


class AbstractUserRule(AbstractRule):
    """A rule of a user's; `jumps` says whether the function jumps, `None` that nobody said so."""

    jumps: bool | None = None

    @property
    def is_discontinuous(self) -> bool:
        return bool(self.jumps)

    def of(self, equation: Equation, unknown: Sequence[bool]) -> AbstractRule:
        said = self.jumps_by_author(equation)
        found = copy.copy(self)
        found.jumps = _jumps(equation, unknown) if said is None else said
        return found

    def jumps_by_author(self, equation: Equation) -> bool | None:
        """What the author of the rule says of jumps."""
        return self.jumps


class AbstractPointsRule(AbstractUserRule):
    """A rule in points, `answer(ctx, inputs, targets) -> new inputs`, in both regimes."""

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        ctx, point = self._point(ctx, inputs)

        def ask(weights: Sequence[Scale], output_weights: Sequence[Scale], targets: Sequence[Array]) -> list[Array]:
            return self.answer(_weighted(ctx, weights, output_weights), point.inputs, targets)

        return _narrowed(of_small_steps(ask, point, duals), inputs)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        ctx, point = self._point(ctx, inputs)
        weights = (ctx.weights, ctx.output_weights)
        found = of_whole_step(
            lambda targets: self.answer(ctx, point.inputs, targets), point, duals, *weights, ctx.metric.grade
        )
        return _narrowed(found, inputs)

    def _point(self, ctx: Context, inputs: Sequence[Array]) -> tuple[Context, Point]:
        """Where the rule is asked, in float32 at least, and the context with what is known there."""
        equation = ctx.equation
        assert equation is not None
        known = [v.index for v, is_unknown in zip(equation.inputs, ctx.unknown, strict=True) if not is_unknown]
        wide = replace(ctx, known={i: _wide(ctx.known[i]) for i in known})

        def function(values: Sequence[Array]) -> list[Array]:
            return [_wide(y) for y in equation.bind(*wide.operands(values))]

        values = [_wide(x) for x in inputs]
        return wide, Point(function, values, function(values), self.is_discontinuous)

    @abc.abstractmethod
    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        """The new unknown operands."""


def _wide(x: Array) -> Array:
    """An array in float32 at least, if it is real."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _narrowed(found: Sequence[Array], like: Sequence[Array]) -> list[Array]:
    return [nu.astype(x.dtype) for nu, x in zip(found, like, strict=True)]


def _weighted(ctx: Context, weights: Sequence[Scale], output_weights: Sequence[Scale]) -> Context:
    """The context with other weights, which may be traced."""
    return replace(
        ctx,
        weights=tuple(weights),
        log_weights=tuple(math.log(w) if isinstance(w, float) else jnp.log(w) for w in weights),
        output_weights=tuple(output_weights),
        ratios=tuple(tuple(k / w for w in weights) for k in output_weights),
    )


def _jumps(equation: Equation, unknown: Sequence[bool]) -> bool:
    """Whether a function jumps for certain: it rounds, or chooses between known values by unknown ones."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs]
    if equation.name in _JUMPS:
        return True
    call = equation.params.get("call")
    function = equation.bind if call is None else call.function
    program = normal_form(jax.make_jaxpr(lambda *values: function(*values))(*shapes))
    found = {v.index for v, is_unknown in zip(program.inputs, unknown, strict=True) if is_unknown}
    for e in program.equations:
        reads = [v.index in found for v in e.inputs]
        if not any(reads):
            continue
        chooses = e.name == "select_n" and reads[0] and not any(reads[1:])
        rounds = e.name == "convert_element_type" and e.inputs[0].is_float != e.outputs[0].is_float
        if e.name in _JUMPS or chooses or rounds:
            return True
        found.update(v.index for v in e.outputs)
    return False


class Custom(AbstractPointsRule):
    """Calls the rule that the function was given."""

    label: ClassVar[str] = "custom"
    takes_precedence: ClassVar[bool] = True

    def jumps_by_author(self, equation: Equation) -> bool | None:
        return equation.params["call"].is_discontinuous

    def describe(self, equation: Equation | None) -> str:
        return "custom" if equation is None else f"custom ({equation.params['call'].name})"

    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        new = ctx.params["call"].rule(ctx, ctx.operands(inputs), targets)
        return [n for n, is_unknown in zip(new, ctx.unknown, strict=True) if is_unknown]


class RegisteredRule(AbstractPointsRule):
    """A rule in points that a user wrote for one primitive."""

    label: ClassVar[str] = "registered"

    def __init__(self, function: Callable[..., Any], name: str, jumps: bool | None = None):
        self.function, self.name, self.jumps = function, name, jumps

    def describe(self, equation: Equation | None) -> str:
        return _described(self.function, self.name)

    def answer(self, ctx: Context, inputs: Sequence[Array], targets: Sequence[Array]) -> list[Array]:
        return _called(self.function, self.name, ctx, inputs, targets)


class RegisteredDualRule(AbstractUserRule):
    """A rule in duals that a user wrote for one primitive: the same answer in both regimes."""

    label: ClassVar[str] = "registered"

    def __init__(self, function: Callable[..., Any], name: str, jumps: bool | None = None):
        self.function, self.name, self.jumps = function, name, jumps

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
    return checked_arrays(new, inputs, f"The projection rule of primitive {name!r}")
