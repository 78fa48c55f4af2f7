"""Complex numbers as pairs of real ones, where a graph needs values: parameters, and what a loop or branch carries.

Transforms a `scan` or `cond` with complex operands or results into one of their real and imaginary parts. Between real
values, complex operations stay as they are: a node reads through them. Limits: it doubles no other operation, so that
two real results of one complex function are two nodes, each of which evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun
from jaxtyping import Array

_Function = Callable[..., Sequence[Any]]


def is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def pairs(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, with the real and the imaginary part in the place of each complex one."""
    return [part for x in arrays for part in ((jnp.real(x), jnp.imag(x)) if is_complex(x.dtype) else (x,))]


def joined(arrays: Sequence[Array], flags: Sequence[bool]) -> list[Array]:
    """The inverse of [`pairs`][]; `flags` says which of its arguments were complex."""
    rest: Iterator[Array] = iter(arrays)
    return [jax.lax.complex(next(rest), next(rest)) if flag else next(rest) for flag in flags]


def in_pairs(
    equation: JaxprEqn, counts: tuple[int, int] | None, programs: Sequence[_Function] = (), held: Sequence[Any] = ()
) -> ClosedJaxpr | None:
    """What a `scan` or `cond` computes, by one of real arrays; `None` where there is nothing to change.

    **Arguments:**

    - `equation`: the `scan` or `cond`.
    - `counts`: the numbers of constants and of carries of a `scan`, `None` for a `cond`.
    - `programs`: functions in the place of its body or branches, each from what is `held` and its operands to its
        results; by default those of the equation.
    - `held`: what the programs read beside their operands. The result has operands for it, after all others.
    """
    inputs, outputs = ([v.aval for v in variables] for variables in (equation.invars, equation.outvars))
    if not programs and not any(is_complex(a.dtype) for a in (*inputs, *outputs)):  # pyright: ignore[reportAttributeAccessIssue]
        return None
    flags = [is_complex(a.dtype) for a in outputs]  # pyright: ignore[reportAttributeAccessIssue]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*inputs, *held)]  # pyright: ignore[reportAttributeAccessIssue]
    params = equation.params
    own = [params["jaxpr"]] if counts is not None else params["branches"]

    def function(*values: Array) -> list[Array]:
        operands, further = values[: len(inputs)], values[len(inputs) :]
        chosen = [partial(f, further) for f in programs] or [jaxpr_as_fun(p) for p in own]
        if counts is None:
            return _cond(chosen, operands, flags)
        return _scan(chosen[0], params, *counts, operands, flags)

    return jax.make_jaxpr(function)(*shapes)


def _scan(
    function: _Function,
    params: Mapping[str, Any],
    constants: int,
    carries: int,
    operands: Sequence[Array],
    flags: Sequence[bool],
) -> list[Array]:
    kinds = [is_complex(x.dtype) for x in operands]
    held, start, xs = (
        pairs(part)
        for part in (operands[:constants], operands[constants : constants + carries], operands[constants + carries :])
    )

    def body(carry, x):
        out = function(*joined([*held, *carry, *x], kinds))
        return pairs(out[:carries]), pairs(out[carries:])

    options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    last, ys = jax.lax.scan(body, start, xs, **options)
    return joined([*last, *ys], flags)


def _cond(branches: Sequence[_Function], operands: Sequence[Array], flags: Sequence[bool]) -> list[Array]:
    index, *rest = operands
    kinds = [is_complex(x.dtype) for x in rest]

    def real(branch):
        return lambda *parts: pairs(branch(*joined(parts, kinds)))

    return joined(jax.lax.switch(index, [real(b) for b in branches], *pairs(rest)), flags)
