"""Convolutions of unknowns, rewritten as products of patches and kernels.

Transforms a program: the patches are a view of the image, whose pixels have a copy in each patch that reads them, and
what is left is a product of two matrices, of which a whole constraint has a direct solver. Limits: the patches are
held, the size of a kernel's window times the image; groups of the batch, and convolutions inside of loops and
branches, stay as they are.
"""

from __future__ import annotations

import functools as ft
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._equations import Equation, Fresh, Program, Variable, dependents
from ._normal_form import traced_for


def with_patches(program: Program, seeds: Sequence[Variable], is_apart: Callable[[Equation], bool]) -> Program:
    """The program with its convolutions rewritten; itself where it has none.

    `seeds` are the unknown inputs. `is_apart` tells which operations stay, such as those with a rule of a user.
    """
    unknown = dependents(program.equations, seeds)

    def is_rewritten(equation: Equation) -> bool:
        if equation.name != "conv_general_dilated" or equation.params["batch_group_count"] != 1:
            return False
        return not is_apart(equation) and any(v.index in unknown for v in equation.inputs)

    return program.rewritten(is_rewritten, _of_patches)


def _of_patches(equation: Equation, fresh: Fresh) -> list[Equation]:
    body, (result,) = traced_for(equation, ft.partial(product_of_patches, equation.params), fresh)
    names = {result.index: equation.outputs[0]}
    return [replace(e, outputs=tuple(names.get(v.index, v) for v in e.outputs)) for e in body]


def product_of_patches(params: Mapping[str, Any], x: Array, w: Array) -> Array:
    """A convolution of these parameters, as a product of the patches of `x` and the kernel `w`.

    The channels stay last, as they lie in memory, and so do the products that one output adds up.
    """
    lhs, rhs, out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    w = jnp.transpose(w, (rhs[0], *rhs[2:], rhs[1]))
    taps = w.shape[1:-1]
    patches = _patches(params, x, taps)
    patches = patches.reshape(*patches.shape[:-1], groups, -1)  # batch, space, tap, group, channel
    kernels = w.reshape(groups, -1, int(np.prod(taps)), w.shape[-1])  # group, output, tap, channel
    last = patches.ndim - 1
    contracted = ((last - 2, last), (2, 3))
    batches = ((last - 1,), (0,)) if groups > 1 else ((), ())
    if groups == 1:
        patches, kernels, contracted = patches.squeeze(last - 1), kernels.squeeze(0), ((last - 2, last - 1), (1, 2))
    product = jax.lax.dot_general(
        patches,
        kernels,
        (contracted, batches),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    product = jnp.moveaxis(product, 0, -2) if groups > 1 else product
    laid = product.reshape(*patches.shape[: last - 2], -1)  # batch, space, output
    return jnp.transpose(laid, np.argsort((out[0], *out[2:], out[1])).tolist())


def _patches(params: Mapping[str, Any], x: Array, taps: Sequence[int]) -> Array:
    """The pixels that each tap of a kernel meets, of an image (batch, space, channels): (batch, space, tap, channels).

    The pixels between those of a dilated image, and around it, are zeros.
    """
    steps, dilations = params["window_strides"], params["rhs_dilation"]
    between = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    if any(any(p) for p in between):
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *between, (0, 0, 0)])
    sizes = x.shape[1:-1]
    counts = [(n - (t - 1) * d - 1) // s + 1 for n, t, d, s in zip(sizes, taps, dilations, steps, strict=True)]

    def met(tap: tuple[int, ...]) -> Array:
        starts = [t * d for t, d in zip(tap, dilations, strict=True)]
        ends = [a + (c - 1) * s + 1 for a, c, s in zip(starts, counts, steps, strict=True)]
        return jax.lax.slice(x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *steps, 1))

    return jnp.stack([met(tap) for tap in itertools.product(*map(range, taps))], axis=-2)
