"""Constraints on a model: pairs `(where, set)`, checked, located among the parameters, and applied.

`where(model)` picks one array or several, as in `equinox.tree_at`; the set maps each to its nearest point, or, with
`Together`, all of them. Arrays that several constraints pick are held in all of their sets at once: at the nearest
common point where they are convex, and at one that is found by projecting in turn where they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._errors import described
from .._numerics._intersection import apart, common_point
from .._numerics._promotion import with_own_promotion
from ..sets import AbstractSet, Together
from ..sets._joint import joined, parted, parts_of

Constraint = tuple[Callable[[Any], Any], AbstractSet | Together]


class Member(eqx.Module):
    """A set of a constraint, and the positions of its arrays among the inexact arrays of a model.

    Several positions are those of `Together`. `number` is that of the constraint.
    """

    chosen: AbstractSet | Together
    positions: tuple[int, ...] = eqx.field(static=True)
    number: int = eqx.field(static=True)

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        return self.chosen(arrays) if isinstance(self.chosen, Together) else [self.chosen(arrays[0])]


class Held(eqx.Module):
    """Arrays of a model and the sets that hold them at once.

    `positions` are those of the arrays among the inexact ones. Each set holds one array, or with `Together` several.
    """

    positions: tuple[int, ...] = eqx.field(static=True)
    members: tuple[Member, ...]

    @property
    def is_discrete(self) -> bool:
        """Whether steps move arrays that are kept for them, see `AbstractSet`."""
        return any(one.chosen.is_discrete for one in self.members)

    def __call__(self, leaves: Sequence[Array] | Mapping[int, Array]) -> dict[int, Array]:
        """The arrays that are in all sets, by position, from those of a model."""
        if len(self.members) == 1:
            (one,) = self.members
            return dict(zip(one.positions, one([leaves[p] for p in one.positions]), strict=True))
        arrays = [leaves[p] for p in self.positions]
        found = common_point(joined(arrays), self._projections(arrays), all(m.chosen.is_convex for m in self.members))
        return dict(zip(self.positions, parted(found, [x.shape for x in arrays]), strict=True))

    def alone(self, x: Array) -> Array:
        """The nearest array, where only one is held."""
        (position,) = self.positions
        return self({position: x})[position]

    def is_apart(self, leaves: Sequence[Array]) -> Bool[Array, ""]:
        """Whether the arrays are outside of one of the sets."""
        arrays = [leaves[p] for p in self.positions]
        return apart(joined(arrays), self._projections(arrays))

    def _projections(self, arrays: Sequence[Array]) -> list[Callable[[Array], Array]]:
        """The sets' projections of all entries of the arrays, as one vector."""
        shapes = [x.shape for x in arrays]

        def of(one: Member) -> Callable[[Array], Array]:
            places = [self.positions.index(p) for p in one.positions]

            def project(vector: Array) -> Array:
                new = parted(vector, shapes)
                for place, array in zip(places, one([new[i] for i in places]), strict=True):
                    new[place] = array
                return joined(new)

            return project

        return [of(one) for one in self.members]

    @property
    def names(self) -> str:
        named = {f"`constraints[{m.number}]`": m.chosen for m in self.members}
        same = len(named) < len(self.members)  # the parts of an intersection
        return " and ".join(name if same else f"{name} ({described(chosen)})" for name, chosen in named.items())


def held(model: PyTree, constraints: Sequence[Constraint]) -> tuple[Held, ...]:
    """What is held in which sets.

    **Raises:** `TypeError` for what is no pair of a function and a set, `ValueError` where the two do not fit, or where
    no array is found that is in all sets.
    """
    if not isinstance(constraints, (list, tuple)):
        raise TypeError(f"`constraints` must be a list of pairs `(where, set)`, got {described(constraints)}.")
    found: list[Held] = []
    for i, constraint in enumerate(constraints):
        picked = _picked(model, i, constraint)
        is_joint = isinstance(constraint[1], Together)
        for positions in [picked] if is_joint else [[p] for p in picked]:
            new = tuple(Member(part, tuple(positions), i) for part in parts_of(constraint[1]))
            found = _with(found, new)
    return tuple(found)


