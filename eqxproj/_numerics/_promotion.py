"""How the library's own code mixes dtypes and ranks, whatever modes of JAX the user has set for theirs.

`jax.numpy_dtype_promotion("strict")` and `jax.numpy_rank_promotion("raise")` are checks of the code that one writes.
They stay on while a user's loss is traced. The limits of what is called here are its own tests.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_T = TypeVar("_T")


def with_own_promotion(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, called in the modes that are the default of JAX."""

    @ft.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return called
