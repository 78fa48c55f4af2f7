"""One step of training: from a state and a minibatch to the next state and the value of the loss.

A step takes the direction of the minibatch, lets the optimizer act in the coordinates of the layers, and applies the
constraints. A step whose loss, direction or new parameters are not finite changes nothing, nor do those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._errors import is_key
from .._numerics._nearest import largest
from .._numerics._promotion import with_own_promotion
from .._problem._constraints import Held, held_in
from .._program._canonical import lowered
from .._program._compiled import configuration, kept
from .._program._sharding import constrained_as
from ..rules._registry import registry_version
from ..sets._joint import joined, parted
from ._direction import AbstractDirection, Direction, Here, key_argument
from ._persistence import at, put

_TRANSFORM = 0x7472  # sets the key of a transform apart from that of the loss
_RAMP = 6  # tenths of the steps after which discrete sets hold whole: where the default rate begins to fall


class TrainState(eqx.Module):
    """What a step of training changes.

    - `parameters`: the model's inexact arrays, in float32 at least.
    - `optimizer`: the state of the optimizer.
    - `carried`: the model's other arrays, where the loss changes them.
    - `shown`: of the arrays in discrete sets, which the steps move, what the model of the next step has in their place.
    - `bad_step`: the number of the first step that was not finite; -1 while there is none.
    - `layers`: the state of the model's layers that the loss takes and returns, such as running statistics, if any.
    - `average`: the moving average of the parameters, if there is one.
    - `left`: what the solver has left at each minibatch, in stacked arrays, if it goes on from there.
    """

    parameters: PyTree
    optimizer: PyTree
    shown: tuple[Array, ...]
    bad_step: Int[Array, ""]
    carried: PyTree = None
    layers: PyTree = None
    average: PyTree = None
    left: PyTree = None


class StepReport(NamedTuple):
    """Of one step: the loss on its minibatch, and the norm of the gradient or displacement."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]


