"""Sets made of sets: several on one array, and one on several arrays. Each projects by its parts.

Limits: where the sets of an intersection are not all convex, the point is near, but need not be the nearest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._errors import check_flag, described
from .._numerics._intersection import apart, common_point
from .._numerics._promotion import with_own_promotion
from ._base import AbstractSet


@final
class Intersection(AbstractSet):
    """All arrays that are in each of several sets: at most a tenth of the entries, say, and none of them negative.

    The nearest one, by Dykstra's algorithm, where the sets are all convex; otherwise one found by projecting onto one
    set after another, from `x` on. Constraints of `train` that pick the same array hold it in their intersection too.

    **Arguments:**

    - `sets`: two or more. `is_discrete` where one of them is, `is_convex` where all are.

    **Raises:** `TypeError` for what is no set of arrays, `ValueError` for fewer than two. Called with an array, an
    error (of `equinox.error_if`) where no common point is found, and `ValueError` where one of the sets does not fit.
    """

    sets: tuple[AbstractSet, ...]

    def __init__(self, *sets: Any):
        for i, one in enumerate(sets):
            if not isinstance(one, AbstractSet):
                remedy = "; write `Together(Intersection(a, b))`" if isinstance(one, Together) else ""
                raise TypeError(f"`Intersection`: `sets[{i}]` must be a set of arrays, got {described(one)}{remedy}.")
        if len(sets) < 2:
            raise ValueError(f"`Intersection`: `sets` must be two or more, got {len(sets)}.")
        inner = (one.sets if isinstance(one, Intersection) else (one,) for one in sets)
        self.sets = tuple(one for several in inner for one in several)

    @property
    def is_discrete(self) -> bool:
        return any(one.is_discrete for one in self.sets)

    @property
    def is_convex(self) -> bool:
        return all(one.is_convex for one in self.sets)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        found = common_point(x, self.sets, self.is_convex)
        failed = jnp.all(jnp.isfinite(x)) & apart(found, self.sets)
        what = f"{described(self)}: no common point of its sets was found. Give sets that meet, or a start near to it."
        return eqx.error_if(found, failed, what)


@final
class Together(eqx.Module):
    r"""Several arrays that are in a set together, as a set for `train(..., constraints=[(where, set)])`.

    `where` picks the arrays. All their entries, one array after the other, are one vector of the set; with `stacked`,
    the arrays, of one shape, are stacked along a new first axis. The nearest arrays are the parts of the nearest point.

    !!! example

        ```python
        def weights(model):
            return [layer.weight for layer in model.layers]


        Together(Sparse(0.1))                       # a tenth of all entries, wherever they are
        Together(L2Ball(3.0))                       # one norm over all of them
        Together(Equal(axis=0), stacked=True)       # arrays tied to each other
        Together(Simplex(axis=0), stacked=True)     # entry by entry, shares that sum to one
        ```

    **Arguments:**

    - `chosen`: a set of arrays. `stacked`: as above.

    **Raises:** `TypeError` where `chosen` is no set of arrays. Called with arrays, `ValueError` where they do not fit.
    """

    chosen: AbstractSet
    stacked: bool = eqx.field(static=True)

    def __init__(self, chosen: AbstractSet, *, stacked: bool = False):
        if not isinstance(chosen, AbstractSet):
            raise TypeError(f"`Together`: `chosen` must be a set of arrays, got {described(chosen)}.")
        check_flag("stacked", stacked)
        self.chosen, self.stacked = chosen, stacked

    @property
    def is_discrete(self) -> bool:
        """That of the set."""
        return self.chosen.is_discrete

    @property
    def is_convex(self) -> bool:
        """That of the set."""
        return self.chosen.is_convex

    @with_own_promotion
    def __call__(self, arrays: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """The arrays that are in the set and nearest to these, all entries together."""
        if len({x.dtype for x in arrays}) > 1 or not arrays:
            kinds = ", ".join(str(x.dtype) for x in arrays)
            raise ValueError(f"`Together` needs arrays of one dtype, got {kinds or 'none'}. Convert the parameters.")
        shapes = [x.shape for x in arrays]
        if not self.stacked:
            return parted(self.chosen(joined(arrays)), shapes)
        if len(set(shapes)) > 1:
            seen = ", ".join(map(str, shapes))
            raise ValueError(f"`Together` with `stacked=True` needs arrays of one shape, got {seen}.")
        return list(self.chosen(jnp.stack(arrays)))


def joined(arrays: Sequence[Float[Array, "..."]]) -> Float[Array, " n"]:
    """The entries of arrays, one array after the other."""
    return jnp.concatenate([x.ravel() for x in arrays])


def parted(vector: Float[Array, " n"], shapes: Sequence[tuple[int, ...]]) -> list[Float[Array, "..."]]:
    """The arrays whose entries a vector has, one array after the other."""
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + math.prod(shape))
    return [vector[ends[i] : ends[i + 1]].reshape(shape) for i, shape in enumerate(shapes)]


def parts_of(chosen: AbstractSet | Together) -> tuple[AbstractSet | Together, ...]:
    """The sets whose intersection a set is."""
    if isinstance(chosen, Intersection):
        return chosen.sets
    if isinstance(chosen, Together) and isinstance(chosen.chosen, Intersection):
        return tuple(Together(one, stacked=chosen.stacked) for one in chosen.chosen.sets)
    return (chosen,)
