r"""Sets for hard constraints on parameters: each maps an array to the nearest array of the set.

`train(..., constraints=[(where, set)])` holds the picked parameters in the set: the returned model satisfies the
constraint exactly, in its own dtype. What "exactly" means:

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
from typing import Any, ClassVar, Literal, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._errors import as_number, described
from ._numerics import _nearest as nearest
from ._numerics._promotion import with_own_promotion

Axis = int | tuple[int, ...] | None


class AbstractSet(eqx.Module):
    r"""A closed set of arrays, which finds its nearest point.

    A set of your own derives from it, and needs `__call__` alone. `is_discrete` says how `train` holds an array in the
    set. With `False`, it projects the array after every step. With `True`, the steps move an array that is kept for it,
    and before every step the model is shown its projection. Set it to `True` where the set consists of separate pieces
    (levels, patterns of zeros): a step from one piece toward another is shorter than the gap, and a projection after
    each step would undo every one. `is_convex` says how an array is held in several sets at once: at the nearest common
    point where all of them are convex, and at one found by projecting in turn otherwise.

    !!! example

        ```python
        class Symmetric(eqxproj.sets.AbstractSet):
            def __call__(self, x):
                return (x + x.T) / 2


        eqxproj.train(..., constraints=[(lambda model: model.layers[1].weight, Symmetric())])
        ```
    """

    is_discrete: ClassVar[bool] = False
    is_convex: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The point of the set nearest to `x` in Euclidean distance (one of them, where there are several).

        It must run under `jax.jit`, and map a point of the set to itself.

        **Arguments:**

        - `x`: any array of floats.

        **Returns:** An array of the shape and dtype of `x`.

        **Raises:** `ValueError` where no array of this shape is in the set.
        """


# --- entries ---


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
        self.low, self.high = _real("Box", "low", low), _real("Box", "high", high)
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

    **Arguments:**

    - `kept_fraction`: at most this fraction of the entries, in (0, 1], is not zero; one entry is always kept.
    - `k`: at most this many entries are not zero. Give one of the two.
    - `axis`: count the entries of every slice along this axis; by default the entries of the array.

    **Raises:** `ValueError` or `TypeError` unless exactly one of the two is given, as above, and for another `axis`.
    """

    is_discrete: ClassVar[bool] = True

    kept_fraction: float | None = eqx.field(static=True)
    k: int | None = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, kept_fraction: float | None = None, *, k: int | None = None, axis: Axis = None):
        if (kept_fraction is None) == (k is None):
            raise ValueError(
                f"`Sparse` must be given exactly one of `kept_fraction` and `k`, got {kept_fraction!r} and {k!r}."
            )
        self.kept_fraction = None if kept_fraction is None else _fraction("Sparse", "kept_fraction", kept_fraction)
        self.k = None if k is None else _count("Sparse", "k", k)
        self.axis = _axis("Sparse", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return nearest.along(x, self.axis, lambda rows: nearest.largest(rows, self._kept(rows.shape[-1])))

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
        self.scale = _scale(scale)
        self.levels = _levels(levels, self.scale)

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


# --- slices ---


@final
class Simplex(AbstractSet):
    r"""All arrays with entries $\ge 0$ whose sum along `axis` is `total`.

    The projection follows Duchi, Shalev-Shwartz, Singer and Chandra, *Efficient projections onto the $\ell_1$-ball for
    learning in high dimensions*, ICML 2008, section 3.

    **Arguments:**

    - `axis`: an axis, a tuple of axes, or `None` for all entries together. `total`: the sum, positive.

    **Raises:** `ValueError` or `TypeError` for another `axis` or `total`.
    """

    is_convex: ClassVar[bool] = True

    axis: Axis = eqx.field(static=True)
    total: float = eqx.field(static=True)

    def __init__(self, axis: Axis = -1, total: float = 1.0):
        self.axis, self.total = _axis("Simplex", axis), _positive("Simplex", "total", total)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _check_has_entries(x.shape, self.axis, "a simplex")
        return _by_slices(x, self.axis, lambda rows: nearest.simplex(rows, self.total, x.dtype))


@final
class L1Ball(AbstractSet):
    r"""All arrays with $\sum_i |x_i| \le r$ along `axis`.

    The projection is the simplex's, of the absolute values (Duchi et al., ICML 2008, section 4).

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    is_convex: ClassVar[bool] = True

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = _positive("L1Ball", "radius", radius), _axis("L1Ball", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l1_ball(rows, self.radius, x.dtype))


