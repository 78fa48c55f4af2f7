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

from .._errors import EvaluationError, NonFiniteError, TrainingInterrupted, described
from .._program._compiled import jitted
from .._progress import progress
from ._data import take
from ._step import Step, TrainState, compiled

Pick = tuple[np.ndarray, Array]
"""The rows of a minibatch, and its key."""
Record = dict[str, Any]
"""Name to number, after one step."""
History = dict[str, Any]
"""Name to array, with one entry a record; and `"compile_seconds"`, a number."""


def _returned(value: Any) -> str:
    """What a function returned in place of a number."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"an array of shape {value.shape} and dtype {value.dtype}" if is_array else described(value)


def _said(error: Exception) -> str:
    """The message of an error; of one that came through a callback of a compiled function, its last line alone."""
    text = str(error).strip()
    return (text.splitlines()[-1] if "Traceback" in text else text).rstrip(".")


def _remedy(error: Exception) -> str:
    """What may help where a function of `evaluate` raised."""
    if isinstance(error, jax.errors.JAXTypeError):
        return " The functions of `evaluate` are compiled: compute with `jax.numpy` in them, not with numpy or Python."
    if isinstance(error, TypeError) and "argument" in str(error):
        return (
            " It is called with the model and the parts of `eval_data` alone: give further arguments, such as a `key`, "
            "a default, or bind them by a `lambda`."
        )
    return ""


class Evaluation(eqx.Module):
    """What is recorded of a model in training, and after which steps.

    - `data`: what the `functions` are given after the model; `None` where only the loss of a step is recorded.
    - `plain`: the functions before they are compiled. `is_loss`: whether the one is the loss, by default.
    - `every`: number of steps from one record to the next. `steps`: the number of all, after which stands the last.
    """

    data: tuple[PyTree, ...] | None
    plain: dict[str, Callable[..., Any]]
    functions: dict[str, Callable[..., Any]]
    is_loss: bool
    every: int
    steps: int

    def __init__(
        self,
        data: tuple[PyTree, ...] | None,
        functions: dict[str, Callable[..., Any]],
        is_loss: bool,
        every: int | None,
        steps: int,
    ):
        self.data = None if data is None else jtu.tree_map(jnp.asarray, data)
        self.plain, self.is_loss = {} if data is None else functions, is_loss
        self.functions = {name: jitted(f) for name, f in self.plain.items()}
        self.every = max(1, steps // 20) if every is None else int(every)
        self.steps = steps

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def record(self, step: int, loss: float, seconds: float, model: PyTree, records: Sequence[Record]) -> Record:
        """One record, after others. `seconds` are those of training so far.

        **Raises:** `EvaluationError` where a function raises, or returns no number.
        """

        def number(name: str, function: Callable[..., Any]) -> float:
            why, cause, found = "", None, None
            try:
                found = function(model, *(self.data or ()))
                if jnp.shape(found) == () and jnp.result_type(found).kind in "biuf":
                    if step == 0 and jnp.isnan(found):
                        self._explain(name, model)
                    return float(found)
                why = f"must return one real number, but it returned {_returned(found)}."
            except Exception as error:
                why, cause = f"raised {type(error).__name__}: {_said(error)}.{_remedy(error)}", error
            raise EvaluationError(name, why, step, model, self.history(records, 0.0)) from cause

        found = {f"eval_{name}": number(name, function) for name, function in self.functions.items()}
        return {"step": step, "loss": loss, "seconds": seconds, **found}

    def _explain(self, name: str, model: PyTree) -> None:
        """Raises what a function that answers NaN says of concrete data; for the loss itself, that it is NaN."""
        try:
            self.plain[name](model, *(self.data or ()))
        except Exception as error:
            raise ValueError(f"it is NaN on `eval_data`, and before it is compiled it raises: {error}") from error
        if self.is_loss:
            integers = [x for x in jtu.tree_leaves(self.data) if x.dtype.kind in "iu"]
            runs = ", ".join(f"{x.min()} to {x.max()}" for x in integers)
            hint = f" The integer arrays of `eval_data` run from {runs}: are labels out of range?" if runs else ""
            raise ValueError(f"it is NaN on `eval_data` before any training, though model and data are finite.{hint}")

    def history(self, records: Sequence[Record], compile_seconds: float) -> History:
        """The records as one array a name."""
        names = ("step", "loss", "seconds", *(f"eval_{name}" for name in self.functions))
        return {**{n: np.asarray([r[n] for r in records]) for n in names}, "compile_seconds": compile_seconds}


def fit(
    step: Step, state: TrainState, data: Sequence[PyTree], picks: Iterator[Pick], evaluation: Evaluation, shown: bool
) -> tuple[PyTree, History]:
    """The trained model and its history, after as many steps as the evaluation counts; `data` is on the host.

    **Raises:** `NonFiniteError`, and `TrainingInterrupted` on Ctrl-C, as [`train`][].
    """
    records: list[Record] = []
    recent: list[Pick] = []
    done, value, seconds, compile_seconds = 0, float("nan"), 0.0, 0.0
    bar = progress(evaluation.steps, step.direction.name, shown)
    try:
        first = next(picks)
        records.append(evaluation.record(0, value, seconds, step.model(state), records))
        start = time.perf_counter()
        advance = compiled(step, state, take(data, first[0]), first[1])
        compile_seconds = time.perf_counter() - start
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
                records.append(evaluation.record(done, float(value), seconds, step.model(state), records))
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
