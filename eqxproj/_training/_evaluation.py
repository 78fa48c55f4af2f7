"""What is recorded of a model in training, and after which steps.

Transforms a model into numbers, by functions of it and of further data: compiled ones, of all data or batch by batch,
and others that run as they are. Limits: batch by batch, the mean over batches stands for the value over all data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._errors import EvaluationError, check_function, described
from .._program._compiled import jitted
from ._data import take

Record = dict[str, Any]
"""Name to number, after one step."""
History = dict[str, Any]
"""Name to array, with one entry a record; and `"compile_seconds"`, a number."""


@final
class on_host:  # noqa: N801
    """Marks a function of `evaluate` that is not compiled: it may use numpy, scikit-learn, or write files.

    ```python
    evaluate = {"auc": eqxproj.on_host(lambda model, x, y: roc_auc_score(y, predict(model, x)))}
    ```

    **Arguments:**

    - `function`: `function(model, *eval_data) -> number`. It is given all of the data at once, as numpy arrays.
    """

    def __init__(self, function: Callable[..., Any]):
        check_function("function", function, "(model, *eval_data) -> number")
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"on_host({self.function!r})"


def _returned(value: Any) -> str:
    """What a function returned in place of a number."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"an array of shape {value.shape} and dtype {value.dtype}" if is_array else described(value)


def _is_real_number(value: Any) -> bool:
    """Whether a function returned what can be recorded."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return np.shape(value) == () and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)


def _said(error: Exception) -> str:
    """The message of an error; of one that came through a callback of a compiled function, its last line alone."""
    text = str(error).strip()
    return (text.splitlines()[-1] if "Traceback" in text else text).rstrip(".")


def _remedy(error: Exception) -> str:
    """What may help where a function of `evaluate` raised."""
    if isinstance(error, jax.errors.JAXTypeError):
        return (
            " The functions of `evaluate` are compiled: compute with `jax.numpy` in them, not with numpy or Python, or "
            "mark one with `eqxproj.on_host`, so that it runs as it is."
        )
    if isinstance(error, TypeError) and "argument" in str(error):
        return (
            " It is called with the model and the parts of `eval_data` alone: give further arguments, such as a `key`, "
            "a default, or bind them by a `lambda`."
        )
    return ""


class Evaluation(eqx.Module):
    """The functions, their data, and the steps after which they are called.

    - `data`: what the `functions` are given after the model, on the host; `None` where only the loss of a step is
        recorded. `batch_size`: how many samples of it in one call; all of them where it is `None`.
    - `plain`: the functions before they are compiled. `is_loss`: whether the one is the loss, by default.
    - `every`: number of steps from one record to the next. `steps`: the number of all, after which stands the last.
    """

    data: tuple[PyTree, ...] | None
    plain: dict[str, Callable[..., Any]]
    functions: dict[str, Callable[..., Any]]
    is_loss: bool
    every: int
    steps: int
    batch_size: int | None
    count: int

    def __init__(
        self,
        data: tuple[PyTree, ...] | None,
        functions: dict[str, Callable[..., Any]],
        is_loss: bool,
        every: int | None,
        steps: int,
        batch_size: int | None = None,
    ):
        leaves = jtu.tree_leaves(data)
        self.count = len(leaves[0]) if leaves else 0
        self.batch_size = None if batch_size is None or batch_size >= self.count else batch_size
        self.plain, self.is_loss = {} if data is None else functions, is_loss
        is_whole = self.batch_size is None and not any(isinstance(f, on_host) for f in functions.values())
        self.data = jtu.tree_map(jnp.asarray, data) if is_whole and data is not None else data
        self.functions = {n: f if isinstance(f, on_host) else jitted(f) for n, f in self.plain.items()}
        self.every = max(1, steps // 20) if every is None else int(every)
        self.steps = steps

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is in a record, beside `"step"` and `"seconds"`."""
        return ("loss", "norm", *(f"eval_{name}" for name in self.functions))

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def next(self, step: int) -> int:
        """The next step after which a record is due."""
        return min(self.steps, (step // self.every + 1) * self.every)

    def record(
        self,
        known: Record,
        model: PyTree,
        layers: tuple[PyTree, ...],
        records: Sequence[Record],
        compile_seconds: float,
    ) -> Record:
        """One record, after others; `known` is what of it needs no evaluation, `layers` the state of layers, if any.

        **Raises:** `EvaluationError` where a function raises, or returns no number.
        """
        args = (model, *layers)
        step = int(known["step"])

        def number(name: str) -> float:
            why, cause = "", None
            try:
                found = self._value(name, args)
                if isinstance(found, float):
                    if step == 0 and np.isnan(found):
                        self._explain(name, args)
                    return found
                why = f"must return one real number, but it returned {_returned(found)}."
            except Exception as error:
                why, cause = f"raised {type(error).__name__}: {_said(error)}.{_remedy(error)}", error
            raise EvaluationError(name, why, step, model, self.history(records, compile_seconds)) from cause

        return known | {f"eval_{name}": number(name) for name in self.functions}

    def _value(self, name: str, args: tuple[PyTree, ...]) -> Any:
        """What a function says of all data: a float, or what it returned in the place of one number."""
        function, total = self.functions[name], 0.0
        for batch, size in self._batches(function):
            found = function(*args, *batch)
            if not _is_real_number(found):
                return found
            total += float(found) * size
        return total

    def _batches(self, function: Callable[..., Any]) -> Iterator[tuple[tuple[PyTree, ...], float]]:
        """The data of each call of a function, and their part of all data."""
        data = self.data or ()
        if self.batch_size is None or isinstance(function, on_host):
            yield data, 1.0
            return
        for start in range(0, self.count, self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, self.count))
            yield take(data, rows), len(rows) / self.count

    def _explain(self, name: str, args: tuple[PyTree, ...]) -> None:
        """Raises what a function that answers NaN says of concrete data; for the loss itself, that it is NaN."""
        data = next(self._batches(self.functions[name]))[0]
        try:
            self.plain[name](*args, *data)
        except Exception as error:
            raise ValueError(f"it is NaN on `eval_data`, and before it is compiled it raises: {error}") from error
        if self.is_loss:
            integers = [x for x in jtu.tree_leaves(self.data) if x.dtype.kind in "iu"]
            runs = ", ".join(f"{x.min()} to {x.max()}" for x in integers)
            hint = f" The integer arrays of `eval_data` run from {runs}: are labels out of range?" if runs else ""
            raise ValueError(f"it is NaN on `eval_data` before any training, though model and data are finite.{hint}")

    def history(self, records: Sequence[Record], compile_seconds: float) -> History:
        """The records as one array a name."""
        recorded = (name for record in records for name in record)
        names = dict.fromkeys(("step", "seconds", *self.names, *recorded))
        columns = {name: np.asarray([record.get(name, np.nan) for record in records]) for name in names}
        columns["step"] = columns["step"].astype(int)
        return {**columns, "compile_seconds": compile_seconds}
