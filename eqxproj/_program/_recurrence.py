"""Reads a `scan` equation: its parts, which of its results depend on unknowns, and its run through time.

Transforms nothing. Limits: the body is read in normal form, once for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

from ._effects import silenced
from ._equations import Equation, dependents
from ._fragment import forward, residuals_of
from ._normal_form import normal_form, scan_counts

_T = TypeVar("_T")


def _split(items: Sequence[_T], first: int, second: int) -> tuple[list[_T], list[_T], list[_T]]:
    return list(items[:first]), list(items[first : first + second]), list(items[first + second :])


class Unknowns(NamedTuple):
    """Which operands of a recurrence's body depend on unknowns, by kind. Carries may become unknown on the way."""

    constants: Sequence[bool]
    carries: Sequence[bool]
    slices: Sequence[bool]

    def place(self, operand: int) -> int:
        """The place, among the unknown operands of the body, of an operand given by its place among all of them."""
        return sum([*self.constants, *self.carries, *self.slices][:operand])

    def split(self, values: Sequence[_T]) -> tuple[list[_T], list[_T], list[_T]]:
        """Values, one an unknown operand, by kind: constants, carries, slices."""
        return _split(values, sum(self.constants), sum(self.carries))

    def chosen(self, constants: Sequence[_T], carries: Sequence[_T], slices: Sequence[_T]) -> list[_T]:
        """Of values, one an operand, those of the unknown operands in order."""
        flags, values = [*self.constants, *self.carries, *self.slices], [*constants, *carries, *slices]
        return [value for value, is_unknown in zip(values, flags, strict=True) if is_unknown]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """The parts of a `scan`: `body(*constants, *carries, *slices)` returns the next carries and what is stacked."""

    jaxpr: ClosedJaxpr
    constants: int
    carries: int
    length: int
    reverse: bool

    @classmethod
    def of(cls, equation: Equation) -> Recurrence:
        params = equation.params
        return cls(params["jaxpr"], *scan_counts(params), params["length"], params["reverse"])

    def silent(self) -> Recurrence:
        """The same without side effects."""
        return replace(self, jaxpr=silenced(self.jaxpr))

    def body(self, *operands: Any) -> tuple[list[Array], list[Array]]:
        """The next carries and the outputs to be stacked."""
        out = jaxpr_as_fun(self.jaxpr)(*operands)
        return list(out[: self.carries]), list(out[self.carries :])

    def split(self, items: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Items, one for each operand, by kind: constants, carries, slices."""
        return _split(items, self.constants, self.carries)

    def unknown_outputs(self, unknown: Sequence[bool]) -> list[bool]:
        """Which carries and stacked outputs depend on unknown operands. What is no float counts as known."""
        program = normal_form(self.jaxpr)
        constants, carries, slices = self.split(unknown)
        while True:
            flags = [*constants, *carries, *slices]
            seeds = [v for v, is_unknown in zip(program.inputs, flags, strict=True) if is_unknown]
            found = dependents(program.equations, seeds)
            reached = [v.index in found and v.is_float for v in program.outputs]
            more = [a or b for a, b in zip(carries, reached[: self.carries], strict=True)]
            if more == carries:
                return [*more, *reached[self.carries :]]
            carries = more

    def unknowns(self, unknown: Sequence[bool]) -> Unknowns:
        """Which operands of the body depend on unknowns, given which operands of the `scan` are unknown."""
        constants, _, slices = self.split(unknown)
        return Unknowns(constants, self.unknown_outputs(unknown)[: self.carries], slices)

    def scan(self, body: Any, init: Any, xs: Any, backward: bool = False) -> tuple[Any, Any]:
        """Runs a body over time in this recurrence's order, or against it."""
        return jax.lax.scan(body, init, xs, self.length, reverse=self.reverse != backward)

    def walk(
        self, constants: Sequence[Any], carries: Sequence[Any], slices: Sequence[Any], with_residuals: bool = False
    ) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
        """Runs the recurrence through time, with the operands of the `scan` by kind.

        Returns the last carries, the stacked outputs, the carries that enter each step, and the residuals of the body
        at each step, if asked for.
        """
        program = normal_form(self.jaxpr)
        wanted = residuals_of(program) if with_residuals else ()

        def step(carry, x):
            env = forward(program, [*constants, *carry, *x])
            out = [jnp.asarray(env[v.index]) for v in program.outputs]
            return out[: self.carries], (out[self.carries :], carry, [env[v.index] for v in wanted])

        last, (ys, entering, residuals) = self.scan(step, [jnp.asarray(c) for c in carries], list(slices))
        return list(last), list(ys), list(entering), list(residuals)
