"""One step of training: from a state and a minibatch to the next state and the value of the loss.

A step takes the direction of the minibatch, lets the optimizer act in the coordinates of the layers, and applies the
constraints. A step whose loss, direction or new parameters are not finite changes nothing, nor do those after it.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._numerics._nearest import largest
from .._numerics._promotion import with_own_promotion
from .._problem._constraints import Held, held_in
from .._program._canonical import lowered
from .._program._compiled import configuration, kept
from .._program._sharding import constrained_as
from ..rules._registry import registry_version
from ..sets._joint import joined, parted
from ._direction import AbstractDirection, Direction

_RAMP = 6  # tenths of the steps after which discrete sets hold whole: where the default rate begins to fall


class TrainState(eqx.Module):
    """What a step of training changes.

    - `parameters`: the model's inexact arrays, in float32 at least.
    - `optimizer`: the state of the optimizer.
    - `carried`: the model's other arrays, where the loss changes them.
    - `shown`: of the arrays in discrete sets, which the steps move, what the model of the next step has in their place.
    - `bad_step`: the number of the first step that was not finite; -1 while there is none.
    """

    parameters: PyTree
    optimizer: PyTree
    shown: tuple[Array, ...]
    bad_step: Int[Array, ""]
    carried: PyTree = None


class Step(eqx.Module):
    """A step of training, and what stays the same from one to the next.

    - `static`: the model without its inexact arrays. `like`: the shapes and types of these in the model.
    - `before`: constraints that hold in the model that is run, but not in the array that is trained.
    - `ramp`: after so many steps they hold whole, see `gradually`.
    - `after`: constraints that the trained array itself satisfies after each step.
    - `updated`: from a model and the auxiliary output of the loss to the model with new `carried` arrays, if any.
    """

    direction: AbstractDirection
    optimizer: optax.GradientTransformationExtraArgs
    static: PyTree
    like: PyTree
    before: tuple[Held, ...]
    ramp: int
    after: tuple[Held, ...]
    updated: Callable[[PyTree, PyTree], PyTree] | None

    def __call__(
        self, state: TrainState, number: Any, batch: Sequence[PyTree], key: Array
    ) -> tuple[TrainState, Float[Array, ""]]:
        """The next state, and the loss of this minibatch; `number` is that of the step, from 0."""
        model = self._with(cast(self._seen(state.parameters, state.shown), self.like), state)
        direction = self.direction(model, batch, key)
        after = model if self.updated is None else self.updated(model, direction.auxiliary)
        carried = None if self.updated is None else _others(after)[0]
        return self._moved(state, number, direction, carried), direction.value

    @with_own_promotion
    def _moved(self, state: TrainState, number: Any, direction: Direction, carried: PyTree) -> TrainState:
        """The state after a step in a direction."""
        value, moved, coordinates, _ = direction
        moved = jtu.tree_map(jnp.conj, cast(moved, state.parameters))  # as JAX has gradients of complex parameters
        moved = moved if coordinates is None else coordinates.centered(moved)
        updates, optimizer = self.optimizer.update(moved, state.optimizer, state.parameters, value=value)
        updates = updates if coordinates is None else coordinates.scaled(updates)
        model = self._with(eqx.apply_updates(state.parameters, updates), state)
        parameters = eqx.filter(held_in(model, self.after), eqx.is_inexact_array)
        shown = self._shown(parameters, number + 1)
        if coordinates is not None:
            parameters = coordinates.offset(parameters, self._changes(state, updates, parameters, shown))
        ok = _all_finite((value, moved, cast(parameters, self.like))) & (state.bad_step < 0)
        bad = jnp.where(ok | (state.bad_step >= 0), state.bad_step, number)
        new = (parameters, optimizer, shown, carried)
        old = (state.parameters, state.optimizer, state.shown, state.carried)
        chosen, moments, kept, others = map(ft.partial(_chosen, ok), new, old)
        return TrainState(chosen, moments, kept, bad, others)

    def _shown(self, parameters: PyTree, number: Any) -> tuple[Array, ...]:
        """What the model of a step has in the place of the arrays in discrete sets."""
        leaves, found = jtu.tree_leaves(cast(parameters, self.like)), {}
        for one in self.before:
            found |= gradually(one, leaves, number / self.ramp)
        return tuple(found[p] for p in sorted(found))

    def _seen(self, parameters: PyTree, shown: Sequence[Array]) -> PyTree:
        """The parameters with what is shown of them."""
        leaves, treedef = jtu.tree_flatten(parameters)
        for position, x in zip(_positions(self.before), shown, strict=True):
            leaves[position] = x.astype(leaves[position].dtype)
        return jtu.tree_unflatten(treedef, leaves)

    def _changes(self, state: TrainState, updates: PyTree, parameters: PyTree, shown: Sequence[Array]) -> PyTree:
        """How the parameters change that the model has: by the updates, or, in sets, by what the projections leave."""
        was, now = self._seen(state.parameters, state.shown), self._seen(parameters, shown)
        leaves, treedef = jtu.tree_flatten(updates)
        old, new = jtu.tree_leaves(was), jtu.tree_leaves(now)
        for position in _positions((*self.before, *self.after)):
            leaves[position] = new[position] - old[position]
        return jtu.tree_unflatten(treedef, leaves)

    def model(self, state: TrainState) -> PyTree:
        """The model that a state stands for, which satisfies all constraints."""
        return held_in(self._combined(state), (*self.before, *self.after))

    def _combined(self, state: TrainState) -> PyTree:
        return self._with(cast(state.parameters, self.like), state)

    def _with(self, parameters: PyTree, state: TrainState) -> PyTree:
        return eqx.combine(parameters, *(() if self.updated is None else (state.carried,)), self.static)


@with_own_promotion
def prepare(
    model: PyTree,
    direction: AbstractDirection,
    optimizer: optax.GradientTransformationExtraArgs,
    held: Sequence[Held],
    steps: int,
) -> tuple[Step, TrainState]:
    """The step that trains a model, and the state to start from; `steps` is how many are to come."""
    before, after = (tuple(one for one in held if one.is_discrete is flag) for flag in (True, False))
    parameters, static = eqx.partition(held_in(model, after), eqx.is_inexact_array)
    like = jtu.tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    wide = widened(parameters)
    updated = getattr(direction.loss, "updated", None)
    carried, static = (None, static) if updated is None else _others(static)
    ramp = max(1, _RAMP * steps // 10) if before else 1
    step = Step(direction, optimizer, static, like, before, ramp, after, updated)
    return step, TrainState(wide, optimizer.init(wide), step._shown(wide, 0), jnp.asarray(-1, jnp.int32), carried)


def gradually(one: Held, leaves: Sequence[Array], time: Any) -> dict[int, Array]:
    r"""Arrays on their way into discrete sets, by position: projected whole from `time` 1 on.

    At time $t$, the fraction $1 - (1 - t)^3$ of the entries that the projection moves are moved, those first that have
    the shortest way, and the others stay as they are. Of sparse arrays that is magnitude pruning along a cubic schedule
    (Zhu and Gupta, *To prune, or not to prune*, 2017), of quantized ones a quantization entry by entry (Zhou et al.,
    *Incremental network quantization*, ICLR 2017).
    """
    projected = one(leaves)
    start, end = (joined([x[p] for p in one.positions]) for x in (leaves, projected))

    def partly() -> Array:
        way = end - start
        waiting = (1 - jnp.minimum(time, 1)) ** 3 * jnp.sum(way != 0)
        return jnp.where(largest(way, jnp.floor(waiting).astype(jnp.int32)) != 0, start, end)

    found = jax.lax.cond(time < 1, partly, lambda: end)
    return dict(zip(one.positions, parted(found, [leaves[p].shape for p in one.positions]), strict=True))


def _positions(all_held: Sequence[Held]) -> list[int]:
    return sorted(p for one in all_held for p in one.positions)


def _others(model: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays of a model that are not trained, and all that is no array."""
    return eqx.partition(eqx.partition(model, eqx.is_inexact_array)[1], eqx.is_array)


def compiled(step: Step, state: TrainState, batch: Sequence[PyTree], key: Array) -> Callable[..., Any]:
    """The step compiled ahead of time, so that compilation is timed apart: a function of the same arguments.

    For another run with the same functions, shapes and settings it is the same program.
    """
    arrays, fixed = eqx.partition(state, eqx.is_array)
    shardings = jtu.tree_map(lambda x: getattr(x, "sharding", False), arrays)  # the next step takes what this returns
    arguments = arrays, np.int32(0), batch, key

    def make(recall: Callable[[], PyTree]) -> jax.stages.Compiled:
        step, fixed = recall()

        def pure(arrays: PyTree, number: Any, batch: Sequence[PyTree], key: Array) -> tuple[PyTree, Array]:
            new, value = step(eqx.combine(arrays, fixed), number, batch, key)
            return jtu.tree_map(constrained_as, eqx.filter(new, eqx.is_array), shardings), value

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
