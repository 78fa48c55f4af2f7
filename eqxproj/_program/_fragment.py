"""Evaluates equations of a program, and the pieces that a graph is made of.

A [`Fragment`][] is a function given by equations: the operation of a node, or the view through which a node reads
its operand. Its known operands are looked up in an environment that the forward pass has filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._equations import Equation, Program, Variable


def evaluate(equations: Iterable[Equation], env: dict[int, Any]) -> dict[int, Any]:
    """Evaluates `equations` in order, adding their results to `env`."""
    for equation in equations:
        results = equation.bind(*(env[v.index] for v in equation.inputs))
        env.update((v.index, r) for v, r in zip((*equation.outputs, *equation.kept), results, strict=True))
    return env


def products(program: Program) -> tuple[Variable, ...]:
    """The results of a program's products, which cost the most, in order.

    There are none where it holds a `scan`: when that is laid out over time, other products take their place.
    """
    if any(equation.name == "scan" for equation in program.equations):
        return ()
    names = ("dot_general", "conv_general_dilated")
    return tuple(v for equation in program.equations if equation.name in names for v in equation.outputs)


def forward(program: Program, inputs: Sequence[Array], recalled: Sequence[Array] = ()) -> dict[int, Any]:
    """The value of every variable of the program at these inputs.

    Its products are not computed again where they are `recalled` from another evaluation, in order. Those of a program
    of which less is alive do not fit, and are not taken.
    """
    env: dict[int, Any] = {
        i: jnp.asarray(x) if isinstance(x, np.ndarray) and x.ndim else x for i, x in program.constants.items()
    }
    env.update((v.index, x) for v, x in zip(program.inputs, inputs, strict=True))
    found = products(program)
    fits = [v.shape for v in found] == [x.shape for x in recalled]
    ready = {v.index: x for v, x in zip(found, recalled, strict=True)} if fits else {}
    env.update(ready)
    return evaluate([e for e in program.equations if e.outputs[0].index not in ready], env)


@dataclass(frozen=True, eq=False)
class Fragment:
    """A function from `operands` to `outputs`; all else that its equations read must be known."""

    equations: tuple[Equation, ...]
    operands: tuple[Variable, ...]
    outputs: tuple[Variable, ...]

    @property
    def is_identity(self) -> bool:
        return not self.equations and self.operands == self.outputs

    @property
    def known(self) -> frozenset[int]:
        """The variables that the equations read from outside."""
        inside = {v.index for e in self.equations for v in e.outputs} | {v.index for v in self.operands}
        return frozenset(v.index for e in self.equations for v in e.inputs if v.index not in inside)

    def of_one(self, static: Mapping[int, float], shape: tuple[int, ...]) -> Callable[[Array], Array]:
        """An elementwise fragment as a function of its one operand, of any shape.

        - `static`: the numbers that it reads from outside, all of them.
        - `shape`: of the operand, which need not be that of the fragment's.
        """
        variables = {v.index: v for e in self.equations for v in e.inputs}
        known = {i: np.full(shape if variables[i].shape else (), static[i], variables[i].dtype) for i in self.known}
        return lambda x: self(known, [x])[0]

    def __call__(self, known: Mapping[int, Any], values: Sequence[Array]) -> list[Array]:
        env = {index: known[index] for index in self.known}
        env.update((v.index, x) for v, x in zip(self.operands, values, strict=True))
        for equation in self.equations:
            if equation.name == "max":
                env[equation.outputs[0].index] = self._maximum(equation, env)
            else:
                evaluate([equation], env)
        return [env[v.index] for v in self.outputs]

    def _maximum(self, equation: Equation, env: Mapping[int, Any]) -> Array:
        """A maximum; over something known as the choice that it is.

        Its value is the same, but where the known one is chosen, a derivative of what follows that is not finite
        (of the root of a relu) is left out and not multiplied by zero, as by the derivative of `jax.nn.relu`.
        """
        flags = [v.index in self.known for v in equation.inputs]
        x, y = (env[v.index] for v in equation.inputs)
        if flags[0] == flags[1]:
            return equation.bind(x, y)[0]
        known, unknown = (x, y) if flags[0] else (y, x)
        return jnp.where(unknown <= known, known, unknown)


@dataclass(frozen=True, eq=False)
class View(Fragment):
    """A 0/1 linear map from values to one operand, with parts that may be known constants."""

    def show(self, known: Mapping[int, Any], values: Sequence[Array]) -> Array:
        return values[0] if self.is_identity else self(known, values)[0]

    def transpose(self, known: Mapping[int, Any], cotangent: Array) -> tuple[Array, ...]:
        r"""$S^T u$, one array a value. Exact: the map is linear up to constants, which a transpose does not see."""
        if self.is_identity:
            return (cotangent,)
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.operands]
        transposed = jax.linear_transpose(lambda *values: self(known, values)[0], *shapes)
        return tuple(transposed(cotangent.astype(self.outputs[0].dtype)))
