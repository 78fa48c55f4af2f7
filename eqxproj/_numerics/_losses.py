r"""Margin, squared error and hinge as objectives: values, and how far their proximal maps move the prediction.

Every loss here, and the cross-entropy of `_cross_entropy.py`, comes as two pure functions, which work under `jax.jit`
and `jax.vmap`:

- a *value*, not reduced: one number per sample (per element, where the loss is elementwise), as in Optax;
- a *displacement* $\mathrm{prox}_{\tau \ell}(z) - z$, where
  $\mathrm{prox}_{\tau \ell}(z) = \arg\min_u \tfrac12 |u - z|^2 + \tau \ell(u)$. It is computed as such rather than as
  a difference of two nearly equal arrays, so that it keeps its relative accuracy when $\tau$ is small:
  displacement$/\tau \to -\nabla \ell(z)$ as $\tau \to 0$.

The last axis of logits and scores holds the classes; integer labels name the right one. Half-precision input is
computed in float32, and every result has the dtype of the prediction. The step `tau` is positive, and a scalar or an
array that broadcasts to the shape of the value.

Limits: the value of a sample whose integer label is out of range is NaN; its displacement means nothing. The
displacements of the
cross-entropy and of the hinge contain a `jax.lax.while_loop`: no derivative in reverse mode. Scores of $-\infty$
(masked classes) stay where they are as long as the right class is not among them; NaN gives NaN.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from ._water_level import water_level


def floating(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    """The argument in the dtype it is computed in (float32 at least), and its own dtype."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be a floating-point array, got dtype {array.dtype}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)), array.dtype


def with_classes(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    """As `floating`, of an array whose last axis holds the classes."""
    array, dtype = floating(name, x)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"`{name}` must have a last axis with at least one class, got shape {array.shape}.")
    return array, dtype


def is_index(labels: Array, shape: tuple[int, ...]) -> bool:
    """Whether the labels are integers, one for each sample of logits of this shape."""
    return labels.shape == shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer)


def is_right(labels: Array, n: int) -> Bool[Array, "*batch n"]:
    """Whether a class is the right one."""
    return labels[..., None] == jnp.arange(n, dtype=labels.dtype)


def where_named(value: Array, labels: Array, n: int) -> Array:
    """The value of a loss where the label names one of n classes, and NaN elsewhere."""
    return jnp.where((labels >= 0) & (labels < n), value, jnp.nan)


def check_classes(labels: Any, classes: int) -> None:
    """Raises a `ValueError` where an integer label, of an array that is no tracer, names none of the classes."""
    low, high = (int(np.min(labels)), int(np.max(labels))) if np.size(labels) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"The `labels` must be integers from 0 to {classes - 1}, since the logits have {classes} classes on their "
            f"last axis, but they run from {low} to {high}. Leave out, or weigh by zero, samples without a label, and "
            "give them the label 0."
        )