class Extras(NamedTuple):
    """What a run asks for beside a direction and an optimizer.

    - `transform`: acts on a batch on the device before the loss.
    - `parts`: a minibatch is computed in so many, one after another.
    - `has_layers`: whether the loss takes and returns the state of layers.
    - `decay`: of the moving average of the parameters.
    - `eval_parameters`: from the state of the optimizer and the parameters to those of the model that is shown.
    - `period`: how many minibatches there are, where they stay the same and the solver goes on from what it left there.
    """

    transform: Callable[..., Any] | None = None
    parts: int = 1
    has_layers: bool = False
    decay: float | None = None
    eval_parameters: Callable[[PyTree, PyTree], PyTree] | None = None
    period: int | None = None


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
    extras: Extras

    def __call__(
        self, state: TrainState, number: Any, batch: Sequence[PyTree], key: Array
    ) -> tuple[TrainState, StepReport]:
        """The next state, and what this minibatch said; `number` is that of the step, from 0, `key` that of the run."""
        key = jax.random.fold_in(key, number)
        batch = transformed(self.extras.transform, batch, key)
        direction, carried, layers = self._direction(state, batch, key, self.here(state, number))
        return self._moved(state, number, direction, (carried, layers), self._value_of(state, batch, key))

    def arguments(self, state: TrainState, batch: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """What the loss takes after the model."""
        return (state.layers, *batch) if self.extras.has_layers else tuple(batch)

    def here(self, state: TrainState, number: Any) -> Here | None:
        """What the solver finds at the minibatch of a step, where it leaves anything."""
        period = self.extras.period
        return None if period is None else Here(at(state.left, number % period), number < period)

    def _direction(
        self, state: TrainState, batch: Sequence[PyTree], key: Array, here: Here | None
    ) -> tuple[Direction, PyTree, PyTree]:
        """The mean direction of the parts of a minibatch, the carried arrays, and the state of the layers."""
        parts = self.extras.parts
        if parts == 1:
            return self._part(state, batch, key, here)
        split = jtu.tree_map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        others = eqx.filter((state.carried, state.layers), eqx.is_array, inverse=True)

        def body(kept: PyTree, item: tuple[PyTree, Array]) -> tuple[PyTree, PyTree]:
            part, number = item
            carried, layers = eqx.combine(kept, others)
            now = replace(state, carried=carried, layers=layers)
            direction, *new = self._part(now, part, jax.random.fold_in(key, number), None)
            return eqx.filter(tuple(new), eqx.is_array), direction._replace(auxiliary=None)

        start = eqx.filter((state.carried, state.layers), eqx.is_array)
        kept, each = jax.lax.scan(body, start, (split, jnp.arange(parts)))
        mean = jtu.tree_map(lambda x: jnp.mean(x, 0), each)
        return mean, *eqx.combine(kept, others)

    def _part(
        self, state: TrainState, batch: Sequence[PyTree], key: Array, here: Here | None
    ) -> tuple[Direction, PyTree, PyTree]:
        model = self.running(state)
        direction = self.direction(model, self.arguments(state, batch), key, here)
        if self.extras.has_layers:
            return direction, state.carried, settled_as(direction.auxiliary, state.layers)
        after = model if self.updated is None else self.updated(model, direction.auxiliary)
        return direction, None if self.updated is None else _others(after)[0], state.layers

    def running(self, state: TrainState) -> PyTree:
        """The model that the loss sees in the next step."""
        return self._with(cast(self._seen(state.parameters, state.shown), self.like), state)

    def _value_of(self, state: TrainState, batch: Sequence[PyTree], key: Array) -> Callable[[PyTree], Array]:
        """The loss of a minibatch as a function of the parameters, for line searches."""

        def value(parameters: PyTree) -> Array:
            model = self._with(cast(self._seen(parameters, state.shown), self.like), state)
            loss = self.direction.loss
            out = loss(model, *self.arguments(state, batch), **key_argument(loss, key))
            return out[0] if self.direction.has_aux else out

        return value

    @with_own_promotion
    def _moved(
        self,
        state: TrainState,
        number: Any,
        direction: Direction,
        others: tuple[PyTree, PyTree],
        value_fn: Callable[[PyTree], Array],
    ) -> tuple[TrainState, StepReport]:
        """The state after a step in a direction; `others` are the carried arrays and the state of layers after it."""
        value, moved, coordinates, *_ = direction
        moved = jtu.tree_map(jnp.conj, cast(moved, state.parameters))  # as JAX has gradients of complex parameters
        norm = _norm(moved)
        moved = moved if coordinates is None else coordinates.centered(moved)
        known = dict(value=value, grad=moved, value_fn=value_fn)
        updates, optimizer = self.optimizer.update(moved, state.optimizer, state.parameters, **known)
        updates = updates if coordinates is None else coordinates.scaled(updates)
        model = self._with(eqx.apply_updates(state.parameters, updates), state)
        parameters = eqx.filter(held_in(model, self.after), eqx.is_inexact_array)
        shown = self._shown(parameters, number + 1)
        if coordinates is not None:
            parameters = coordinates.offset(parameters, self._changes(state, updates, parameters, shown))
        ok = _all_finite((value, moved, cast(parameters, self.like))) & (state.bad_step < 0)
        bad = jnp.where(ok | (state.bad_step >= 0), state.bad_step, number)
        new = TrainState(parameters, optimizer, shown, bad, *others, self._average(state, parameters, number))
        chosen = _chosen(ok, new, replace(state, left=None))
        period, left = self.extras.period, state.left
        left = left if period is None else put(left, direction.left, number % period, ok)
        report = StepReport(*(jnp.asarray(x, jnp.result_type(float)) for x in (value, norm)))
        return replace(chosen, bad_step=bad, left=left), report

    def _average(self, state: TrainState, parameters: PyTree, number: Any) -> PyTree:
        """The moving average after a step: over few steps at first, so that the initial parameters are forgotten."""
        if self.extras.decay is None:
            return None
        decay = jnp.minimum(self.extras.decay, number / (9.0 + number))
        return jtu.tree_map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.average, parameters)

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
        """The model that a state stands for, which satisfies all constraints. Its arrays are its own."""
        parameters = state.parameters if state.average is None else state.average
        if self.extras.eval_parameters is not None:
            parameters = self.extras.eval_parameters(state.optimizer, parameters)
        model = self._with(cast(parameters, self.like), state)
        return copied(held_in(model, (*self.before, *self.after)))

    def _with(self, parameters: PyTree, state: TrainState) -> PyTree:
        return eqx.combine(parameters, *(() if self.updated is None else (state.carried,)), self.static)


def transformed(transform: Callable[..., Any] | None, batch: Sequence[PyTree], key: Array) -> tuple[PyTree, ...]:
    """A minibatch as the loss takes it; `key` is that of the step."""
    if transform is None:
        return tuple(batch)
    found = transform(*batch, **key_argument(transform, jax.random.fold_in(key, _TRANSFORM)))
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


