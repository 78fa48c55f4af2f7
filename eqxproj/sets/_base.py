"""What a set is: a function from an array to its nearest point, and two flags that `train` asks for."""

from __future__ import annotations

import abc
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float


class AbstractSet(eqx.Module):
    r"""A closed set of arrays, which finds its nearest point.

    A set of your own derives from it, and needs `__call__` alone. `is_discrete` says how `train` holds an array in the
    set. With `False`, it projects the array after every step. With `True`, the steps move an array that is kept for it,
    and the model is shown its projection, which at first changes only the entries with the shortest way. Set it to
    `True` where the set consists of separate pieces (levels, patterns of zeros): a step from one piece toward another
    is shorter than the gap, and a projection after each step would undo every one. `is_convex` says how an array is
    held in several sets at once: at the nearest common point where all of them are convex, and at one found by
    projecting in turn otherwise.

    !!! example

        ```python
        class Symmetric(eqxproj.sets.AbstractSet):
            def __call__(self, x):
                return (x + x.T) / 2


        eqxproj.train(..., constraints=[(lambda model: model.layers[1].weight, Symmetric())])
        ```
    """

    is_discrete: ClassVar[bool] = False
    is_convex: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The point of the set nearest to `x` in Euclidean distance (one of them, where there are several).

        It must run under `jax.jit`, and map a point of the set to itself.

        **Arguments:**

        - `x`: any array of floats.

        **Returns:** An array of the shape and dtype of `x`.

        **Raises:** `ValueError` where no array of this shape is in the set.
        """
