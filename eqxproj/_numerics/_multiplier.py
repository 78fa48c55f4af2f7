r"""The multiplier of a scalar product whose two operands both move.

For one product $z = a \cdot w$ with weights $\alpha, \omega$ on the operands' copies and $\kappa$ on the output, the
minimizer of $\alpha|a-a_0|^2 + \omega|w-w_0|^2 + \kappa(a\cdot w-z_0)^2$ has, with a multiplier $\lambda$,
$\alpha(a-a_0) = \lambda w$, $\omega(w-w_0) = \lambda a$ and $\lambda = \kappa(z_0 - z)$. With $t =
\lambda/\sqrt{\alpha\omega}$ and $r = \sqrt{\omega/\alpha}$ these solve to

$$a = \frac{a_0 + t r w_0}{1-t^2}, \qquad w = \frac{w_0 + t a_0/r}{1-t^2}, \qquad
z - p = \frac{p\,t^2(3-t^2) + t Q}{(1-t^2)^2},$$

$p = a_0\cdot w_0$, $Q = r|w_0|^2 + |a_0|^2/r$. In units of $\sqrt{\alpha\omega}$, with $h =
\kappa/\sqrt{\alpha\omega}$, $q = hQ$ and $\tau = \mu/\sqrt{\alpha\omega}$ for the dual $\mu = \kappa(z_0-p)$, the
multiplier is the root of

$$G(t) = t + \frac{h p\,t^2(3-t^2) + q t}{(1-t^2)^2} - \tau ,$$

which increases on $(-1, 1)$ (its slope is at least one, as $|hp| \le q/2$). The root has the sign of $\tau$; by
symmetry it is looked for in $[0, 1)$ with $p$ carrying that sign. It exists unless $a_0 = \mp r w_0$ ($q = 2|hp|$),
where $G$ stays finite at one: then $t = 1$, and the minimizers are a sphere. The derivation
follows Elser, "Learning without loss" (2021), and section 3 of arXiv 2506.05878, with weights added.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._newton import bracketed_root

_STEPS = 60


def _stable_g(t: Array, hp: Array, apart: Array, tau: Array) -> tuple[Array, Array, float]:
    """$G(t)$, its slope and no error, from $q + 2hp$ in place of $q$: nothing cancels next to $t = 1$."""
    s = 1.0 / (1.0 + t)
    pole = s / (1.0 - t)
    value = t - hp * t * (2.0 + t) * s * s + apart * t * pole * pole - tau
    slope = 1.0 - 2.0 * hp * s * s * s + apart * (1.0 + 3.0 * t * t) * pole * pole * pole
    return value, slope, 0.0


def solve_multiplier(hp: Array, q: Array, tau: Array, apart: Array) -> tuple[Array, Array]:
    r"""$\rho = t/\tau$ for the root $t$ in $[0, 1)$ of $G$ for $\tau \ge 0$, elementwise, and where there is none.

    There $t = 1$. The multiplier is $\rho\mu$; neither sign nor underflow of a short step is lost.

    `hp` has the sign of the dual, `tau` is $|\mu|/\sqrt{\alpha\omega}$, and `apart` is
    $q + 2hp = h|a_0 \pm r w_0|^2/r$, which is zero where $a_0 = \mp r w_0$.

    Where every step is moderate, as in training, the inverted power series of G, $t = t_1 - u t_1^2 + 2(u^2 -
    q/(1+q)) t_1^3 + \dots$ with $t_1 = \tau/(1+q)$ and $u = 3hp/(1+q)$, and one Newton step reach rounding, without
    a loop. Where they do not, all roots are found again by Newton steps inside a bracket.
    """
    inverse = 1.0 / (1.0 + q)
    t = jnp.minimum(tau * inverse, 0.25)
    u = 3.0 * hp * inverse
    ratio = inverse * (1.0 + t * (2.0 * t * (u * u - q * inverse) - u))
    # Newton on G times (1 - t^2)^2 / tau, which has one division.
    t = tau * ratio
    t2 = t * t
    rest = 1.0 - t2
    square = rest * rest
    value = (ratio - 1.0) * square + ratio * (hp * t * (3.0 - t2) + q)
    slope = square - 4.0 * t * rest * (t - tau) + hp * t * (6.0 - 4.0 * t2) + q
    step = value / slope
    # A Newton step shorter than the square root of what is wanted leaves an error below it.
    done = jnp.all((jnp.abs(step) <= 0.1 * jnp.sqrt(jnp.finfo(tau.dtype).eps) * ratio) & (t <= 0.5))
    quick = ratio - step, jnp.zeros(t.shape, bool)
    return jax.lax.cond(done, lambda: quick, lambda: _bracketed(hp, q, tau, apart))


def _bracketed(hp: Array, q: Array, tau: Array, apart: Array) -> tuple[Array, Array]:
    """As `solve_multiplier`, safely: Newton steps inside of a bracket."""
    eps = float(jnp.finfo(tau.dtype).eps)
    top = jnp.full_like(tau, 1.0 - 8.0 * eps)
    hp = jnp.clip(hp, -0.5 * q, 0.5 * q)
    no_root = _stable_g(top, hp, apart, tau)[0] < 0
    goal = jnp.where(no_root, 0.0, tau)  # has the root zero, and delays no other
    start = jnp.clip(goal / (1.0 + q), 0.0, 0.9)
    function = functools.partial(_stable_g, hp=hp, apart=apart, tau=goal)
    t, _ = bracketed_root(function, start, jnp.zeros_like(tau), top, rtol=4.0 * eps, max_steps=_STEPS)
    # Below rounding the root is that of the first order.
    short = tau < 0.1 * eps
    ratio = jnp.where(short, 1.0 / (1.0 + q), jnp.where(no_root, 1.0, t) / jnp.where(short, 1.0, tau))
    return ratio, no_root


def published_multiplier(hp: Array, q: Array, tau: Array) -> Array:
    """Ten plain Newton steps from zero, for parity with the software of arXiv 2506.05878: may end outside (-1, 1)."""
    t = jnp.zeros_like(tau)
    for _ in range(10):
        t2 = t * t
        s = 1.0 / (1.0 - t2)
        s2 = s * s
        value = t + (hp * t2 * (3.0 - t2) + q * t) * s2 - tau
        slope = 1.0 + (hp * t * (6.0 + 2.0 * t2) + q * (1.0 + 3.0 * t2)) * s2 * s
        t = t - value / slope
    return t
