r"""Softmax cross-entropy as an objective: its value, and how far its proximal map moves the logits.

Value, displacement, arguments and limits are as in `_losses.py`. The labels are integers, or one floating-point
probability per class; these need not sum to 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Num

from ._losses import is_index, is_right, step_of, where_named, with_classes
from ._newton import bracketed_root

_MAX_STEPS = 60  # `_multipliers` takes about ten where the step is below 100; this many leave room for bisections


def _probabilities(labels: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "*batch n"]:
    """The labels as one probability per class."""
    array = jnp.asarray(labels)
    if is_index(array, shape):
        return is_right(array, shape[-1]).astype(dtype)
    if array.shape == shape and jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(dtype)
    raise ValueError(
        f"`labels` must be integers of shape {shape[:-1]} or floating-point probabilities of shape {shape}, "
        f"got {array.dtype} of shape {array.shape}."
    )


def cross_entropy_value(
    logits: Float[Array, "*batch n"], labels: Int[Array, "*batch"] | Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    r"""Softmax cross-entropy, $-\sum_i y_i \log \mathrm{softmax}(z)_i$ per sample, in nats.

    With the likeliest label $k$, the logarithm $L$ of the sum of the others' $e^{z_i}$, and $m = \sum_i y_i$, it is

    $$m \log(1 + e^{L - z_k}) - \sum_{i \ne k} y_i (z_i - z_k) .$$

    So value and gradient keep their relative accuracy where the label is certain: the derivative by $z_k$ is minus the
    sum of the others, where $\mathrm{softmax}(z)_k - 1$ would cancel.
    """
    z, dtype = with_classes("logits", logits)
    y, array, n = _probabilities(labels, z.shape, z.dtype), jnp.asarray(labels), z.shape[-1]
    is_certain = is_index(array, z.shape)
    chosen = is_right(array if is_certain else jnp.argmax(jnp.where(z == -jnp.inf, -1, y), axis=-1), n)
    own, others = jnp.sum(jnp.where(chosen, z, 0), axis=-1), jnp.where(chosen, -jnp.inf, z)
    info = jnp.finfo(z.dtype)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(others, axis=-1), info.min))  # of all masked classes, too
    total = jnp.sum(jnp.exp(others - top[..., None]), axis=-1)  # at least one, if there is any other class
    value = jax.nn.softplus(jnp.log(total + info.tiny) + top - own)
    if is_certain:
        value = where_named(value, array, n)
    else:
        rest = jnp.where(chosen | (y == 0), 0, y * (z - own[..., None]))
        value = jnp.sum(y, axis=-1) * value - jnp.sum(rest, axis=-1)
    return value.astype(dtype)


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
def _multipliers(
    z: Float[Array, "n *batch"], y: Float[Array, "n *batch"], tau: Float[Array, "*batch"]
) -> Float[Array, "n *batch"]:
    r"""$\omega = \tau\, \mathrm{softmax}(u)$, nearly, at the solution $u$ of $u - z + \tau\, \mathrm{softmax}(u) = y$.

    Eliminate $u$: with $c = \log \sum_i e^{u_i}$ and $\omega = \tau e^{u - c}$, the equation reads
    $\omega_i + \log \omega_i = z_i + y_i - c + \log \tau$, so that $\omega_i(c)$ is known in closed form, decreases
    in $c$, and $\log \sum_i \omega_i(c) = \log \tau$ is one equation for one unknown. The slope of its left side,
    $-\sum_i \frac{\omega_i}{1 + \omega_i} / \sum_i \omega_i$, is up to its sign the denominator that
    Sherman-Morrison has for $H = I + \tau (\mathrm{diag}\, s - s s^T)$; so Newton's method in $c$ is Newton's
    method for $u$, with everything but one direction solved exactly. As $u_i \le z_i + y_i \le u_i + \tau$, there is a
    bracket: $c \le \log \sum_i e^{z_i + y_i} \le c + \tau$.

    The first guess is the first-order expansion $c = \log \sum_i e^{z_i} + s(z) \cdot (y - \tau s(z))$. The last step,
    of a length up to $\epsilon^{1/4}$, leaves a relative error of $\epsilon^{1/2}$, and the caller's own Newton step
    squares it.
    """
    shifted, log_tau = z + y, jnp.log(tau)
    top, total = jnp.max(shifted, axis=0), jnp.sum(jnp.exp(z), axis=0)
    upper = top + jnp.log(jnp.sum(jnp.exp(shifted - top), axis=0))
    s = jnp.exp(z) / total
    first = jnp.clip(jnp.log(total) + jnp.sum(s * (y - tau * s), axis=0), upper - tau, upper)
    epsilon = float(jnp.finfo(z.dtype).eps)
    rounding = 4 * epsilon * (jnp.abs(upper) + tau)

    def missing(c):
        omega = _wright(shifted - c + log_tau)
        mass = jnp.sum(omega, axis=0)
        return log_tau - jnp.log(mass), jnp.sum(omega / (1 + omega), axis=0) / mass, 0.0

    tolerance = jnp.maximum(epsilon**0.25, rounding)
    c, _ = bracketed_root(missing, first, upper - tau, upper, rtol=0.0, atol=tolerance, max_steps=_MAX_STEPS)
    return _wright(shifted - c + log_tau)


def cross_entropy_displacement(
    logits: Float[Array, "*batch n"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch n"],
    tau: Num[ArrayLike, "*#batch"],
) -> Float[Array, "*batch n"]:
    r"""How far the proximal map of softmax cross-entropy moves the logits.

    Solves $d + \tau (m\, \mathrm{softmax}(z + d) - y) = 0$, with $m = \sum_i y_i$, to a residual at the level of
    rounding. `_multipliers` comes close; then one Newton step in $d$ itself, where no large terms cancel: with
    $\omega = \tau m s$, $H = \mathrm{diag}(1 + \omega) - \omega \omega^T / \tau m$ and Sherman-Morrison,
    $$H^{-1} r = q + \frac{\omega}{1 + \omega} \frac{\omega \cdot q}{\sum_i \omega_i / (1 + \omega_i)}, \qquad
    q = \frac{r}{1 + \omega}.$$
    """
    z, dtype = with_classes("logits", logits)
    step = step_of(tau, z.shape[:-1], z.dtype)
    y = _probabilities(labels, z.shape, z.dtype)
    epsilon = float(jnp.finfo(z.dtype).eps)
    limit = (20 * epsilon) ** 0.25
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
    # below leaves t^5 / 20 of d: for small t, less than what rounding leaves, and no loop is needed.
    near, small = mass * jax.nn.softmax(z, axis=0), mass <= limit
    omega = jax.lax.cond(jnp.all(small), lambda: near, lambda: jnp.where(small, near, _multipliers(z, y, mass)))
    d = move(omega)
    omega = mass * jax.nn.softmax(z + d, axis=0)
    residual = d - move(omega)
    q, share = residual / (1 + omega), omega / (1 + omega)
    d = d - q - share * (jnp.sum(omega * q, axis=0) / jnp.sum(share, axis=0))
    return jnp.moveaxis(d, 0, -1).astype(dtype)
