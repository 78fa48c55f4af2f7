r"""Unrolls the recurrences of a program: from a `scan` to equations with an axis of time.

The body of a `scan` becomes equations over all time steps at once, by `jax.vmap`, so that the size of the graph does
not depend on the number of steps. Limits: the forward pass still goes through time in order, by an equation that
stacks the entering carries ([`Entering`][]).

The carry that enters step $t$ is the one that leaves step $t - 1$. It is a *delayed* variable: no result of its own,
but a view of the initial carry and of all leaving carries except the last. This closes a cycle in the graph, unless no
carry depends on unknowns (`lax.map`): then a `scan` is always unrolled. Recurrences inside of a body are too, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.extend.core import primitives as jp

from ._custom import Call
from ._effects import inner_programs
from ._equations import Equation, Fresh, Program, Variable, dependents
from ._fragment import residuals_of
from ._normal_form import normal_form, traced_for
from ._primitives import VIEWS
from ._recurrence import Recurrence

_enter_p = Primitive("entering_carries")


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
    """A recurrence that is run in order. Its residuals are the carries that enter its steps, then the body's own."""

    recurrence: Recurrence = field(kw_only=True)

    def silent(self) -> Walked:
        plain = super().silent()
        assert isinstance(plain, Walked)
        return replace(plain, recurrence=self.recurrence.silent())

    def bind(self, *operands: Any) -> list[Any]:
        last, stacked, entering, inner = self.recurrence.walk(*self.recurrence.split(operands), with_residuals=True)
        return [*last, *stacked, *entering, *inner]


@dataclass(frozen=True, eq=False)
class Delayed:
    """The equations that show a delayed variable, and the number of the leaving carry among what they read."""

    equations: tuple[Equation, ...]
    leaving: int


@dataclass(frozen=True, eq=False)
class Unrolled:
    """A program that runs forward, and what shows each delayed variable, by its number."""

    program: Program
    delayed: Mapping[int, Delayed]


def unroll(
    program: Program, seeds: Sequence[Variable], stays: Callable[[Recurrence, Sequence[bool]], bool]
) -> Unrolled:
    """Unrolls the recurrences of a program in normal form; `seeds` are its unknown inputs.

    `stays` says of a recurrence with unknown carries, and of which of its operands are unknown, whether it is left as
    it is.
    """
    fresh = Fresh.after(program)
    delayed: dict[int, Delayed] = {}
    replaced: dict[int, Variable] = {}
    done: list[Equation] = []
    queue = list(program.equations)
    unknown = {v.index for v in seeds}
    while queue:
        equation = _renamed(queue.pop(0), replaced)
        flags = [v.index in unknown and v.is_float for v in equation.inputs]
        recurrence = Recurrence.of(equation) if equation.name == "scan" and any(flags) else None
        if recurrence is not None and recurrence.length > 0:
            carries = recurrence.unknown_outputs(flags)[: recurrence.carries]
            quiet = recurrence.silent() if equation.acts else recurrence
            batch = None if any(carries) and stays(recurrence, flags) else _batch(quiet)
            if batch is not None:
                if equation.acts:  # it runs once more, in order, for its side effects alone
                    done.append(replace(equation, outputs=tuple(map(fresh.like, equation.outputs))))
                    equation = equation.silent()
                queue[:0], shown, stacked = _unrolled(equation, quiet, carries, batch, fresh)
                delayed |= shown
                replaced |= stacked
                continue
            equation = _walked(equation, recurrence, fresh)
        shared = [i for i, flag in enumerate(flags) if flag and _shares(equation, i)]
        if shared:
            body, outputs = _unshared(equation, shared, fresh)
            queue[:0] = body
            replaced |= {v.index: new for v, new in zip(equation.outputs, outputs, strict=True)}
            continue
        done.append(equation)
        if any(flags) and equation.name in ("scan", "cond"):
            stops = _stopped(equation, flags, fresh)
            done.extend(stops)
            replaced |= {stop.inputs[0].index: stop.outputs[0] for stop in stops}
        unknown |= dependents([equation], [v for v in equation.inputs if v.index in unknown])
    outputs = tuple(_resolved(v, replaced) for v in program.outputs)
    delayed = {i: replace(d, equations=tuple(_renamed(e, replaced) for e in d.equations)) for i, d in delayed.items()}
    return Unrolled(Program(program.inputs, tuple(done), outputs, fresh.constants, fresh.static), delayed)


