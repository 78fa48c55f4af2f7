"""`solve`: runs a solver on a problem.

The loop is one program on the device (`_iterate.py`). Inside of a `jit`, `vmap` or `scan` it is part of theirs, and
what goes wrong is told by the result. Outside of them this module calls it again and again for a fraction of a second,
and does between the calls what a program cannot: errors that name a node, progress, callbacks, and Ctrl-C.
"""

from __future__ import annotations

import numbers
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import NonFiniteError, as_number, check_flag, check_function, check_key, described
from .._files import check_packages, check_picture, write_figure
from .._numerics._promotion import with_own_promotion
from .._problem._measures import Measures
from .._problem._problem import FeasibilityProblem
from .._problem._state import State
from .._program._canonical import canonicalised
from .._progress import progress as shown_progress
from ._base import AbstractSolver
from ._iterate import Progress, advance, begin, finite_nodes, first_bad, program_of
from ._plot import check_plotted, plotted
from ._start import fits

Callback = Callable[[int, Mapping[str, Any]], Any]

_CAPACITY = 256
"""Chunks that one call of the program may take, and measures that it returns."""
_SECONDS = 0.3
"""How long a call of the program is to take."""


class RESULTS(eqx.Enumeration):
    """How a run of a solver ended. Compare with `==`, which works inside of a `jit` too."""

    step_limit = "All steps were taken."
    converged = "The solver's own criterion was met to the tolerance."
    non_finite = "A state became NaN or infinite. What is returned is from before."
    stopped = "A callback asked to stop."
    interrupted = "Ctrl-C. What is returned is the state with the least gap so far."


_NAMES = ("step_limit", "converged", "non_finite", "stopped", "interrupted")


class Solution(eqx.Module):
    """What [`solve`][] returns.

    - `model`: the model with the parameters found.
    - `state`: the solver's last state, from which it can go on: `start=solution.state`.
    - `stats`: `"steps"`, the number of steps; and with one entry every so many steps `"step"`, `"change"` (largest
        change of any copy or parameter in a step), `"gap"` (distance of the two projections of a step: the root of the
        squares over all copies, in the mean over the constraints) and `"violation"` (largest distance of any node's
        output copies from the function of its input copies). Inside of a `jit` NaN stands behind the last entry.
    - `result`: one of [`RESULTS`][].
    """

    model: PyTree
    state: State
    stats: dict[str, Any]
    result: Any

    def plot(self, path: str | os.PathLike[str] | None = None, problem: FeasibilityProblem | None = None) -> Any:
        """Plots gap and violation over the steps, on a logarithmic scale.

        **Arguments:**

        - `path`: the file to write, one of `.png`, `.svg` and `.pdf`, in a folder that is there; by default none.
        - `problem`: the problem that was solved. With it, a second picture shows the largest violation at the end, by
            kind of node.

        **Returns:**

        The `matplotlib.figure.Figure`, which a notebook shows. It belongs to no window: nothing is to be closed.
        Several runs, from a `vmap`, are one pale line each.

        **Raises:** `TypeError`, `ValueError` and `FileNotFoundError` for unusable arguments, and `ImportError` where
        matplotlib is missing (`pip install 'eqxproj[plot]'`).
        """
        target = None if path is None else check_picture(path)
        check_plotted(self.stats, self.state, problem)
        check_packages("`solution.plot`", ("matplotlib",))
        figure = plotted(self.stats, self.state, problem)
        if target is not None:
            write_figure(target, figure)
        return figure

    def __repr__(self) -> str:
        last = {n: x[-1] for n, x in self.stats.items() if isinstance(x, np.ndarray) and x.ndim and len(x)}
        shown = ", ".join(f"last {name}={described(value)}" for name, value in last.items() if name != "step")
        model, steps = type(self.model).__name__, described(self.stats.get("steps"))
        return f"Solution(result={_name(self.result)}, steps={steps}, {shown or 'no measures'}, model=<{model}>)"


