r"""The scalar node $y = \phi(s)$ for the square and for roundings, exactly.

Every function here, and in `_search.py`, `_smooth.py` and `_piecewise_dual.py`, solves, elementwise,

$$\min_s (s - s_0)^2/\sigma + \kappa (\phi(s) - y_0)^2$$

given $s_0$, the dual $\mu = \kappa (y_0 - \phi(s_0))$, the weight $\sigma$ and the exact product $q = \kappa\sigma$. It
returns the dual $\lambda = (s - s_0)/\sigma$ in the dtype of `s0`. With $d = (\phi(s) - \phi(s_0))/\sigma$, the
objective minus its value at $s_0$, over $\sigma$, is $E = \lambda^2 + q d^2 - 2 \mu d$: neither $y_0$ nor $\kappa$ is
needed.

Limits: a rounding is exact as long as half-integers are representable next to $s_0$.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ._newton import bracketed_root
from ._piecewise_dual import Elements, Weights, finite_cast

_STEPS = 30


def square_dual(s0: Elements, mu: Elements, sigma: Weights, q: Weights) -> Elements:
    r"""The dual for $\phi(s) = s^2$, exactly.

    By symmetry the minimum lies on the side of $s_0$; let $s_0 \ge 0$. Stationarity reads
    $2 q s^3 + w s - s_0 = 0$ with $w = 1 - 2 q s_0^2 - 2 \sigma\mu$, which has one positive root where $s_0 > 0$. Of
    the bounds $s_0/w$ (if $w > 0$) and $\sqrt{\max(-w, 0)/2q} + \sqrt[3]{s_0/2q}$, the smaller lies above it, by a
    factor of at most two, and the cubic is convex: Newton's method descends to it monotonically. In terms of that root

    $$\lambda = 2 s \mu/(1 + 2 q s (s + s_0)),$$

    where nothing cancels. At $s_0 = 0$ the positive root is preferred.
    """
    dtype, s0, mu, sigma, q = widen(s0, mu, sigma, q)
    start = jnp.abs(s0)
    scale = jnp.maximum(2 * q, 1)  # divides the equation: q may be enormous
    # The bounds keep the compiler from turning x/(a/b) into x b/a, which overflows.
    cube, end = jnp.clip(2 * q / scale, 1e-30, 1), start / scale
    w = (1 - 2 * jnp.clip(sigma * mu, -1e30, 1e30)) / scale - cube * start * start
    bound = jnp.sqrt(jnp.maximum(-w, 0)) / jnp.sqrt(cube) + jnp.cbrt(end / cube)
    bound = jnp.where(w > 0, jnp.minimum(bound, end / jnp.where(w > 0, w, 1)), bound)
    bound = jnp.maximum(bound, 1e-30)
    third, first, zeroth = cube * bound * bound, w, end / bound
    size = jnp.maximum(jnp.maximum(third, jnp.abs(first)), jnp.maximum(zeroth, 1e-8))
    third, first, zeroth = third / size, first / size, zeroth / size

    def cubic(x):
        return (third * x * x + first) * x - zeroth, 3 * third * x * x + first, 0.0

    one = jnp.ones_like(bound)
    rtol = 0.1 * float(jnp.finfo(s0.dtype).eps) ** 0.5
    s = bound * bracketed_root(cubic, one, jnp.zeros_like(one), one, rtol=rtol, max_steps=_STEPS)[0]
    lam = s * (2 * mu / (1 + 2 * q * s * (s + start)))
    return finite_cast(jnp.where(s0 < 0, -lam, lam), dtype)


def round_dual(
    s0: Elements, mu: Elements, sigma: Weights, q: Weights, method: Literal["round", "floor", "ceil"] = "round"
) -> Elements:
    r"""The dual for a rounding to integers (`"round"` is half to even, as `jnp.round`), exactly.

    Only the side to which $\mu$ points can pay. With $1 - f \in [0, 1]$ the distance from $s_0$ to the end of its cell
    on that side, the nearest point of the cell $j \ge 1$ steps away lies at the distance $j - f$, and the objective
    changes by $((j - f)^2 + q j^2 - 2 \sigma|\mu| j)/\sigma$. It is convex in $j$ and smallest at
    $j^* = (f + \sigma|\mu|)/(1 + q)$, so that $j$ is one of the two integers around $j^*$, at least one; or $s_0$
    stays. The new point lies inside its cell by a few units in the last place, so that rounding does not undo the step.
    """
    narrow = s0
    dtype, s0, mu, sigma, q = widen(s0, mu, sigma, q)
    eps = float(jnp.finfo(dtype).eps)
    rounded, lowest = {
        "round": (jnp.round(narrow), -0.5),
        "floor": (jnp.floor(narrow), 0.0),
        "ceil": (jnp.ceil(narrow), -1.0),
    }[method]
    edge = rounded.astype(s0.dtype) + lowest
    near = jnp.clip(jnp.where(mu > 0, (edge + 1) - s0, s0 - edge), 0, 1)
    f = 1 - near
    pull = jnp.clip(sigma * jnp.abs(mu), 0, 1e30)
    j = jnp.maximum(jnp.floor((f + pull) / (1 + q)), 1)
    j = jnp.where(2 * (j - f) + 1 + q * (2 * j + 1) < 2 * pull, j + 1, j)
    distance = (j - 1) + near
    distance = distance + jnp.clip(8 * eps * jnp.maximum(jnp.abs(s0), distance), 1e-12, 0.5)
    moves = distance * (distance / j) + q * j < 2 * pull
    return finite_cast(jnp.where(moves, jnp.sign(mu) * distance / sigma, 0), dtype)


def widen(s0: Array, mu: Array, sigma: ArrayLike, q: ArrayLike) -> tuple[Any, Array, Array, Array, Array]:
    """The dtype of `s0`, and all arguments in at least single precision; `mu` gets the shape of `s0`."""
    dtype = jnp.result_type(s0)
    work = jnp.promote_types(dtype, jnp.float32)
    mu = jnp.broadcast_to(jnp.asarray(mu, work), jnp.shape(s0))
    return dtype, jnp.asarray(s0, work), mu, jnp.asarray(sigma, work), jnp.asarray(q, work)
