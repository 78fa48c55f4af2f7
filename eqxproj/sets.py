r"""Sets for hard constraints on parameters: a parameter's constraint becomes "all copies equal, and in the set".

A set is a function that projects an array onto it. `train(..., constraints=[(where, set)])` projects after every
step, or, for `sparse` and `quantized`, shows the model a projection of an array that it keeps; either way the returned
model satisfies the constraint exactly, in its own dtype:

- zeros, signs, bounds, orders and levels hold without any error (bounds and levels as the dtype rounds them);
- norms, sums, ranks and orthonormality hold up to the rounding of the entries (relative $2^{-8}$ for bfloat16, and
  $10^{-6}$ for float32), and a ball's radius is never exceeded by more than $10^{-6}$. An array that is in the set to
  that accuracy is returned as it is.

Where a set has an argument `axis`, every slice along that axis is in the set: `axis=-1` means each row of a matrix by
itself, a tuple of axes means their entries together, and `None` all entries of the array together.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._numerics import _nearest as nearest

Axis = int | tuple[int, ...] | None


class AbstractSet(eqx.Module):
    """A closed set of arrays.

    `keeps` says whether `train` keeps the array as it was before the projection, moves that, and shows the projected
    one to the model. Sets of isolated pieces need it: a step that is smaller than half the way to the next piece would
    be undone by every projection, and never add up.
    """

    keeps: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The point of the set nearest to `x` (one of them, where there are several).

        **Raises:** `ValueError` where no array of this shape is in the set.
        """


# ----------------------------------------------------------------------------------------------------------------------
# Entries
# ----------------------------------------------------------------------------------------------------------------------


class Box(AbstractSet):
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.clip(x, self.low, self.high)


class Sparse(AbstractSet):
    keeps: ClassVar[bool] = True

    kept_fraction: float | None = eqx.field(static=True)
    k: int | None = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return nearest.along(x, self.axis, lambda rows: nearest.largest(rows, self._kept(rows.shape[-1])))

    def _kept(self, n: int) -> int:
        if self.kept_fraction is None:
            assert self.k is not None
            return self.k
        return max(1, math.floor(self.kept_fraction * n + 1e-9))


class Quantized(AbstractSet):
    keeps: ClassVar[bool] = True

    levels: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        levels = nearest.table(self.levels, x.dtype)
        chosen = jnp.asarray(levels)[nearest.nearest_level(nearest.wide(x), levels)]
        return jnp.where(jnp.isnan(x), x, chosen.astype(x.dtype))


class ScaledLevels(AbstractSet):
    keeps: ClassVar[bool] = True

    levels: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        if x.size == 0:
            return x
        wide = nearest.wide(x.ravel())
        levels = nearest.table(self.levels, wide.dtype)
        return nearest.scaled_levels(wide, levels, x.dtype).astype(x.dtype).reshape(x.shape)


def box(low: float, high: float) -> AbstractSet:
    """All arrays with entries from `low` to `high`.

    **Raises:** `ValueError` unless `low <= high`, with a number between them; `TypeError` where one is no number.
    """
    low, high = _real("low", low), _real("high", high)
    if not low <= high or low == math.inf or high == -math.inf:
        raise ValueError(f"`low` must be at most `high`, with a number between them; got {low!r} and {high!r}.")
    return Box(low, high)


def non_negative() -> AbstractSet:
    """All arrays without negative entries."""
    return Box(0.0, math.inf)


def sparse(kept_fraction: float | None = None, *, k: int | None = None, axis: Axis = None) -> AbstractSet:
    """All arrays with few entries that are not zero. The nearest one keeps those of largest absolute value.

    **Arguments:**

    - `kept_fraction`: at most this fraction of the entries (at least one) is not zero.
    - `k`: at most this many entries are not zero. Give one of the two.
    - `axis`: count the entries of every slice along this axis; by default those of the array.

    **Raises:** `ValueError` unless exactly one of `kept_fraction`, in (0, 1], and `k`, at least 1, is given;
    `TypeError` where `k` or `axis` are no integers.
    """
    if (kept_fraction is None) == (k is None):
        raise ValueError(f"give exactly one of `kept_fraction` and `k`, got {kept_fraction!r} and {k!r}.")
    if k is not None:
        return Sparse(None, _count("k", k), _axis(axis))
    if isinstance(kept_fraction, bool) or not 0 < _real("kept_fraction", kept_fraction) <= 1:
        raise ValueError(f"`kept_fraction` must be in (0, 1], got {kept_fraction!r}.")
    return Sparse(float(kept_fraction), None, _axis(axis))  # pyright: ignore[reportArgumentType]