def _name(result: Any) -> str:
    """The name of a result, where its value is known."""
    same = {name: result == getattr(RESULTS, name) for name in _NAMES}
    if any(isinstance(x, jax.core.Tracer) for x in same.values()):
        return "traced"
    return next((name for name, is_same in same.items() if np.all(is_same)), "several")


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` for what is no integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {described(value)}.")


def check_solver(solver: Any) -> None:
    if not isinstance(solver, AbstractSolver):
        got = f"{solver.__name__}. Call the class to make one." if isinstance(solver, type) else f"{described(solver)}."
        raise TypeError(f"`solver` must be an instance of a solver such as `eqxproj.DouglasRachford()`, got {got}")


@with_own_promotion
def solve(
    problem: FeasibilityProblem,
    solver: AbstractSolver,
    *,
    steps: int,
    tol: float = 0.0,
    start: Literal["forward", "random"] | State = "forward",
    key: Array | None = None,
    every: int = 1,
    progress: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Runs a solver on a problem.

    It may be called inside of `jax.jit`, `jax.vmap` (over keys, for restarts) and `jax.lax.scan`. There are no errors
    there: look at the `result`.

    **Arguments:**

    - `problem`: from [`feasibility_problem`][].
    - `solver`: a solver, for instance `DouglasRachford()`.
    - `steps`: at most so many steps.
    - `tol`: where to stop. Of Douglas-Rachford, the difference map and relaxed reflect-reflect it is a bound of the
        `"gap"`, of the others of the `"change"` or the `"violation"`, whichever is met first. Zero takes all steps.
    - `start`: `"forward"`, the forward pass; `"random"`, all copies uniformly from [-1, 1] by `key`; or the state of
        another solution of the same solver on a problem of the same shape, from which to go on.
    - `every`: from one measurement to the next. Only then is `tol` looked at. A larger number is faster.
    - `progress`: show a progress bar; not inside of a `jit`.
    - `callback`: `callback(step, report)`, called a few times a second, outside of `jit` alone. The report has the last
        measures by name and the `"state"`. The run stops where it returns `True`.

    **Returns:**

    A [`Solution`][]. On Ctrl-C it is that with the least gap so far.

    **Raises:** `ValueError` and `TypeError` for unusable arguments; `NonFiniteError` where a state becomes NaN or
    infinite, with the node, the step, and the last good model.
    """
    _check(problem, solver, steps, tol, every, progress, callback)
    begins = _start(problem, solver, start, key)
    steps, every = int(steps), min(int(every), int(steps))
    if any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves((problem, solver, begins, tol))):
        if progress or callback is not None:
            raise ValueError("`progress` and `callback` work outside of `jit` and `vmap` alone. Leave them out there.")
        return _traced(problem, solver, begins, steps, every, tol)
    return _Run(problem, solver, float(tol), every, steps, callback, progress).solution(begins)


def _check(problem: Any, solver: Any, steps: Any, tol: Any, every: Any, progress: Any, callback: Any) -> None:
    """Raises what is wrong with the arguments of `solve`."""
    if not isinstance(problem, FeasibilityProblem):
        raise TypeError(f"`problem` must come from `eqxproj.feasibility_problem`, got {described(problem)}.")
    check_solver(solver)
    if solver.needs_two_colors and problem.graph.conflicts:
        raise ValueError(
            f"{type(solver).__name__} projects all nodes of one color together, but `problem` has edges that join two "
            "nodes of one color. Make it with `two_colors=True`."
        )
    solver.check(problem)
    check_positive("steps", steps)
    check_positive("every", every)
    check_flag("progress", progress)
    if callback is not None:
        check_function("callback", callback, "callback(step, report)")
    if isinstance(tol, jax.core.Tracer) and jnp.shape(tol) == ():
        return
    limit = as_number(tol)
    if limit is None or not limit >= 0:
        raise ValueError(f"`tol` must be a number of at least zero, got {described(tol)}.")


def _start(problem: FeasibilityProblem, solver: AbstractSolver, start: Any, key: Any) -> State | Array | None:
    """A state, a key, or `None` for the forward pass."""
    if isinstance(start, State):
        if not fits(problem, start, jax.eval_shape(lambda: solver.init(problem))):
            raise ValueError(
                f"`start` is a state of another problem, or of another solver than {described(solver)}. Take the "
                "`state` of a solution of the same solver, on a problem of the same shape."
            )
        return start
    if not isinstance(start, str) or start not in ("forward", "random"):
        raise ValueError(f'`start` must be "forward", "random", or the state of a solution, got {described(start)}.')
    if start == "forward":
        return None
    if key is None:
        raise ValueError('`start="random"` needs a `key`, such as `jax.random.key(0)`.')
    return check_key(key)


def _parameters(problem: FeasibilityProblem, solver: AbstractSolver, state: State) -> tuple[Array, ...]:
    return problem.in_sets(solver.postprocess(problem, state))


def _traced(
    problem: FeasibilityProblem,
    solver: AbstractSolver,
    start: State | Array | None,
    steps: int,
    every: int,
    tol: float | Array,
) -> Solution:
    """The solution as part of a traced program."""
    state = begin(problem, solver, start)
    full, rest = divmod(steps, every)

    def whole() -> Progress:
        run = advance(problem, solver, Progress.of(state, full + bool(rest)), full, every, tol)
        return advance(problem, solver, run, full + 1, rest, tol) if rest else run

    run = canonicalised(whole, problem.trace.program)
    done = jnp.where(run.is_finite, run.chunks, jnp.maximum(run.chunks - 1, 0))
    counts = jnp.minimum((jnp.arange(full + bool(rest)) + 1) * every, steps)
    entries = jnp.arange(counts.size) < run.chunks
    stats = {"step": jnp.where(entries, counts, -1), **run.stats._asdict()}
    result = RESULTS.where(
        run.is_finite, RESULTS.where(run.is_done, RESULTS.converged, RESULTS.step_limit), RESULTS.non_finite
    )
    model = problem.model(_parameters(problem, solver, run.state))
    return Solution(model, run.state, {"steps": jnp.minimum(done * every, steps), **stats}, result)


class _Run:
    """A run of a solver outside of a `jit`: what it is asked for, and how far it has come."""

    def __init__(
        self,
        problem: FeasibilityProblem,
        solver: AbstractSolver,
        tol: float,
        every: int,
        steps: int,
        callback: Callback | None,
        shown: bool,
    ):
        self.problem, self.solver = problem, solver
        self.tol, self.every, self.steps, self.callback = np.float32(tol), every, steps, callback
        self.bar = shown_progress(steps, type(solver).__name__, shown)
        self.taken, self.stats = 0, [np.zeros((0,), np.float32)] * 3
        self.counts: list[int] = []
        self.best: tuple[float, State | None] = (np.inf, None)
        self.programs: dict[str, Callable[..., PyTree]] = {}

    def solution(self, start: State | Array | None) -> Solution:
        state = self._program("begin", begin, start)
        finite = self._program("finite", _finite_nodes, state)
        if (bad := first_bad(self.problem, jax.device_get(finite))) is not None:
            raise NonFiniteError(self.problem.describe(bad), 0, self.model(state))
        result: Any = RESULTS.step_limit
        chunks = 1
        try:
            while self.taken < self.steps and bool(result == RESULTS.step_limit):
                state, result, chunks = self._call(state, chunks)
        except KeyboardInterrupt:
            result, state = RESULTS.interrupted, state if self.best[1] is None else self.best[1]
        finally:
            self.bar.close()
        found = dict(zip(Measures._fields, self.stats, strict=True))
        stats = {"steps": self.taken, "step": np.asarray(self.counts, np.int64), **found}
        return Solution(self.model(state), state, stats, result)

    def model(self, state: State) -> PyTree:
        return self.problem.model(self._program("parameters", _parameters, state))

    def _program(self, kind: str, function: Callable[..., Any], *arguments: PyTree) -> PyTree:
        if kind not in self.programs:
            self.programs[kind] = program_of(kind, function, self.problem, self.solver, *arguments)
        return self.programs[kind](*arguments)

    def _call(self, state: State, chunks: int) -> tuple[State, Any, int]:
        """One call of the program: the state after it, how it ended, and how many chunks the next is to take."""
        full = (self.steps - self.taken) // self.every
        every = self.every if full else self.steps - self.taken
        limit = min(chunks, full or 1, _CAPACITY)
        began = time.perf_counter()
        run = self._program("advance", _advanced, state, np.int32(limit), np.int32(every), self.tol)
        done, finite, count = jax.device_get((run.is_done, run.is_finite, run.chunks))
        seconds = time.perf_counter() - began
        if not finite:
            self._fail(run.state, int(count) - 1, every)
        self._record(run, int(count), every)
        result: Any = RESULTS.converged if done else RESULTS.step_limit
        if self.callback is not None and not done:
            report = {name: x[-1].item() for name, x in zip(Measures._fields, self.stats, strict=True)}
            stops = self.callback(self.taken, {**report, "state": run.state})
            is_flag = isinstance(stops, (bool, np.bool_, jax.Array))
            result = RESULTS.stopped if is_flag and bool(stops) else result
        return run.state, result, max(1, min(4 * limit, int(limit * _SECONDS / max(seconds, 1e-4))))

    def _record(self, run: Progress, count: int, every: int) -> None:
        """Adds what a call has measured."""
        self.counts += [self.taken + every * (i + 1) for i in range(count)]
        self.taken += every * count
        new = [np.asarray(x)[:count] for x in run.stats]
        self.stats = [np.concatenate(pair) for pair in zip(self.stats, new, strict=True)]
        gap = float(self.stats[1][-1])
        if gap <= self.best[0]:
            self.best = gap, run.state
        self.bar.update(every * count)
        self.bar.set_postfix_str(f"gap {gap:.3g}")

    def _fail(self, state: State, chunks: int, every: int) -> None:
        """Raises the error of a chunk that became NaN or infinite: its steps are taken again, one by one."""
        for number in range(every):
            run = self._program("advance", _advanced, state, np.int32(1), np.int32(1), np.float32(0.0))
            if not bool(run.is_finite):
                finite = self._program("step", _stepped, state)
                bad = first_bad(self.problem, jax.device_get(finite))
                where = "the weights of the constraints" if bad is None else self.problem.describe(bad)
                raise NonFiniteError(where, self.taken + chunks * every + number, self.model(state))
            state = run.state
        raise AssertionError("a chunk that was not finite is so no more")


def _advanced(
    problem: FeasibilityProblem, solver: AbstractSolver, state: State, limit: Array, every: Array, tol: Array
) -> Progress:
    return advance(problem, solver, Progress.of(state, _CAPACITY), limit, every, tol)


def _finite_nodes(problem: FeasibilityProblem, solver: AbstractSolver, state: State) -> Array:
    return finite_nodes(problem, state)


def _stepped(problem: FeasibilityProblem, solver: AbstractSolver, state: State) -> Array:
    """For each node whether it is finite after a step."""
    return finite_nodes(problem, solver.step(problem, state))
