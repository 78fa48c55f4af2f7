r"""Losses as objectives: their values, and how far their proximal maps move the prediction.

Every function here is pure, and works under `jax.jit` and `jax.vmap`. A loss comes as two functions:

- a *value*, not reduced: one number per sample (per element, where the loss is elementwise), as in Optax;
- a *displacement* $\mathrm{prox}_{\tau \ell}(z) - z$, where
  $\mathrm{prox}_{\tau \ell}(z) = \arg\min_u \tfrac12 |u - z|^2 + \tau \ell(u)$. It is computed as such rather than as
  a difference of two nearly equal arrays, so that it keeps its relative accuracy when $\tau$ is small:
  displacement$/\tau \to -\nabla \ell(z)$ as $\tau \to 0$.

The last axis holds the classes. Half-precision input is computed in float32, and every result has the dtype of the
prediction. `tau` is a scalar or an array that broadcasts to the shape of the value.

Limits: integer labels outside the range of the classes are not detected, and their results mean nothing. The
displacements of the cross-entropy and of the hinge contain a `jax.lax.while_loop`, so they cannot be differentiated in
reverse mode. Scores of $-\infty$ (masked classes) are allowed, and stay where they are as long as the right class is
not among them; NaN gives NaN.
"""

import itertools
import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

# Newton's method in `_multipliers` takes about ten where the step is below 100; this many leave room for bisections.
_MAX_ITERATIONS = 60
# Up to this size, `water_level` tries every active set, which fuses into one pass over the array.
_ENUMERATE_UP_TO = 4
# Steps of the cross-entropy up to so many units of rounding are those of its slope.
_SHORT = 16
# Up to so many classes, sums over them vectorize if they are the first axis.
_FEW_CLASSES = 16


