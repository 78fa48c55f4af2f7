"""Sets that are told entry by entry: bounds, signs, zeros, levels. Each class maps an array to its nearest point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import _nearest as nearest
from .._numerics._promotion import with_own_promotion
from . import _arguments as arguments
from ._arguments import Axis
from ._base import AbstractSet


@final
class Box(AbstractSet):
    """All arrays with entries from `low` to `high`.

    **Arguments:**

    - `low`, `high`: the bounds, in units of the parameter. They may be equal, and infinite on one side or both.

    **Raises:** `ValueError` unless `low <= high`, with a number between them; `TypeError` where one is no number.
    """

    is_convex: ClassVar[bool] = True

    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __init__(self, low: float, high: float):
        self.low, self.high = arguments.real("Box", "low", low), arguments.real("Box", "high", high)
        if not self.low <= self.high or self.low == math.inf or self.high == -math.inf:
            wanted = "`low` must be at most `high`, with a number between them"
            raise ValueError(f"`Box`: {wanted}; got {low!r} and {high!r}.")

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.clip(x, self.low, self.high)


@final
class NonNegative(AbstractSet):
    """All arrays without negative entries."""

    is_convex: ClassVar[bool] = True

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.maximum(x, 0)


@final
class Sparse(AbstractSet):
    """All arrays with few entries that are not zero. The nearest one keeps the entries of largest absolute value.

    !!! example

        ```python
        eqxproj.sets.Sparse(0.1)                    # nine tenths of the array's entries are zero
        eqxproj.sets.Sparse(k=3, axis=-1)           # at most three entries of each row are not
        eqxproj.sets.Sparse(k=2, of=4, axis=-1)     # 2:4 sparsity: at most two of every four neighbours in a row
        ```

    **Arguments:**

    - `kept_fraction`: at most this fraction of the entries, in (0, 1], is not zero; one entry is always kept.
    - `k`: at most this many entries are not zero. Give one of the two.
    - `axis`: count the entries of every slice along this axis; by default the entries of the array.
    - `of`: count the entries of every group of so many neighbours in a slice; by default those of the whole slice.

    **Raises:** `ValueError` or `TypeError` unless exactly one of the first two is given, as above, and for another
    `axis` or `of`. `ValueError` for an array whose slices do not fall into groups of equal length.
    """

    is_discrete: ClassVar[bool] = True

    kept_fraction: float | None = eqx.field(static=True)
    k: int | None = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)
    of: int | None = eqx.field(static=True)

    def __init__(self, kept_fraction: float | None = None, *, k: int | None = None, axis: Axis = None, of: Any = None):
        if (kept_fraction is None) == (k is None):
            raise ValueError(
                f"`Sparse` must be given exactly one of `kept_fraction` and `k`, got {kept_fraction!r} and {k!r}."
            )
        self.kept_fraction = (
            None if kept_fraction is None else arguments.fraction("Sparse", "kept_fraction", kept_fraction)
        )
        self.k = None if k is None else arguments.count("Sparse", "k", k)
        self.axis = arguments.axis("Sparse", axis)
        self.of = None if of is None else arguments.count("Sparse", "of", of)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return nearest.along(x, self.axis, self._rows)

    def _rows(self, rows: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        n = rows.shape[-1]
        if self.of is None:
            return nearest.largest(rows, self._kept(n))
        if n % self.of:
            raise ValueError(f"`Sparse` with groups `of` {self.of} needs a multiple of that along its `axis`, got {n}.")
        groups = rows.reshape(*rows.shape[:-1], n // self.of, self.of)
        return nearest.largest(groups, self._kept(self.of)).reshape(rows.shape)

    def _kept(self, n: int) -> int:
        """How many of n entries are kept."""
        if self.kept_fraction is None:
            assert self.k is not None
            return self.k
        return max(1, math.floor(self.kept_fraction * n + 1e-9))  # 0.3 * 10 is a little less than 3


@final
class Quantized(AbstractSet):
    r"""All arrays whose entries are among `levels`, or among multiples of them.

    With `scale="learned"` the set holds the arrays with entries $s q_i$, all $q_i$ among the levels, for any $s \ge 0$,
    one for each array. Its projection alternates between the nearest levels for a scale and the best scale for these
    levels (least squares), and starts from the best of several scales. That finds a local optimum, and an array of the
    set itself stays as it is. Levels that are to stay apart in bfloat16 must differ by more than its rounding.

    **Arguments:**

    - `levels`: numbers; or, with a scale, a number $b$ of bits (1 to 8): the $2^b$ levels $\pm 1/2, \pm 3/2, \dots$ of
        spacing 1, and $\pm 1$ where $b = 1$.
    - `scale`: `None` for the levels as they are, a positive number that multiplies them, or `"learned"`.

    **Raises:** `ValueError` where there is no level, one that is not finite or, with a learned scale, none but zero;
    and for other scales. `TypeError` where the levels are no numbers.
    """

    is_discrete: ClassVar[bool] = True

    levels: tuple[float, ...] = eqx.field(static=True)
    scale: float | Literal["learned"] | None = eqx.field(static=True)

    def __init__(self, levels: Sequence[float] | int, *, scale: float | Literal["learned"] | None = None):
        self.scale = arguments.scale(scale)
        self.levels = arguments.levels(levels, self.scale)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        if self.scale != "learned":
            factor = 1.0 if self.scale is None else self.scale
            levels = nearest.table(tuple(factor * level for level in self.levels), x.dtype)
            chosen = jnp.asarray(levels)[nearest.nearest_level(nearest.wide(x), levels)]
            return jnp.where(jnp.isnan(x), x, chosen.astype(x.dtype))
        if x.size == 0:
            return x
        wide = nearest.wide(x.ravel())
        levels = nearest.table(self.levels, wide.dtype)
        return nearest.scaled_levels(wide, levels, x.dtype).astype(x.dtype).reshape(x.shape)
