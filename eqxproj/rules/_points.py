r"""Rules written in points, for a library that works in duals.

A user's rule takes inputs and a target and returns new inputs. In the projection regime it gets the wanted target
itself. In the gradient regime the wanted change $\mu/\kappa$ is below the rounding of the values, so the rule is asked
for a change in the same direction of a visible size, and its answer is scaled back. Limits: the second is exact to
first order, for a rule that answers small wanted changes in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from ._base import Scale

_VISIBLE = 0.01
"""The change that is asked for, in units of the largest output."""


def of_whole_step(
    rule: Callable[[Sequence[Array]], Sequence[Array]],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    duals: Sequence[Array],
    weights: Sequence[float],
    output_weights: Sequence[Scale],
) -> list[Array]:
    """The duals of the inputs, from a rule `targets -> new inputs` that is asked for the wanted target."""
    targets = [y + mu / jnp.asarray(k, y.dtype) for y, mu, k in zip(outputs, duals, output_weights, strict=True)]
    return [(n - x) * jnp.asarray(w, x.dtype) for n, x, w in zip(rule(targets), inputs, weights, strict=True)]


def of_visible_step(
    rule: Callable[[Sequence[Array]], Sequence[Array]],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    duals: Sequence[Array],
) -> list[Array]:
    """The duals of the inputs, from a rule `targets -> new inputs` that is asked for a change of a visible size."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(mu), initial=0.0) for mu in duals]))
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(y), initial=0.0) for y in outputs]))
    largest = jnp.where(largest > 0, largest, 1.0)
    visible = _VISIBLE * jnp.where(size > 0, size, 1.0)
    targets = [
        y + visible.astype(y.dtype) * (mu / largest.astype(mu.dtype)) for y, mu in zip(outputs, duals, strict=True)
    ]
    new = rule(targets)
    return [(n - x) / visible.astype(x.dtype) * largest.astype(x.dtype) for n, x in zip(new, inputs, strict=True)]
