"""Conjugate gradients on a positive-definite operator over pytrees.

Unlike `jax.scipy.sparse.linalg.cg` it takes a right side of any scale, down to the smallest that float32 holds, and
stops where a direction has no positive curvature. Limits: it starts from zero.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def inner(x: PyTree, y: PyTree) -> Array:
    """The scalar product of two pytrees of arrays, in full precision."""
    products = jtu.tree_map(lambda a, b: jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST), x, y)
    return sum(jtu.tree_leaves(products), start=jnp.asarray(0.0))


def _plus(x: PyTree, scale: Array, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)


def conjugate_gradients(
    operator: Callable[[PyTree], PyTree],
    b: PyTree,
    preconditioner: Callable[[PyTree], PyTree] | None = None,
    *,
    tol: float | Array,
    max_steps: int,
) -> PyTree:
    r"""Solves $M x = b$ for symmetric positive-definite $M$, the operator.

    The `preconditioner` applies an approximate inverse of it, which is symmetric and positive definite too. It stops at
    the relative residual `tol`, after `max_steps` products, or at a direction without positive curvature.
    """
    preconditioned = (lambda r: r) if preconditioner is None else preconditioner
    size = jtu.tree_reduce(jnp.maximum, jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0.0), b), jnp.asarray(0.0))
    scale = jnp.where(size > 0, size, 1.0)
    r = jtu.tree_map(lambda x: x / scale.astype(x.dtype), b)
    z = preconditioned(r)
    x, rz = jtu.tree_map(jnp.zeros_like, r), inner(r, z)

    def body(carry):
        x, r, p, rz, count, _ = carry
        mp = operator(p)
        curvature = inner(p, mp)
        ok = (curvature > 0) & jnp.isfinite(curvature)
        alpha = jnp.where(ok, rz / jnp.where(ok, curvature, 1.0), 0.0)
        x, r = _plus(x, alpha, p), _plus(r, -alpha, mp)
        z = preconditioned(r)
        new = inner(r, z)
        p = _plus(z, new / jnp.where(rz > 0, rz, 1.0), p)
        return x, r, p, new, count + 1, ok

    def more(carry):
        return (carry[3] > tol**2 * rz) & (carry[4] < max_steps) & carry[5]

    start = (x, r, z, rz, jnp.asarray(0), jnp.asarray(True))
    x = jax.lax.while_loop(more, body, start)[0]
    return jtu.tree_map(lambda v: v * scale.astype(v.dtype), x)
