r"""Functions with a derivative of their own: `jax.custom_vjp`.

What such a function answers on the way back is its author's choice: a reversed or a clipped gradient, an estimate
straight through, the solution of an implicit equation. It is kept whole and asked for that answer, $\nu = B(\mu)$ for
$J^T \mu$, damped by one factor. Along $d_i = c\,\nu_i / w_i$ the cost

$$\sum_i \frac{c^2 |\nu_i|^2}{w_i} + \kappa \Big| J d - \frac{\mu}{\kappa} \Big|^2, \qquad
|J d| \ge \frac{\langle \mu, J d \rangle}{|\mu|} = \frac{c}{|\mu|} \sum_i \frac{|\nu_i|^2}{w_i},$$

is least, with the bound in the place of $|J d|$, at $c = 1/(1 + \rho)$ with
$\rho = \sum_i (\kappa/w_i) |\nu_i|^2 / |\mu|^2$. That is the projection to first order, for a function of one output.

Its limits: one factor for all elements, and no second step. The derivatives of `jax.custom_jvp` are not asked for:
such functions are seen through, unless there is no other derivative of what they do, and left to the local solver then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._numerics._conjugate_gradients import inner
from .._program._equations import Equation
from ._base import AbstractRule, Context, step
from ._local import largest


class CustomDerivative(AbstractRule):
    """One step along what a function's own derivative rule answers."""

    label: ClassVar[str] = "its own derivative"
    takes_precedence: ClassVar[bool] = True

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return all(v.is_float for v in equation.outputs)

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        # Thresholds of the author's, as of a clipped gradient, are in units of the loss.
        back = jax.vjp(ctx.function, *inputs)[1]
        return [nu * jnp.asarray(ctx.unit, nu.dtype) for nu in back([step(ctx.unit, mu) for mu in duals])]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        pulled = self.pullback(ctx, inputs, duals)
        size = inner(list(duals), list(duals))
        rho = jnp.zeros_like(size)
        for i, nu in enumerate(pulled):
            rho = rho + jnp.asarray(largest([r[i] for r in ctx.ratios]), size.dtype) * jnp.vdot(nu, nu)
        factor = 1.0 / (1.0 + rho / jnp.where(size > 0, size, 1.0))
        return [nu * factor.astype(nu.dtype) for nu in pulled]
