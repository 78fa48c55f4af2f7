"""Rounds the operands of float32 products to 10 bits on a CPU, as the default precision of a GPU does.

    pytest -p tests.tensor_float tests/test_whole.py

Products that ask for the highest precision stay as they are. Unlike a GPU it rounds small products, too. It stands on
the lowering rules of JAX, which are not public, so that no test of the suite needs it.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax._src.lax import convolution as _convolution
from jax._src.lax import lax as _lax
from jax.interpreters import mlir

_FULL = lax.Precision.HIGHEST


def _rounding(primitive, lower):
    def lowered(ctx, *operands, **params):
        precision = params["precision"]
        each = precision if isinstance(precision, tuple) else (precision,) * 2
        floats = all(aval.dtype == jnp.float32 for aval in ctx.avals_in)
        if not floats or all(p == _FULL for p in each):
            return lower(ctx, *operands, **params)

        def rounded(*operands):
            shorter = [lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10) for x in operands]
            chosen = (x if p == _FULL else y for x, y, p in zip(operands, shorter, each, strict=True))
            return primitive.bind(*chosen, **{**params, "precision": (_FULL, _FULL)})

        return mlir.lower_fun(rounded, multiple_results=False)(ctx, *operands)

    mlir.register_lowering(primitive, lowered, platform="cpu")


_rounding(_lax.dot_general_p, functools.partial(_lax._dot_general_lower, platform="cpu"))
_rounding(_convolution.conv_general_dilated_p, _convolution._conv_general_dilated_lower)
