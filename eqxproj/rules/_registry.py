"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. Views and elementwise operations need no entry (see
`_names.py`); an entry for one of them takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import jax.numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array

from .._errors import check_shapes
from .._program._equations import Equation
from ._base import AbstractRule, Context
from ._points import through_points

RULES: dict[str, AbstractRule] = {}
"""Primitive name to rule."""

_F = TypeVar("_F", bound=Callable[..., Any])


class RegisteredRule(AbstractRule):
    """A rule that a user wrote for one primitive, in points or in duals."""

    label: ClassVar[str] = "registered"
    takes_precedence: ClassVar[bool] = True

    def __init__(self, function: Callable[..., Any], form: Literal["points", "duals"], name: str):
        self.function = function
        self.form = form
        self.name = name

    def describe(self, equation: Equation | None) -> str:
        return f"registered ({getattr(self.function, '__name__', self.name)})"

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]):
        operands = tuple(ctx.operands(inputs))

        def checked(wanted: Sequence[Array]) -> list[Array]:
            new = self.function(ctx, operands, wanted[0] if len(wanted) == 1 else tuple(wanted))
            new = _unknown_part(new if isinstance(new, (tuple, list)) else (new,), ctx.unknown, self.name)
            check_shapes(new, inputs, f"The projection rule of primitive {self.name!r}")
            return new

        if self.form == "duals":
            nus = checked(duals)
        else:
            nus = through_points(checked, inputs, ctx.function(*inputs), duals, ctx.weights, ctx.kappa)
        moved = [x + nu / jnp.asarray(w, x.dtype) for x, nu, w in zip(inputs, nus, ctx.weights, strict=True)]
        return nus, ctx.function(*moved)


def _unknown_part(new: Sequence[Any], unknown: Sequence[bool], name: str) -> list[Array]:
    if len(new) == len(unknown):
        return [x for x, is_unknown in zip(new, unknown, strict=True) if is_unknown]
    if len(new) == sum(unknown):
        return list(new)
    raise ValueError(
        f"The projection rule of primitive {name!r} returned {len(new)} inputs, but the primitive has {len(unknown)} "
        f"operands, {sum(unknown)} of them unknown. Return one new value an operand, in their order."
    )


def register_projection(
    primitive: str | Primitive, *, form: Literal["points", "duals"] = "points"
) -> Callable[[_F], _F]:
    """Registers a projection rule for a JAX primitive; use as a decorator.

    **Arguments:**

    - `primitive`: the primitive, or its name.
    - `form`: `"points"` for a rule `(ctx, inputs, target) -> new_inputs`; `"duals"` for a rule
        `(ctx, inputs, dual) -> duals of the inputs`, which loses nothing to rounding where the metric is steep.

    The rule receives *all* operands of the primitive, known ones included (`ctx.unknown` says which are unknown) and
    returns as many; what it returns for known operands is ignored. `ctx.params` are the primitive's parameters,
    `ctx.weights` and `ctx.kappa` the weights of the unknown operands and of the output.

    **Returns:**

    A decorator that returns the function unchanged. A second registration replaces the first.
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"`primitive` must be the name of a primitive or a `jax.extend.core.Primitive`, got {primitive!r}."
        )
    if form not in ("points", "duals"):
        raise ValueError(f'`form` must be "points" or "duals", got {form!r}.')

    def decorator(function: _F) -> _F:
        RULES[name] = RegisteredRule(function, form, name)
        return function

    return decorator
