"""The loop of training: minibatches in, the trained model and the history of its evaluations out.

Steps are dispatched without waiting for their results; whether all of them were finite is looked up where the model is
evaluated. Limits: the loop runs on the host, one step a turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree
from tqdm.auto import tqdm

from .._errors import NonFiniteError, TrainingInterrupted
from ._compiled import jitted
from ._data import take
from ._step import Step, TrainState, compiled

Pick = tuple[np.ndarray, Array]
"""The rows of a minibatch, and its key."""
Record = dict[str, Any]
"""Name to number, after one step."""
History = dict[str, Any]
"""Name to array, with one entry a record; and `"compile_seconds"`, a number."""


class Evaluation(eqx.Module):
    """What is recorded of a model in training, and after which steps.

    - `data`: what the `functions` are given after the model; `None` where only the loss of a step is recorded.
    - `every`: number of steps from one record to the next. `steps`: the number of all, after which stands the last.
    """

    data: tuple[PyTree, ...] | None
    functions: dict[str, Callable[..., Any]]
    every: int
    steps: int

    def __init__(
        self, data: tuple[PyTree, ...] | None, functions: dict[str, Callable[..., Any]], every: int | None, steps: int
    ):
        self.data = None if data is None else jtu.tree_map(jnp.asarray, data)
        self.functions = {} if data is None else {name: jitted(f) for name, f in functions.items()}
        self.every = max(1, steps // 20) if every is None else int(every)
        self.steps = steps

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def record(self, step: int, loss: float, seconds: float, model: PyTree) -> Record:
        """One record. `seconds` are those of training so far."""
        found = {f"eval_{name}": float(f(model, *(self.data or ()))) for name, f in self.functions.items()}
        return {"step": step, "loss": loss, "seconds": seconds, **found}

    def history(self, records: Sequence[Record], compile_seconds: float) -> History:
        """The records as one array a name."""
        names = ("step", "loss", "seconds", *(f"eval_{name}" for name in self.functions))
        return {**{n: np.asarray([r[n] for r in records]) for n in names}, "compile_seconds": compile_seconds}


def fit(
    step: Step, state: TrainState, data: Sequence[PyTree], picks: Iterator[Pick], evaluation: Evaluation, progress: bool
) -> tuple[PyTree, History]:
    """The trained model and its history, after as many steps as the evaluation counts; `data` is on the host.

    **Raises:** `NonFiniteError`, and `TrainingInterrupted` on Ctrl-C, as [`train`][].
    """
    records: list[Record] = []
    recent: list[Pick] = []
    done, value, seconds, compile_seconds = 0, float("nan"), 0.0, 0.0
    bar = tqdm(total=evaluation.steps, desc=step.direction.name, disable=not progress, leave=True)
    try:
        first = next(picks)
        start = time.perf_counter()
        advance = compiled(step, state, take(data, first[0]), first[1])
        compile_seconds = time.perf_counter() - start
        records.append(evaluation.record(0, value, seconds, step.model(state)))
        start = time.perf_counter()
        for rows, key in itertools.islice(itertools.chain([first], picks), evaluation.steps):
            state, value = advance(state, np.int32(done), take(data, rows), key)
            done += 1
            recent.append((rows, key))
            bar.update()
            if evaluation.is_due(done):
                jax.block_until_ready(state)
                seconds += time.perf_counter() - start
                if int(state.bad_step) >= 0:
                    picked = recent[int(state.bad_step) - (done - len(recent))]
                    raise _non_finite(step, state, data, picked, evaluation.history(records, compile_seconds))
                recent.clear()
                records.append(evaluation.record(done, float(value), seconds, step.model(state)))
                bar.set_postfix_str(f"loss {float(value):.4g}")
                start = time.perf_counter()
    except KeyboardInterrupt as error:
        history = evaluation.history(records, compile_seconds)
        raise TrainingInterrupted(done, step.model(state), history) from error
    finally:
        bar.close()
    return step.model(state), evaluation.history(records, compile_seconds)


def _non_finite(
    step: Step, state: TrainState, data: Sequence[PyTree], picked: Pick, history: History
) -> NonFiniteError:
    """The error of a run whose step on a minibatch was not finite; the state is that before it."""
    model, (rows, key) = step.model(state), picked
    node = step.direction.failing_node(model, take(data, rows), key)
    return NonFiniteError(node, int(state.bad_step), model, history)
