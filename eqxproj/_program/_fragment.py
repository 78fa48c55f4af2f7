"""Evaluates equations, programs, and the pieces of programs that a graph is made of.

A [`Fragment`][] is a function given by equations: the operation of a node, or the view through which a node reads its
operand. Limits: all else that it reads must be known from the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._equations import Equation, Program, Variable, live


def evaluate(
    equations: Iterable[Equation], env: Mapping[int, Any], bind: Callable[..., list[Any]] | None = None
) -> dict[int, Any]:
    """`env` with all results of `equations`, evaluated in order, each by `bind(equation, *operands)` or its own."""
    found = dict(env)
    for equation in equations:
        operands = [found[v.index] for v in equation.inputs]
        results = equation.bind(*operands) if bind is None else bind(equation, *operands)
        found.update((v.index, r) for v, r in zip((*equation.outputs, *equation.residuals), results, strict=True))
    return found


def residuals_of(program: Program) -> tuple[Variable, ...]:
    """The results of the forward pass that the way back needs again: the results of products, which cost the most.

    There are none where the program holds a `scan`: once that is unrolled over time, other products take their place.
    What only side effects need is not among them: the way back has none.
    """
    if any(e.name == "scan" for e in program.equations):
        return ()
    names = ("dot_general", "conv_general_dilated")
    return tuple(v for e in live(program.equations, program.outputs) if e.name in names for v in e.outputs)


def forward(program: Program, inputs: Sequence[Array], residuals: Sequence[Array] = ()) -> dict[int, Any]:
    """The values of all variables of the program, by number, from one array for each of its inputs.

    `residuals` are the values of [`residuals_of`][] from another evaluation at the same inputs. They are not computed
    again, unless their shapes do not fit: fewer of the products may be alive in this program than in that one.
    """
    env: dict[int, Any] = {
        i: jnp.asarray(x) if isinstance(x, np.ndarray) and x.ndim else x for i, x in program.constants.items()
    }
    env.update((v.index, x) for v, x in zip(program.inputs, inputs, strict=True))
    wanted = residuals_of(program)
    fits = [v.shape for v in wanted] == [x.shape for x in residuals]
    ready = {v.index: x for v, x in zip(wanted, residuals, strict=True)} if fits else {}
    env.update(ready)
    return evaluate([e for e in program.equations if not any(v.index in ready for v in e.outputs)], env)


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

    def __call__(self, known: Mapping[int, Any], values: Sequence[Array]) -> list[Array]:
        env = {index: known[index] for index in self.known}
        env.update((v.index, x) for v, x in zip(self.operands, values, strict=True))
        env = evaluate(self.equations, env, self._bind)
        return [env[v.index] for v in self.outputs]

    def _bind(self, equation: Equation, *operands: Any) -> list[Any]:
        """The results of an equation. A maximum over a known operand is written as a choice, which has the same value.

        Its derivative is zero where the known operand is chosen, even if a derivative of what follows is not finite
        there (as of the root of a relu). The derivative of `jax.nn.relu` is the same.
        """
        is_known = [v.index in self.known for v in equation.inputs] if equation.name == "max" else []
        if sum(is_known) != 1:
            return equation.bind(*operands)
        known, unknown = operands if is_known[0] else reversed(operands)
        return [jnp.where(unknown <= known, known, unknown)]


@dataclass(frozen=True)
class OfOne:
    """An elementwise fragment whose known operands are numbers, as a function of one array of any shape.

    Two of them are equal if they take the same steps, whatever their variables are called.
    """

    dtype: Any
    steps: Hashable
    fragment: Fragment = field(compare=False)
    static: Mapping[int, float] = field(compare=False)

    @classmethod
    def of(cls, fragment: Fragment, static: Mapping[int, float]) -> OfOne:
        """`static` holds all numbers that the fragment reads from outside, by the number of their variable."""
        made = [*fragment.operands, *(v for e in fragment.equations for v in e.outputs)]
        place = {v.index: i for i, v in enumerate(made)}

        def read(v: Variable) -> Hashable:  # as text: the two zeros differ, and what is no number equals itself
            return place[v.index] if v.index in place else (repr(static[v.index]), str(v.dtype), v.shape == ())

        steps = tuple(
            (e.primitive, tuple(e.params.items()), tuple(map(read, e.inputs)), tuple(str(v.dtype) for v in e.outputs))
            for e in fragment.equations
        )
        used = {i: static[i] for i in fragment.known}
        return cls(fragment.operands[0].dtype, (steps, tuple(map(read, fragment.outputs))), fragment, used)

    def __call__(self, x: Array) -> Array:
        variables = {v.index: v for e in self.fragment.equations for v in e.inputs}
        known = {
            i: np.full(x.shape if variables[i].shape else (), n, variables[i].dtype) for i, n in self.static.items()
        }
        return self.fragment(known, [x])[0]


@dataclass(frozen=True, eq=False)
class View(Fragment):
    """A 0/1 linear map from values to one operand. Parts of the operand may be known constants."""

    def show(self, known: Mapping[int, Any], values: Sequence[Array]) -> Array:
        return values[0] if self.is_identity else self(known, values)[0]

    def transpose(self, known: Mapping[int, Any], cotangent: Array) -> tuple[Array, ...]:
        r"""$S^T u$, one array a value. The constants of the view do not enter it."""
        if self.is_identity:
            return (cotangent,)
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.operands]
        transposed = jax.linear_transpose(lambda *values: self(known, values)[0], *shapes)
        return tuple(transposed(cotangent.astype(self.outputs[0].dtype)))