def _with(all_held: Sequence[Held], new: tuple[Member, ...]) -> list[Held]:
    """What is held with further sets of the same arrays: what shares an array with them becomes one with them."""
    wanted = set(new[0].positions)
    meets = [not wanted.isdisjoint(one.positions) for one in all_held]
    met = [one for one, is_met in zip(all_held, meets, strict=True) if is_met]
    members = sorted((*(m for one in met for m in one.members), *new), key=lambda m: m.number)
    positions = dict.fromkeys((*(p for one in met for p in one.positions), *new[0].positions))
    rest = [one for one, is_met in zip(all_held, meets, strict=True) if not is_met]
    return [*rest, Held(tuple(positions), tuple(members))]


@with_own_promotion
def check_common_points(model: PyTree, all_held: Sequence[Held]) -> None:
    """Raises a `ValueError` where several sets have no common point that is found from the values of their arrays."""
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    for one in all_held:
        if len(one.members) == 1:
            continue
        found = _projected(leaves, [one])
        before, after = ([x[p] for p in one.positions] for x in (leaves, found))
        is_zero = any(bool(jnp.any(x != 0)) for x in before) and not any(bool(jnp.any(x)) for x in after)
        if is_zero or bool(_is_apart(found, one)):
            what = "the only value found in all of their sets is zero" if is_zero else "no value was found in all sets"
            shapes = " and ".join(str(x.shape) for x in before)
            arrays = f"one array of shape {shapes}" if len(before) == 1 else f"arrays of shapes {shapes}"
            raise ValueError(
                f"{one.names} hold {arrays}, but {what}. Give sets that meet, or a start near to where they do; or "
                "use one set of your own that says all."
            )


@with_own_promotion
def outside(model: PyTree, all_held: Sequence[Held]) -> str:
    """The constraints that do not hold together on arrays of a model; empty where all do. One alone always holds."""
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    several = [one for one in all_held if len(one.members) > 1]
    return next((one.names for one in several if bool(_is_apart(leaves, one))), "")


@eqx.filter_jit
def _is_apart(leaves: Sequence[Array], one: Held) -> Array:
    return one.is_apart(leaves)


def _picked(model: PyTree, i: int, constraint: Any) -> list[int]:
    """The positions, among the inexact arrays of a model, of the arrays that a constraint picks; all is checked."""
    if not isinstance(constraint, tuple) or len(constraint) != 2 or not callable(constraint[0]):
        raise TypeError(f"`constraints[{i}]` must be a pair `(where, set)`, got {described(constraint)}.")
    where, chosen = constraint
    if not isinstance(chosen, (AbstractSet, Together)):
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
    picked = list(dict.fromkeys(position[id(leaf)] for leaf in found))
    for part in parts_of(chosen):
        for positions in [picked] if isinstance(part, Together) else [[p] for p in picked]:
            _check_fit(f"constraints[{i}]", Member(part, tuple(positions), i), [leaves[p] for p in positions])
    return picked


def _check_fit(name: str, member: Member, arrays: Sequence[Array]) -> None:
    """Tries the projection on the shapes of arrays, without computing it."""
    wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    shapes = f"an array of shape {arrays[0].shape}" if len(arrays) == 1 else f"{len(arrays)} arrays together"
    try:
        got = jax.eval_shape(member, wanted)
    except ValueError as error:
        raise ValueError(f"`{name}` does not fit {shapes}: {error}") from error
    for new, old in zip(got, wanted, strict=True):
        if not hasattr(new, "shape") or (new.shape, new.dtype) != (old.shape, old.dtype):
            seen = f"{new.dtype} of shape {new.shape}" if hasattr(new, "shape") else type(new).__name__
            raise ValueError(
                f"`{name}` must return arrays of the shape and dtype that it is given; got {seen} for {old.dtype} of "
                f"shape {old.shape}."
            )


@eqx.filter_jit
def _projected(leaves: list[Array], all_held: Sequence[Held]) -> list[Array]:
    new = dict(enumerate(leaves))
    for one in all_held:
        new |= one(leaves)
    return list(new.values())


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
