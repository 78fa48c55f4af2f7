"""The part of a traced program that the value of its loss depends on, and what in it is unknown.

Transforms a trace into a [`LiveProgram`][]: recurrences unrolled or left whole, comparisons of unknowns written as
differences, dead code dropped. Limits: the auxiliary outputs of the loss are dead code here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from .._program._comparisons import with_differences
from .._program._equations import Equation, Program, Variable, dependents, live
from .._program._recurrence import Recurrence
from .._program._trace import Trace
from .._program._unroll import Delayed, unroll


@dataclass(frozen=True, eq=False)
class LiveProgram:
    """What of a program leads to its loss.

    - `program`: the whole program, as it runs forward. `parameters`, `arguments`: its inputs.
    - `delayed`: the variables that show values of the time step before, and how. `fed`: what they show.
    - `equations`: what the loss depends on, in order, without what shows delayed variables, later than their readers.
    - `unknown`: the numbers of the variables that depend on parameters, or on pinned data.
    - `pinned`: the arguments that are variables held in place.
    """

    program: Program
    parameters: tuple[Variable, ...]
    arguments: tuple[Variable, ...]
    delayed: Mapping[int, Delayed]
    equations: tuple[Equation, ...]
    fed: tuple[Variable, ...]
    unknown: frozenset[int] = frozenset()
    pinned: tuple[Variable, ...] = ()

    def with_unknowns(self, pinned: Sequence[Variable] = ()) -> LiveProgram:
        """The same program, in which what depends on a parameter or on `pinned` data is unknown."""
        return replace(self, unknown=self.dependents([*self.parameters, *pinned]), pinned=tuple(pinned))

    def dependents(self, seeds: Sequence[Variable]) -> frozenset[int]:
        """The numbers of the variables that depend on the seeds. Delayed variables count as seeds."""
        return dependents(self.equations, [*seeds, *(Variable(i, (), None) for i in self.delayed)])

    @cached_property
    def of_data(self) -> frozenset[int]:
        """The numbers of the variables that depend on data: on arguments that are no keys, or on constant arrays."""
        data = [v for v in self.arguments if not jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]
        used = {v.index for e in self.equations for v in e.inputs}
        arrays = [i for i, c in self.program.constants.items() if i in used and np.size(c) > 1]
        return self.dependents([*data, *(Variable(i, (), None) for i in arrays)])

    def unknown_inputs(self, equation: Equation) -> list[Variable]:
        """The unknown operands of an equation, in order."""
        return [v for v in equation.inputs if v.index in self.unknown]


def live_program(trace: Trace, pinned: bool, stays: Callable[[Recurrence, Sequence[bool]], bool]) -> LiveProgram:
    """The live part of a traced loss; its parameters are its unknowns.

    `pinned`: whether data may become variables later, so that recurrences over data alone are unrolled too.
    `stays`: which recurrences whose carries depend on unknowns stay whole.
    """
    count = len(trace.parameters)
    parameters, arguments = trace.program.inputs[:count], trace.program.inputs[count:]
    seeds = [*parameters, *(v for v in arguments if v.is_float and pinned)]
    unrolled = unroll(trace.program, seeds, stays)
    program = with_differences(unrolled.program, seeds)
    equations, fed = _alive(program, unrolled.delayed)
    return LiveProgram(program, parameters, arguments, unrolled.delayed, equations, fed).with_unknowns()


def _alive(program: Program, delayed: Mapping[int, Delayed]) -> tuple[tuple[Equation, ...], tuple[Variable, ...]]:
    """The equations that the loss depends on, also through time, and the variables that delayed ones show."""
    forward = [e for e in program.equations if not any(v.index in delayed for v in e.outputs)]
    made = {v.index for late in delayed.values() for e in late.equations for v in e.outputs}
    fed: tuple[Variable, ...] = ()
    while True:
        equations = live(forward, [program.outputs[0], *fed])
        reads = {v.index for e in equations for v in e.inputs}
        shown = [v for i in delayed if i in reads for e in delayed[i].equations for v in e.inputs]
        more = tuple(dict.fromkeys(v for v in shown if v.index not in made))
        if len(more) == len(fed):
            return tuple(e.silent() for e in equations), fed
        fed = more