@with_own_promotion
def prepare(
    model: PyTree,
    direction: AbstractDirection,
    optimizer: optax.GradientTransformationExtraArgs,
    held: Sequence[Held],
    steps: int,
    extras: Extras = Extras(),  # noqa: B008
    layers: PyTree = None,
    left: PyTree = None,
) -> tuple[Step, TrainState]:
    """The step that trains a model, and the state to start from; `steps` is how many there are in all."""
    before, after = (tuple(one for one in held if one.is_discrete is flag) for flag in (True, False))
    parameters, static = eqx.partition(held_in(model, after), eqx.is_inexact_array)
    like = jtu.tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    wide = widened(parameters)
    updated = getattr(direction.loss, "updated", None)
    carried, static = (None, static) if updated is None else _others(static)
    ramp = max(1, _RAMP * steps // 10) if before else 1
    step = Step(direction, optimizer, static, like, before, ramp, after, updated, extras)
    average = None if extras.decay is None else wide
    bad = jnp.asarray(-1, jnp.int32)
    state = TrainState(wide, optimizer.init(wide), step._shown(wide, 0), bad, carried, layers, average, left)
    return step, copied(state)


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


Advance = Callable[[TrainState, int, int, PyTree], tuple[TrainState, StepReport]]


def compiled(step: Step, state: TrainState, whole: PyTree, items: PyTree, key: Array) -> Advance:
    """Many steps, compiled ahead of time, so that compilation is timed apart: `(state, first, count, items) -> ...`.

    `whole` are data on the device, of which `items` are rows; or `None`, and they are batches. The memory of the given
    state is used for the new one. For another run with the same functions, shapes and settings it is the same program.
    """
    arrays, fixed = eqx.partition(state, eqx.is_array)
    shardings = jtu.tree_map(lambda x: getattr(x, "sharding", False), arrays)  # the next step takes what this returns
    numbers = np.int32(0), np.int32(1)
    arguments = arrays, *numbers, items, whole, key

    def make(recall: Callable[[], PyTree]) -> jax.stages.Compiled:
        step, fixed = recall()

        def steps(arrays: PyTree, first: Array, count: Array, items: PyTree, whole: PyTree, key: Array) -> PyTree:
            def body(i: Array, carry: tuple[PyTree, StepReport]) -> tuple[PyTree, StepReport]:
                item = at(items, i)
                batch = item if whole is None else jtu.tree_map(lambda x: x[item], whole)
                new, report = step(eqx.combine(carry[0], fixed), first + i, batch, key)
                new = jtu.tree_map(_like, eqx.filter(new, eqx.is_array), carry[0])
                return jtu.tree_map(constrained_as, new, shardings), report

            nothing = jnp.zeros((), jnp.result_type(float))
            new, report = jax.lax.fori_loop(0, count, body, (arrays, StepReport(nothing, nothing)))
            return jtu.tree_map(constrained_as, new, shardings), report

        return lowered(steps, *arguments, donated=(0,)).compile()

    leaves, treedef = jtu.tree_flatten(arguments)
    types = tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)
    program = kept("steps", make, (step, fixed), treedef, types, registry_version(), configuration())

    def advance(state: TrainState, first: int, count: int, items: PyTree) -> tuple[TrainState, StepReport]:
        arrays = eqx.filter(state, eqx.is_array)
        new, report = program(arrays, np.int32(first), np.int32(count), items, whole, key)
        return eqx.combine(new, fixed), report

    return advance


def _like(new: Array, old: Array) -> Array:
    """A new array in the type of the old one, which a loop asks for."""
    return new if is_key(old) else jnp.asarray(new, old.dtype)


def copied(tree: PyTree) -> PyTree:
    """A pytree whose arrays share no memory with others."""

    def copy(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        return x.copy() if is_key(x) else jnp.asarray(x, x.dtype).copy()  # of a type of its own, not a weak one

    return jtu.tree_map(copy, tree)


def settled_as(new: PyTree, old: PyTree) -> PyTree:
    """The state of layers after a step, in the structure and the types of the one before.

    **Raises:** `TypeError` where they differ.
    """
    wanted, got = jtu.tree_structure(old), jtu.tree_structure(new)
    if wanted != got:
        raise TypeError(
            "With `model_state`, the loss is `loss(model, state, *batch) -> (value, state)`, and returns a state "
            f"structured like the one that it is given, {wanted}; got {got}."
        )
    return jtu.tree_map(lambda a, b: _like(a, b) if eqx.is_array(b) else b, new, old)


def widened(parameters: PyTree) -> PyTree:
    """Parameters as training keeps them, in float32 at least: small steps would be lost to the rounding of bfloat16."""
    return jtu.tree_map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), parameters)


def cast(arrays: PyTree, like: PyTree) -> PyTree:
    """Arrays in the types of others."""
    return jtu.tree_map(lambda p, q: p.astype(q.dtype), arrays, like)


def _norm(arrays: PyTree) -> Array:
    """The Euclidean norm of all entries together."""
    squares = [jnp.sum(jnp.square(jnp.abs(x).astype(jnp.result_type(float)))) for x in jtu.tree_leaves(arrays)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _all_finite(arrays: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(arrays)]))


def _chosen(ok: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new arrays where all is well, else the old ones."""
    return jtu.tree_map(lambda a, b: jnp.where(ok, a, b) if eqx.is_array(a) else a, new, old)
