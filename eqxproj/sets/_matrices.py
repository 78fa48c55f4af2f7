"""Sets of matrices, told by their singular values. Each class maps an array to its nearest point.

An array with more than two axes, such as the kernel of a convolution, counts as the matrix with all axes but the first
made into one.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import equinox as eqx
from jaxtyping import Array, Float

from .._numerics import _nearest as nearest
from .._numerics._promotion import with_own_promotion
from . import _arguments as arguments
from ._base import AbstractSet


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
        self.rank = arguments.count("LowRank", "rank", rank)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "LowRank")
        if self.rank >= min(matrix.shape):
            return x
        return nearest.truncated(matrix, self.rank, x.dtype).astype(x.dtype).reshape(x.shape)


@final
class SpectralBall(AbstractSet):
    r"""All matrices, as for `Orthogonal`, whose largest singular value is at most $r$: as maps they are $r$-Lipschitz.

    The nearest matrix to $X = U \Sigma V^T$ is $U \min(\Sigma, r) V^T$: the Euclidean norm and the set do not change
    under rotations, and by von Neumann's trace inequality $|X - Y| \ge |\Sigma_X - \Sigma_Y|$, with equality where $Y$
    shares the singular vectors of $X$.

    **Arguments:**

    - `radius`: $r$, positive.

    **Raises:** `ValueError` or `TypeError` for another `radius`.
    """

    is_convex: ClassVar[bool] = True

    radius: float = eqx.field(static=True)

    def __init__(self, radius: float = 1.0):
        self.radius = arguments.positive("SpectralBall", "radius", radius)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        matrix = _matrix(x, "SpectralBall")
        if matrix.size == 0:
            return x
        return nearest.clipped(matrix, self.radius, x.dtype).astype(x.dtype).reshape(x.shape)


def _matrix(x: Float[Array, "*shape"], owner: str) -> Float[Array, "rows columns"]:
    """The array as a matrix, in the dtype that it is computed in."""
    if x.ndim < 2:
        raise ValueError(f"`{owner}` needs an array with two axes or more, got shape {x.shape}.")
    return nearest.wide(x).reshape(x.shape[0], math.prod(x.shape[1:]))
