r"""A point of several closed sets at once, each given by its projection: constraints that meet.

Where all sets are convex, Dykstra's algorithm finds the nearest common point: it projects $x + p_i$ onto one set after
another, and keeps in $p_i$ what each projection took away (Boyle and Dykstra, *A method for finding projections onto
the intersection of convex sets in Hilbert spaces*, 1986). It stops where the $p_i$ stand still (Birgin and Raydan,
*Robust stopping criteria for Dykstra's algorithm*, SIAM J. Sci. Comput. 26(4), 2005). Other sets are projected onto in
turn, and so are the convex ones at the end, until every set returns the point as it is. Each turn is lengthened where
that brings the sets nearer (Gubin, Polyak and Raik, *The method of projections for finding the common point of convex
sets*, 1967, section 3). A point that all sets return as it is stays as it is.

Limits: sets that are not convex may have common points that are not found; [`apart`][] says whether one was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._conjugate_gradients import inner
from ._nearest import rounding

Projection = Callable[[Array], Array]

_MOST_CYCLES = 2000
_SETTLED = 10  # so many cycles within rounding end a turn through sets of which one never returns its own points


def _unit(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0.0)


def _within(x: Array) -> Array:
    """How far rounding moves an array."""
    return 4 * rounding(x.dtype) * _unit(x)


def common_point(
    x: Float[Array, "*shape"], projections: Sequence[Projection], all_convex: bool
) -> Float[Array, "*shape"]:
    """A point near `x` of all sets, the nearest one where all are convex."""

    def found() -> Array:
        y = x
        if all_convex:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            y = _nearest_of_convex(wide, projections).astype(x.dtype)
        return _in_turn(y, projections)

    inside = jnp.all(jnp.stack([jnp.all(project(x) == x) for project in projections]))
    return jax.lax.cond(inside, lambda: x, found)


def _nearest_of_convex(start: Array, projections: Sequence[Projection]) -> Array:
    limit = rounding(start.dtype) * _unit(start)

    def cycle(state):
        x, kept, _, count = state
        moved, new = jnp.zeros((), x.dtype), []
        for project, old in zip(projections, kept, strict=True):
            y = x + old
            x = project(y)
            new.append(y - x)
            moved = jnp.maximum(moved, jnp.max(jnp.abs(new[-1] - old), initial=0.0))
        return x, tuple(new), moved, count + 1

    def goes_on(state):
        return (state[2] > limit) & (state[3] < _MOST_CYCLES)

    zeros = tuple(jnp.zeros_like(start) for _ in projections)
    begin = (start, zeros, jnp.asarray(jnp.inf, start.dtype), jnp.asarray(0))
    return jax.lax.while_loop(goes_on, cycle, begin)[0]


def _in_turn(start: Array, projections: Sequence[Projection]) -> Array:
    *first, last = projections

    def gap(x):
        return sum(jnp.sum(jnp.square(project(x) - x)) for project in projections)

    def cycle(state):
        old, _, settled, count = state
        y = old
        for project in first:
            y = project(y)
        new = last(y)
        # Two sets that meet at a small angle: as far along the last one as the tangent of the first one is away.
        along = inner(y - old, new - old)
        factor = inner(y - old, y - old) / jnp.where(along > 0, along, 1)
        far = last(old + jnp.where(along > 0, factor, 1) * (new - old))
        new = jnp.where(gap(far) < gap(new), far, new)
        moved = jnp.max(jnp.abs(new - old), initial=0.0)
        return new, moved, jnp.where(moved <= _within(new), settled + 1, 0), count + 1

    def goes_on(state):
        return (state[1] != 0) & (state[2] < _SETTLED) & (state[3] < _MOST_CYCLES)

    begin = (start, jnp.asarray(jnp.inf, start.dtype), jnp.asarray(0), jnp.asarray(0))
    return jax.lax.while_loop(goes_on, cycle, begin)[0]


def apart(x: Float[Array, "*shape"], projections: Sequence[Projection]) -> Bool[Array, ""]:
    """Whether an array is outside of one of the sets, by more than rounding."""
    gaps = jnp.stack([jnp.max(jnp.abs(project(x) - x), initial=0.0) for project in projections])
    return jnp.any(~(gaps <= _within(x)))
