"""What a program is made of: variables, equations in order, and what depends on what.

Transforms nothing itself; the normal form, the graph and the rules all speak in these terms. Limits: a program is flat,
and inner programs (of a `scan`, say) are parameters of their equation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive


@dataclass(frozen=True)
class Variable:
    """A variable of a program: its number, and the shape and dtype of its value."""

    index: int
    shape: tuple[int, ...] = field(compare=False)
    dtype: Any = field(compare=False)

    @property
    def is_float(self) -> bool:
        """Whether the value is real. Other variables, complex ones too, are read through and never become values."""
        return jnp.issubdtype(self.dtype, jnp.floating)

    def describe(self) -> str:
        """The dtype and the shape, as `explain()` prints them."""
        return f"{np.dtype(self.dtype).name if self.dtype != jax.dtypes.float0 else 'float0'}{list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Equation:
    """One application of a primitive. `source` is the place in the user's code that it came from."""

    primitive: Primitive
    params: Mapping[str, Any]
    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    source: str
    residuals: tuple[Variable, ...] = field(default=(), kw_only=True)
    """What `bind` returns after the outputs. Only the rule reads it, on the way back; no equation does."""

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, *operands: Any) -> list[Any]:
        """Applies the primitive to values; always returns a list."""
        params = self.primitive.get_bind_params(dict(self.params))
        if isinstance(params, tuple):  # up to JAX 0.9.1: the functions of a call apart from the other parameters
            operands, params = (*params[0], *operands), params[1]
        out = self.primitive.bind(*operands, **params)
        return list(out) if self.primitive.multiple_results else [out]


@dataclass(frozen=True, eq=False)
class Program:
    """A flat program: equations in order, with the constants lifted out.

    `static` holds the Python value of every variable that is one number known while tracing (a literal, or a
    broadcast or conversion of one). Functions such as `max(x, 0)` are recognized by these values.
    """

    inputs: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Variable, ...]
    constants: Mapping[int, Any]
    static: Mapping[int, float]


def live(equations: Sequence[Equation], wanted: Sequence[Variable]) -> tuple[Equation, ...]:
    """The equations that `wanted` depends on, in order."""
    needed = {v.index for v in wanted}
    kept: list[Equation] = []
    for equation in reversed(equations):
        if any(v.index in needed for v in equation.outputs):
            kept.append(equation)
            needed.update(v.index for v in equation.inputs)
    return tuple(reversed(kept))


def dependents(equations: Sequence[Equation], seeds: Sequence[Variable]) -> frozenset[int]:
    """The variables that depend on `seeds`, which they include. What `stop_gradient` returns depends on nothing."""
    found = {v.index for v in seeds}
    for equation in equations:
        if equation.name != "stop_gradient" and any(v.index in found for v in equation.inputs):
            found.update(v.index for v in equation.outputs)
    return frozenset(found)


class Fresh:
    """Makes variables that are new to a program, and collects the constants that come with them."""

    def __init__(self, program: Program):
        used = [v.index for e in program.equations for v in (*e.inputs, *e.outputs)]
        used += [v.index for v in (*program.inputs, *program.outputs)] + list(program.constants)
        self.count = max(used, default=0) + 1
        self.constants = dict(program.constants)
        self.static = dict(program.static)

    def variable(self, shape: Sequence[int], dtype: Any) -> Variable:
        self.count += 1
        return Variable(self.count - 1, tuple(shape), dtype)

    def static_variable(self, shape: Sequence[int], dtype: Any, value: float) -> Variable:
        """A variable all of whose elements are one known number."""
        variable = self.variable(shape, dtype)
        self.static[variable.index] = value
        return variable

    def like(self, variable: Variable) -> Variable:
        return self.variable(variable.shape, variable.dtype)

    def constant(self, value: np.ndarray) -> Variable:
        variable = self.variable(value.shape, value.dtype)
        self.constants[variable.index] = value
        if value.size == 1:
            self.static[variable.index] = float(value.reshape(()))
        return variable

    def splice(self, program: Program, inputs: Sequence[Variable]) -> tuple[list[Equation], list[Variable]]:
        """Takes over another program.

        **Arguments:**

        - `program`: a program in normal form.
        - `inputs`: what takes the place of its inputs.

        **Returns:**

        Its equations and its outputs, with all other variables renumbered.
        """
        new: dict[int, Variable] = {v.index: w for v, w in zip(program.inputs, inputs, strict=True)}

        def renamed(v: Variable) -> Variable:
            if v.index not in new:
                new[v.index] = self.like(v)
                if v.index in program.constants:
                    self.constants[new[v.index].index] = program.constants[v.index]
                if v.index in program.static:
                    self.static[new[v.index].index] = program.static[v.index]
            return new[v.index]

        equations = [
            Equation(e.primitive, e.params, tuple(map(renamed, e.inputs)), tuple(map(renamed, e.outputs)), e.source)
            for e in program.equations
        ]
        return equations, [renamed(v) for v in program.outputs]
