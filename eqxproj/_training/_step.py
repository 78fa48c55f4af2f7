"""One step of training: from a state and a minibatch to the next state and the value of the loss.

A step takes the direction of the minibatch, lets the optimizer act in the coordinates of the layers, and applies the
constraints. A step whose loss, direction or new parameters are not finite changes nothing, nor do those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._program._canonical import lowered
from ..rules._registry import registry_version
from ._compiled import configuration, jitted, kept
from ._constraints import Constraint, apply_constraints
from ._direction import AbstractDirection


class TrainState(eqx.Module):
    """What a step of training changes.

    - `parameters`: the model's inexact arrays, in float32 at least.
    - `optimizer`: the state of the optimizer.
    - `bad_step`: the number of the first step that was not finite; -1 while there is none.
    """

    parameters: PyTree
    optimizer: PyTree
    bad_step: Int[Array, ""]


class Step(eqx.Module):
    """A step of training, and what stays the same from one to the next.

    - `static`: the model without its inexact arrays. `like`: the shapes and types of these in the model.
    - `constraints`: all of them. Discrete ones hold in the model that is run, but not in the array that is trained.
    """

    direction: AbstractDirection
    optimizer: optax.GradientTransformation
    static: PyTree
    like: PyTree
    constraints: tuple[Constraint, ...]

    def __call__(
        self, state: TrainState, number: Any, batch: Sequence[PyTree], key: Array
    ) -> tuple[TrainState, Float[Array, ""]]:
        """The next state, and the loss of this minibatch; `number` is that of the step, from 0."""
        before, after = _by_kind(self.constraints)
        model = apply_constraints(self._combined(state.parameters), before)
        value, moved, coordinates = self.direction(model, batch, key)
        moved = cast(moved, state.parameters)
        moved = moved if coordinates is None else coordinates.centered(moved)
        chain = optax.with_extra_args_support(self.optimizer)  # some go by the value of the loss
        updates, optimizer = chain.update(moved, state.optimizer, state.parameters, value=value)
        updates = updates if coordinates is None else coordinates.applied(updates)
        model = eqx.combine(eqx.apply_updates(state.parameters, updates), self.static)
        parameters = eqx.filter(apply_constraints(model, after), eqx.is_inexact_array)
        ok = _all_finite((value, moved, cast(parameters, self.like))) & (state.bad_step < 0)
        bad = jnp.where(ok | (state.bad_step >= 0), state.bad_step, number)
        return TrainState(
            _chosen(ok, parameters, state.parameters), _chosen(ok, optimizer, state.optimizer), bad
        ), value

    def model(self, state: TrainState) -> PyTree:
        """The model that a state stands for, which satisfies all constraints."""
        model = self._combined(state.parameters)
        return jitted(_Constrained(self.constraints))(model) if self.constraints else model

    def _combined(self, parameters: PyTree) -> PyTree:
        return eqx.combine(cast(parameters, self.like), self.static)


class _Constrained(eqx.Module):
    """Projects a model onto constraints."""

    constraints: tuple[Constraint, ...]

    def __call__(self, model: PyTree) -> PyTree:
        return apply_constraints(model, self.constraints)


def _by_kind(constraints: Sequence[Constraint]) -> tuple[tuple[Constraint, ...], tuple[Constraint, ...]]:
    """The discrete constraints, which hold before a step, and the others, which hold after it."""
    before, after = (tuple(c for c in constraints if c[1].is_discrete is flag) for flag in (True, False))
    return before, after


def prepare(
    model: PyTree,
    direction: AbstractDirection,
    optimizer: optax.GradientTransformation,
    constraints: Sequence[Constraint],
) -> tuple[Step, TrainState]:
    """The step that trains a model, and the state to start from."""
    parameters, static = eqx.partition(apply_constraints(model, _by_kind(constraints)[1]), eqx.is_inexact_array)
    like = jtu.tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    wide = widened(parameters)
    step = Step(direction, optimizer, static, like, tuple(constraints))
    return step, TrainState(wide, optimizer.init(wide), jnp.asarray(-1, jnp.int32))


def compiled(step: Step, state: TrainState, batch: Sequence[PyTree], key: Array) -> Callable[..., Any]:
    """The step compiled ahead of time, so that compilation is timed apart: a function of the same arguments.

    For another run with the same functions, shapes and settings it is the same program.
    """
    arrays, fixed = eqx.partition(state, eqx.is_array)
    arguments = arrays, np.int32(0), batch, key

    def make(recall: Callable[[], PyTree]) -> jax.stages.Compiled:
        step, fixed = recall()

        def pure(arrays: PyTree, number: Any, batch: Sequence[PyTree], key: Array) -> tuple[PyTree, Array]:
            new, value = step(eqx.combine(arrays, fixed), number, batch, key)
            return eqx.filter(new, eqx.is_array), value

        return lowered(pure, *arguments).compile()

    leaves, treedef = jtu.tree_flatten(arguments)
    types = tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)
    program = kept("step", make, (step, fixed), treedef, types, registry_version(), configuration())

    def advance(state: TrainState, number: Any, batch: Sequence[PyTree], key: Array) -> tuple[TrainState, Array]:
        new, value = program(eqx.filter(state, eqx.is_array), number, batch, key)
        return eqx.combine(new, fixed), value

    return advance


def widened(parameters: PyTree) -> PyTree:
    """Parameters as training keeps them, in float32 at least: small steps would be lost to the rounding of bfloat16."""
    return jtu.tree_map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), parameters)


def cast(arrays: PyTree, like: PyTree) -> PyTree:
    """Arrays in the types of others."""
    return jtu.tree_map(lambda p, q: p.astype(q.dtype), arrays, like)


def _all_finite(arrays: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(arrays)]))


def _chosen(ok: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new arrays where all is well, else the old ones."""
    return jtu.tree_map(lambda a, b: jnp.where(ok, a, b) if eqx.is_array(a) else a, new, old)