def _loops(equations: Iterable[Any]) -> int:
    """How deep recurrences are nested. A batch of what can be run one by one alone is a recurrence itself."""
    depths = [0]
    for equation in equations:
        own = 1 if equation.primitive.name == "scan" else 0
        depths.append(own + max((_loops(x.eqns) for x in inner_programs(equation.params)), default=0))
    return max(depths)


def _shares(equation: Equation, position: int) -> bool:
    """Whether an equation is a batch of calls with a rule that share an input."""
    call = equation.params.get("call")
    return isinstance(call, Call) and call.shares(position)


def _unshared(equation: Equation, shared: Sequence[int], fresh: Fresh) -> tuple[list[Equation], list[Variable]]:
    """A batch of calls with a rule that share inputs, with a copy of these for each call."""
    call = equation.params["call"]

    def function(*values: Any) -> list[Any]:
        own = [call.copies(i, x) if i in shared else x for i, x in enumerate(values)]
        return equation.primitive.bind(*own, call=call.unshared(shared))

    return traced_for(equation, function, fresh)


def _walked(equation: Equation, recurrence: Recurrence, fresh: Fresh) -> Walked:
    """The same `scan`, which keeps its residuals."""
    each = (*recurrence.split(equation.inputs)[1], *residuals_of(normal_form(recurrence.jaxpr)))
    residuals = tuple(fresh.variable((recurrence.length, *v.shape), v.dtype) for v in each)
    fields = (equation.primitive, equation.params, equation.inputs, equation.outputs, equation.source)
    return Walked(*fields, residuals=residuals, acts=equation.acts, recurrence=recurrence)


def _stopped(equation: Equation, flags: Sequence[bool], fresh: Fresh) -> list[Equation]:
    """Stops the outputs that depend on no unknown, or are no floats: counters, predicates, positions."""
    is_scan = equation.name == "scan"
    unknown = Recurrence.of(equation).unknown_outputs(flags) if is_scan else [v.is_float for v in equation.outputs]
    known = [v for v, is_unknown in zip(equation.outputs, unknown, strict=True) if not is_unknown]
    return [Equation(jp.stop_gradient_p, {}, (v,), (fresh.like(v),), equation.source) for v in known]


def _resolved(variable: Variable, replaced: Mapping[int, Variable]) -> Variable:
    while variable.index in replaced:
        variable = replaced[variable.index]
    return variable


def _renamed(equation: Equation, replaced: Mapping[int, Variable]) -> Equation:
    inputs = tuple(_resolved(v, replaced) for v in equation.inputs)
    return equation if inputs == equation.inputs else replace(equation, inputs=inputs)


def _unrolled(
    equation: Equation, recurrence: Recurrence, carries: Sequence[bool], batch: Program, fresh: Fresh
) -> tuple[list[Equation], dict[int, Delayed], dict[int, Variable]]:
    """All steps of a `scan` at once: equations, delayed variables, and new names of the stacked outputs.

    `carries` says which carries depend on unknowns, and `batch` is the body over all steps.
    """
    initial = recurrence.split(equation.inputs)[1]
    entering = [fresh.variable((recurrence.length, *v.shape), v.dtype) for v in initial]
    constants, _, slices = recurrence.split(equation.inputs)
    body, outputs = fresh.splice(batch, [*constants, *entering, *slices])
    equations = [*_runs(equation, recurrence, entering, carries), *body]
    delayed: dict[int, Delayed] = {}
    last = 0 if recurrence.reverse else recurrence.length - 1
    for i, (enter, leave) in enumerate(zip(entering, outputs, strict=False)):
        if carries[i]:
            if not _is_result(leave, equations):
                equations.append(Equation(jp.copy_p, {}, (leave,), (fresh.like(leave),), equation.source))
                leave = equations[-1].outputs[0]
            shows = _shows(initial[i], leave, enter, recurrence, equation.source, fresh)
            delayed[enter.index] = Delayed(shows, leave.index)
        row = _slice(leave, last, last + 1, equation.source, fresh)
        equations += [row, _reshape(row.outputs[0], equation.outputs[i], equation.source)]
    stacked = zip(equation.outputs[recurrence.carries :], outputs[recurrence.carries :], strict=True)
    return equations, delayed, {out.index: y for out, y in stacked}


