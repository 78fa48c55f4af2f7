"""What a program is made of: variables, equations in order, and what depends on what.

Transforms nothing itself; the normal form, the graph and the rules all speak in these terms. Limits: a program is flat,
and inner programs (of a `scan`, say) are parameters of their equation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from ._effects import silenced


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

    @property
    def is_inexact(self) -> bool:
        """Whether the value is real or complex, and may have a derivative."""
        return jnp.issubdtype(self.dtype, jnp.inexact)

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
    acts: bool = field(default=False, kw_only=True)
    """Whether it has side effects, for which it is kept though nothing may read its outputs."""

    @property
    def name(self) -> str:
        return self.primitive.name

    def silent(self) -> Equation:
        """The same without side effects, as it is evaluated on the way back."""
        return replace(self, params=silenced(self.params), acts=False) if self.acts else self

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

    `static` holds the variables that are one number known while tracing, by which functions as `max(x, 0)` are known.
    """

    inputs: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Variable, ...]
    constants: Mapping[int, Any]
    static: Mapping[int, float]

    def rewritten(
        self, is_chosen: Callable[[Equation], bool], written: Callable[[Equation, Fresh], Sequence[Equation]]
    ) -> Program:
        """The program with others in the place of the chosen equations; itself where there are none."""
        if not any(map(is_chosen, self.equations)):
            return self
        fresh = Fresh.after(self)
        equations = [x for e in self.equations for x in (written(e, fresh) if is_chosen(e) else [e])]
        return Program(self.inputs, tuple(equations), self.outputs, fresh.constants, fresh.static)


def live(equations: Sequence[Equation], wanted: Sequence[Variable], with_effects: bool = False) -> tuple[Equation, ...]:
    """The equations that `wanted` depends on, in order; and those `with_effects`, with what they depend on."""
    needed, kept = {v.index for v in wanted}, []
    for equation in reversed(equations):
        if (equation.acts and with_effects) or any(v.index in needed for v in equation.outputs):
            kept.append(equation)
            needed.update(v.index for v in equation.inputs)
    return tuple(reversed(kept))


def ways(
    makers: Mapping[int, Equation], order: Mapping[Equation, int], wanted: Iterable[int], wall: Container[int]
) -> tuple[Equation, ...]:
    """The equations that `wanted` variables depend on, in order, without those that make a variable of the `wall`.

    Only these are looked at: `makers` are the equations by output, and `order` are their places in the program.
    """
    found: set[Equation] = set()
    stack = list(wanted)
    while stack:
        maker = makers.get(stack.pop())
        if maker is not None and maker not in found and not any(v.index in wall for v in maker.outputs):
            found.add(maker)
            stack.extend(v.index for v in maker.inputs)
    return tuple(sorted(found, key=order.__getitem__))


def dependents(equations: Sequence[Equation], seeds: Sequence[Variable]) -> frozenset[int]:
    """The variables that depend on `seeds`, which they include. What `stop_gradient` returns depends on nothing."""
    found = {v.index for v in seeds}
    for equation in equations:
        if equation.name != "stop_gradient" and any(v.index in found for v in equation.inputs):
            found.update(v.index for v in equation.outputs)
    return frozenset(found)


@dataclass(eq=False)
class Fresh:
    """Makes variables with new numbers, and collects their constants and known numbers."""

    count: int = 0
    constants: dict[int, Any] = field(default_factory=dict)
    static: dict[int, float] = field(default_factory=dict)

    @classmethod
    def after(cls, program: Program) -> Fresh:
        """Variables that are new to a program."""
        used = [v.index for e in program.equations for v in (*e.inputs, *e.outputs)]
        used += [*(v.index for v in (*program.inputs, *program.outputs)), *program.constants]
        return cls(max(used, default=0) + 1, dict(program.constants), dict(program.static))

    def variable(self, shape: Sequence[int], dtype: Any) -> Variable:
        self.count += 1
        return Variable(self.count - 1, tuple(shape), dtype)

    def like(self, variable: Variable) -> Variable:
        return self.variable(variable.shape, variable.dtype)

    def constant(self, value: Any) -> Variable:
        array = value
        if not isinstance(value, jax.Array):  # kept out of JAX, so that it stays a number inside of a `jit`
            array = np.asarray(value)
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        variable = self.variable(array.shape, array.dtype)
        self.constants[variable.index] = array
        is_number = not jnp.issubdtype(array.dtype, jax.dtypes.extended)
        if not isinstance(array, jax.core.Tracer) and array.size == 1 and is_number:
            self.note(variable, array)
        return variable

    def note(self, variable: Variable, number: Any) -> None:
        """Notes the value of a constant of one element, if it is real."""
        if not np.iscomplexobj(number):
            self.static[variable.index] = float(np.asarray(number).reshape(()))

    def splice(self, program: Program, inputs: Sequence[Variable]) -> tuple[list[Equation], list[Variable]]:
        """The equations and outputs of a program in normal form, renumbered, with `inputs` in place of its own."""
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
            replace(e, inputs=tuple(map(renamed, e.inputs)), outputs=tuple(map(renamed, e.outputs)))
            for e in program.equations
        ]
        return equations, [renamed(v) for v in program.outputs]
