r"""Lays the steps of a recurrence side by side: from a `scan` to equations with an axis of time.

The body of a `scan` becomes equations over all time steps at once, by `jax.vmap`. The carry that enters step $t$ is
the one that leaves step $t - 1$: a *delayed* variable, which is no result of its own but a view of the initial carry
and of all but the last of the leaving ones. So the graph has a cycle, in which the two-color solvers see nothing
unusual: they project all time steps at once. The forward pass, which must go through time in order, gets an equation
that runs the recurrence and stacks the entering carries.

A `scan` without a carry that depends on unknowns (`lax.map`) has no cycle and is always laid out. Recurrences inside
of a body are laid out in turn. The size of the graph does not depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.core import primitives as jp

from ._equations import Equation, Fresh, Program, Variable, dependents
from ._fragment import products
from ._normal_form import normal_form
from ._primitives import VIEWS
from ._recurrence import Recurrence

_enter_p = Primitive("entering_carries")
_copy_p = jp.copy_p


@dataclass(frozen=True, eq=False)
class Entering(Equation):
    """Runs a recurrence and stacks some of the carries that enter its steps."""

    recurrence: Recurrence = field(kw_only=True)
    picked: tuple[int, ...] = field(kw_only=True)

    def bind(self, *operands: Any) -> list[Any]:
        entering = self.recurrence.walk(*self.recurrence.split(operands))[2]
        return [entering[i] for i in self.picked]


@dataclass(frozen=True, eq=False)
class Walked(Equation):
    """A recurrence that is walked in order and keeps, for the way back, what enters its steps and their products."""

    recurrence: Recurrence = field(kw_only=True)
    entering: tuple[Variable, ...] = field(kw_only=True)
    products: tuple[Variable, ...] = field(kw_only=True)

    @property
    def kept(self) -> tuple[Variable, ...]:
        return (*self.entering, *self.products)

    def bind(self, *operands: Any) -> list[Any]:
        last, stacked, entering, seen = self.recurrence.walk(*self.recurrence.split(operands), with_products=True)
        return [*last, *stacked, *entering, *seen]


@dataclass(frozen=True, eq=False)
class Delayed:
    """The equations that show a delayed variable, and the number of the leaving carry among what they read."""

    equations: tuple[Equation, ...]
    leaving: int


@dataclass
class Layout:
    """What laying out a program's recurrences gives.

    `program` runs forward; `delayed` maps the number of each delayed variable to what shows it.
    """

    program: Program
    delayed: dict[int, Delayed]


def lay_out(program: Program, seeds: Sequence[Variable], in_order: bool) -> Layout:
    """Lays out the recurrences of a program.

    **Arguments:**

    - `program`: in normal form.
    - `seeds`: its unknown inputs.
    - `in_order`: leave recurrences whose carries depend on unknowns as they are.

    **Returns:**

    A [`Layout`][].
    """
    fresh = Fresh(program)
    delayed: dict[int, Delayed] = {}
    done: list[Equation] = []
    queue = list(program.equations)
    replaced: dict[int, Variable] = {}
    unknown = {v.index for v in seeds}
    while queue:
        equation = _renamed(queue.pop(0), replaced)
        flags = [v.index in unknown and v.is_float for v in equation.inputs]
        if equation.name == "scan" and any(flags):
            recurrence = Recurrence.of(equation)
            carries = recurrence.unknown_carries(flags)
            if not (in_order and any(carries)) and recurrence.length > 0:
                queue[:0] = _Steps(fresh, equation, recurrence, carries, delayed, replaced).equations
                continue
            if recurrence.length > 0:
                equation = _walked(equation, recurrence, fresh)
        done.append(equation)
        if any(flags) and equation.name in ("scan", "cond"):
            done.extend(_stopped(equation, flags, fresh, replaced))
        unknown |= dependents([equation], [v for v in equation.inputs if v.index in unknown])
    outputs = tuple(_resolved(v, replaced) for v in program.outputs)
    laid_out = Program(program.inputs, tuple(done), outputs, fresh.constants, fresh.static)
    for i, found in delayed.items():
        delayed[i] = Delayed(tuple(_renamed(e, replaced) for e in found.equations), found.leaving)
    return Layout(laid_out, delayed)


def _walked(equation: Equation, recurrence: Recurrence, fresh: Fresh) -> Walked:
    def stacked(variables: Sequence[Variable]) -> tuple[Variable, ...]:
        return tuple(fresh.variable((recurrence.length, *v.shape), v.dtype) for v in variables)

    entering = stacked(recurrence.split(equation.inputs)[1])
    fields = (equation.primitive, equation.params, equation.inputs, equation.outputs, equation.source)
    seen = stacked(products(recurrence.program()))
    return Walked(*fields, recurrence=recurrence, entering=entering, products=seen)


def _stopped(equation: Equation, flags: Sequence[bool], fresh: Fresh, replaced: dict[int, Variable]) -> list[Equation]:
    """Stops the outputs that depend on no unknown, or are no floats: counters, predicates, positions."""
    unknown = [v.is_float for v in equation.outputs]
    if equation.name == "scan":
        unknown = Recurrence.of(equation).unknown_outputs(flags)
    stops = []
    for v, is_unknown in zip(equation.outputs, unknown, strict=True):
        if not is_unknown:
            replaced[v.index] = fresh.like(v)
            stops.append(Equation(jp.stop_gradient_p, {}, (v,), (replaced[v.index],), equation.source))
    return stops


def _resolved(variable: Variable, replaced: dict[int, Variable]) -> Variable:
    while variable.index in replaced:
        variable = replaced[variable.index]
    return variable


def _renamed(equation: Equation, replaced: dict[int, Variable]) -> Equation:
    inputs = tuple(_resolved(v, replaced) for v in equation.inputs)
    if inputs == equation.inputs:
        return equation
    return replace(equation, inputs=inputs)


class _Steps:
    """The equations that take the place of one `scan`."""

    def __init__(self, fresh: Fresh, equation: Equation, recurrence: Recurrence, carries, delayed, replaced):
        self.fresh, self.source, self.recurrence = fresh, equation.source, recurrence
        self.equations: list[Equation] = []
        self.constants, self.initial, self.slices = recurrence.split(equation.inputs)
        self.length = recurrence.length
        entering = self._entering(equation, carries)
        leaving, stacked = self._body(entering)
        last = 0 if recurrence.reverse else self.length - 1
        for i, (out, enter, leave) in enumerate(
            zip(equation.outputs[: recurrence.carries], entering, leaving, strict=True)
        ):
            if carries[i]:
                leave = self._value(leave, enter)
                delayed[enter.index] = Delayed(self._delay(self.initial[i], leave, enter), leave.index)
            row = self._slice(leave, last, last + 1)
            self._reshape(row, out.shape, out)
        for out, y in zip(equation.outputs[recurrence.carries :], stacked, strict=True):
            replaced[out.index] = y

    def emit(self, primitive: Any, params: dict, inputs: Sequence[Variable], output: Variable) -> Variable:
        self.equations.append(Equation(primitive, params, tuple(inputs), (output,), self.source))
        return output

    def _entering(self, equation: Equation, carries: Sequence[bool]) -> list[Variable]:
        """Variables for the entering carries: those that depend on unknowns apart from those that do not."""
        found = [self.fresh.variable((self.length, *v.shape), v.dtype) for v in self.initial]
        for is_unknown in (False, True):
            picked = tuple(i for i, c in enumerate(carries) if c == is_unknown)
            if picked:
                outputs = tuple(found[i] for i in picked)
                primitive = _enter_p if is_unknown else jp.stop_gradient_p  # which nothing unknown passes
                args = (primitive, {}, equation.inputs, outputs, self.source)
                self.equations.append(Entering(*args, recurrence=self.recurrence, picked=picked))
        return found

    def _body(self, entering: Sequence[Variable]) -> tuple[list[Variable], list[Variable]]:
        """The body over all steps at once: the leaving carries and the stacked outputs."""
        recurrence = self.recurrence
        axes = [None] * recurrence.constants + [0] * (recurrence.carries + len(self.slices))
        inputs = [*self.constants, *entering, *self.slices]
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs]

        def body(*operands):
            carries, ys = recurrence.body(*operands)
            return (*carries, *ys)

        over_time = jax.vmap(body, in_axes=axes, out_axes=0, axis_size=self.length)
        equations, outputs = self.fresh.splice(normal_form(jax.make_jaxpr(over_time)(*shapes)), inputs)
        self.equations.extend(equations)
        return outputs[: recurrence.carries], outputs[recurrence.carries :]

    def _value(self, leave: Variable, enter: Variable) -> Variable:
        """The leaving carry as the result of an operation: a mere view of the entering one would be circular."""
        maker = next((e for e in self.equations if leave in e.outputs), None)
        if maker is not None and maker.name not in VIEWS and not isinstance(maker, Entering):
            return leave
        return self.emit(_copy_p, {}, [leave], self.fresh.like(leave))

    def _delay(self, initial: Variable, leave: Variable, enter: Variable) -> tuple[Equation, ...]:
        """The entering carry as a view of the initial and the leaving ones."""
        before = len(self.equations)
        first = self._reshape(initial, (1, *initial.shape), None)
        parts = [first]
        if self.length > 1:
            kept = (1, self.length) if self.recurrence.reverse else (0, self.length - 1)
            rest = self._slice(leave, *kept)
            parts = [rest, first] if self.recurrence.reverse else [first, rest]
        self.emit(jp.concatenate_p, dict(dimension=0), parts, enter)
        shown = tuple(self.equations[before:])
        del self.equations[before:]
        return shown

    def _slice(self, variable: Variable, start: int, stop: int) -> Variable:
        rest = variable.shape[1:]
        params = dict(start_indices=(start, *(0 for _ in rest)), limit_indices=(stop, *rest), strides=None)
        return self.emit(jp.slice_p, params, [variable], self.fresh.variable((stop - start, *rest), variable.dtype))

    def _reshape(self, variable: Variable, shape: Sequence[int], output: Variable | None) -> Variable:
        output = self.fresh.variable(shape, variable.dtype) if output is None else output
        params = dict(new_sizes=tuple(shape), dimensions=None, sharding=None)
        return self.emit(jp.reshape_p, params, [variable], output)