def quantized(levels: Sequence[float] | int, *, scale: float | Literal["learned"] | None = None) -> AbstractSet:
    r"""All arrays whose entries are among `levels`, or among multiples of them.

    With `scale="learned"` the set holds the arrays with entries $s q_i$, all $q_i$ among the levels, for any $s \ge 0$,
    one for each array. Its projection alternates between the nearest levels for a scale and the best scale for these
    (least squares), from the best of several scales: a local optimum, and an array of the set itself stays as it is.
    Levels that are to stay apart in bfloat16 must differ by more than its rounding.

    **Arguments:**

    - `levels`: numbers; or, with a scale, a number $b$ of bits (1 to 8): the $2^b$ levels $\pm 1/2, \pm 3/2, \dots$ of
        spacing 1, and $\pm 1$ where $b = 1$.
    - `scale`: `None` for the levels as they are, a positive number that multiplies them, or `"learned"`.

    **Raises:** `ValueError` where there is no level, one that is not finite or, with a learned scale, none but zero;
    and for other scales. `TypeError` where the levels are no numbers.
    """
    if scale is not None and scale != "learned":
        if isinstance(scale, (bool, str)) or not 0 < _real("scale", scale) < math.inf:
            raise ValueError(f'`scale` must be `None`, "learned" or a positive number, got {scale!r}.')
    values = _levels(levels, scale)
    if scale == "learned":
        if not any(values):
            raise ValueError(f"`levels` must hold one that is not zero where the scale is learned, got {levels!r}.")
        return ScaledLevels(values)
    factor = 1.0 if scale is None else float(scale)
    return Quantized(tuple(factor * value for value in values))


def _levels(levels: Any, scale: Any) -> tuple[float, ...]:
    """The levels, in ascending order."""
    if isinstance(levels, numbers.Integral) and not isinstance(levels, bool):
        if scale is None:
            raise ValueError(f"`levels` as a number of bits, got {levels!r}, must come with a `scale`.")
        if not 1 <= int(levels) <= 8:
            raise ValueError(f"`levels` as a number of bits must be from 1 to 8, got {levels!r}.")
        count = 2 ** int(levels)
        return (-1.0, 1.0) if count == 2 else tuple(i - (count - 1) / 2 for i in range(count))
    if isinstance(levels, (str, bool)) or not isinstance(levels, Iterable):
        raise TypeError(f"`levels` must be a sequence of numbers, or a number of bits; got {levels!r}.")
    values = tuple(sorted({_real("levels", x) + 0.0 for x in levels}))
    if not values or not all(math.isfinite(x) for x in values):
        raise ValueError(f"`levels` must be one or more finite numbers, got {levels!r}.")
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Slices
# ----------------------------------------------------------------------------------------------------------------------


class Simplex(AbstractSet):
    total: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _with_entries(x.shape, self.axis, "a simplex")
        return _by_slices(x, self.axis, lambda rows: nearest.simplex(rows, self.total, x.dtype))


class L1Ball(AbstractSet):
    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l1_ball(rows, self.radius, x.dtype))


class L2Ball(AbstractSet):
    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l2_ball(rows, self.radius, x.dtype))


class Sphere(AbstractSet):
    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _with_entries(x.shape, self.axis, "a sphere")
        return _by_slices(x, self.axis, lambda rows: nearest.sphere(rows, self.radius, x.dtype))


class Monotone(AbstractSet):
    axis: int = eqx.field(static=True)
    increasing: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        sign = 1 if self.increasing else -1
        return sign * _by_slices(sign * x, self.axis, nearest.isotonic)


def _by_slices(x: Float[Array, "*shape"], axis: Axis, project: Callable[[Array], Array]) -> Float[Array, "*shape"]:
    """Projects each slice, in float32 at least."""
    nearest.axes_of(axis, x.shape)
    return x if x.size == 0 else nearest.along(nearest.wide(x), axis, project).astype(x.dtype)


def _with_entries(shape: tuple[int, ...], axis: Axis, what: str) -> None:
    if 0 in [shape[i] for i in nearest.axes_of(axis, shape)]:
        raise ValueError(f"an array of shape {shape} has no entries that could be on {what} (along axis {axis}).")


def simplex(axis: Axis = -1, total: float = 1.0) -> AbstractSet:
    r"""All arrays with entries $\ge 0$ whose sum along `axis` is `total`.

    The projection is that of Duchi, Shalev-Shwartz, Singer and Chandra, *Efficient projections onto the $\ell_1$-ball
    for learning in high dimensions*, ICML 2008.

    **Raises:** `ValueError` or `TypeError` unless `total` is a positive number and `axis` an axis, some, or `None`.
    """
    return Simplex(_positive("total", total), _axis(axis))


def l1_ball(radius: float = 1.0, axis: Axis = None) -> AbstractSet:
    r"""All arrays with $\sum_i |x_i| \le r$ (along `axis`).

    **Raises:** `ValueError` or `TypeError` unless `radius` is a positive number and `axis` an axis, some, or `None`.
    """
    return L1Ball(_positive("radius", radius), _axis(axis))


