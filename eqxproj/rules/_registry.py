"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. Views and elementwise operations need no entry (see
`_program/_primitives.py`); an entry for one of them takes precedence. Rules are looked up while a loss is traced.
Compiled functions of this library take `registry_version()` as a static argument, so that they compile again after a
registration. A function that the user compiles around them keeps the rules that it was compiled with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from jax.extend.core import Primitive

from ._base import AbstractRule
from ._custom import RegisteredDualRule, RegisteredRule

RULES: dict[str, AbstractRule] = {}
"""Primitive name to rule."""
_OWN: dict[str, AbstractRule | None] = {}
"""For primitives with a rule that a user registered: the library's own rule, `None` where it has none."""
_version = 0

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
    `ctx.weights` and `ctx.output_weights` the weights of the unknown operands and of the outputs.

    **Returns:**

    A decorator that returns the function unchanged. A second registration replaces the first;
    [`unregister_projection`][] takes it back. Functions of this library that are compiled already compile again.
    """
    name = _name_of(primitive)
    if form not in ("points", "duals"):
        raise ValueError(f'`form` must be "points" or "duals", got {form!r}.')

    def decorator(function: _F) -> _F:
        if not _is_registered(name):
            _OWN[name] = RULES.get(name)
        _write(name, (RegisteredDualRule if form == "duals" else RegisteredRule)(function, name))
        return function

    return decorator


def unregister_projection(primitive: str | Primitive) -> None:
    """Takes back what [`register_projection`][] registered for a primitive: the library's own rule answers again.

    **Arguments:**

    - `primitive`: the primitive, or its name. Where the library has no rule for it, it has none again.

    **Raises:** `ValueError` where no rule was registered for the primitive.
    """
    name = _name_of(primitive)
    if not _is_registered(name):
        known = ", ".join(filter(_is_registered, sorted(RULES)))
        raise ValueError(
            f"`primitive` is {name!r}, for which no rule was registered. Registered are rules for: {known or 'none'}. "
            f"Register one with `@eqxproj.register_projection({name!r})`."
        )
    _write(name, _OWN.pop(name))


def registry_version() -> int:
    """A number that grows with every registration, and with every one that is taken back."""
    return _version


def _is_registered(name: str) -> bool:
    """Whether the rule of a primitive is a user's."""
    return isinstance(RULES.get(name), RegisteredRule | RegisteredDualRule)


def _write(name: str, rule: AbstractRule | None) -> None:
    """Sets the rule of a primitive, or removes it."""
    global _version
    if rule is None:
        del RULES[name]
    else:
        RULES[name] = rule
    _version += 1


def _name_of(primitive: Any) -> str:
    """The name of a primitive that is given as itself or by name."""
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"`primitive` must be the name of a primitive or a `jax.extend.core.Primitive`, got {primitive!r}."
        )
    return name
