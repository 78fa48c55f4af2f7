"""Sets of slices: sums, norms and orders along an axis. Each class maps an array to its nearest point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, final

import equinox as eqx
from jaxtyping import Array, Float

from .._numerics import _nearest as nearest
from .._numerics._promotion import with_own_promotion
from . import _arguments as arguments
from ._arguments import Axis
from ._base import AbstractSet


@final
class Simplex(AbstractSet):
    r"""All arrays with entries $\ge 0$ whose sum along `axis` is `total`.

    The projection follows Duchi, Shalev-Shwartz, Singer and Chandra, *Efficient projections onto the $\ell_1$-ball for
    learning in high dimensions*, ICML 2008, section 3.

    **Arguments:**

    - `axis`: an axis, a tuple of axes, or `None` for all entries together. `total`: the sum, positive.

    **Raises:** `ValueError` or `TypeError` for another `axis` or `total`.
    """

    is_convex: ClassVar[bool] = True

    axis: Axis = eqx.field(static=True)
    total: float = eqx.field(static=True)

    def __init__(self, axis: Axis = -1, total: float = 1.0):
        self.axis, self.total = arguments.axis("Simplex", axis), arguments.positive("Simplex", "total", total)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _check_has_entries(x.shape, self.axis, "a simplex")
        return _by_slices(x, self.axis, lambda rows: nearest.simplex(rows, self.total, x.dtype))


@final
class L1Ball(AbstractSet):
    r"""All arrays with $\sum_i |x_i| \le r$ along `axis`.

    The projection is the simplex's, of the absolute values (Duchi et al., ICML 2008, section 4).

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    is_convex: ClassVar[bool] = True

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = arguments.positive("L1Ball", "radius", radius), arguments.axis("L1Ball", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l1_ball(rows, self.radius, x.dtype))


@final
class L2Ball(AbstractSet):
    r"""All arrays with Euclidean norm $|x| \le r$ along `axis`.

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    is_convex: ClassVar[bool] = True

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = arguments.positive("L2Ball", "radius", radius), arguments.axis("L2Ball", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, lambda rows: nearest.l2_ball(rows, self.radius, x.dtype))


@final
class Sphere(AbstractSet):
    r"""All arrays with Euclidean norm $|x| = r$ along `axis`. Zero is projected to a constant vector.

    **Arguments:**

    - `radius`: $r$, positive. `axis`: as for the other sets, all entries together by default.

    **Raises:** `ValueError` or `TypeError` for another `radius` or `axis`.
    """

    radius: float = eqx.field(static=True)
    axis: Axis = eqx.field(static=True)

    def __init__(self, radius: float = 1.0, axis: Axis = None):
        self.radius, self.axis = arguments.positive("Sphere", "radius", radius), arguments.axis("Sphere", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        _check_has_entries(x.shape, self.axis, "a sphere")
        return _by_slices(x, self.axis, lambda rows: nearest.sphere(rows, self.radius, x.dtype))


@final
class Monotone(AbstractSet):
    """All arrays that do not decrease along an axis; with `increasing=False`, that do not increase.

    The projection is isotonic regression, exactly, by pooling adjacent violators.

    **Arguments:**

    - `axis`: one axis. `increasing`: the direction.

    **Raises:** `TypeError` unless `axis` is an integer and `increasing` a Boolean.
    """

    is_convex: ClassVar[bool] = True

    axis: int = eqx.field(static=True)
    increasing: bool = eqx.field(static=True)

    def __init__(self, axis: int = -1, increasing: bool = True):
        if not arguments.is_integer(axis):
            raise TypeError(f"`Monotone`: `axis` must be an integer, got {axis!r}.")
        if not isinstance(increasing, bool):
            raise TypeError(f"`Monotone`: `increasing` must be `True` or `False`, got {increasing!r}.")
        self.axis, self.increasing = int(axis), increasing

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        sign = 1 if self.increasing else -1
        return sign * _by_slices(sign * x, self.axis, nearest.isotonic)


@final
class Equal(AbstractSet):
    """All arrays whose entries along `axis` are equal. The nearest one has their mean.

    `Together(Equal(axis=0), stacked=True)` ties arrays to each other.

    **Arguments:**

    - `axis`: an axis, a tuple of axes, or `None` for all entries together.

    **Raises:** `TypeError` for another `axis`.
    """

    is_convex: ClassVar[bool] = True

    axis: Axis = eqx.field(static=True)

    def __init__(self, axis: Any = -1):
        self.axis = arguments.axis("Equal", axis)

    @with_own_promotion
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _by_slices(x, self.axis, nearest.equal)


def _by_slices(x: Float[Array, "*shape"], axis: Axis, project: Callable[[Array], Array]) -> Float[Array, "*shape"]:
    """Projects each slice, in float32 at least."""
    nearest.axes_of(axis, x.shape)
    return x if x.size == 0 else nearest.along(nearest.wide(x), axis, project).astype(x.dtype)


def _check_has_entries(shape: tuple[int, ...], axis: Axis, what: str) -> None:
    if 0 in [shape[i] for i in nearest.axes_of(axis, shape)]:
        raise ValueError(f"an array of shape {shape} has no entries that could be on {what} (along axis {axis}).")
