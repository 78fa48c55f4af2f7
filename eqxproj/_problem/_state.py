r"""The state of an algorithm.

The copy of a value $v$ that an edge holds is $u = S v + \mu/w$: the value as its producer last wrote it, shown
through the edge's view, and the *dual* that its consumer has added. Parameters likewise are their initial value and an
accumulated dual. So nothing is lost to rounding when a dual is far below the value.

That a dual is zero (`None`) and an output up to date is known while tracing. Such a node has nothing to do, so that
one sweep from the forward pass costs what it must. Algorithms that return to consensus before each projection keep the
sum of an operand's duals; `store_copies` marks a state that keeps every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

_Entry = Any
"""An array or `None`. In the place of an array JAX puts others, such as shapes, in its transformations."""


@final
@jtu.register_dataclass
@dataclass(frozen=True, eq=False)
class State:
    """Values, edges' duals, and what is known of them while tracing.

    - `values`: for each value that a node puts out, the array it last wrote; `None` for parameters and data.
    - `shifts`: for each parameter the dual accumulated since the start; `None` elsewhere, and where it is zero.
    - `duals`: for each edge its dual, in the shape of the operand, or with `store_copies` of its copies.
    - `gains`: for each node a factor of the weights of its copies, as reweighting moves them; empty without it.
    - `up_to_date`: for each node, whether its output is the function of its operands.
    - `is_last`: whether only parameters are read after this step: what nodes put out is not evaluated again.
    """

    values: tuple[_Entry, ...]
    shifts: tuple[_Entry, ...]
    duals: tuple[_Entry, ...]
    up_to_date: tuple[bool, ...] = eqx.field(static=True)
    store_copies: bool = eqx.field(static=True)
    is_last: bool = eqx.field(static=True, default=False)
    gains: tuple[_Entry, ...] = ()

    def __repr__(self) -> str:
        held = {n: sum(x is not None for x in getattr(self, n)) for n in ("values", "shifts", "duals")}
        counts = ", ".join(f"{count} {name}" for name, count in held.items())
        return f"State({counts}, store_copies={self.store_copies})"


_UNROLLED = 4
"""So few steps are unrolled: they take as many times as long to compile, and with convolutions a tenth less to run."""


def iterate(step: Callable[[State], State], state: State, count: int) -> State:
    """The state after `count` steps, which has zeros where it has `None` and `state` has an array.

    To call a compiled step again and again, start from [`prepared`][] and take one step a call: the state that comes
    out then has the structure of the one that went in.
    """
    if count == 1:
        return filled(step(state), state)
    start = prepared(step, state)

    def advance(_: Any, state: State) -> State:
        return filled(step(state), start)

    if count > _UNROLLED:
        return jax.lax.fori_loop(0, count, advance, start)
    state = start
    for number in range(count):
        state = advance(number, state)
    return state


def prepared(step: Callable[[State], State], state: State) -> State:
    """A state to iterate from: what no step moves stays `None`, and everything else is an array from the start."""
    state = filled(state, state)
    while True:
        more = filled(state, jax.eval_shape(step, state))
        if jtu.tree_structure(more) == jtu.tree_structure(state):
            return state
        state = more


def filled(state: State, like: State) -> State:
    """The state with zeros where it has `None` and `like` has an array; no output is known to be up to date."""

    def fill(x, y):
        return jnp.zeros(y.shape, y.dtype) if x is None and y is not None else x

    shifts, duals = tuple(map(fill, state.shifts, like.shifts)), tuple(map(fill, state.duals, like.duals))
    return replace(state, shifts=shifts, duals=duals, up_to_date=(False,) * len(state.up_to_date), is_last=False)


def combine(coefficients: Sequence[float], states: Sequence[State]) -> State:
    """The affine combination of states; the coefficients add up to one. The gains are those of the first."""

    def mix(*leaves):
        parts = [jnp.asarray(c, x.dtype) * x for c, x in zip(coefficients, leaves, strict=True) if x is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    groups = zip(*((s.values, s.shifts, s.duals) for s in states), strict=True)
    values, shifts, duals = (jtu.tree_map(mix, *group, is_leaf=lambda x: x is None) for group in groups)
    stale = (False,) * len(states[0].up_to_date)
    return State(values, shifts, duals, stale, states[0].store_copies, gains=states[0].gains)
