"""Constraints on a model: pairs `(where, set)`, checked, located among the parameters, and applied.

`where(model)` picks one array or several, as in `equinox.tree_at`; the set maps each to its nearest point. Constraints
apply in the order in which they are given, so that of two on one array the last one holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..sets import AbstractSet

Constraint = tuple[Callable[[Any], Any], AbstractSet]


def check_constraints(model: PyTree, constraints: Sequence[Constraint]) -> None:
    """Raises a `TypeError` for what is no pair of a function and a set, a `ValueError` where the two do not fit."""
    for i, constraint in enumerate(constraints):
        if not isinstance(constraint, tuple) or len(constraint) != 2 or not callable(constraint[0]):
            raise TypeError(f"`constraints[{i}]` must be a pair `(where, set)`, got {constraint!r}.")
        where, chosen = constraint
        if not isinstance(chosen, AbstractSet):
            raise TypeError(
                f"`constraints[{i}]` must name a set of `eqxproj.sets`, such as `eqxproj.sets.Sparse(0.1)`; got "
                f"{chosen!r}."
            )
        leaves = jtu.tree_leaves(where(model))
        if not leaves or not all(eqx.is_inexact_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            raise ValueError(
                f"`constraints[{i}]`: `where(model)` must be a floating-point array of the model (or several)."
            )
        for leaf in leaves:
            _check_fit(f"constraints[{i}]", chosen, leaf)


def _check_fit(name: str, chosen: AbstractSet, leaf: Array) -> None:
    """Tries the projection on the shape of an array, without computing it."""
    wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    try:
        got = jax.eval_shape(chosen, wanted)
    except ValueError as error:
        raise ValueError(f"`{name}` does not fit an array of shape {leaf.shape}: {error}") from error
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(
            f"`{name}` must return arrays of the shape and dtype that it is given; got {got.dtype} of shape "
            f"{got.shape} for {wanted.dtype} of shape {wanted.shape}."
        )


def constrained(model: PyTree, constraints: Sequence[Constraint]) -> frozenset[int]:
    """The positions, among the inexact arrays of a model, of the arrays that a constraint acts on."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    numbered = eqx.combine(jtu.tree_unflatten(treedef, list(range(len(leaves)))), rest)
    return frozenset(i for where, _ in constraints for i in jtu.tree_leaves(where(numbered)))


def apply_constraints(model: PyTree, constraints: Sequence[Constraint]) -> PyTree:
    """The model with every constrained array projected onto its set."""
    for where, chosen in constraints:
        model = eqx.tree_at(where, model, replace_fn=lambda part, chosen=chosen: jtu.tree_map(chosen, part))
    return model
