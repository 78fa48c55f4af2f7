"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. Views and elementwise operations need no entry (see
`_program/_primitives.py`); an entry for one of them takes precedence. Rules are looked up while a loss is traced, so
that compiled functions of this library take `registry_version()` as a static argument: they compile again after a
registration. A function that the user compiles around them keeps the rules that it was compiled with.
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

_version = 0

_F = TypeVar("_F", bound=Callable[..., Any])


class RegisteredRule(AbstractRule):
    """A rule that a user wrote for one primitive, in points or in duals."""

    label: ClassVar[str] = "registered"

    def __init__(
        self,
        function: Callable[..., Any],
        form: Literal["points", "duals"],
        name: str,
        replaced: AbstractRule | None = None,
    ):
        self.function = function
        self.form = form
        self.name = name
        self.replaced = replaced
        """The library's own rule of the primitive, if it has one."""

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

    A decorator that returns the function unchanged. A second registration replaces the first;
    [`unregister_projection`][] takes it back. Functions of this library that are compiled already compile again.
    """
    name = _name_of(primitive)
    if form not in ("points", "duals"):
        raise ValueError(f'`form` must be "points" or "duals", got {form!r}.')

    def decorator(function: _F) -> _F:
        before = RULES.get(name)
        own = before.replaced if isinstance(before, RegisteredRule) else before
        _write(name, RegisteredRule(function, form, name, own))
        return function

    return decorator


def unregister_projection(primitive: str | Primitive) -> None:
    """Takes back what [`register_projection`][] registered for a primitive: the library's own rule answers again.

    **Arguments:**

    - `primitive`: the primitive, or its name. Where the library has no rule for it, it has none again.

    **Raises:** `ValueError` where no rule was registered for the primitive.
    """
    name = _name_of(primitive)
    registered = RULES.get(name)
    if not isinstance(registered, RegisteredRule):
        known = sorted(n for n, rule in RULES.items() if isinstance(rule, RegisteredRule))
        raise ValueError(
            f"`primitive` is {name!r}, for which no rule was registered. Registered are rules for: "
            f"{', '.join(known) or 'none'}. Register one with `@eqxproj.register_projection({name!r})`."
        )
    _write(name, registered.replaced)


def registry_version() -> int:
    """A number that grows with every registration and every one taken back."""
    return _version


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
