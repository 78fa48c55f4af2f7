"""The errors that the library raises beside `ValueError` and `TypeError`, and checks that many arguments share.

All of them can be pickled, so that they cross from one process to another. In the place of what a model holds that
cannot be pickled, such as a `lambda`, stands its `repr` then.
"""

from __future__ import annotations

import math
import numbers
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array


@dataclass(frozen=True)
class Unsupported:
    """An operation without a projection rule, where it stands in the user's code, and why, where that is not plain."""

    primitive: str
    source: str
    why: str = ""


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # it is up to the types of the model what they raise
        return False
    return True


def picklable(model: Any) -> Any:
    """The model, with text in the place of leaves that cannot be pickled; text alone where its structure cannot be."""
    if _can_be_pickled(model):
        return model
    rest = jtu.tree_map(lambda leaf: leaf if _can_be_pickled(leaf) else repr(leaf), model)
    return rest if _can_be_pickled(rest) else repr(model)


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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.missing,)


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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.node, self.step, picklable(self.model), self.history)


class EvaluationError(ValueError):
    """A function of `evaluate` raised, or returned no number.

    `name` is that of the function, `why` what went wrong, `model` the model that it was given, `step` the number of
    finished steps, and `history` what had been recorded till then. What the function raised is the `__cause__`.
    """

    def __init__(self, name: str, why: str, step: int, model: Any, history: Any = None):
        self.name, self.why, self.step, self.model, self.history = name, why, step, model, history
        super().__init__(
            f"`evaluate[{name!r}]` {why} This was after {step} steps of training. The model is in the attribute "
            "`model` of this error."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.why, self.step, picklable(self.model), self.history)


class ConstraintError(ValueError):
    """Several constraints on one array do not hold together at the end of training, as they did before it.

    `model` is the trained model, `history` what has been recorded.
    """

    def __init__(self, names: str, model: Any, history: Any):
        self.names, self.model, self.history = names, model, history
        super().__init__(
            f"{names} do not hold together in the trained model: from where training led, no common point was found. "
            "The model is in the attribute `model` of this error. Hold the array in one set that says both."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, picklable(self.model), self.history)


class CheckpointError(OSError):
    """A checkpoint could not be written, as where a disk is full. Those that were written before are there still.

    `model` is the model after the last finished step, `step` the number of finished steps, `history` what had been
    recorded till then, and `why` what the system said.
    """

    def __init__(self, why: str, step: int, model: Any, history: Any):
        self.why, self.step, self.model, self.history = why, step, model, history
        super().__init__(
            f"The checkpoint of step {step} could not be written: {why}. The model is in the attribute `model` of this "
            "error. Make room, or name another folder, and go on with `resume=`."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why, self.step, picklable(self.model), self.history)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted from the keyboard.

    `model` is the model after the last finished step, `step` the number of finished steps, `history` what had been
    recorded till then, and `state` what `train(resume=...)` goes on from; it is left out where this is pickled.
    """

    def __init__(self, step: int, model: Any, history: Any, state: Any = None):
        self.step, self.model, self.history, self.state = step, model, history, state
        super().__init__(
            f"Training was interrupted after step {step}. The model is in the attribute `model` of this exception."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, picklable(self.model), self.history)


def as_number(value: Any) -> float | None:
    """A real number of Python, numpy or JAX; `None` for anything else (Booleans, text, arrays, traced values)."""
    is_scalar_array = isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0
    if is_scalar_array and not isinstance(value, jax.core.Tracer) and value.dtype.kind in "iuf":
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # of an integer beyond the largest float
        return float("inf") if bool(value > 0) else float("-inf")  # pyright: ignore[reportOperatorIssue]


def positive_number(name: str, value: Any, meaning: str = "") -> float:
    """A positive finite number, of an argument that stands for `meaning`; a `ValueError` for anything else."""
    number = as_number(value)
    if number is None or not 0 < number < math.inf:
        wanted = f"must be a positive finite number{meaning and ', '}{meaning}"
        raise ValueError(f"`{name}` {wanted}; got {described(value)}.")
    return number


def described(value: Any, most: int = 200) -> str:
    """What an argument is, for a message: its `repr`, or its type where that is long or fails."""
    try:
        text = repr(value)
    except Exception:  # the message is about something else
        text = ""
    is_short = 0 < len(text) <= most and "\n" not in text
    return text if is_short else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_function(name: str, value: Any, wanted: str) -> None:
    """Raises a `TypeError` for what cannot be called; `wanted` is how it is called, such as `loss(model, *batch)`."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function `{wanted}`, got {described(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Raises a `TypeError` for what is neither `True` nor `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be `True` or `False`, got {described(value)}.")


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


def as_array(name: str, x: Any) -> np.ndarray:
    """An argument as a numpy array of numbers: an array, a number, or a (nested) list of numbers.

    **Raises:** `TypeError` for anything else, `ValueError` for arrays of anything else than numbers, with the remedy.
    """
    if not isinstance(x, (np.ndarray, np.generic, jax.Array, list, tuple, bool, int, float, complex)):
        raise TypeError(f"`{name}` must be an array of numbers; got {_no_array(x)}")
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise ValueError(
                f"`{name}` is a masked array with {np.ma.count_masked(x)} masked entries. Fill them, as in "
                "`x.filled(0)`, and pass the mask as a further array for the loss to use."
            )
        x = x.data
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"`{name}` is a list whose rows have unequal lengths ({error}). Pad them to one.") from error
    kind = array.dtype.kind
    if kind not in "biufc" and not (kind == "V" and jnp.issubdtype(array.dtype, np.number)):
        raise ValueError(f"`{name}` must hold numbers, got dtype {array.dtype}.{_REMEDIES.get(kind, '')}")
    return array


_REMEDIES = {
    "O": " Make it an array of one type, `x.astype(np.float32)`, or pad its rows to one length and stack them.",
    "V": " Pass its fields as arrays of their own.",
    "U": " Encode text as integers.",
    "S": " Encode text as integers.",
    "M": " Take numbers of it, as `x.astype(np.int64) / 1e9`.",
    "m": " Take numbers of it, as `x / np.timedelta64(1, 's')`.",
}


def _no_array(x: Any) -> str:
    """What was given in place of an array, with the remedy."""
    name = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}".removeprefix("builtins.")
    if isinstance(x, str):
        return f"text, {x[:40]!r}. Encode text as integers."
    if hasattr(x, "to_numpy"):
        return f"{name}. Pass numpy arrays: `frame.to_numpy()`."
    if hasattr(x, "__array__"):
        return f"{name}. Pass numpy arrays: `np.asarray(x)`."
    return f"{name}. Pass numpy or JAX arrays, or (nested) tuples and dictionaries of them."


def is_key(x: Any) -> bool:
    """Whether a value is a PRNG key of the new kind."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_key(key: Any) -> Array:
    """The key as one of the new kind, `jax.random.key(0)` where it is `None`.

    **Raises:** `TypeError` for what is no key, `ValueError` for several.
    """
    key = jax.random.key(0) if key is None else key
    wanted = "`key` must be one PRNG key such as `jax.random.key(0)`, got"
    if not isinstance(key, jax.Array) or not (is_key(key) or key.dtype == np.uint32):
        raise TypeError(f"{wanted} {described(key)}.")
    if not is_key(key):
        if key.ndim != 1:
            raise ValueError(f"{wanted} an array of shape {key.shape}.")
        key = jax.random.wrap_key_data(key)
    if key.shape != ():
        raise ValueError(f"{wanted} {key.size} of them. Choose one: `key[0]`.")
    return key
