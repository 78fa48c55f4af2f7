"""The loop of training: chunks of steps on the device, and between them records, checkpoints and the wish to stop.

Transforms a state and a stream of minibatches into the state after the last step. A chunk is one compiled program of
many steps; whether all of them were finite is looked up after it. Limits: nobody looks on inside of a chunk, which
takes a few tenths of a second, or one step.
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from .._errors import CheckpointError, NonFiniteError, TrainingInterrupted
from .._progress import progress
from ._checkpoint import TrainingState, save
from ._evaluation import Evaluation, History, Record
from ._source import AbstractSource, Chunks
from ._step import Advance, Step, compiled, copied, transformed
from ._watch import Asked, Callback, EarlyStopping, Report, termination, uninterrupted

_SECONDS = 0.2
"""How long a chunk is to take."""


class Plan(NamedTuple):
    """What happens beside the steps.

    - `evaluation`, `callbacks`, `early_stopping`: at each record.
    - `folder`, `every`: where checkpoints are written, and after how many steps each.
    - `shown`: whether progress is. `divided`: places stacked batches on devices.
    """

    evaluation: Evaluation
    callbacks: tuple[Callback, ...]
    early_stopping: EarlyStopping | None
    folder: pathlib.Path | None
    every: int
    shown: bool
    divided: Callable[[PyTree], PyTree]


class Trained(NamedTuple):
    """What a run leaves: the model it returns, the state of its layers, the state it goes on from, and why it ended."""

    model: PyTree
    layers: PyTree
    state: TrainingState
    history: History
    reason: str


class Loop:
    """One run of training. Its `state` is that after the last whole chunk, also where the run ends early."""

    def __init__(self, step: Step, source: AbstractSource, state: TrainingState, plan: Plan):
        self.step, self.source, self.plan, self.state = step, source, plan, state
        self._chunks = Chunks(source.items(state.step), source.longest, plan.divided)
        self._programs: dict[Any, Advance] = {}
        self._compile_seconds, self._pace = 0.0, 1
        self._saved: int | None = None

    @property
    def history(self) -> History:
        return self.plan.evaluation.history(self.state.records, self._compile_seconds)

    def run(self) -> Trained:
        """Trains to the end.

        **Raises:** `NonFiniteError`, `CheckpointError`, `EvaluationError`, and `TrainingInterrupted` on Ctrl-C.
        """
        bar = progress(self.plan.evaluation.steps, self.step.direction.name, self.plan.shown)
        try:
            with termination(self.plan.folder is not None) as asked:
                reason = self._all_steps(bar, asked)
        except KeyboardInterrupt as error:
            self._save()
            model = self.step.model(self.state.arrays)
            raise TrainingInterrupted(self.state.step, model, self.history, self.state) from error
        finally:
            bar.close()
            self._chunks.close()
        model, layers = self._shown()
        if self.plan.early_stopping is not None and not math.isnan(self.state.best_value):
            others = eqx.filter((model, layers), eqx.is_array, inverse=True)
            model, layers = eqx.combine(copied(self.state.best), others)
        return Trained(model, layers, self.state, self.history, reason)

    def _all_steps(self, bar: Any, asked: Asked) -> str:
        """Runs chunk after chunk; the answer is why it ended."""
        evaluation = self.plan.evaluation
        bar.update(self.state.step)
        is_first = evaluation.is_due(self.state.step) and not self._is_recorded  # or that of an interrupted run
        reason = self._look() if is_first else None
        while reason is None and self.state.step < evaluation.steps:
            done = self._chunk(self._goal() - self.state.step)
            bar.update(done)
            reason = None if done else "data"
            if (evaluation.is_due(self.state.step) or not done) and not self._is_recorded:
                reason = self._look() or reason
                bar.set_postfix_str(f"loss {self.state.loss:.4g}")
            if reason is None and asked.by_all():
                reason = "terminated"
            if self.state.step % self.plan.every == 0:
                self._save()
        self._save()
        return reason or "steps"

    @property
    def _is_recorded(self) -> bool:
        """Whether there is a record of the last step."""
        return bool(self.state.records) and self.state.records[-1]["step"] == self.state.step

    def _goal(self) -> int:
        """The next step after which the host has something to do."""
        step = self.state.step
        save = (step // self.plan.every + 1) * self.plan.every if self.plan.folder is not None else math.inf
        return int(min(self.plan.evaluation.next(step), save))

    def _chunk(self, most: int) -> int:
        """Takes steps, at most so many: how many they were."""
        feed, items = self._chunks.next(min(most, self._pace))
        if not items:
            return 0
        first, count = self.state.step, len(items)
        advance = self._compiled(feed)
        start = time.perf_counter()
        with uninterrupted():
            arrays, report = jax.block_until_ready(advance(self.state.arrays, first, count, feed))
            seconds = time.perf_counter() - start
            loss, norm = float(report.loss), float(report.norm)
            total = self.state.seconds + seconds
            self.state = replace(self.state, arrays=arrays, step=first + count, seconds=total, loss=loss, norm=norm)
        if jax.process_count() > 1:
            self._pace = self.source.longest  # the same in all processes
        elif count == self._pace:
            self._pace = max(1, min(2 * count, self.source.longest, int(_SECONDS * count / max(seconds, 1e-9))))
        if int(arrays.bad_step) >= 0:
            raise self._non_finite(items[int(arrays.bad_step) - first])
        return count

    def _compiled(self, feed: PyTree) -> Advance:
        """The program for chunks of this shape."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree_util.tree_leaves(feed))
        if shapes not in self._programs:
            start = time.perf_counter()
            self._programs[shapes] = compiled(self.step, self.state.arrays, self.source.whole, feed, self.state.key)
            self._compile_seconds += time.perf_counter() - start
        return self._programs[shapes]

    def _shown(self) -> tuple[PyTree, PyTree]:
        """The model that the state stands for, and the state of its layers."""
        return self.step.model(self.state.arrays), copied(self.state.arrays.layers)

    def _look(self) -> str | None:
        """Makes a record, and asks who looks on; the answer is why to stop, if somebody wants to."""
        model, layers = self._shown()
        state, evaluation = self.state, self.plan.evaluation
        known = {name: getattr(state, name) for name in ("step", "loss", "norm", "seconds")}
        rate = learning_rate(state.arrays.optimizer)
        known |= {} if rate is None else {"learning_rate": rate}
        prefix = () if layers is None else (layers,)
        record = evaluation.record(known, model, prefix, state.records, self._compile_seconds)
        self.state = replace(state, records=(*state.records, record))
        reason = self._compare(record, (model, layers))
        if not self.plan.callbacks:
            return reason
        values = {name: value for name, value in record.items() if name != "step"}
        seen = Report(state.step, values, self.history, model, layers)
        answers = [callback(state.step, seen) for callback in self.plan.callbacks]
        return "callback" if any(answer is True for answer in answers) else reason

    def _compare(self, record: Record, shown: PyTree) -> str | None:
        """Keeps a model that is the best so far; the answer is why to stop, where none has been better for long."""
        rule, state = self.plan.early_stopping, self.state
        if rule is None:
            return None
        value = record[rule.monitor]
        if rule.is_better(value, state.best_value):
            best = eqx.filter(shown, eqx.is_array)
            self.state = replace(state, best=best, best_value=value, best_step=state.step, waited=0)
            return None
        waited = state.waited + (not math.isnan(state.best_value))
        self.state = replace(state, waited=waited)
        return "early_stopping" if rule.patience is not None and waited >= rule.patience else None

    def _save(self) -> None:
        """Writes a checkpoint, where they are asked for and it is not there yet."""
        if self.plan.folder is None or self._saved == self.state.step:
            return
        try:
            save(self.plan.folder, self.state)
        except OSError as error:
            model = self.step.model(self.state.arrays)
            raise CheckpointError(str(error), self.state.step, model, self.history) from error
        self._saved = self.state.step

    def _non_finite(self, item: PyTree) -> NonFiniteError:
        """The error of a run whose step on a minibatch was not finite; the state is that before it."""
        state, number = self.state.arrays, int(self.state.arrays.bad_step)
        key = jax.random.fold_in(self.state.key, number)
        batch = transformed(self.step.extras.transform, self.source.batch(item), key)
        model, arguments = self.step.running(state), self.step.arguments(state, batch)
        node = self.step.direction.failing_node(model, arguments, key, self.step.here(state, number))
        return NonFiniteError(node, number, self.step.model(state), self.history)


def learning_rate(state: PyTree) -> float | None:
    """The learning rate that the state of an optimizer holds, as those of `optax.inject_hyperparams` do."""
    found = [value for _, value in optax.tree_utils.tree_get_all_with_path(state, "learning_rate")]
    numbers = [x for x in found if eqx.is_array_like(x) and np.shape(x) == ()]
    return float(numbers[0]) if numbers else None