def _runs(
    equation: Equation, recurrence: Recurrence, entering: Sequence[Variable], carries: Sequence[bool]
) -> list[Equation]:
    """The equations that compute the entering carries: the known ones apart from the unknown ones."""
    found: list[Equation] = []
    for primitive, is_unknown in ((jp.stop_gradient_p, False), (_enter_p, True)):
        picked = tuple(i for i, c in enumerate(carries) if c == is_unknown)
        if picked:  # nothing unknown passes a `stop_gradient`
            args = (primitive, {}, equation.inputs, tuple(entering[i] for i in picked), equation.source)
            found.append(Entering(*args, recurrence=recurrence, picked=picked))
    return found


def _batch(recurrence: Recurrence) -> Program | None:
    """The body over all steps at once; `None` where it holds what can only be run one by one.

    A batch of that is an error, or another loop, which would be unrolled without end.
    """
    count = recurrence.constants
    axes = [None if i < count else 0 for i in range(len(recurrence.jaxpr.in_avals))]
    over_time = jax.vmap(jaxpr_as_fun(recurrence.jaxpr), in_axes=axes, axis_size=recurrence.length)
    shapes = [
        jax.ShapeDtypeStruct(a.shape if axis is None else (recurrence.length, *a.shape), a.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        for a, axis in zip(recurrence.jaxpr.in_avals, axes, strict=True)
    ]
    try:
        traced = jax.make_jaxpr(over_time)(*shapes)
    except Exception:  # each primitive without a rule for batches raises an error of its own
        return None
    return normal_form(traced) if _loops(traced.jaxpr.eqns) <= _loops(recurrence.jaxpr.jaxpr.eqns) else None


def _is_result(leave: Variable, equations: Sequence[Equation]) -> bool:
    """Whether a leaving carry is computed. One that only shows the entering carry would be circular."""
    maker = next((e for e in equations if leave in e.outputs), None)
    return maker is not None and maker.name not in VIEWS and not isinstance(maker, Entering)


def _shows(
    initial: Variable, leave: Variable, enter: Variable, recurrence: Recurrence, source: str, fresh: Fresh
) -> tuple[Equation, ...]:
    """The entering carry as a view of the initial and the leaving ones."""
    first = _reshape(initial, fresh.variable((1, *initial.shape), initial.dtype), source)
    start, steps = int(recurrence.reverse), recurrence.length - 1
    found = [first, _slice(leave, start, start + steps, source, fresh)] if steps else [first]
    inputs = tuple(e.outputs[0] for e in (reversed(found) if recurrence.reverse else found))
    return (*found, Equation(jp.concatenate_p, dict(dimension=0), inputs, (enter,), source))


def _slice(variable: Variable, start: int, stop: int, source: str, fresh: Fresh) -> Equation:
    rest = variable.shape[1:]
    params = dict(start_indices=(start, *[0] * len(rest)), limit_indices=(stop, *rest), strides=None)
    output = fresh.variable((stop - start, *rest), variable.dtype)
    return Equation(jp.slice_p, params, (variable,), (output,), source)


def _reshape(variable: Variable, output: Variable, source: str) -> Equation:
    params = dict(new_sizes=output.shape, dimensions=None, sharding=None)
    return Equation(jp.reshape_p, params, (variable,), (output,), source)