@final
class L2Ball(AbstractSet):
    r"""All arrays with Euclidean norm $|x| \le r$ along `axis`.

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    is_convex: ClassVar[bool] = True

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = _positive("L2Ball", "radius", radius), _axis("L2Ball", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l2_ball(rows, self.radius, x.dtype))


@final
class Sphere(AbstractSet):
    r"""All arrays with Euclidean norm $|x| = r$ along `axis`. Zero is projected to a constant vector.

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = _positive("Sphere", "radius", radius), _axis("Sphere", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _check_has_entries(x.shape, self.axis, "a sphere")
        return _by_slices(x, self.axis, lambda rows: nearest.sphere(rows, self.radius, x.dtype))


@final
class Monotone(AbstractSet):
    """All arrays that do not decrease along an axis; with `increasing=False`, that do not increase.

    The projection is isotonic regression, exactly, by pooling adjacent violators.

    **Arguments:**

    - `axis`: one axis. `increasing`: the direction.

    **Raises:** `TypeError` unless `axis` is an integer and `increasing` a Boolean.
    """

    is_convex: ClassVar[bool] = True

    axis: int = eqx.field(static=True)
    increasing: bool = eqx.field(static=True)

    def __init__(self, axis: int = -1, increasing: bool = True):
        if not _is_integer(axis):
            raise TypeError(f"`Monotone`: `axis` must be an integer, got {axis!r}.")
        if not isinstance(increasing, bool):
            raise TypeError(f"`Monotone`: `increasing` must be `True` or `False`, got {increasing!r}.")
        self.axis, self.increasing = int(axis), increasing

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        sign = 1 if self.increasing else -1
        return sign * _by_slices(sign * x, self.axis, nearest.isotonic)


def _by_slices(x: Float[Array, "*shape"], axis: Axis, project: Callable[[Array], Array]) -> Float[Array, "*shape"]:
    """Projects each slice, in float32 at least."""
    nearest.axes_of(axis, x.shape)
    return x if x.size == 0 else nearest.along(nearest.wide(x), axis, project).astype(x.dtype)


def _check_has_entries(shape: tuple[int, ...], axis: Axis, what: str) -> None:
    if 0 in [shape[i] for i in nearest.axes_of(axis, shape)]:
        raise ValueError(f"an array of shape {shape} has no entries that could be on {what} (along axis {axis}).")


# --- matrices ---


@final
class Orthogonal(AbstractSet):
    r"""All matrices with orthonormal rows or, where these are fewer, columns.

    The nearest one is the polar factor $U V^T$ of $X = U \Sigma V^T$. An array with more than two axes, such as the
    kernel of a convolution, counts as the matrix with all axes but the first made into one.
    """

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "Orthogonal")
        if matrix.size == 0:
            raise ValueError(f"`Orthogonal` needs an array with entries, got shape {x.shape}.")
        return nearest.polar(matrix, x.dtype).astype(x.dtype).reshape(x.shape)


@final
class LowRank(AbstractSet):
    """All matrices, as for `Orthogonal`, of at most this rank; the nearest one keeps the largest singular values.

    **Arguments:**

    - `rank`: at least 1. Where a matrix has no more rows or columns than this, every such matrix is in the set.

    **Raises:** `ValueError` or `TypeError` unless `rank` is an integer of at least 1.
    """

    rank: int = eqx.field(static=True)

    def __init__(self, rank: int):
        self.rank = _count("LowRank", "rank", rank)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "LowRank")
        if self.rank >= min(matrix.shape):
            return x
        return nearest.truncated(matrix, self.rank, x.dtype).astype(x.dtype).reshape(x.shape)


