"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. Views and elementwise operations need no entry (see
`_names.py`); an entry for one of them takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from jax.extend.core import Primitive

from ._base import AbstractRule
from ._custom import RegisteredDualRule, RegisteredRule

RULES: dict[str, AbstractRule] = {}
"""Primitive name to rule."""

_F = TypeVar("_F", bound=Callable[..., Any])


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
        RULES[name] = (RegisteredDualRule if form == "duals" else RegisteredRule)(function, name)
        return function

    return decorator
