"""Sets, each with a test of membership that is written without it."""

import jax.numpy as jnp
import numpy as np

from eqxproj import sets

TWO_BITS = (-1.5, -0.5, 0.5, 1.5)
PATTERN = (-1.0, 0.0, 0.3, 2.0)


def error_of(dtype):
    """The relative error of one rounding, with some room for what is computed in float32."""
    return float(jnp.finfo(dtype).eps) / 2 + 1.5e-6


def on_scaled_levels(x, levels, error):
    """Whether the entries are one scale times levels, up to rounding."""
    x, levels = x.ravel(), np.asarray(levels)
    if not x.any():
        return True
    top = x[np.argmax(abs(x))]
    scales = [top / level for level in levels if level * top > 0]
    near = [levels[np.abs(x[:, None] / s - levels).argmin(1)] * s for s in scales]
    return min(np.max(abs(x - y) - 2 * error * abs(y)) for y in near) <= 0


def orthonormal(x, error):
    matrix = x.reshape(len(x), -1)
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    return abs(matrix @ matrix.T - np.eye(len(matrix))).max() <= 3 * error


def tail(x, rank):
    """The norm of all but the largest singular values."""
    return np.linalg.norm(np.linalg.svd(x.reshape(len(x), -1), compute_uv=False)[rank:])


def few(x, k, axis):
    return ((x != 0).sum(axis) <= k).all()


# Name to set and test of membership: `contains(float64 array, relative error of a rounding)`.
WIDER = {
    "k": (sets.Sparse(k=3), lambda x, e: few(x, 3, None)),
    "k_beyond": (sets.Sparse(k=10**6), lambda x, e: True),
    "k_rows": (sets.Sparse(k=2, axis=-1), lambda x, e: few(x, 2, -1)),
    "fraction_columns": (sets.Sparse(0.5, axis=0), lambda x, e: few(x, max(1, len(x) // 2), 0)),
    "given_scale": (sets.Quantized([-1.0, 0.0, 1.0], scale=0.3), lambda x, e: on_scaled_levels(x, [-1, 0, 1], e)),
    "given_bits": (sets.Quantized(3, scale=0.2), lambda x, e: len(np.unique(x)) <= 8),
    "sign_scale": (sets.Quantized(1, scale="learned"), lambda x, e: len(np.unique(abs(x))) == 1),
    "two_bits": (sets.Quantized(2, scale="learned"), lambda x, e: on_scaled_levels(x, TWO_BITS, e)),
    "pattern": (sets.Quantized(PATTERN, scale="learned"), lambda x, e: on_scaled_levels(x, PATTERN, e)),
    "simplex": (sets.Simplex(), lambda x, e: (x >= 0).all() and (abs(x.sum(-1) - 1) <= e).all()),
    "simplex_all": (sets.Simplex(None, 2.5), lambda x, e: (x >= 0).all() and abs(x.sum() - 2.5) <= 2.5 * e),
    "l1": (sets.L1Ball(), lambda x, e: abs(x).sum() <= 1 + 1e-6),
    "l1_rows": (sets.L1Ball(0.7, axis=-1), lambda x, e: (abs(x).sum(-1) <= 0.7 * (1 + 1e-6)).all()),
    "l2": (sets.L2Ball(1.5), lambda x, e: np.linalg.norm(x) <= 1.5 * (1 + 1e-6)),
    "l2_columns": (sets.L2Ball(0.3, axis=0), lambda x, e: (np.sqrt((x**2).sum(0)) <= 0.3 * (1 + 1e-6)).all()),
    "sphere": (sets.Sphere(2.0), lambda x, e: abs(np.linalg.norm(x) - 2) <= 2 * e),
    "sphere_rows": (sets.Sphere(1.0, axis=(-1,)), lambda x, e: (abs(np.sqrt((x**2).sum(-1)) - 1) <= e).all()),
    "increasing": (sets.Monotone(), lambda x, e: (np.diff(x, axis=-1) >= 0).all()),
    "decreasing": (sets.Monotone(0, increasing=False), lambda x, e: (np.diff(x, axis=0) <= 0).all()),
    "orthogonal": (sets.Orthogonal(), orthonormal),
    "spectral": (sets.SpectralBall(0.8), lambda x, e: np.linalg.norm(x.reshape(len(x), -1), 2) <= 0.8 * (1 + 1e-6)),
    "equal": (sets.Equal(), lambda x, e: (x == x[..., :1]).all()),
    "equal_all": (sets.Equal(None), lambda x, e: len(np.unique(x)) <= 1),
    "positive_ball": (
        sets.Intersection(sets.NonNegative(), sets.L2Ball(1.5)),
        lambda x, e: (x >= 0).all() and np.linalg.norm(x) <= 1.5 * (1 + 1e-6),
    ),
    "rank": (sets.LowRank(2), lambda x, e: tail(x, 2) <= (e + 2e-6) * np.linalg.norm(x)),
}