def l2_ball(radius: float = 1.0, axis: Axis = None) -> AbstractSet:
    r"""All arrays with Euclidean norm $|x| \le r$ (along `axis`).

    **Raises:** `ValueError` or `TypeError` unless `radius` is a positive number and `axis` an axis, some, or `None`.
    """
    return L2Ball(_positive("radius", radius), _axis(axis))


def sphere(radius: float = 1.0, axis: Axis = None) -> AbstractSet:
    r"""All arrays with Euclidean norm $|x| = r$ (along `axis`). Zero is projected to a constant vector.

    **Raises:** `ValueError` or `TypeError` unless `radius` is a positive number and `axis` an axis, some, or `None`.
    """
    return Sphere(_positive("radius", radius), _axis(axis))


def monotone(axis: int = -1, increasing: bool = True) -> AbstractSet:
    """All arrays that do not decrease along an axis; with `increasing=False`, that do not increase.

    The projection is isotonic regression, exactly, by pooling adjacent violators.

    **Raises:** `TypeError` unless `axis` is an integer and `increasing` a Boolean.
    """
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"`axis` must be an integer, got {axis!r}.")
    if not isinstance(increasing, bool):
        raise TypeError(f"`increasing` must be `True` or `False`, got {increasing!r}.")
    return Monotone(int(axis), increasing)


# ----------------------------------------------------------------------------------------------------------------------
# Matrices
# ----------------------------------------------------------------------------------------------------------------------


class Orthogonal(AbstractSet):
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "`orthogonal()`")
        if matrix.size == 0:
            raise ValueError(f"`orthogonal()` wants an array with entries, got shape {x.shape}.")
        return nearest.polar(matrix, x.dtype).astype(x.dtype).reshape(x.shape)


class LowRank(AbstractSet):
    rank: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "`low_rank(rank)`")
        if self.rank >= min(matrix.shape):
            return x
        return nearest.truncated(matrix, self.rank, x.dtype).astype(x.dtype).reshape(x.shape)


def _matrix(x: Float[Array, "*shape"], what: str) -> Float[Array, "rows columns"]:
    """The array as a matrix, in the dtype that it is computed in."""
    if x.ndim < 2:
        raise ValueError(f"{what} wants an array with two axes or more, got shape {x.shape}.")
    return nearest.wide(x).reshape(x.shape[0], math.prod(x.shape[1:]))


def orthogonal() -> AbstractSet:
    r"""All matrices with orthonormal rows or, where these are fewer, columns.

    The nearest one is the polar factor $U V^T$ of $X = U \Sigma V^T$. An array with more than two axes, such as the
    kernel of a convolution, counts as the matrix with all axes but the first made into one.
    """
    return Orthogonal()


def low_rank(rank: int) -> AbstractSet:
    """All matrices of at most this rank; the nearest one keeps the largest singular values.

    An array with more than two axes, such as the kernel of a convolution, counts as the matrix with all axes but the
    first made into one.

    **Raises:** `ValueError` or `TypeError` unless `rank` is an integer of at least 1.
    """
    return LowRank(_count("rank", rank))


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def _real(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from None


def _positive(name: str, value: Any) -> float:
    number = _real(name, value)
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if int(value) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    return int(value)


def _axis(axis: Any) -> Axis:
    if axis is None:
        return None
    several = axis if isinstance(axis, tuple) else (axis,)
    if not several or any(isinstance(a, bool) or not isinstance(a, numbers.Integral) for a in several):
        raise TypeError(f"`axis` must be an integer, a tuple of them, or `None`; got {axis!r}.")
    return tuple(int(a) for a in several) if isinstance(axis, tuple) else int(axis)


# ----------------------------------------------------------------------------------------------------------------------
# Attaching them to a model
# ----------------------------------------------------------------------------------------------------------------------

Constraint = tuple[Callable[[Any], Any], AbstractSet]


def check_constraints(model: PyTree, constraints: Sequence[Constraint]) -> None:
    """Raises a clear error for a constraint that cannot be attached to the model."""
    for i, constraint in enumerate(constraints):
        if not isinstance(constraint, tuple) or len(constraint) != 2 or not callable(constraint[0]):
            raise TypeError(f"`constraints[{i}]` must be a pair `(where, set)`, got {constraint!r}.")
        where, chosen = constraint
        if not isinstance(chosen, AbstractSet):
            raise TypeError(
                f"`constraints[{i}]` must name a set of `eqxproj.sets`, such as `sets.sparse(0.1)`; got {chosen!r}."
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
    """The positions, among the inexact arrays of a model, of those that any constraint acts on."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(arrays)
    numbered = eqx.combine(jtu.tree_unflatten(treedef, list(range(len(leaves)))), rest)
    return frozenset(i for where, _ in constraints for i in jtu.tree_leaves(where(numbered)))


def apply_constraints(model: PyTree, constraints: Sequence[Constraint]) -> PyTree:
    """The model with every constrained array projected onto its set."""
    for where, chosen in constraints:
        model = eqx.tree_at(where, model, replace_fn=lambda part, chosen=chosen: jtu.tree_map(chosen, part))
    return model
