r"""Recurrences: the projection of a whole `scan` as one node.

With `copies="none"` a recurrence whose derivative says how it moves is one constraint. All its states are functions of
constants $c$, slices $x_t$ and the first carry, and with $J$ the Jacobian of the stacked outputs and the last carry by
those, the local solver solves $(I + J W^{-1} J^T K) \lambda = \mu$ by conjugate gradients (`rules/_local.py`): each of
its products with $J$ is one pass through time, each with $J^T$ one pass back, and no matrix of a time step is formed.

Otherwise one goes back through time in order. The body is a program of its own. With the carries of the forward pass in
hand, time is walked backward: at each step one sweep through the body's own constraints ([`sweep`][]) turns the duals
of the next carry and of the stacked output into duals of the carry, of the step's slices and of the constants, whose
duals add up over time. Nothing is unrolled; in a steep metric the result is that of backpropagation through time.

This is what cyclic projections use, and the gradient regime; two-color solvers project all time steps at once
(`_program/_unroll.py`). Limits: the nearest point of the whole is a local one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._errors import Unsupported
from .._graph._recurrences import is_smooth
from .._problem._problem import FeasibilityProblem
from .._program._equations import Equation
from .._program._recurrence import Recurrence
from .._program._slopes import slopes_of
from ..rules._base import AbstractRule, Context
from ..rules._local import nearest_locally
from ._sweep import missing_in, problem_of, sweep


class Scan(AbstractRule):
    """The projection onto the graph of a recurrence."""

    label: ClassVar[str] = "recurrence"
    answers_for_some: ClassVar[bool] = True

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        return all(v.is_float for v, u in zip(equation.inputs, unknown, strict=True) if u)

    def missing(self, equation: Equation, unknown: Sequence[bool]) -> Sequence[Unsupported]:
        recurrence = Recurrence.of(equation)
        constants, carries, slices = recurrence.split(range(len(equation.inputs)))
        walk = _Walk(recurrence, unknown, [v.is_float for v in equation.outputs])

        def once(*operands):
            x = [jnp.zeros(operands[i].shape[1:], operands[i].dtype) for i in slices]  # there may be no step at all
            held, entering = ([operands[i] for i in places] for places in (constants, carries))
            return walk.function(held, entering, x, Context.plain(unknown))[:2]

        return missing_in(once, equation)

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        """The duals of the operands; the sweeps through the body are in the regime of the metric."""
        walk, constants, (entering, slices, seen) = _walked(ctx, inputs)
        recurrence = walk.recurrence
        last, of_stacked = walk.wanted(ctx, duals)

        def back(state, now):
            of_constants, of_carries = state
            carry, x, of_ys, residuals = now
            new_constants, new_carries, of_x = walk.step(constants, carry, x, of_carries, of_ys, ctx, residuals)
            added = [a + b for a, b in zip(of_constants, new_constants, strict=True)]
            return (added, new_carries), of_x

        held = [c for c, u in zip(constants, walk.unknown[0], strict=True) if u]
        zeros = [jnp.zeros(c.shape, jnp.promote_types(c.dtype, jnp.float32)) for c in held]  # bfloat16 loses long sums
        xs = (entering, slices, of_stacked, seen)
        (of_constants, of_carries), of_slices = recurrence.scan(back, (zeros, last), xs, backward=True)
        given = recurrence.split(ctx.unknown)[1]
        of_init = [nu for nu, u in zip(walk.fill(1, of_carries, [None] * len(given)), given, strict=True) if u]
        return [*(nu.astype(c.dtype) for nu, c in zip(of_constants, held, strict=True)), *of_init, *of_slices]

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        """With `copies="none"` the nearest point of the whole; else one sweep through the steps, back in time."""
        assert ctx.equation is not None
        if ctx.copies == "none" and is_smooth(Recurrence.of(ctx.equation), ctx.unknown):
            return nearest_locally(ctx, inputs, duals)
        return self.pullback(ctx, inputs, duals)

    def over_time(self, ctx: Context, inputs: Sequence[Array], look: Callable[[FeasibilityProblem], PyTree]) -> PyTree:
        """The arrays that `look` finds in the body's problem at each time step, stacked along the first axis.

        The problem's parameters are the unknown constants, carries and slices.
        """
        walk, constants, along = _walked(ctx, inputs)

        def once(carry, x, residuals):
            function, start, is_parameter = walk.function(constants, carry, x, ctx)
            zeros = [jnp.zeros_like(y) for y in function(*start)]
            return look(problem_of(function, start, zeros, is_parameter, ctx, residuals))

        return jax.vmap(once)(*along)


def _walked(ctx: Context, inputs: Sequence[Array]) -> tuple[_Walk, list[Array], tuple[list[Array], ...]]:
    """The walk, its constants, and for all time steps the entering carries, the slices and the body's residuals."""
    assert ctx.equation is not None
    recurrence = Recurrence.of(ctx.equation)
    constants, carries, slices = recurrence.split(ctx.operands(inputs))
    if ctx.residuals_hold and ctx.equation.residuals:
        kept = [ctx.known[v.index] for v in ctx.equation.residuals]
        entering, seen = kept[: recurrence.carries], kept[recurrence.carries :]
    else:
        entering, seen = recurrence.walk(constants, carries, slices, with_residuals=True)[2:]
    return _Walk(recurrence, ctx.unknown, ctx.read), constants, (entering, slices, seen)


