"""Losses whose projection or prox is known in closed form: `(logits, labels)`, one value a sample, as in optax.

They are ordinary functions under `jit`, `vmap` and `grad`, so that the same loss trains by gradients. Training by
projections asks them for their prox instead. Any other loss works too, through a local solver.
"""

from __future__ import annotations

from jaxtyping import Array, ArrayLike

from ._numerics._cross_entropy import cross_entropy_displacement, cross_entropy_value
from ._numerics._losses import (
    hinge_displacement,
    hinge_value,
    margin_displacement,
    margin_value,
    squared_error_displacement,
    squared_error_value,
)
from ._program._custom import custom_loss

_margin = custom_loss(margin_value, lambda logits, labels, tau: margin_displacement(logits, labels), hard=True)
_cross_entropy = custom_loss(cross_entropy_value, cross_entropy_displacement)
_squared_error = custom_loss(squared_error_value, squared_error_displacement)
_hinge = custom_loss(hinge_value, hinge_displacement)


def margin(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""The constraint that the logit of the right class is at least one and all others are at most zero.

    **Arguments:**

    - `logits`: `Float[Array, "*batch classes"]`.
    - `labels`: integers, `Int[Array, "*batch"]`.

    **Returns:**

    Half the squared distance of each sample's logits to that set, `Float[Array, "*batch"]`: zero exactly on it.
    Its projection is that of section 3 of arXiv 2506.05878.
    """
    return _margin(logits, labels)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Softmax cross-entropy.

    **Arguments:**

    - `logits`: `Float[Array, "*batch classes"]`.
    - `labels`: integers, `Int[Array, "*batch"]`, or probabilities of the shape of `logits`.

    **Returns:**

    $-\sum_k y_k \log \mathrm{softmax}(z)_k$ in nats, `Float[Array, "*batch"]`.
    """
    return _cross_entropy(logits, labels)


def squared_error(predictions: ArrayLike, targets: ArrayLike) -> Array:
    r"""$(p - t)^2$, elementwise, of the shape of `predictions` (no factor of one half, as in optax).

    **Arguments:**

    - `predictions`, `targets`: of equal shape.
    """
    return _squared_error(predictions, targets)


def hinge(scores: ArrayLike, labels: ArrayLike) -> Array:
    r"""The hinge loss, multiclass or binary.

    **Arguments:**

    - `scores`: `Float[Array, "*batch classes"]` with integer labels `Int[Array, "*batch"]`:
        $\max_j (s_j + [j \ne y]) - s_y$ (Crammer and Singer); or `Float[Array, "*batch"]` with labels -1 or 1 of the
        same shape: $\max(0, 1 - s y)$.

    **Returns:**

    `Float[Array, "*batch"]`.
    """
    return _hinge(scores, labels)