def _matrix(x: Float[Array, "*shape"], owner: str) -> Float[Array, "rows columns"]:
    """The array as a matrix, in the dtype that it is computed in."""
    if x.ndim < 2:
        raise ValueError(f"`{owner}` needs an array with two axes or more, got shape {x.shape}.")
    return nearest.wide(x).reshape(x.shape[0], math.prod(x.shape[1:]))


# --- checks of arguments: `owner` is the class, `name` its argument ---


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(owner: str, name: str, value: Any) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"`{owner}`: `{name}` must be a number, got {described(value)}.")
    return number


def _positive(owner: str, name: str, value: Any) -> float:
    number = _real(owner, name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{owner}`: `{name}` must be a positive number, got {described(value)}.")
    return number


def _fraction(owner: str, name: str, value: Any) -> float:
    number = _real(owner, name, value)
    if not 0 < number <= 1:
        raise ValueError(f"`{owner}`: `{name}` must be in (0, 1], got {value!r}.")
    return number


def _count(owner: str, name: str, value: Any) -> int:
    if not _is_integer(value):
        raise TypeError(f"`{owner}`: `{name}` must be an integer, got {value!r}.")
    if int(value) < 1:
        raise ValueError(f"`{owner}`: `{name}` must be at least 1, got {value!r}.")
    return int(value)


def _axis(owner: str, axis: Any) -> Axis:
    if axis is None:
        return None
    several = axis if isinstance(axis, tuple) else (axis,)
    if not several or not all(map(_is_integer, several)):
        raise TypeError(f"`{owner}`: `axis` must be an integer, a tuple of integers, or `None`; got {axis!r}.")
    return tuple(int(a) for a in several) if isinstance(axis, tuple) else int(axis)


def _scale(scale: Any) -> float | Literal["learned"] | None:
    if scale is None or (isinstance(scale, str) and scale == "learned"):
        return scale
    if isinstance(scale, (bool, str)) or not 0 < _real("Quantized", "scale", scale) < math.inf:
        raise ValueError(f'`Quantized`: `scale` must be `None`, "learned" or a positive number, got {scale!r}.')
    return float(scale)


def _levels(levels: Any, scale: float | Literal["learned"] | None) -> tuple[float, ...]:
    """The levels, in ascending order, before they are multiplied by the scale."""
    if _is_integer(levels):
        return _levels_of_bits(int(levels), scale)
    if isinstance(levels, (str, bool)) or not isinstance(levels, Iterable):
        raise TypeError(f"`Quantized`: `levels` must be a sequence of numbers, or a number of bits; got {levels!r}.")
    values = tuple(sorted({_real("Quantized", "levels", x) + 0.0 for x in levels}))  # + 0.0 makes -0.0 and 0.0 one
    if not values or not all(math.isfinite(x) for x in values):
        raise ValueError(f"`Quantized`: `levels` must be one or more finite numbers, got {levels!r}.")
    if scale == "learned" and not any(values):
        raise ValueError(
            f"`Quantized`: `levels` must hold one that is not zero where the scale is learned, got {levels!r}."
        )
    return values


def _levels_of_bits(bits: int, scale: float | Literal["learned"] | None) -> tuple[float, ...]:
    """The levels that a number of bits tells apart."""
    if scale is None:
        remedy = '`scale`: a positive number, or "learned"'
        raise ValueError(f"`Quantized`: `levels` as a number of bits, got {bits}, must come with a {remedy}.")
    if not 1 <= bits <= 8:
        raise ValueError(f"`Quantized`: `levels` as a number of bits must be from 1 to 8, got {bits}.")
    return (-1.0, 1.0) if bits == 1 else tuple(i - (2**bits - 1) / 2 for i in range(2**bits))
