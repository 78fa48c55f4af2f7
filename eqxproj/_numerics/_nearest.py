r"""The computations behind `eqxproj.sets`: nearest points, of slices along the last axis, to levels, and of matrices.

They compute in float32 at least; `dtype` is that of the caller's array, to which the answer is rounded. The rounded
answer must be in the set. Hence

- numbers are rounded by `jax.lax.reduce_precision`: XLA may leave out a conversion to bfloat16 and back, and then a
  test of the rounded array would see the array before rounding;
- an array that is in the set up to the rounding of its dtype is returned as it is, so that projections are idempotent;
- where the set is a ball, rounding is towards its center.

NaN gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._water_level import water_level

_MAX_ALTERNATIONS = 200  # of nearest levels and least squares; they end by themselves, usually within 20


def rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The array rounded to the numbers of a dtype, in its own dtype."""
    if x.dtype == dtype:
        return x
    info = jnp.finfo(dtype)
    normal = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return normal
    # `reduce_precision` sets to zero what float16 has as subnormal numbers, the multiples of the smallest.
    least = float(info.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(info.tiny), jnp.round(x / least) * least, normal)


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The array in the dtype that it is computed in."""
    return rounded(x.astype(jnp.promote_types(x.dtype, jnp.float32)), x.dtype)


def rounding(dtype: jnp.dtype) -> float:
    """The relative error of an array of a dtype that was computed in float32 at least, and then rounded."""
    computed = jnp.promote_types(dtype, jnp.float32)
    return 2.0 ** -(jnp.finfo(dtype).nmant + 1) + 8 * float(jnp.finfo(computed).eps)


def table(levels: Sequence[float], dtype: jnp.dtype) -> Float[np.ndarray, "levels"]:
    """The levels as a dtype has them, in the dtype of the computation."""
    return np.asarray(levels, np.float64).astype(dtype).astype(jnp.promote_types(dtype, jnp.float32))


def axes_of(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> list[int]:
    """The axes that `axis` means, counted from the front."""
    if axis is None:
        return list(range(len(shape)))
    given = (axis,) if isinstance(axis, int) else axis
    for a in given:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"`axis` {a} is out of range for an array of shape {shape}.")
    found = [a % len(shape) for a in given]
    if len(set(found)) < len(found):
        raise ValueError(f"`axis` {axis} names an axis twice for an array of shape {shape}.")
    return found


def along(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...] | None, project: Callable[[Array], Array]
) -> Float[Array, "*shape"]:
    """Projects every slice along some axes: `project` maps arrays whose last axis is the slice."""
    chosen = axes_of(axis, x.shape)
    order = [i for i in range(x.ndim) if i not in chosen] + chosen
    moved = jnp.transpose(x, order)
    kept = moved.shape[: x.ndim - len(chosen)]
    answer = project(moved.reshape(*kept, math.prod(x.shape[i] for i in chosen)))
    return jnp.transpose(answer.reshape(moved.shape), sorted(range(x.ndim), key=order.__getitem__))


def _returned(inside: Bool[Array, "*#shape"], x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """`x` where it is inside already, else `y`, rounded."""
    return jnp.where(inside, x, rounded(y, dtype))


def largest(x: Float[Array, "*batch n"], kept: int | Int[Array, ""]) -> Float[Array, "*batch n"]:
    """The slice with all but its `kept` entries of largest absolute value (the first, among equals) set to zero.

    Positive floats are ordered as the integers of the same bits are. So the bits of the least size that is kept are
    found from the highest on: each is set where as many entries as wanted are no smaller then. That takes as many sums
    as there are bits, and is faster than sorting.
    """
    if isinstance(kept, int) and kept >= x.shape[-1]:
        return x
    size = jnp.abs(wide(x))
    integer = jnp.dtype(f"int{jnp.finfo(size.dtype).bits}")
    order, high = jax.lax.bitcast_convert_type(size, integer), jnp.iinfo(integer).bits - 2

    def count(which: Array) -> Array:
        return jnp.sum(which, axis=-1, keepdims=True, dtype=jnp.int32)

    def lower(i: Array, least: Array) -> Array:
        larger = least | (jnp.ones((), integer) << (high - i).astype(integer))
        return jnp.where(count(order >= larger) >= kept, larger, least)

    least = jax.lax.fori_loop(0, high + 1, lower, jnp.zeros((*x.shape[:-1], 1), integer))
    above, equal = order > least, order == least
    first = jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= kept - count(above)
    return jnp.where(above | (equal & first), x, jnp.zeros_like(x))


def _on_simplex(x: Float[Array, "*batch n"], total: float) -> Float[Array, "*batch n"]:
    r"""The nearest slice with entries $\ge 0$ and sum $t$.

    It is $y_i = \max(x_i - \theta, 0)$ with the $\theta$ at which the sum is $t$ (Duchi et al., *Efficient projections
    onto the $\ell_1$-ball for learning in high dimensions*, ICML 2008, section 3). With $m = \max_i x_i$, depths
    $e_i = (m - x_i) / t$ and $L = (m - \theta) / t$ that is $\sum_i \max(L - e_i, 0) = 1$, the level of water in basins
    of depths $e_i$, and $y_i = t \max(L - e_i, 0)$. The last division takes out what the sum lost to rounding.
    """
    depths = (jnp.max(x, axis=-1, keepdims=True) - x) / total
    shares = jnp.maximum(water_level(depths)[..., None] - depths, 0)
    return total * (shares / jnp.sum(shares, axis=-1, keepdims=True))


def simplex(x: Float[Array, "*batch n"], total: float, dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    """The nearest slice with entries at least zero and the sum `total`."""
    error = jnp.abs(jnp.sum(x, axis=-1, keepdims=True) - total)
    inside = (jnp.min(x, axis=-1, keepdims=True) >= 0) & (error <= rounding(dtype) * total)
    return _returned(inside, x, _on_simplex(x, total), dtype)


def l1_ball(x: Float[Array, "*batch n"], radius: float, dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    r"""The nearest slice with $\sum_i |y_i| \le r$.

    Outside of the ball, it has the signs of $x$ and absolute values that are the point of the simplex of total $r$
    nearest to $|x|$ (Duchi et al. 2008, section 4).
    """
    size = jnp.abs(x)
    inside = jnp.sum(size, axis=-1, keepdims=True) <= radius
    nearest = jnp.sign(x) * _on_simplex(size, radius * (1 - rounding(dtype)))
    return _returned(inside, x, nearest, dtype)


def _unit(size: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A power of two that brings sizes to where neither squares nor reciprocals leave the range of float32."""
    return jnp.where(size > 2.0**60, 2.0**64, jnp.where(size < 2.0**-60, 2.0**-64, 1.0)).astype(size.dtype)


