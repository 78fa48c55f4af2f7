"""Constraints on a model: pairs `(where, set)`, checked, located among the parameters, and applied.

`where(model)` picks one array or several, as in `equinox.tree_at`; the set maps each to its nearest point. An array
that several constraints pick is held in all of their sets at once: at the nearest common point where they are convex,
and at one that is found by projecting in turn where they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._errors import described
from .._numerics._intersection import apart, common_point
from .._numerics._promotion import with_own_promotion
from ..sets import AbstractSet

Constraint = tuple[Callable[[Any], Any], AbstractSet]


class Held(eqx.Module):
    """An array of a model and the sets that it is held in: its position among the inexact arrays, their constraints."""

    position: int = eqx.field(static=True)
    numbers: tuple[int, ...] = eqx.field(static=True)
    sets: tuple[AbstractSet, ...]

    @property
    def is_discrete(self) -> bool:
        """Whether steps move an array that is kept for it, see `AbstractSet`."""
        return any(s.is_discrete for s in self.sets)

    def __call__(self, x: Array) -> Array:
        if len(self.sets) == 1:
            return self.sets[0](x)
        return common_point(x, self.sets, all(s.is_convex for s in self.sets))

    @property
    def names(self) -> str:
        return " and ".join(
            f"`constraints[{i}]` ({described(s)})" for i, s in zip(self.numbers, self.sets, strict=True)
        )


def held(model: PyTree, constraints: Sequence[Constraint]) -> tuple[Held, ...]:
    """What is held in which sets.

    **Raises:** `TypeError` for what is no pair of a function and a set, `ValueError` where the two do not fit, or where
    no array is found that is in all sets.
    """
    if not isinstance(constraints, (list, tuple)):
        raise TypeError(f"`constraints` must be a list of pairs `(where, set)`, got {described(constraints)}.")
    found: dict[int, list[int]] = {}
    for i, constraint in enumerate(constraints):
        for position in _picked(model, i, constraint):
            found.setdefault(position, []).append(i)
    return tuple(Held(p, tuple(numbers), tuple(constraints[i][1] for i in numbers)) for p, numbers in found.items())


@with_own_promotion
def check_common_points(model: PyTree, all_held: Sequence[Held]) -> None:
    """Raises a `ValueError` where several sets of one array have no common point that is found from its value."""
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    for one in all_held:
        if len(one.sets) == 1:
            continue
        start = leaves[one.position]
        found = _common(start, one)
        is_zero = bool(jnp.any(start != 0)) and not bool(jnp.any(found))
        if is_zero or bool(_is_apart(found, one)):
            what = "the only value found in all of their sets is zero" if is_zero else "no value was found in all sets"
            raise ValueError(
                f"{one.names} hold one array of shape {start.shape}, but {what}. Give sets that meet, or a start near "
                "to where they do; or hold the array in one set of your own that says all."
            )


@with_own_promotion
def outside(model: PyTree, all_held: Sequence[Held]) -> str:
    """The constraints that do not hold together on an array of a model; empty where all do. One alone always holds."""
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    several = [one for one in all_held if len(one.sets) > 1]
    return next((one.names for one in several if bool(_is_apart(leaves[one.position], one))), "")


@eqx.filter_jit
def _common(x: Array, one: Held) -> Array:
    return one(x)


@eqx.filter_jit
def _is_apart(x: Array, one: Held) -> Array:
    return apart(x, one.sets)


def _picked(model: PyTree, i: int, constraint: Any) -> list[int]:
    """The positions, among the inexact arrays of a model, of the arrays that a constraint picks; all is checked."""
    if not isinstance(constraint, tuple) or len(constraint) != 2 or not callable(constraint[0]):
        raise TypeError(f"`constraints[{i}]` must be a pair `(where, set)`, got {described(constraint)}.")
    where, chosen = constraint
    if not isinstance(chosen, AbstractSet):
        raise TypeError(
            f"`constraints[{i}]` must name a set of `eqxproj.sets`, such as `eqxproj.sets.Sparse(0.1)`; got "
            f"{described(chosen)}."
        )
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    # An array that stands at two places of a model is two: each gets an object of its own, by which it is known.
    leaves, treedef = jtu.tree_flatten(jtu.tree_map(jnp.array, arrays))
    try:
        found = jtu.tree_leaves(where(eqx.combine(jtu.tree_unflatten(treedef, leaves), rest)))
    except Exception as error:
        raise ValueError(
            f"`constraints[{i}]`: `where(model)` must pick an array of the model, but it raised "
            f"{type(error).__name__}: {error}."
        ) from error
    if not found or not all(eqx.is_inexact_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in found):
        raise ValueError(
            f"`constraints[{i}]`: `where(model)` must be a floating-point array of the model (or several)."
        )
    position = {id(leaf): number for number, leaf in enumerate(leaves)}
    if any(id(leaf) not in position for leaf in found):
        raise ValueError(
            f"`constraints[{i}]`: `where(model)` must pick arrays of the model as they are, but computes one, such as "
            "a part or a transpose. Pick the whole array, and give a set of your own that acts on the part."
        )
    for leaf in found:
        _check_fit(f"constraints[{i}]", chosen, leaf)
    return list(dict.fromkeys(position[id(leaf)] for leaf in found))


def _check_fit(name: str, chosen: AbstractSet, leaf: Array) -> None:
    """Tries the projection on the shape of an array, without computing it."""
    wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    try:
        got = jax.eval_shape(chosen, wanted)
    except ValueError as error:
        raise ValueError(f"`{name}` does not fit an array of shape {leaf.shape}: {error}") from error
    if not hasattr(got, "shape") or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        seen = f"{got.dtype} of shape {got.shape}" if hasattr(got, "shape") else type(got).__name__
        raise ValueError(
            f"`{name}` must return arrays of the shape and dtype that it is given; got {seen} for {wanted.dtype} of "
            f"shape {wanted.shape}."
        )


@eqx.filter_jit
def _projected(leaves: list[Array], all_held: Sequence[Held]) -> list[Array]:
    new = list(leaves)
    for one in all_held:
        new[one.position] = one(new[one.position])
    return new


def apply_constraints(model: PyTree, constraints: Sequence[Constraint]) -> PyTree:
    """A model whose arrays satisfy constraints: each is the nearest one, or where its sets are not convex, a near one.

    **Arguments:**

    - `model`: any pytree.
    - `constraints`: pairs `(where, set)`, as for [`train`][].

    **Returns:** The model with every constrained array projected onto its sets.

    **Raises:** `TypeError` for what is no pair of a function and a set, `ValueError` where the two do not fit.
    """
    return held_in(model, held(model, constraints))


@with_own_promotion
def held_in(model: PyTree, all_held: Sequence[Held]) -> PyTree:
    """The model with every constrained array projected onto its sets."""
    if not all_held:
        return model
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    return eqx.combine(jtu.tree_unflatten(treedef, _projected(leaves, list(all_held))), rest)
