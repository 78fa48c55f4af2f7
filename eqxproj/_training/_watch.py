"""What looks on while a model is trained: callbacks, early stopping, and signals of the system.

Transforms records into the decision to stop. Limits: all of it happens where a record is made, not after every step.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .._errors import check_function, described
from ..solvers._solve import check_positive
from ._evaluation import History


@final
class Report:
    """What a callback of [`train`][] is given after each record.

    - `step`: number of finished steps. `values`: the last record, name to number: `"loss"`, `"norm"`, `"seconds"`,
        `"learning_rate"` where the optimizer tells it, and `"eval_<name>"`.
    - `history`: all records so far, as in a [`TrainResult`][].
    - `model`: the model as it is evaluated. `model_state`: the state of its layers, if any.
    """

    def __init__(
        self, step: int, values: Mapping[str, float], history: History, model: PyTree, model_state: PyTree = None
    ):
        self.step, self.values, self.history = step, dict(values), history
        self.model, self.model_state = model, model_state

    def __repr__(self) -> str:
        return f"Report(step={self.step}, {', '.join(f'{k}={v:.4g}' for k, v in self.values.items())})"


Callback = Callable[[int, Report], Any]
"""`(step, report) -> stop?`: training ends after a callback has returned `True`."""


@final
class EarlyStopping(eqx.Module):
    """Keeps the best model by one of the recorded numbers, and stops when there has been no better one for a while.

    **Arguments:**

    - `monitor`: a name in the history, such as `"eval_loss"` or `"eval_accuracy"`.
    - `mode`: whether the least or the largest value is the best, `"min"` or `"max"`.
    - `patience`: training stops after so many records in a row without a better value. With `None` it never does, and
        only the best model is kept.
    - `min_delta`: a value is better only if it is so by more than this.

    With it, `train` returns the best model; its state goes on from the last one.
    """

    monitor: str = "eval_loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = 5
    min_delta: float = 0.0

    def __check_init__(self) -> None:
        if not isinstance(self.monitor, str):
            raise TypeError(f"`monitor` must be a name in the history such as 'eval_loss', got {self.monitor!r}.")
        if self.mode not in ("min", "max"):
            raise ValueError(f'`mode` must be "min" or "max", got {described(self.mode)}.')
        if self.patience is not None:
            check_positive("patience", self.patience)
        is_number = isinstance(self.min_delta, (int, float)) and not isinstance(self.min_delta, bool)
        if not is_number or not 0 <= self.min_delta < math.inf:
            raise ValueError(f"`min_delta` must be a finite number of at least 0, got {described(self.min_delta)}.")

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value is better than the best one so far, which is NaN as long as there is none."""
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


def check_watchers(callbacks: Any, early_stopping: Any, names: Sequence[str]) -> tuple[Callback, ...]:
    """The callbacks as a tuple.

    **Raises:** `TypeError` for what is no callback or no `EarlyStopping`, `ValueError` for a name that is not recorded.
    """
    if callable(callbacks) or not isinstance(callbacks, Sequence):
        raise TypeError(f"`callbacks` must be a sequence of functions `(step, report) -> stop?`, got {callbacks!r}.")
    for i, callback in enumerate(callbacks):
        check_function(f"callbacks[{i}]", callback, "(step, report) -> stop?")
    if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
        raise TypeError(f"`early_stopping` must be an `eqxproj.EarlyStopping`, got {described(early_stopping)}.")
    if early_stopping is not None and early_stopping.monitor not in names:
        raise ValueError(
            f"`early_stopping` monitors {early_stopping.monitor!r}, but recorded are {', '.join(map(repr, names))}. "
            "Values on other data are recorded with `eval_data` and `evaluate`."
        )
    return tuple(callbacks)


class Asked:
    """Whether the system has asked the process to end."""

    def __init__(self) -> None:
        self.to_end = False

    def by_all(self) -> bool:
        """Whether it has asked any process of the run, which all of them are told."""
        if jax.process_count() == 1:
            return self.to_end
        return bool(multihost_utils.process_allgather(np.asarray(self.to_end)).any())


@contextlib.contextmanager
def termination(is_heard: bool) -> Iterator[Asked]:
    """Notes a SIGTERM, where one is heard, and sends it on at the end, so that what was done before can be saved."""
    asked = Asked()
    if not is_heard or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.to_end = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if asked.to_end:
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back Ctrl-C, and a SIGTERM that is listened to, until the end of what it surrounds.

    In between, the old state is gone and the new one is not there yet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in heard:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
    for number in waiting:
        heard[signal.Signals(number)](number, None)
