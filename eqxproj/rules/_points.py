r"""Rules written in points, used by a library that works in duals.

A user's rule takes inputs and a target and returns new inputs. Where the metric is steep, the wanted change
$\mu/\kappa$ is below the rounding of the values themselves. Then the rule is asked for a change in the same direction
of a visible size, one hundredth of the output's, and its answer is scaled back: exact to first order for every rule
that answers small wishes in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array

_STEEP, _VISIBLE = 100.0, 0.01


def through_points(
    rule: Callable[[Sequence[Array]], Sequence[Array]],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    duals: Sequence[Array],
    weights: Sequence[float],
    kappa: Sequence[float | Array],
) -> list[Array]:
    """The duals of the inputs, from a rule `targets -> new inputs`."""
    if max(weights, default=1.0) <= _STEEP:
        targets = [y + mu / jnp.asarray(k, y.dtype) for y, mu, k in zip(outputs, duals, kappa, strict=True)]
        new = rule(targets)
        return [(n - x) * jnp.asarray(w, x.dtype) for n, x, w in zip(new, inputs, weights, strict=True)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(mu), initial=0.0) for mu in duals]))
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(y), initial=0.0) for y in outputs]))
    largest = jnp.where(largest > 0, largest, 1.0)
    visible = _VISIBLE * jnp.where(size > 0, size, 1.0)
    targets = [
        y + visible.astype(y.dtype) * (mu / largest.astype(mu.dtype)) for y, mu in zip(outputs, duals, strict=True)
    ]
    new = rule(targets)
    return [(n - x) / visible.astype(x.dtype) * largest.astype(x.dtype) for n, x in zip(new, inputs, strict=True)]