def _floating(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    """The argument in the dtype it is computed in (float32 at least), and its own dtype."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be a floating-point array, got dtype {array.dtype}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)), array.dtype


def _with_classes(name: str, x: ArrayLike) -> tuple[Array, jnp.dtype]:
    array, dtype = _floating(name, x)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"`{name}` must have a last axis with at least one class, got shape {array.shape}.")
    return array, dtype


def _is_index(labels: Array, shape: tuple[int, ...]) -> bool:
    return labels.shape == shape[:-1] and jnp.issubdtype(labels.dtype, jnp.integer)


def _indices(labels: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = jnp.asarray(labels)
    if not _is_index(array, shape):
        raise ValueError(f"`labels` must be integers of shape {shape[:-1]}, got {array.dtype} of shape {array.shape}.")
    return array


def _step(tau: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """`tau` with as many axes as `shape`, in the dtype of the computation."""
    array = jnp.asarray(tau, dtype)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"`tau` must be a scalar or broadcast to the shape of the loss, {shape}, got shape {array.shape}."
        ) from None


def _largest_known(tau: ArrayLike) -> float:
    """The largest step, infinity where its values are not known while tracing."""
    return math.inf if isinstance(tau, jax.core.Tracer) else float(np.max(np.asarray(tau), initial=0.0))


def _is_right(labels: Array, n: int) -> Bool[Array, "*batch n"]:
    return labels[..., None] == jnp.arange(n, dtype=labels.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Water level
# ----------------------------------------------------------------------------------------------------------------------


@jax.jit  # a loop traced anew in every call would be compiled anew
def water_level(
    depths: Float[Array, "*batch n"],
    rate: Num[ArrayLike, "*#batch"] = 0.0,
    areas: Float[Array, "*batch n"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The level at which one unit of water stands in a set of basins.

    Solves $\rho L + \sum_i a_i \max(L - e_i, 0) = 1$ for $L$. Both the projection onto the simplex and the
    proximal map of a maximum reduce to this equation.

    The left side is convex and increases in $L$, and it is the largest of the lines
    $\rho L + \sum_{i \in S} a_i (L - e_i)$ over all sets $S$, so the root is the smallest of theirs,
    $L_S = (1 + \sum_S a_i e_i) / (\rho + \sum_S a_i)$. Newton's method from above, $S = \{i : e_i < L\}$ and then
    $L = L_S$, descends to it and is exact as soon as $S$ stops shrinking. With $f$ the excess and $k$ the slope,
    convexity gives $f_{j+1}/f_j + k_{j+1}/k_j \le 1$, so that $f k$ falls at least by a factor of 4 in each
    iteration: $O(\log(n / \epsilon))$ iterations of $O(n)$, usually 2 to 6. A sort with prefix sums gives the same
    level, but was 5 to 40 times slower on a CPU.

    **Arguments:**

    - `depths`: $e_i \ge 0$, finite, at least one of them zero with a positive area.
    - `rate`: $\rho \ge 0$.
    - `areas`: $a_i \ge 0$, by default all 1.

    **Returns:**

    $L > 0$, for each element of the leading axes.
    """
    n = depths.shape[-1]
    rate = jnp.broadcast_to(jnp.asarray(rate, depths.dtype), depths.shape[:-1])
    areas = jnp.ones_like(depths) if areas is None else areas
    # No level is above that of the basins of depth zero alone. Basins at or above it stay dry: taking them out here
    # leaves the rounding of the level to the basins that count.
    level = 1 / (rate + jnp.max(jnp.where(depths == 0, areas, 0), axis=-1))
    areas = jnp.where(depths < level[..., None], areas, 0)
    volumes = jnp.where(areas > 0, areas * depths, 0)

    if n <= _ENUMERATE_UP_TO:
        for size in range(1, n + 1):
            for chosen in itertools.combinations(range(n), size):
                volume = sum((volumes[..., i] for i in chosen), start=jnp.ones_like(level))
                area = sum((areas[..., i] for i in chosen), start=rate)
                level = jnp.where(area > 0, jnp.minimum(level, volume / jnp.where(area > 0, area, 1)), level)
        return level

    def lower(state):
        level, _ = state
        wet = depths < level[..., None]
        volume = 1 + jnp.sum(jnp.where(wet, volumes, 0), axis=-1)
        area = rate + jnp.sum(jnp.where(wet, areas, 0), axis=-1)
        new = jnp.minimum(level, volume / area)
        return new, jnp.any(new < level)

    return jax.lax.while_loop(lambda state: state[1], lower, (level, jnp.array(True)))[0]


# ----------------------------------------------------------------------------------------------------------------------
# Margin
# ----------------------------------------------------------------------------------------------------------------------


def margin_displacement(logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch n"]:
    r"""From the logits to the nearest logits with a margin: wrong classes at most 0, the right class at least 1.

    **Arguments:**

    - `logits`: one score per class.
    - `labels`: the right class, an integer.

    **Returns:**

    $P(z) - z$, zero exactly on the set.
    """
    z, dtype = _with_classes("logits", logits)
    right = _is_right(_indices(labels, z.shape), z.shape[-1])
    return jnp.where(right, jnp.maximum(1 - z, 0), -jnp.maximum(z, 0)).astype(dtype)


def margin_value(logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Half the squared distance to the logits with a margin; its gradient is `-margin_displacement`.

    **Arguments:**

    - `logits`: one score per class.
    - `labels`: the right class, an integer.

    **Returns:**

    $\tfrac12 |z - P(z)|^2$ per sample.
    """
    z, dtype = _with_classes("logits", logits)
    return (0.5 * jnp.sum(margin_displacement(z, labels) ** 2, axis=-1)).astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ----------------------------------------------------------------------------------------------------------------------


def _probabilities(labels: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    """The labels as one probability per class."""
    array = jnp.asarray(labels)
    if _is_index(array, shape):
        return _is_right(array, shape[-1]).astype(dtype)
    if array.shape == shape and jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(dtype)
    raise ValueError(
        f"`labels` must be integers of shape {shape[:-1]} or floating-point probabilities of shape {shape}, "
        f"got {array.dtype} of shape {array.shape}."
    )


def cross_entropy_value(
    logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"] | Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    r"""Softmax cross-entropy.

    **Arguments:**

    - `logits`: one score per class.
    - `labels`: the right class, an integer; or one probability per class, floating-point, which need not sum to 1.

    **Returns:**

    $-\sum_i y_i \log \mathrm{softmax}(z)_i$ per sample.
    """
    z, dtype = _with_classes("logits", logits)
    logs = jax.nn.log_softmax(z, axis=-1)
    array = jnp.asarray(labels)
    if _is_index(array, z.shape):
        return -jnp.take_along_axis(logs, array[..., None], axis=-1)[..., 0].astype(dtype)
    y = _probabilities(array, z.shape, z.dtype)
    return -jnp.sum(jnp.where(y == 0, 0, y * logs), axis=-1).astype(dtype)


def _wright(xi: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""The positive root of $\omega + \log \omega = \xi$ (the Wright function), to a relative error below 1e-8.

    With $v = \log \omega$, the equation $v + e^v = \xi$ is convex and increases. Two of Halley's iterations, from
    $v = \min(\xi, \log \max(\xi, 1))$, where the error is largest at $\xi = 0$: 0.57, 4e-3, 2e-9.
    """
    v = jnp.minimum(xi, jnp.log(jnp.maximum(xi, 1)))
    omega, step = v, v
    for _ in range(2):
        omega = jnp.exp(v)
        excess, slope = v + omega - xi, 1 + omega
        step = excess * slope / (slope * slope - 0.5 * excess * omega)
        v = v - step
    return omega * (1 - step * (1 - step * (0.5 - step / 6)))  # omega * exp(-step), without another exp


@jax.jit
def _multipliers(z: Float[Array, "n *batch"], y: Float[Array, "n *batch"], tau: Float[Array, "*batch"]):
    r"""$\omega = \tau\, \mathrm{softmax}(u)$, nearly, at the solution $u$ of $u - z + \tau\, \mathrm{softmax}(u) = y$.

    Eliminate $u$: with $c = \log \sum_i e^{u_i}$ and $\omega = \tau e^{u - c}$, the equation reads
    $\omega_i + \log \omega_i = z_i + y_i - c + \log \tau$, so that $\omega_i(c)$ is known in closed form, decreases
    in $c$, and $\log \sum_i \omega_i(c) = \log \tau$ is one equation for one unknown. The slope of its left side,
    $-\sum_i \frac{\omega_i}{1 + \omega_i} / \sum_i \omega_i$, is up to its sign the denominator that
    Sherman-Morrison has for $H = I + \tau (\mathrm{diag}\, s - s s^T)$; so Newton's method in $c$ is Newton's
    method for $u$, with everything but one direction solved exactly, and a bracket keeps it safe:
    $u_i \le z_i + y_i \le u_i + \tau$ gives $c \le \log \sum_i e^{z_i + y_i} \le c + \tau$.

    The first guess is the first-order expansion $c = \log \sum_i e^{z_i} + s(z) \cdot (y - \tau s(z))$. The loop
    stops at $|dc| < \epsilon^{1/4}$: the last step is then taken in $\omega$ and leaves a relative error of
    $\epsilon^{1/2}$, and the caller's own Newton step squares it.
    """
    shifted, log_tau = z + y, jnp.log(tau)
    top, total = jnp.max(shifted, axis=0), jnp.sum(jnp.exp(z), axis=0)
    upper = top + jnp.log(jnp.sum(jnp.exp(shifted - top), axis=0))
    s = jnp.exp(z) / total
    first = jnp.clip(jnp.log(total) + jnp.sum(s * (y - tau * s), axis=0), upper - tau, upper)
    epsilon = jnp.finfo(z.dtype).eps
    rounding = 4 * epsilon * (jnp.abs(upper) + tau)
    tolerance = jnp.maximum(epsilon**0.25, rounding)

    def newton(state):
        c, low, high, omega, dc, done, count = state
        new = _wright(shifted - c + log_tau)
        mass = jnp.sum(new, axis=0)
        excess = jnp.log(mass) - log_tau
        move = excess * mass / jnp.sum(new / (1 + new), axis=0)
        low, high = jnp.where(excess >= 0, c, low), jnp.where(excess <= 0, c, high)
        # What is done stays as it is, so that no sample depends on the others of its batch.
        omega, dc = jnp.where(done, omega, new), jnp.where(done, dc, move)
        inside = (c + dc >= low) & (c + dc <= high)
        done = done | (jnp.abs(dc) <= tolerance) | (high - low <= rounding)
        c = jnp.where(done, c, jnp.where(inside, c + dc, 0.5 * (low + high)))
        return c, low, high, omega, dc, done, count + 1

    def unfinished(state):
        return jnp.any(~state[5]) & (state[6] < _MAX_ITERATIONS)

    start = (first, upper - tau, upper, jnp.zeros_like(z), jnp.zeros_like(tau), jnp.zeros(tau.shape, bool), 0)
    state = jax.lax.while_loop(unfinished, newton, start)
    omega, dc = state[3], state[4]
    x = jnp.clip(dc / (1 + omega), -1, 1)
    return omega * (1 - x + 0.5 * x * x)


def _short_step(z: Float[Array, "*batch n"], labels: Int[Array, "*batch"], tau: Float[Array, "*batch"]):
    r"""$\tau (y - \mathrm{softmax}(z))$, for steps so short that rounding leaves no more of the prox.

    As $|\nabla \mathrm{softmax}| \le \tfrac12$, it errs by less than $\tau / 2$ of itself.
    """
    axis = 0 if z.shape[-1] <= _FEW_CLASSES else -1
    right = jnp.moveaxis(_is_right(labels, z.shape[-1]), -1, axis)
    s = jax.nn.softmax(jnp.moveaxis(z, -1, axis), axis=axis)
    others = jnp.where(right, 0, -jnp.expand_dims(tau, axis) * s)
    # The entries sum to zero: where the label is certain, 1 - softmax cancels, and the others' sum does not.
    return jnp.moveaxis(jnp.where(right, -jnp.sum(others, axis=axis, keepdims=True), others), axis, -1)


def cross_entropy_displacement(
    logits: Float[Array, "*batch n"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch n"],
    tau: Num[ArrayLike, "*#batch"],
) -> Float[Array, "*batch n"]:
    r"""How far the proximal map of softmax cross-entropy moves the logits.

    Solves $d + \tau (m\, \mathrm{softmax}(z + d) - y) = 0$, with $m = \sum_i y_i$, in one to three iterations up to
    $\tau = 1$, about ten up to $\tau = 100$ and tens beyond, to a residual at the level of rounding. `_multipliers`
    comes close; then one Newton step in $d$ itself, where the residual has no large terms that cancel: with
    $\omega = \tau m s$, $H = \mathrm{diag}(1 + \omega) - \omega \omega^T / \tau m$ and Sherman-Morrison,
    $$H^{-1} r = q + \frac{\omega}{1 + \omega} \frac{\omega \cdot q}{\sum_i \omega_i / (1 + \omega_i)}, \qquad
    q = \frac{r}{1 + \omega}.$$

    **Arguments:**

    - `logits`: one score per class.
    - `labels`: the right class, an integer; or one probability per class, floating-point, which need not sum to 1.
    - `tau`: the step, positive. Where it is known while tracing, short steps cost less.

    **Returns:**

    $\mathrm{prox}(z) - z$.
    """
    z, dtype = _with_classes("logits", logits)
    step = _step(tau, z.shape[:-1], z.dtype)
    y = _probabilities(labels, z.shape, z.dtype)
    epsilon = float(jnp.finfo(z.dtype).eps)
    limit = (20 * epsilon) ** 0.25
    largest_known = _largest_known(tau) if _is_index(jnp.asarray(labels), z.shape) else math.inf
    if largest_known <= _SHORT * epsilon:
        return _short_step(z, jnp.asarray(labels), step).astype(dtype)
    # Classes first: for a few classes and many samples, sums over the first axis vectorize.
    z, y = jnp.moveaxis(z, -1, 0), jnp.moveaxis(y, -1, 0)
    z = jnp.maximum(z - jnp.max(z, axis=0), -1e30)  # a masked class, at -inf, becomes an ordinary very unlikely one
    mass = jnp.maximum(step * jnp.sum(y, axis=0), 1e-30)
    largest = jnp.argmax(y, axis=0) == jnp.arange(z.shape[0]).reshape((-1,) + (1,) * (z.ndim - 1))
    y = step * y

    def move(omega):
        # y - omega, which sums to zero: where the label is certain, 1 - softmax cancels, and the others' sum does not.
        others = jnp.where(largest, 0, y - omega)
        return jnp.where(largest, -jnp.sum(others, axis=0), others)

    # One step of the fixed point d = y - tau m softmax(z + d) errs by less than t^3 at t = tau m, so that Newton's step
    # below leaves t^5 / 20 of d: for small t, less than what rounding leaves, and no loop is needed; nor
    # is one compiled where that is known while tracing.
    near, small = mass * jax.nn.softmax(z, axis=0), mass <= limit
    if largest_known <= limit:
        omega = near
    else:
        omega = jax.lax.cond(jnp.all(small), lambda: near, lambda: jnp.where(small, near, _multipliers(z, y, mass)))
    d = move(omega)
    omega = mass * jax.nn.softmax(z + d, axis=0)
    residual = d - move(omega)
    q, share = residual / (1 + omega), omega / (1 + omega)
    d = d - q - share * (jnp.sum(omega * q, axis=0) / jnp.sum(share, axis=0))
    return jnp.moveaxis(d, 0, -1).astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Squared error
# ----------------------------------------------------------------------------------------------------------------------


def _targets(targets: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    array = jnp.asarray(targets)
    if array.shape != shape or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"`targets` must be real, of shape {shape}, got {array.dtype} of shape {array.shape}.")
    return array.astype(dtype)


def squared_error_value(predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Squared error, elementwise.

    **Arguments:**

    - `predictions`, `targets`: of one shape.

    **Returns:**

    $(p - t)^2$ for each element.
    """
    p, dtype = _floating("predictions", predictions)
    return ((p - _targets(targets, p.shape, p.dtype)) ** 2).astype(dtype)


def squared_error_displacement(
    predictions: Float[Array, "*shape"], targets: Num[Array, "*shape"], tau: Num[ArrayLike, "*#shape"]
) -> Float[Array, "*shape"]:
    r"""How far the proximal map of the squared error moves the predictions.

    $u - p + 2 \tau (u - t) = 0$ gives $u - p = \frac{2 \tau}{1 + 2 \tau} (t - p)$.

    **Arguments:**

    - `predictions`, `targets`: of one shape.
    - `tau`: the step, positive.

    **Returns:**

    $\mathrm{prox}(p) - p$.
    """
    p, dtype = _floating("predictions", predictions)
    t = _targets(targets, p.shape, p.dtype)
    twice = 2 * _step(tau, p.shape, p.dtype)
    return (twice / (1 + twice) * (t - p)).astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Hinge
# ----------------------------------------------------------------------------------------------------------------------


def _hinge_labels(labels: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, bool]:
    """The labels, and whether they name classes."""
    array = jnp.asarray(labels)
    if len(shape) > 0 and _is_index(array, shape):
        return array, True
    if array.shape == shape and jnp.issubdtype(array.dtype, jnp.number):
        if not jnp.issubdtype(array.dtype, jnp.complexfloating):
            return array.astype(dtype), False
    raise ValueError(
        f"`labels` must be integers of shape {shape[:-1]} (the right class) or numbers -1 and 1 of shape {shape}, "
        f"got {array.dtype} of shape {array.shape}."
    )


def hinge_value(
    scores: Float[Array, "*shape"], labels: Int[Array, "..."] | Num[Array, "*shape"]
) -> Float[Array, "..."]:
    r"""Hinge loss: Crammer and Singer's for several classes, or the binary one.

    **Arguments:**

    - `scores`: one score per class; for the binary loss, of any shape.
    - `labels`: the right class, an integer; or, with the shape of `scores`, -1 or 1 for each score.

    **Returns:**

    $\max_j (s_j + [j \ne y]) - s_y$ per sample, or $\max(0, 1 - s t)$ for each element.
    """
    s, dtype = _floating("scores", scores)
    array, multiclass = _hinge_labels(labels, s.shape, s.dtype)
    if not multiclass:
        return jnp.maximum(1 - s * array, 0).astype(dtype)
    s, _ = _with_classes("scores", s)
    right = _is_right(array, s.shape[-1])
    best = jnp.max(jnp.where(right, s, s + 1), axis=-1)
    return (best - jnp.sum(jnp.where(right, s, 0), axis=-1)).astype(dtype)


def hinge_displacement(
    scores: Float[Array, "*shape"],
    labels: Int[Array, "..."] | Num[Array, "*shape"],
    tau: Num[ArrayLike, "..."],
) -> Float[Array, "*shape"]:
    r"""How far the proximal map of the hinge loss moves the scores; exact.

    Binary: $s$ moves by $t \cdot \mathrm{clip}(1 - s t, 0, \tau)$.

    Several classes: with $v = s + [j \ne y] + \tau e_y$, the problem is the proximal map of $\tau \max$ at $v$, and
    by Moreau's identity the displacement is $\tau (e_y - p)$, where $p$ is the projection of $v / \tau$ onto the
    simplex, $p_j = \max(v_j / \tau - \theta, 0)$ with $\theta$ such that $\sum_j p_j = 1$. That is a water level
    below the largest $v_j$, in units of $\tau$; only differences of scores enter.

    **Arguments:**

    - `scores`: one score per class; for the binary loss, of any shape.
    - `labels`: the right class, an integer; or, with the shape of `scores`, -1 or 1 for each score.
    - `tau`: the step, positive; it broadcasts to the shape of `hinge_value`.

    **Returns:**

    $\mathrm{prox}(s) - s$.
    """
    s, dtype = _floating("scores", scores)
    array, multiclass = _hinge_labels(labels, s.shape, s.dtype)
    if not multiclass:
        return (array * jnp.clip(1 - s * array, 0, _step(tau, s.shape, s.dtype))).astype(dtype)
    s, _ = _with_classes("scores", s)
    step = _step(tau, s.shape[:-1], s.dtype)[..., None]
    right = _is_right(array, s.shape[-1])
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