class _Walk:
    """One step back in time. `unknown` says of the constants, carries and slices of the body which are unknown.

    `read` says of all outputs which are wanted anything of.
    """

    def __init__(self, recurrence: Recurrence, unknown: Sequence[bool], read: Sequence[bool]):
        self.recurrence = recurrence
        self.unknown = recurrence.unknowns(unknown)
        self.read = read

    def unknown_carries(self, carries: Sequence) -> list:
        """Of one value a carry, those of the unknown carries."""
        return [c for c, u in zip(carries, self.unknown.carries, strict=True) if u]

    def read_slices(self, ys: Sequence) -> list:
        """Of one value a stacked output, those of the outputs that are read."""
        return [y for y, r in zip(ys, self.read[self.recurrence.carries :], strict=True) if r]

    def wanted(self, ctx: Context, duals: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """The duals of the unknown carries after the last step, zero where none is read, and of the stacked outputs."""
        assert ctx.equation is not None
        rest, last = iter(duals), []
        for v, is_read in zip(ctx.equation.outputs[: self.recurrence.carries], self.read, strict=False):
            last.append(next(rest) if is_read else jnp.zeros(v.shape, v.dtype) if v.is_float else None)
        return self.unknown_carries(last), list(rest)

    def fill(self, kind: int, values: Sequence, known: Sequence) -> list:
        """All operands of one kind: the unknown ones from `values`, the others from `known`."""
        rest = iter(values)
        return [next(rest) if u else k for u, k in zip(self.unknown[kind], known, strict=True)]

    def function(self, constants, carry, x, ctx: Context) -> tuple[Callable[..., list[Array]], list[Array], list[bool]]:
        """One time step as a function of its unknown operands; their values, and which of them are parameters.

        Its outputs are the unknown carries, then the stacked outputs that are read.
        """
        known = (constants, carry, x)
        start = self.unknown.chosen(*known)

        def function(*values):
            parts = self.unknown.split(values)
            full = [v for kind in range(3) for v in self.fill(kind, parts[kind], known[kind])]
            new, ys = self.recurrence.body(*full)
            return self.unknown_carries(new) + self.read_slices(ys)

        parameter = iter(ctx.is_parameter)
        given = self.recurrence.split(ctx.unknown)
        likes = [[next(parameter, False) if u else False for u in flags] for flags in given]
        flags = [likes[kind][i] and kind != 1 for kind in range(3) for i, u in enumerate(self.unknown[kind]) if u]
        return function, start, flags

    def step(self, constants, carry, x, of_carries, of_ys, ctx: Context, residuals=()) -> tuple[list, list, list]:
        """The duals of the unknown constants, carries and slices of one time step, whose residuals may be at hand.

        `of_carries` and `of_ys` are the duals of the unknown carries, and of the stacked outputs that are read.
        """
        function, start, is_parameter = self.function(constants, carry, x, ctx)
        reached = self._reached(function, start, ctx)
        return self.unknown.split(sweep(function, start, [*of_carries, *of_ys], is_parameter, ctx, residuals, reached))

    def _reached(self, function: Callable[..., list[Array]], start: Sequence[Array], ctx: Context) -> list[bool]:
        """For each output of one time step, whether a gradient reaches it, at this or at a later step.

        A carry is reached where the last one is, or where the next step leads from it to an output that is reached.
        """
        if ctx.noise != "unreached" or not ctx.reached:
            return []
        rest = iter(ctx.reached)
        carries = self.unknown_carries([next(rest) if r else False for r in self.read[: self.recurrence.carries]])
        ys = list(rest)
        _, slopes, _ = self.unknown.split(slopes_of(lambda _, values: function(*values), start))
        while True:
            bits = sum(1 << i for i, is_reached in enumerate([*carries, *ys]) if is_reached)
            more = [r or bool(through & bits) for r, through in zip(carries, slopes, strict=True)]
            if more == carries:
                return [*carries, *ys]
            carries = more
