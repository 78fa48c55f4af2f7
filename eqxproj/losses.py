r"""Losses that bring their own projection or proximal map: `(predictions, targets)` to one value a sample.

They are ordinary functions under `jit`, `vmap` and `grad`, unreduced as in Optax, so the same loss trains by gradients.
In the gradient regime, training by projections takes their gradient too. In the projection regime it moves the
predictions $z$ to the proximal point

$$\mathrm{prox}_{\tau \ell}(z) = \arg\min_u \tfrac12 |u - z|^2 + \tau \ell(u),$$

where $\tau > 0$ is the step times any factor of the loss, such as the $1/n$ of a mean. For small $\tau$ this is a
gradient step, $z - \tau \nabla \ell(z)$. Every prox here is exact up to rounding. Any other loss works too, by Newton
steps on this minimum; `eqxproj.custom_loss` makes a loss with a prox of your own.

Labels are checked where they are known: outside of a `jit`, or as constants in it. Inside of one, the loss of a sample
with an integer label out of range is NaN (`eqxproj.train` checks its data before).

Limits: half precision is computed in float32, and the answer has the dtype of the predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from ._errors import as_array
from ._numerics._cross_entropy import cross_entropy_displacement, cross_entropy_value
from ._numerics._losses import (
    check_classes,
    check_signs,
    equal_displacement,
    equal_value,
    hinge_displacement,
    hinge_value,
    margin_displacement,
    margin_value,
    squared_error_displacement,
    squared_error_value,
)
from ._numerics._promotion import with_own_promotion
from ._program._custom import custom_loss


def _own(value: Callable[..., Array], displacement: Callable[..., Array], hard: bool = False) -> Callable[..., Array]:
    return custom_loss(with_own_promotion(value), with_own_promotion(displacement), hard=hard)


_margin = _own(margin_value, lambda logits, labels, tau: margin_displacement(logits, labels), hard=True)
_cross_entropy = _own(cross_entropy_value, cross_entropy_displacement)
_squared_error = _own(squared_error_value, squared_error_displacement)
_equal = _own(equal_value, lambda predictions, targets, tau: equal_displacement(predictions, targets), hard=True)
_hinge = _own(hinge_value, hinge_displacement)


def _array(name: str, x: Any) -> Any:
    """An argument as an array; traced ones, and those of which only a part is on this machine, as they are."""
    is_known = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    return as_array(name, x) if is_known and not isinstance(x, jax.Array) else x


def _known(labels: Any) -> np.ndarray | None:
    """The labels, where their values can be seen."""
    is_hidden = isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True)
    return None if is_hidden else np.asarray(labels)


def _check_labels(logits: Any, labels: Any) -> None:
    """Raises a `ValueError` for labels out of range, before they are rounded to the integers of JAX."""
    array, (*batch, classes) = _known(labels), jnp.shape(logits) or (0,)
    if array is not None and array.dtype.kind in "iu" and classes and array.shape == tuple(batch):
        check_classes(array, classes)


def margin(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""The constraint that the right class has a logit of at least one, and every other class at most zero.

    The value is half the squared distance to the logits that satisfy it:

    $$\ell(z) = \tfrac12 |z - P(z)|^2, \qquad P(z)_y = \max(z_y, 1), \quad P(z)_j = \min(z_j, 0) \text{ for } j \ne y.$$

    The projection regime does not take the prox of this value, but the projection $P$ itself: the constraint is hard,
    whatever $\tau$ is. The gradient regime takes the gradient, $z - P(z)$. Source: arXiv 2506.05878, section 3.

    **Arguments:**

    - `logits`: `Float[Array, "*batch classes"]`.
    - `labels`: the right class, `Int[Array, "*batch"]`.

    **Returns:** $\ell$ for each sample, `Float[Array, "*batch"]`; zero exactly where the constraint holds.

    **Raises:** `ValueError` for other shapes and dtypes, and for labels out of range.
    """
    logits, labels = _array("logits", logits), _array("labels", labels)
    _check_labels(logits, labels)
    return _margin(logits, labels)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Softmax cross-entropy.

    $$\ell(z) = -\sum_k y_k \log \mathrm{softmax}(z)_k,$$

    in nats, with $y$ one for the right class and zero for the others, or any probabilities. The prox $u$ is the
    solution of $u - z + \tau (m\, \mathrm{softmax}(u) - y) = 0$ with $m = \sum_k y_k$. It has no closed form:
    eliminating $u$ leaves one increasing equation in the one unknown $\log \sum_k e^{u_k}$, for which Newton's method
    with a bracket takes a few steps.

    **Arguments:**

    - `logits`: `Float[Array, "*batch classes"]`. A class with the logit $-\infty$ is masked.
    - `labels`: the right class, `Int[Array, "*batch"]`; or probabilities, `Float[Array, "*batch classes"]`, which need
        not sum to one.

    **Returns:** $\ell$ for each sample, `Float[Array, "*batch"]`.

    **Raises:** `ValueError` for other shapes and dtypes, and for labels out of range.
    """
    logits, labels = _array("logits", logits), _array("labels", labels)
    _check_labels(logits, labels)
    return _cross_entropy(logits, labels)


def squared_error(predictions: ArrayLike, targets: ArrayLike) -> Array:
    r"""The squared error of each element.

    $$\ell(p) = (p - t)^2,$$

    without a factor of one half, as in Optax. The prox is $p + \frac{2 \tau}{1 + 2 \tau} (t - p)$, the minimum of a
    parabola.

    **Arguments:**

    - `predictions`: `Float[Array, "*shape"]`.
    - `targets`: real numbers, `Num[Array, "*shape"]`.

    **Returns:** $\ell$ for each element, `Float[Array, "*shape"]`.

    **Raises:** `ValueError` where the shapes differ, and for other dtypes.
    """
    return _squared_error(_array("predictions", predictions), _array("targets", targets))


def equal(outputs: ArrayLike, targets: ArrayLike) -> Array:
    r"""The constraint that the outputs equal the targets, as discrete outputs do or do not.

    The value is the squared distance of each element, $\ell(y) = (y - t)^2$: zero exactly where the constraint holds.
    The projection regime does not take the prox of this value, but puts the outputs at the targets: the constraint is
    hard, whatever $\tau$ is. In the gradient regime it is the squared error.

    **Arguments:**

    - `outputs`: `Float[Array, "*shape"]`.
    - `targets`: real numbers, `Num[Array, "*shape"]`.

    **Returns:** $\ell$ for each element, `Float[Array, "*shape"]`.

    **Raises:** `ValueError` where the shapes differ, and for other dtypes.
    """
    return _equal(_array("outputs", outputs), _array("targets", targets))


def hinge(scores: ArrayLike, labels: ArrayLike) -> Array:
    r"""The hinge loss, multiclass or binary.

    For several classes it is the loss of Crammer and Singer, *On the algorithmic implementation of multiclass
    kernel-based vector machines*, JMLR 2001, section 3:

    $$\ell(s) = \max_j (s_j + [j \ne y]) - s_y.$$

    With $v = s + [j \ne y] + \tau e_y$ the prox moves $s$ by $\tau (e_y - p)$, where $p$ is the point of the
    probability simplex nearest to $v / \tau$ (Moreau's identity; the projection is that of Duchi et al., *Efficient
    projections onto the $\ell_1$-ball for learning in high dimensions*, ICML 2008, section 3).

    With labels $y = \pm 1$ it is $\ell(s) = \max(0, 1 - s y)$ for each score, and its prox moves $s$ by
    $y \cdot \min(\max(1 - s y, 0), \tau)$.

    **Arguments:**

    - `scores`: `Float[Array, "*batch classes"]`, or for the binary loss `Float[Array, "*batch"]`.
    - `labels`: the right class, `Int[Array, "*batch"]`; or for the binary loss -1 and 1, of the shape of `scores`.

    **Returns:** $\ell$ for each sample, `Float[Array, "*batch"]`.

    **Raises:** `ValueError` for other shapes and dtypes, and for labels out of range.
    """
    scores, labels = _array("scores", scores), _array("labels", labels)
    array = _known(labels)
    if array is not None and array.shape == jnp.shape(scores) and array.dtype.kind in "biuf":
        check_signs(array)
    else:
        _check_labels(scores, labels)
    return _hinge(scores, labels)
