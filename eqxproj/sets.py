"""Sets for hard constraints on parameters: a parameter's constraint becomes "all copies equal, and in the set".

A set is a function that projects an array onto it. `train(..., constraints=[(where, set)])` projects after every
step, so that the returned model satisfies the constraint exactly, in its own dtype.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


class AbstractSet(eqx.Module):
    """A closed set of arrays."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The point of the set nearest to `x` (one of them, where there are several)."""


class Box(AbstractSet):
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.clip(x, self.low, self.high)


class Sparse(AbstractSet):
    kept_fraction: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        kept = max(1, math.floor(self.kept_fraction * x.size + 1e-9))
        order = jnp.argsort(-jnp.abs(x).ravel(), stable=True)
        mask = jnp.zeros(x.size, bool).at[order[:kept]].set(True)
        return jnp.where(mask.reshape(x.shape), x, jnp.zeros_like(x))


class Quantized(AbstractSet):
    levels: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        nearest = jnp.full_like(x, self.levels[0])
        for level in self.levels[1:]:
            value = jnp.asarray(level, x.dtype)
            nearest = jnp.where(jnp.abs(x - value) < jnp.abs(x - nearest), value, nearest)
        return nearest


def box(low: float, high: float) -> AbstractSet:
    """All arrays with entries from `low` to `high`.

    **Raises:** `ValueError` unless `low <= high`.
    """
    if not low <= high:
        raise ValueError(f"`low` must be at most `high`, got {low!r} and {high!r}.")
    return Box(float(low), float(high))


def non_negative() -> AbstractSet:
    """All arrays without negative entries."""
    return Box(0.0, math.inf)


def sparse(kept_fraction: float) -> AbstractSet:
    """All arrays of which at most this fraction of the entries (at least one) is not zero.

    **Raises:** `ValueError` unless `0 < kept_fraction <= 1`.
    """
    if isinstance(kept_fraction, bool) or not 0 < kept_fraction <= 1:
        raise ValueError(f"`kept_fraction` must be in (0, 1], got {kept_fraction!r}.")
    return Sparse(float(kept_fraction))


def quantized(levels: Sequence[float]) -> AbstractSet:
    """All arrays whose entries are among `levels`.

    **Raises:** `ValueError` where there is no level, or one that is not finite.
    """
    values = tuple(sorted({float(x) for x in levels}))
    if not values or not all(math.isfinite(x) for x in values):
        raise ValueError(f"`levels` must be one or more finite numbers, got {levels!r}.")
    return Quantized(values)


Constraint = tuple[Callable[[Any], Any], AbstractSet]


def check_constraints(model: PyTree, constraints: Sequence[Constraint]) -> None:
    """Raises a clear error for a constraint that cannot be attached to the model."""
    for i, constraint in enumerate(constraints):
        if not isinstance(constraint, tuple) or len(constraint) != 2 or not callable(constraint[0]):
            raise TypeError(f"`constraints[{i}]` must be a pair `(where, set)`, got {constraint!r}.")
        where, chosen = constraint
        if not isinstance(chosen, AbstractSet):
            raise TypeError(
                f"`constraints[{i}]` must name a set of `eqxproj.sets`, such as `sets.sparse(0.1)`; got {chosen!r}."
            )
        leaves = jtu.tree_leaves(where(model))
        if not leaves or not all(eqx.is_inexact_array(x) for x in leaves):
            raise ValueError(
                f"`constraints[{i}]`: `where(model)` must be a floating-point array of the model (or several)."
            )


def apply_constraints(model: PyTree, constraints: Sequence[Constraint]) -> PyTree:
    """The model with every constrained array projected onto its set."""
    for where, chosen in constraints:
        model = eqx.tree_at(where, model, replace_fn=lambda part, chosen=chosen: jtu.tree_map(chosen, part))
    return model
