"""Bilinear maps $f(a, w)$ in which every output is a sum of products $\\sum_k a_{i(k)} w_{j(k)}$.

Beside $f$ and its two transposes, a form knows the same maps with one operand replaced by ones, which count and add up
copies. The special cases below are cheaper ways to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class BilinearForm:
    """A bilinear map given by its function; subclasses know cheaper ways to the maps with ones.

    - `f(a, w)`: the map.
    - `back_a(g, w)`, `back_w(a, g)`: its transposes in `a` and in `w`.
    - `sum_a(a)`: $f(a, 1)$. `sum_w(w)`: $f(1, w)$, either of any shape that broadcasts to the output's.
    - `spread_a(g)`, `spread_w(g)`: their transposes, in the shape of the operand or one that broadcasts to it.
    """

    def __init__(self, f: Callable[[Array, Array], Array], shape_a: Any, shape_w: Any):
        self.f = f
        self.shape_a = jax.ShapeDtypeStruct(shape_a.shape, shape_a.dtype)
        self.shape_w = jax.ShapeDtypeStruct(shape_w.shape, shape_w.dtype)

    def back_a(self, g: Array, w: Array) -> Array:
        return jax.linear_transpose(lambda a: self.f(a, w), self.shape_a)(g)[0]

    def back_w(self, a: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda w: self.f(a, w), self.shape_w)(g)[0]

    def sum_a(self, a: Array) -> Array:
        return self.f(a, jnp.ones(self.shape_w.shape, self.shape_w.dtype))

    def sum_w(self, w: Array) -> Array:
        return self.f(jnp.ones(self.shape_a.shape, self.shape_a.dtype), w)

    def spread_a(self, g: Array) -> Array:
        return jax.linear_transpose(self.sum_a, self.shape_a)(g)[0]

    def spread_w(self, g: Array) -> Array:
        return jax.linear_transpose(self.sum_w, self.shape_w)(g)[0]

    def square_of_sum(self, a: Array, w: Array, c: Array, known: tuple[Array, Array, Array]) -> Array:
        """$|a + c w|^2$ of the terms of every output, for a c for each output, from their `f(a, w)`, |a|^2 and |w|^2.

        Known to the rounding of those; what is not above that counts as zero.
        """
        p, square_a, square_w = known
        squares = square_a + c * c * square_w
        found = squares + 2.0 * c * p
        return jnp.where(found < 3e-5 * squares, 0.0, found)


class DotForm(BilinearForm):
    """`dot_general`: the sums run over the contracted dimensions alone."""

    def __init__(self, f, shape_a, shape_w, dimension_numbers):
        super().__init__(f, shape_a, shape_w)
        (self.contract_a, self.contract_w), (self.batch_a, self.batch_w) = dimension_numbers
        self.free_a = rest(len(shape_a.shape), self.contract_a, self.batch_a)
        self.free_w = rest(len(shape_w.shape), self.contract_w, self.batch_w)

    def sum_a(self, a: Array) -> Array:
        kept = jnp.transpose(a.sum(self.contract_a, keepdims=True), (*self.batch_a, *self.free_a, *self.contract_a))
        shape = kept.shape[: len(self.batch_a) + len(self.free_a)]
        return kept.reshape(shape + (1,) * len(self.free_w))

    def sum_w(self, w: Array) -> Array:
        kept = jnp.transpose(w.sum(self.contract_w, keepdims=True), (*self.batch_w, *self.free_w, *self.contract_w))
        batch = kept.shape[: len(self.batch_w)]
        free = kept.shape[len(self.batch_w) : len(self.batch_w) + len(self.free_w)]
        return kept.reshape(batch + (1,) * len(self.free_a) + free)

    def spread_a(self, g: Array) -> Array:
        nb, na = len(self.batch_a), len(self.free_a)
        g = g.sum(tuple(range(nb + na, g.ndim)))
        return _place(g, (*self.batch_a, *self.free_a), len(self.shape_a.shape))

    def spread_w(self, g: Array) -> Array:
        nb, na = len(self.batch_a), len(self.free_a)
        g = g.sum(tuple(range(nb, nb + na)))
        return _place(g, (*self.batch_w, *self.free_w), len(self.shape_w.shape))


class ConvForm(BilinearForm):
    """`conv_general_dilated` without groups of the batch: a sum over channels, and a convolution of one a group.

    The zeros of padding and dilation count as variables of the products that read them, as they do in a matrix
    product of patches: so |w|^2 is the same for every output.
    """

    def __init__(self, f, shape_a, shape_w, params: Mapping[str, Any]):
        super().__init__(f, shape_a, shape_w)
        self.params = params
        self.lhs, self.rhs, self.out = params["dimension_numbers"]

    def sum_a(self, a: Array) -> Array:
        groups, (batch, channel) = self.params["feature_group_count"], self.lhs[:2]
        ordered = jnp.transpose(a, (batch, channel, *self.lhs[2:]))
        summed = ordered.reshape(ordered.shape[0], groups, -1, *ordered.shape[2:]).sum(2)
        windows = jax.lax.reduce_window(
            summed,
            np.zeros((), a.dtype),
            jax.lax.add,
            (1, 1, *(self.shape_w.shape[d] for d in self.rhs[2:])),
            (1, 1, *self.params["window_strides"]),
            ((0, 0), (0, 0), *self.params["padding"]),
            (1, 1, *self.params["lhs_dilation"]),
            (1, 1, *self.params["rhs_dilation"]),
        )
        each = 1 if groups == 1 else self.shape_w.shape[self.rhs[0]] // groups
        return jnp.transpose(jnp.repeat(windows, each, axis=1), np.argsort(self.out).tolist())

    def sum_w(self, w: Array) -> Array:
        return _place(w.sum(tuple(map(int, self.rhs[1:]))), (int(self.out[1]),), w.ndim)

    def spread_a(self, g: Array) -> Array:
        if self.params["feature_group_count"] != 1:
            return super().spread_a(g)
        g = g.sum(self.out[1], keepdims=True)
        shape = [1 if d == self.lhs[1] else n for d, n in enumerate(self.shape_a.shape)]
        return jax.linear_transpose(self.sum_a, jax.ShapeDtypeStruct(tuple(shape), g.dtype))(g)[0]

    def spread_w(self, g: Array) -> Array:
        return _place(g.sum(rest(g.ndim, (self.out[1],))), (int(self.rhs[0]),), g.ndim)


class ElementForm(BilinearForm):
    """`mul`: every sum has one term."""

    def square_of_sum(self, a: Array, w: Array, c: Array, known: tuple[Array, Array, Array]) -> Array:
        return jnp.square(a + c * w)

    def sum_a(self, a: Array) -> Array:
        return a

    sum_w = spread_a = spread_w = sum_a  # pyright: ignore[reportAssignmentType]


class CopyForm(BilinearForm):
    """Products of stored copies: both operands of shape (group, row, column, k), summed over k."""

    def __init__(self, shape_a, shape_w):
        super().__init__(lambda a, w: (a * w).sum(-1), shape_a, shape_w)

    def back_a(self, g: Array, w: Array) -> Array:
        return g[..., None] * w

    def back_w(self, a: Array, g: Array) -> Array:
        return g[..., None] * a

    def square_of_sum(self, a: Array, w: Array, c: Array, known: tuple[Array, Array, Array]) -> Array:
        return jnp.square(a + c[..., None] * w).sum(-1)

    def sum_a(self, a: Array) -> Array:
        return a.sum(-1)

    sum_w = sum_a  # pyright: ignore[reportAssignmentType]

    def spread_a(self, g: Array) -> Array:
        return g[..., None]

    spread_w = spread_a  # pyright: ignore[reportAssignmentType]


def rest(ndim: int, *used) -> tuple[int, ...]:
    taken = {int(d) for dims in used for d in dims}
    return tuple(d for d in range(ndim) if d not in taken)


def _place(g: Array, dims: tuple[int, ...], ndim: int) -> Array:
    """Moves dimension i of `g` to `dims[i]` of an array of `ndim` dimensions, the others of size one."""
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    shape = [1] * ndim
    for i in order:
        shape[dims[i]] = g.shape[i]
    return jnp.transpose(g, order).reshape(shape)
