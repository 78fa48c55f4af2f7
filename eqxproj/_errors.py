"""The errors that the library raises beside `ValueError` and `TypeError`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class Unsupported:
    """An operation without a projection rule, where it stands in the user's code, and why, where that is not plain."""

    primitive: str
    source: str
    why: str = ""


_LOOP = (
    "\nA `while_loop` over unknowns has no fixed number of steps: write it with `jax.lax.scan`, or as a `fori_loop` "
    "whose bounds are known when it is traced."
)

_JUMPS = (
    "\nA derivative takes what is rounded from unknowns for fixed, and so may you: put `jax.lax.stop_gradient` around "
    "what rounds, or, where that is not your code, give the function around it a `jax.custom_vjp`, which is asked for "
    "its own answer."
)


class UnsupportedPrimitiveError(NotImplementedError):
    """A loss contains operations that have neither a projection rule nor a derivative.

    `missing` lists all of them.
    """

    def __init__(self, missing: Sequence[Unsupported]):
        self.missing = tuple(dict.fromkeys(missing))
        lines = [f"  - {m.primitive!r} at {m.source}{m.why and ', ' + m.why}" for m in self.missing]
        example = self.missing[0].primitive
        super().__init__(
            "These operations on unknowns have no projection rule, and no derivative to do without one:\n"
            + "\n".join(lines)
            + f"\nRegister a rule with `@eqxproj.register_projection({example!r})`, give the enclosing function a "
            "projection of its own with `@eqxproj.custom_projection`, or wrap the operand in `jax.lax.stop_gradient` "
            "to hold it at its value."
            + (_LOOP if any(m.primitive == "while" for m in self.missing) else "")
            + (_JUMPS if any(m.why for m in self.missing) else "")
        )


class NonFiniteError(FloatingPointError):
    """A state became NaN or infinite.

    `model` is the last good model, `step` the number of the step (from 0), `node` the description of the first node,
    from the objective back, at which it happened, and `history` what had been recorded till then.
    """

    def __init__(self, node: str, step: int, model: Any, history: Any = None):
        self.node, self.step, self.model, self.history = node, step, model, history
        super().__init__(
            f"The state became NaN or infinite at step {step}, at node {node}. The last good model is in the attribute "
            "`model` of this error. A smaller `tau`, a stiffer `metric` or a lower learning rate may help; data or "
            "initial parameters of an extreme scale are the usual cause."
        )


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted from the keyboard.

    `model` is the model after the last finished step, `step` the number of finished steps, and `history` what had been
    recorded till then.
    """

    def __init__(self, step: int, model: Any, history: Any):
        self.step, self.model, self.history = step, model, history
        super().__init__(
            f"Training was interrupted after step {step}. The model is in the attribute `model` of this exception."
        )


def check_function(name: str, function: object, form: str) -> None:
    """Raises a `TypeError` where the argument `name`, to be called as in `form`, is no function."""
    if not callable(function):
        raise TypeError(f"`{name}` must be a function `{form}`, got {function!r}.")


def checked_arrays(new: Sequence[Any], old: Sequence[Array], who: str) -> list[Array]:
    """What a rule has returned, as arrays; an error where it is not of the shapes and the kind of its inputs."""
    return [_checked_array(n, o, f"input {i}", who) for i, (n, o) in enumerate(zip(new, old, strict=True))]


def _checked_array(new: Any, old: Array, which: str, who: str) -> Array:
    remedy = "A rule returns new inputs (or duals) of the shapes and the kind of the old ones."
    try:
        found = jnp.asarray(new)
    except TypeError as error:
        raise TypeError(f"{who} returned {type(new).__name__} for {which}, which is an array. {remedy}") from error
    if found.shape != old.shape:
        raise ValueError(f"{who} returned shape {found.shape} for {which}, which has shape {old.shape}. {remedy}")
    is_number = isinstance(new, int | float) and not isinstance(new, bool)
    wanted = jnp.floating if jnp.issubdtype(old.dtype, jnp.floating) else jnp.inexact
    if jnp.issubdtype(old.dtype, wanted) and not (is_number or jnp.issubdtype(found.dtype, wanted)):
        raise TypeError(f"{who} returned dtype {found.dtype} for {which}, which has dtype {old.dtype}. {remedy}")
    return found.astype(old.dtype)
