r"""Functions with a derivative of their own: `jax.custom_vjp`, and `jax.custom_jvp` where it makes a difference.

What such a function answers on the way back is its author's choice: a reversed or a clipped gradient, an estimate
straight through, a surrogate of a step, the solution of an implicit equation. It is kept whole and asked for that
answer, $\nu = B(\mu)$ for $J^T \mu$. What it returns beside floating-point numbers passes nothing on.

A `custom_jvp` has a derivative forward too, so that the local solver projects it. A `custom_vjp` has none: its answer
is damped by one factor. Along $d_i = c\,\nu_i / w_i$ the cost

$$\sum_i \frac{c^2 |\nu_i|^2}{w_i} + \kappa \Big| J d - \frac{\mu}{\kappa} \Big|^2, \qquad
|J d| \ge \frac{\langle \mu, J d \rangle}{|\mu|} = \frac{c}{|\mu|} \sum_i \frac{|\nu_i|^2}{w_i},$$

is least, with the bound in the place of $|J d|$, at $c = 1/(1 + \rho)$ with
$\rho = \sum_i (\kappa/w_i) |\nu_i|^2 / |\mu|^2$. That is the projection to first order, for a function of one output.

Its limits: one factor for all elements, and no second step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from .._numerics._conjugate_gradients import inner
from ._base import AbstractRule, Context, transposed
from ._local import largest, nearest_locally


class CustomDerivative(AbstractRule):
    """One step along what a function's own derivative rule answers."""

    label: ClassVar[str] = "its own derivative"
    takes_precedence: ClassVar[bool] = True
    answers_for_some: ClassVar[bool] = True

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return transposed(self, ctx, inputs, duals)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        assert ctx.equation is not None
        if ctx.equation.name == "custom_jvp_call":
            return nearest_locally(ctx, inputs, duals)
        pulled = self.pullback(ctx, inputs, duals)
        size = inner(list(duals), list(duals))
        rho = jnp.zeros_like(size)
        for i, nu in enumerate(pulled):
            rho = rho + jnp.asarray(largest([r[i] for r in ctx.ratios]), size.dtype) * jnp.vdot(nu, nu)
        factor = 1.0 / (1.0 + rho / jnp.where(size > 0, size, 1.0))
        return [nu * factor.astype(nu.dtype) for nu in pulled]
