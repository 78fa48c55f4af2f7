"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. A user's rule hides the library's own, and is asked
before an operation is fused with others. Rules are looked up while a loss is traced. Compiled functions of this library
take `registry_version()` as a static argument, so that a registration reaches them; a function that the user compiles
around them keeps the rules that it was compiled with.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

from jax.extend.core import Primitive

from ._base import AbstractRule
from ._custom import RegisteredDualRule, RegisteredRule

RULES: ChainMap[str, AbstractRule] = ChainMap({}, {})
"""Primitive name to rule: the rules of users, then the library's own."""

_F = TypeVar("_F")


def register_projection(
    primitive: str | Primitive, *, form: Literal["points", "duals"] = "points"
) -> Callable[[_F], _F]:
    """Registers a projection rule for a JAX primitive; use as a decorator.

    **Arguments:**

    - `primitive`: the primitive, or its name.
    - `form`: `"points"` for a function `(ctx, inputs, target) -> new_inputs`; `"duals"` for a function
        `(ctx, inputs, dual) -> duals of the inputs`, from which nothing is lost to rounding in the gradient regime.

    A function receives *all* operands of the primitive, known ones included (`ctx.unknown` says which are unknown) and
    returns as many; what it returns for known operands is ignored. `ctx.params` are the primitive's parameters,
    `ctx.weights` and `ctx.output_weights` the weights of the unknown operands and of the outputs. A subclass of
    [`AbstractRule`][], without arguments, or one of its instances is registered as it is.

    **Returns:**

    A decorator that returns the function or class unchanged. A second registration replaces the first;
    [`unregister_projection`][] takes it back. Functions of this library that are compiled already compile again.

    **Raises:** `TypeError` where the primitive or the decorated object is none, `ValueError` for another `form`.
    """
    name = _name_of(primitive)
    if form not in ("points", "duals"):
        raise ValueError(f'`form` must be "points" or "duals", got {form!r}.')

    def decorator(function: _F) -> _F:
        made: Any = function
        if isinstance(made, type) and issubclass(made, AbstractRule):
            made = made()
        if not isinstance(made, AbstractRule):
            if not callable(made):
                raise TypeError(
                    f"The projection rule of primitive {name!r} must be a function `(ctx, inputs, target) -> "
                    f"new_inputs` or a rule of `eqxproj.rules.AbstractRule`, got {function!r}."
                )
            made = (RegisteredDualRule if form == "duals" else RegisteredRule)(made, name)
        RULES[name] = made
        return function

    return decorator


def unregister_projection(primitive: str | Primitive) -> None:
    """Takes back what [`register_projection`][] registered for a primitive: the library's own rule answers again.

    **Arguments:**

    - `primitive`: the primitive, or its name. Where the library has no rule for it, it has none again.

    **Raises:** `ValueError` where no rule was registered for the primitive.
    """
    name = _name_of(primitive)
    if not is_registered(name):
        raise ValueError(
            f"`primitive` is {name!r}, for which no rule was registered. Registered are rules for: "
            f"{', '.join(sorted(RULES.maps[0])) or 'none'}. Register one with "
            f"`@eqxproj.register_projection({name!r})`."
        )
    del RULES[name]


def registry_version() -> Hashable:
    """The rules of users as they are now: what compiled functions depend on."""
    return tuple(RULES.maps[0].items())


def is_registered(name: str) -> bool:
    """Whether the rule of a primitive is a user's."""
    return name in RULES.maps[0]


def _name_of(primitive: Any) -> str:
    """The name of a primitive that is given as itself or by name."""
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"`primitive` must be the name of a primitive or a `jax.extend.core.Primitive`, got {primitive!r}."
        )
    return name