def check_signs(labels: Any) -> None:
    """Raises a `ValueError` where a label, of an array that is no tracer, is neither -1 nor 1."""
    found = np.unique(np.asarray(labels, np.float64))
    if not np.isin(found, (-1, 1)).all():
        shown = ", ".join(f"{x:g}" for x in found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(
            f"The `labels` of the binary hinge loss, which have the shape of the scores, must be -1 and 1, but they "
            f"are {shown}. Of labels 0 and 1, take `2 * labels - 1`."
        )


def step_of(tau: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The step `tau`, broadcast to the shape of the loss, in the dtype of the computation."""
    array = jnp.asarray(tau, dtype)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"`tau` must be a scalar or broadcast to the shape of the loss, {shape}, got shape {array.shape}."
        ) from None


def margin_displacement(logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch n"]:
    r"""From the logits to the nearest logits with a margin: wrong classes at most 0, the right class at least 1."""
    z, dtype = with_classes("logits", logits)
    array = jnp.asarray(labels)
    if not is_index(array, z.shape):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"`labels` must be integers of shape {z.shape[:-1]}, got {got}.")
    right = is_right(array, z.shape[-1])
    return jnp.where(right, jnp.maximum(1 - z, 0), -jnp.maximum(z, 0)).astype(dtype)


def margin_value(logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Half the squared distance to the logits with a margin; its gradient is `-margin_displacement`."""
    z, dtype = with_classes("logits", logits)
    value = 0.5 * jnp.sum(margin_displacement(z, labels) ** 2, axis=-1)
    return where_named(value, jnp.asarray(labels), z.shape[-1]).astype(dtype)


def _targets(targets: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    array = jnp.asarray(targets)
    if array.shape != shape or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"`targets` must be real, of shape {shape}, got {array.dtype} of shape {array.shape}.")
    return array.astype(dtype)


def squared_error_value(predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$(p - t)^2$ for each element."""
    p, dtype = floating("predictions", predictions)
    return ((p - _targets(targets, p.shape, p.dtype)) ** 2).astype(dtype)


def squared_error_displacement(
    predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"], tau: Num[ArrayLike, "*#shape"]
) -> Float[Array, "*shape"]:
    r"""How far the proximal map of the squared error moves the predictions.

    $u - p + 2 \tau (u - t) = 0$ gives $u - p = \frac{2 \tau}{1 + 2 \tau} (t - p)$.
    """
    p, dtype = floating("predictions", predictions)
    t = _targets(targets, p.shape, p.dtype)
    twice = 2 * step_of(tau, p.shape, p.dtype)
    return (twice / (1 + twice) * (t - p)).astype(dtype)


def equal_displacement(predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """From the predictions to the targets."""
    p, dtype = floating("predictions", predictions)
    return (_targets(targets, p.shape, p.dtype) - p).astype(dtype)


def equal_value(predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$(p - t)^2$ for each element: the squared distance to the targets."""
    return squared_error_value(predictions, targets)


def _hinge_labels(labels: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, bool]:
    """The labels, and whether they name classes."""
    array = jnp.asarray(labels)
    if len(shape) > 0 and is_index(array, shape):
        return array, True
    is_real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if array.shape == shape and is_real:
        return array.astype(dtype), False
    raise ValueError(
        f"`labels` must be integers of shape {shape[:-1]} (the right class) or numbers -1 and 1 of shape {shape}, "
        f"got {array.dtype} of shape {array.shape}."
    )


def hinge_value(
    scores: Float[Array, "*shape"], labels: Int[Array, "..."] | Num[Array, "*shape"]
) -> Float[Array, "..."]:
    r"""Hinge loss: $\max_j (s_j + [j \ne y]) - s_y$ (Crammer and Singer), or the binary $\max(0, 1 - s t)$ elementwise.

    In the binary loss the labels $t$ are -1 or 1, of the shape of the scores.
    """
    s, dtype = floating("scores", scores)
    array, multiclass = _hinge_labels(labels, s.shape, s.dtype)
    if not multiclass:
        return jnp.maximum(1 - s * array, 0).astype(dtype)
    s, _ = with_classes("scores", s)
    right = is_right(array, s.shape[-1])
    best = jnp.max(jnp.where(right, s, s + 1), axis=-1)
    value = best - jnp.sum(jnp.where(right, s, 0), axis=-1)
    return where_named(value, array, s.shape[-1]).astype(dtype)


def hinge_displacement(
    scores: Float[Array, "*shape"], labels: Int[Array, "..."] | Num[Array, "*shape"], tau: Num[ArrayLike, "..."]
) -> Float[Array, "*shape"]:
    r"""How far the proximal map of the hinge loss moves the scores; exact.

    Binary: $s$ moves by $t \cdot \mathrm{clip}(1 - s t, 0, \tau)$.

    Several classes: with $v = s + [j \ne y] + \tau e_y$, the problem is the proximal map of $\tau \max$ at $v$, and
    by Moreau's identity the displacement is $\tau (e_y - p)$, where $p$ is the projection of $v / \tau$ onto the
    simplex, $p_j = \max(v_j / \tau - \theta, 0)$ with $\theta$ such that $\sum_j p_j = 1$. That is a water level
    below the largest $v_j$, in units of $\tau$; only differences of scores enter.
    """
    s, dtype = floating("scores", scores)
    array, multiclass = _hinge_labels(labels, s.shape, s.dtype)
    if not multiclass:
        return (array * jnp.clip(1 - s * array, 0, step_of(tau, s.shape, s.dtype))).astype(dtype)
    s, _ = with_classes("scores", s)
    step = step_of(tau, s.shape[:-1], s.dtype)[..., None]
    right = is_right(array, s.shape[-1])
    rival = jnp.max(jnp.where(right, -jnp.inf, s), axis=-1, keepdims=True)
    # How far the right class is below its margin; beyond the margin, as without rivals, nothing is to be done.
    lead = jnp.sum(jnp.where(right, s, 0), axis=-1, keepdims=True)
    lead = jnp.where(rival == -jnp.inf, 0, jnp.minimum(lead - rival - 1, 0))
    unit = jnp.where(step > 0, step, 1)
    own = 1 + lead / unit  # (v_y - v_rival) / tau; the top is the larger of the two
    top = jnp.maximum(own, 0)
    below = jnp.where(right, top - own, top + jnp.where(s == rival, 0, rival - s) / unit)
    below = jnp.clip(below, 0, 1)  # the level is at most one unit below the top
    p = jnp.maximum(water_level(below)[..., None] - below, 0)
    others = jnp.where(right, 0, -p)
    return (step * jnp.where(right, -jnp.sum(others, axis=-1, keepdims=True), others)).astype(dtype)
