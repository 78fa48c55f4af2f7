"""The registry of projection rules: a dictionary from the name of a primitive to its rule.

Primitives are known by name because some are exported nowhere. A user's rule hides the library's own, and is asked
before an operation is fused with others. Rules are looked up while a loss is traced. Compiled functions of this library
take `registry_version()` as a static argument, so that a registration reaches them; a function that the user compiles
around them keeps the rules that it was compiled with.
"""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import jax
from jax.extend.core import Primitive, primitives
from jax.interpreters import ad, batching

from ._base import AbstractRule
from ._custom import RegisteredDualRule, RegisteredRule

RULES: ChainMap[str, AbstractRule] = ChainMap({}, {})
"""Primitive name to rule: the rules of users, then the library's own."""

_F = TypeVar("_F")


def register_projection(
    primitive: str | Primitive, *, form: Literal["points", "duals"] = "points", is_discontinuous: bool | None = None
) -> Callable[[_F], _F]:
    """Registers a projection rule for a JAX primitive; use as a decorator.

    **Arguments:**

    - `primitive`: the primitive, or its name. A primitive of one's own that JAX can neither differentiate nor batch is
        given as itself, since its name is known nowhere.
    - `form`: `"points"` for a function `(ctx, inputs, target) -> new_inputs`, asked as in [`custom_projection`][];
        `"duals"` for a function `(ctx, inputs, dual) -> duals of the inputs`, from which nothing is lost to rounding
        in the gradient regime.
    - `is_discontinuous`: whether the output may jump where an operand hardly moves, as in [`custom_projection`][]. Not
        for an [`AbstractRule`][], which says so itself.

    A function receives *all* operands of the primitive, known ones included (`ctx.unknown` says which are unknown) and
    returns as many; what it returns for known operands is ignored. `ctx.params` are the primitive's parameters,
    `ctx.weights` and `ctx.output_weights` the weights of the unknown operands and of the outputs. A subclass of
    [`AbstractRule`][], without arguments, or one of its instances is registered as it is.

    **Returns:**

    A decorator that returns the function or class unchanged. A second registration replaces the first;
    [`unregister_projection`][] takes it back. Functions of this library that are compiled already compile again.

    **Raises:** `TypeError` where the primitive or the decorated object is none, `ValueError` for another `form`, and
    for the name of no primitive.
    """
    name = _name_of(primitive)
    if isinstance(primitive, str):
        _check_known(name)
    if not isinstance(is_discontinuous, bool | None):
        raise TypeError(f"`is_discontinuous` must be `True`, `False` or `None`, got {is_discontinuous!r}.")
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
            made = (RegisteredDualRule if form == "duals" else RegisteredRule)(made, name, is_discontinuous)
        elif is_discontinuous is not None:
            raise ValueError(
                f"`is_discontinuous` is {is_discontinuous}, but a rule of `eqxproj.rules.AbstractRule` says by its own "
                "property `is_discontinuous` whether the output jumps. Leave the argument out."
            )
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
    name = primitive.name if isinstance(primitive, Primitive) else primitive
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"`primitive` must be the name of a primitive or a `jax.extend.core.Primitive`, got {primitive!r}."
        )
    return name


def _check_known(name: str) -> None:
    """Raises a `ValueError` for a name that no primitive has which JAX or this library knows anything of."""
    batchers = (getattr(batching, f"{kind}primitive_batchers", {}) for kind in ("", "fancy_", "axis_"))
    tables = (ad.primitive_jvps, ad.primitive_transposes, *(t for t in batchers if isinstance(t, dict)))
    known = [*vars(primitives).values(), *vars(jax.lax).values(), *(p for table in tables for p in table)]
    names = {p.name for p in known if isinstance(p, Primitive)} | set(RULES)
    if name in names:
        return
    near = difflib.get_close_matches(name, sorted(names), n=3)
    raise ValueError(
        f"`primitive` is {name!r}, and no primitive has that name."
        + (f" Did you mean {' or '.join(map(repr, near))}?" if near else "")
        + " `jax.make_jaxpr` prints the names of the primitives of a function. Give a primitive of your own as itself."
    )