def _in_units(
    x: Float[Array, "*batch n"],
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch n"], Float[Array, "*batch 1"]]:
    """A power of two for each slice, the slice in units of it, and its Euclidean norm in them, at any scale of it."""
    unit = _unit(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    part = x / unit
    largest = jnp.max(jnp.abs(part), axis=-1, keepdims=True)
    size = jnp.sqrt(jnp.sum((part / jnp.where(largest > 0, largest, 1)) ** 2, axis=-1, keepdims=True))
    return unit, part, largest * size


def l2_ball(x: Float[Array, "*batch n"], radius: float, dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    r"""The nearest slice with $|y| \le r$: outside of the ball, $r x / |x|$."""
    unit, part, norm = _in_units(x)
    direction = part / jnp.where(norm > 0, norm, 1)
    return _returned(unit * norm <= radius, x, direction * (radius * (1 - rounding(dtype))), dtype)


def sphere(x: Float[Array, "*batch n"], radius: float, dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    r"""The nearest slice with $|y| = r$: $r x / |x|$. All points are as near to zero; the constant one is returned."""
    x = jnp.where(jnp.all(x == 0, axis=-1, keepdims=True), radius / math.sqrt(x.shape[-1]), x)
    unit, part, norm = _in_units(x)
    stays = jnp.abs(unit * norm - radius) <= rounding(dtype) * radius
    # Little is left behind the divisions: XLA computes that anew for each copy of a weight.
    return rounded(part / jnp.where(stays, 1, norm) / jnp.where(stays, 1 / unit, 1 / radius), dtype)


def isotonic(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    r"""The nearest nondecreasing slice, by pooling adjacent violators.

    The nearest sequence is constant on blocks, at the mean of each (Barlow, Bartholomew, Bremner and Brunk,
    *Statistical inference under order restrictions*, 1972, section 1.2). A stack of blocks, with means and sizes, takes
    one entry after the other; while the mean below the top is larger than the top's, these two are merged. Each of the
    at most $2n - 1$ iterations pushes or merges a block of every slice. Blocks with equal means are not merged, so that
    a nondecreasing slice is returned as it is.
    """
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    rows = jnp.arange(flat.shape[0])

    def step(state):
        means, sizes, top, entry, _ = state
        under, last = jnp.maximum(top - 2, 0), jnp.maximum(top - 1, 0)
        low, high, size = means[rows, under], means[rows, last], sizes[rows, last]
        merge = (top >= 2) & (low > high)
        push = ~merge & (entry < n)
        both = size + sizes[rows, under]
        share = (size / both).astype(x.dtype)
        pooled = low * (1 - share) + high * share
        place = jnp.where(merge, under, jnp.where(push, top, last))
        mean = jnp.where(merge, pooled, jnp.where(push, flat[rows, jnp.minimum(entry, n - 1)], high))
        size = jnp.where(merge, both, jnp.where(push, 1, size))
        means, sizes = means.at[rows, place].set(mean), sizes.at[rows, place].set(size)
        return means, sizes, top + push.astype(int) - merge, entry + push, jnp.any(merge | push)

    zeros = jnp.zeros(flat.shape[:1], int)
    start = (jnp.zeros_like(flat), jnp.ones(flat.shape, int), zeros, zeros, jnp.array(flat.size > 0))
    means, sizes, top, _, _ = jax.lax.while_loop(lambda state: state[-1], step, start)
    first = jnp.cumsum(sizes, axis=-1) - sizes
    first = jnp.where(jnp.arange(n) < top[:, None], first, n)
    begins = jnp.zeros(flat.shape, int).at[rows[:, None], first].set(1, mode="drop")
    return jnp.take_along_axis(means, jnp.cumsum(begins, axis=-1) - 1, axis=-1).reshape(x.shape)


def equal(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """The nearest slice whose entries are equal: their mean. One whose entries are equal already stays as it is."""
    mean = jnp.sum(x / x.shape[-1], axis=-1, keepdims=True)  # so that no sum of large numbers overflows
    return jnp.where(jnp.all(x == x[..., :1], axis=-1, keepdims=True), x, mean)


def nearest_level(x: Float[Array, "*shape"], levels: Float[np.ndarray, "levels"]) -> Int[Array, "*shape"]:
    """The index of the level nearest to each entry; the levels ascend."""
    if len(levels) == 1:
        return jnp.zeros(x.shape, int)
    known, gaps = jnp.asarray(levels), np.diff(levels)
    if np.ptp(gaps) < 1e-3 * gaps.max():
        lower = jnp.floor((x - levels[0]) / gaps.mean())
        upper = jnp.clip(lower, 0, len(levels) - 2).astype(int) + 1
    else:
        method = "compare_all" if len(levels) <= 16 else "scan"
        upper = jnp.clip(jnp.searchsorted(known, x, method=method), 1, len(levels) - 1)
    return jnp.where(x - known[upper - 1] <= known[upper] - x, upper - 1, upper).astype(int)


def scaled_levels(x: Float[Array, " n"], levels: Float[np.ndarray, "levels"], dtype: jnp.dtype) -> Float[Array, " n"]:
    r"""A nearby array with entries $s q_i$, all $q_i$ among the levels, for one $s \ge 0$.

    At a given scale the best $q_i$ are the levels nearest to $x_i / s$. For given $q$ the best scale is
    $s = \langle x, q \rangle_+ / |q|^2$, at which $|x - s q|^2 = |x|^2 - g$ with the gain
    $g = \langle x, q \rangle_+^2 / |q|^2$. Alternating the two never decreases $g$ (it is Lloyd's algorithm, for
    levels with one common parameter), and ends where neither changes: at a local optimum. It starts from the scale with
    the largest gain among those that

    - put the entry of largest size $x_j$ on one of the levels, $s = x_j / l_k$,
    - or are smaller than the smallest of these by factors of $\sqrt 2$ down to 32.

    An array that is in the set already is found among the former: let $q_j = l_k$ be the level in use with the largest
    size, then $x_i = x_j q_i / l_k$. So is the result made, from $x_j$ as it is rounded to `dtype`.
    """
    known = jnp.asarray(levels)
    size = np.abs(levels)
    # `ratios[k]` are the levels relative to level k, rounded once.
    divisors = np.where(levels == 0, 1, levels).astype(np.float64)
    ratios = jnp.asarray((levels[None, :] / divisors[:, None]).astype(levels.dtype))
    extreme = x[jnp.argmax(jnp.abs(x))]
    unit = jnp.where(extreme == 0, 1, jnp.abs(extreme))
    z = x / unit

    def fit(scale):
        index = nearest_level(z / jnp.where(scale > 0, scale, 1), levels)
        q = known[index]
        product, square = jnp.maximum(jnp.sum(z * q), 0), jnp.sum(q * q)
        best = product / jnp.where(square > 0, square, 1)
        return index, best, best * product

    def start(scale_and_level):
        scale, k = scale_and_level
        index, best, gain = fit(scale)
        member = (extreme * known[k] > 0) & jnp.all(rounded(extreme * ratios[k][index], dtype) == x)
        return best, gain, member

    def alternate(state):
        scale, gain, _, count = state
        _, best, new = fit(scale)
        better = new > gain
        return jnp.where(better, best, scale), jnp.where(better, new, gain), better, count + 1

    nonzero, top = np.flatnonzero(levels), int(np.argmax(size))
    scales = np.concatenate([1 / size[nonzero], 2 ** (-np.arange(1, 11) / 2) / size[top]]).astype(levels.dtype)
    at_level = np.concatenate([nonzero, np.full(10, top)])
    bests, gains, members = jax.lax.map(start, (jnp.asarray(scales), jnp.asarray(at_level)))
    first = jnp.argmax(gains)
    begin = (bests[first], gains[first], jnp.array(True), jnp.array(0))
    scale = jax.lax.while_loop(lambda s: s[2] & (s[3] < _MAX_ALTERNATIONS), alternate, begin)[0]
    index = fit(scale)[0]
    k = index[jnp.argmax(jnp.abs(known[index]))]
    result = rounded(rounded(unit * (scale * known[k]), dtype) * ratios[k][index], dtype)
    return jnp.where(jnp.any(members), x, jnp.where(scale > 0, result, 0 * scale))


def _times(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A product without the shortened factors of some accelerators."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _decomposed(x: Float[Array, "m n"]) -> tuple[Array, Array, Array]:
    r"""$U$, $\sigma$ and $V^T$.

    The divide and conquer of LAPACK does not always converge where singular values lie close together, as in a
    nearly orthogonal matrix, and then answers NaN. The transposed matrix is another problem for it, hence a second try.
    """
    u, s, v = jnp.linalg.svd(x, full_matrices=False)

    def transposed():
        u, s, v = jnp.linalg.svd(x.T, full_matrices=False)
        return v.T, s, u.T

    found = jnp.all(jnp.isfinite(u)) & jnp.all(jnp.isfinite(s)) & jnp.all(jnp.isfinite(v))
    return jax.lax.cond(found, lambda: (u, s, v), transposed)


_FAR = 100.0  # the Gram matrix has half of the digits: it is taken where squares of singular values differ by less,
_OUTSIDE = 4.0  # and of a matrix outside of a ball, where the largest one exceeds the radius by a smaller factor


def _rows_decomposed(x: Float[Array, "m n"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """The squares of the singular values, ascending, and the left singular vectors, by the Gram matrix of the rows.

    With few rows that is many times as fast as the singular value decomposition.
    """
    return jnp.linalg.eigh(_times(x, x.T))


def polar(x: Float[Array, "m n"], dtype: jnp.dtype) -> Float[Array, "m n"]:
    r"""The nearest matrix with orthonormal rows, or columns where these are fewer.

    With the singular value decomposition $X = U \Sigma V^T$ it is $U V^T$ (Higham, *Computing the polar decomposition -
    with applications*, SIAM J. Sci. Stat. Comput. 7(4), 1986, section 2). Where the singular values are of one size, as
    after a step from an orthogonal matrix, it is found as $U \Sigma^{-1} U^T X$, with $X X^T = U \Sigma^2 U^T$. A step
    $\tfrac12 (3 I - Y Y^T) Y$ of Newton and Schulz squares the error that rounding left in $Y Y^T = I$.
    """
    if x.shape[0] > x.shape[1]:
        return polar(x.T, dtype).T
    identity = jnp.eye(x.shape[0], dtype=x.dtype)
    squares, u = _rows_decomposed(x)

    def whole() -> Array:
        u, _, v = _decomposed(x)
        return _times(u, v)

    near = (squares[0] > 0) & (squares[-1] < _FAR * squares[0])
    y = jax.lax.cond(near, lambda: _times(_times(u / jnp.sqrt(squares), u.T), x), whole)
    for _ in range(2):
        y = 1.5 * y - 0.5 * _times(_times(y, y.T), y)
    inside = jnp.max(jnp.abs(_times(x, x.T) - identity)) <= 3 * rounding(dtype)
    return _returned(inside, x, y, dtype)


def truncated(x: Float[Array, "m n"], rank: int, dtype: jnp.dtype) -> Float[Array, "m n"]:
    r"""The nearest matrix of at most this rank.

    It is the sum $\sum_{i \le r} \sigma_i u_i v_i^T$ over the largest singular values (Eckart and Young, *The
    approximation of one matrix by another of lower rank*, Psychometrika 1, 1936).
    """
    unit = _unit(jnp.max(jnp.abs(x)))
    u, s, v = _decomposed(x / unit)
    error = rounding(dtype) + 16 * float(jnp.finfo(x.dtype).eps)  # that of the entries, and of the decomposition
    share = s / jnp.where(s[0] > 0, s[0], 1)  # whose squares are numbers at any scale
    inside = jnp.sum(share[rank:] ** 2) <= error**2 * jnp.sum(share**2)
    return _returned(inside, x, unit * _times(u[:, :rank] * s[:rank], v[:rank]), dtype)


def clipped(x: Float[Array, "m n"], radius: float, dtype: jnp.dtype) -> Float[Array, "m n"]:
    r"""The nearest matrix whose singular values are at most `radius`: the larger ones become the radius.

    With $X X^T = U \Sigma^2 U^T$ it is $X - U (1 - r \Sigma^{-1})_+ U^T X$, where no singular value is much larger than
    the radius $r$, as after a step from the ball. Rounding moves the singular values of the answer, all by about its
    relative error: they are clipped below the radius by twice that.
    """
    if x.shape[0] > x.shape[1]:
        return clipped(x.T, radius, dtype).T
    least = radius * (1 - 2 * rounding(dtype))
    squares, u = _rows_decomposed(x)
    sizes = jnp.sqrt(jnp.maximum(squares, least**2))

    def whole() -> tuple[Array, Array]:
        unit = _unit(jnp.max(jnp.abs(x)))
        u, s, v = _decomposed(x / unit)
        return s[0] <= radius / unit, unit * _times(u * jnp.minimum(s, least / unit), v)

    def partly() -> tuple[Array, Array]:
        return squares[-1] <= radius**2, x - _times(_times(u * (1 - least / sizes), u.T), x)

    inside, y = jax.lax.cond(squares[-1] < _OUTSIDE * radius**2, partly, whole)
    return _returned(inside, x, y, dtype)
