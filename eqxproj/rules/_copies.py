"""Bilinear primitives as products of rows and columns, for algorithms that hold every copy.

Every supported primitive is a stack of matrix products: output (group, row, column) is the scalar product of row
`(group, row)` of one operand and column `(group, column)` of the other, of length k. `expand` lays an operand out in
the shape (group, row, column, k), one entry a copy.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._numerics._windows import reads
from .._program._equations import Equation
from ._bilinear_forms import rest


class Copies:
    """The layout of the copies of one `dot_general` or `conv_general_dilated`."""

    def __init__(self, equation: Equation):
        self.equation = equation
        self.shapes = tuple(v.shape for v in equation.inputs)
        self.out_shape = equation.outputs[0].shape
        self.params = equation.params
        if equation.name == "dot_general":
            (self.contract, self.batch) = self.params["dimension_numbers"]
            self.free = tuple(
                rest(len(s), c, b) for s, c, b in zip(self.shapes, self.contract, self.batch, strict=True)
            )
            sizes = [[s[d] for d in f] for s, f in zip(self.shapes, self.free, strict=True)]
            self.groups = math.prod(self.shapes[0][d] for d in self.batch[0])
            self.rows, self.columns = math.prod(sizes[0]), math.prod(sizes[1])
        else:
            self.lhs, self.rhs, self.out = self.params["dimension_numbers"]
            self.groups = self.params["feature_group_count"]
            self.columns = self.shapes[1][self.rhs[0]] // self.groups
            self.rows = math.prod(self.out_shape) // (self.columns * self.groups)

    def matrix(self, operand: int, value: Array) -> Array:
        """An operand as (group, row, k) or (group, column, k)."""
        if self.equation.name == "dot_general":
            dims = (*self.batch[operand], *self.free[operand], *self.contract[operand])
            return jnp.transpose(value, dims).reshape(self.groups, (self.rows, self.columns)[operand], -1)
        if self.params["batch_group_count"] != 1:
            raise ValueError(
                'A convolution with `batch_group_count` above 1 has no materialized copies. Use copies="none", or a '
                "solver that returns to consensus (AlternatingProjections, CyclicProjections)."
            )
        if operand == 1:
            return jnp.transpose(value, self.rhs).reshape(self.groups, self.columns, -1)
        keep = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        patches = jax.lax.conv_general_dilated_patches(
            value,
            filter_shape=[self.shapes[1][d] for d in self.rhs[2:]],
            precision=jax.lax.Precision.HIGHEST,
            **{k: self.params[k] for k in keep},
        )
        patches = jnp.transpose(patches, (self.out[0], *self.out[2:], self.out[1]))
        return jnp.swapaxes(patches.reshape(self.rows, self.groups, -1), 0, 1)

    @property
    def inner(self) -> int:
        """How many products a scalar product adds up."""
        return math.prod(self.shapes[0]) // max(self.groups * self.rows, 1)

    def from_matrix(self, operand: int, matrix: Array) -> Array:
        """The inverse of `matrix`, for a `dot_general`."""
        dims = (*self.batch[operand], *self.free[operand], *self.contract[operand])
        laid = matrix.reshape([self.shapes[operand][d] for d in dims])
        return jnp.transpose(laid, np.argsort(dims).tolist())

    def expand(self, operand: int, value: Array) -> Array:
        """The copies of an operand."""
        # XLA would compute the views that are shown anew for each copy.
        matrix = jax.lax.optimization_barrier(self.matrix(operand, value))
        laid = matrix[:, :, None, :] if operand == 0 else matrix[:, None, :, :]
        return jnp.broadcast_to(laid, (self.groups, self.rows, self.columns, matrix.shape[-1]))

    def totals(self, operand: int, value: Array) -> Array:
        """The copies of an operand, added up for each product, as (group, row, column)."""
        total = self.matrix(operand, value).sum(-1)
        laid = total[:, :, None] if operand == 0 else total[:, None, :]
        return jnp.broadcast_to(laid, (self.groups, self.rows, self.columns))

    def counts(self, operand: int) -> float | np.ndarray:
        """How many copies there are of each element."""
        times = float((self.columns, self.rows)[operand])
        if self.equation.name == "dot_general" or operand == 1:
            return times
        shapes = zip((self.shapes[0], self.out_shape, self.shapes[1]), (self.lhs, self.out, self.rhs), strict=True)
        image, windows, sizes = ([shape[d] for d in spec[2:]] for shape, spec in shapes)
        p = self.params
        found = reads(image, windows, sizes, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        found = found.reshape(1, 1, *found.shape).transpose(np.argsort(self.lhs)) / p["batch_group_count"]
        return np.broadcast_to(times * found, self.shapes[0])

    def from_output(self, value: Array) -> Array:
        """An array of the output's shape as (group, row, column)."""
        value = jnp.broadcast_to(value, self.out_shape)
        if self.equation.name == "dot_general":
            return value.reshape(self.groups, self.rows, self.columns)
        value = jnp.transpose(value, (self.out[0], *self.out[2:], self.out[1]))
        return jnp.swapaxes(value.reshape(self.rows, self.groups, self.columns), 0, 1)

    def to_output(self, value: Array) -> Array:
        """The inverse of `from_output`."""
        if self.equation.name == "dot_general":
            return value.reshape(self.out_shape)
        order = (self.out[0], *self.out[2:], self.out[1])
        full = jnp.swapaxes(value, 0, 1).reshape([self.out_shape[d] for d in order])
        return jnp.transpose(full, np.argsort(order).tolist())
