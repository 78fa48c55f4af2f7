"""Checks of the arguments of sets: from what a caller gave to a number, a count, an axis or levels.

`owner` is the class and `name` its argument; both stand in the errors. Limits: shapes are seen by the sets themselves.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, Literal

from .._errors import as_number, described

Axis = int | tuple[int, ...] | None


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def real(owner: str, name: str, value: Any) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"`{owner}`: `{name}` must be a number, got {described(value)}.")
    return number


def positive(owner: str, name: str, value: Any) -> float:
    number = real(owner, name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{owner}`: `{name}` must be a positive number, got {described(value)}.")
    return number


def fraction(owner: str, name: str, value: Any) -> float:
    number = real(owner, name, value)
    if not 0 < number <= 1:
        raise ValueError(f"`{owner}`: `{name}` must be in (0, 1], got {value!r}.")
    return number


def count(owner: str, name: str, value: Any) -> int:
    if not is_integer(value):
        raise TypeError(f"`{owner}`: `{name}` must be an integer, got {value!r}.")
    if int(value) < 1:
        raise ValueError(f"`{owner}`: `{name}` must be at least 1, got {value!r}.")
    return int(value)


def axis(owner: str, axis: Any) -> Axis:
    if axis is None:
        return None
    several = axis if isinstance(axis, tuple) else (axis,)
    if not several or not all(map(is_integer, several)):
        raise TypeError(f"`{owner}`: `axis` must be an integer, a tuple of integers, or `None`; got {axis!r}.")
    return tuple(int(a) for a in several) if isinstance(axis, tuple) else int(axis)


def scale(scale: Any) -> float | Literal["learned"] | None:
    if scale is None or (isinstance(scale, str) and scale == "learned"):
        return scale
    if isinstance(scale, (bool, str)) or not 0 < real("Quantized", "scale", scale) < math.inf:
        raise ValueError(f'`Quantized`: `scale` must be `None`, "learned" or a positive number, got {scale!r}.')
    return float(scale)


def levels(levels: Any, scale: float | Literal["learned"] | None) -> tuple[float, ...]:
    """The levels, in ascending order, before they are multiplied by the scale."""
    if is_integer(levels):
        return levels_of_bits(int(levels), scale)
    if isinstance(levels, (str, bool)) or not isinstance(levels, Iterable):
        raise TypeError(f"`Quantized`: `levels` must be a sequence of numbers, or a number of bits; got {levels!r}.")
    values = tuple(sorted({real("Quantized", "levels", x) + 0.0 for x in levels}))  # + 0.0 makes -0.0 and 0.0 one
    if not values or not all(math.isfinite(x) for x in values):
        raise ValueError(f"`Quantized`: `levels` must be one or more finite numbers, got {levels!r}.")
    if scale == "learned" and not any(values):
        raise ValueError(
            f"`Quantized`: `levels` must hold one that is not zero where the scale is learned, got {levels!r}."
        )
    return values


def levels_of_bits(bits: int, scale: float | Literal["learned"] | None) -> tuple[float, ...]:
    """The levels that a number of bits tells apart."""
    if scale is None:
        remedy = '`scale`: a positive number, or "learned"'
        raise ValueError(f"`Quantized`: `levels` as a number of bits, got {bits}, must come with a {remedy}.")
    if not 1 <= bits <= 8:
        raise ValueError(f"`Quantized`: `levels` as a number of bits must be from 1 to 8, got {bits}.")
    return (-1.0, 1.0) if bits == 1 else tuple(i - (2**bits - 1) / 2 for i in range(2**bits))
