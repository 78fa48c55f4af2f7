"""`train`: an existing model and loss, trained by projections in one call.

Each step takes a minibatch, builds the feasibility problem of the loss on it (while tracing, once), runs the solver
from the forward pass, and hands the displacement to an optax optimizer. With `method="gradient"` the same loop,
batches and evaluation run on gradients, for comparison. This module checks the arguments before any training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._errors import ConstraintError, check_flag, check_function, check_key, described
from .._metric import Metric, check_metric
from .._problem._constraints import Constraint, check_common_points, held, outside
from .._problem._problem import Copies
from .._program._sharding import on_automatic_mesh, placed_as
from ..rules._base import Noise
from ..solvers import AbstractSolver
from ..solvers._solve import check_positive, check_solver
from ._data import batches, check_data, check_model, take
from ._direction import AbstractDirection, Displacement, Gradient, ValueAlone, key_argument
from ._displacement import Options, checked_options
from ._loop import Evaluation, fit
from ._nnx import takes_nnx
from ._optimizer import REPLACING, checked_optimizer, default_optimizer
from ._regime import ROUGH, in_projection_regime, settings
from ._step import prepare, widened

Metrics = Mapping[str, Callable[..., Any]]


class TrainResult(eqx.Module):
    """What [`train`][] returns.

    - `model`: the trained model.
    - `history`: `"step"`, `"loss"` (of that step's minibatch), `"seconds"` (of training, without compilation and
        evaluation) and `"eval_<name>"` as arrays with one entry an evaluation, and `"compile_seconds"`.
    """

    model: PyTree
    history: dict[str, Any]

    def __repr__(self) -> str:
        last = {name: values[-1] for name, values in self.history.items() if np.ndim(values) and len(values)}
        shown = ", ".join(f"{name}={value:.4g}" for name, value in last.items())
        return f"TrainResult(model=<{type(self.model).__name__}>, history of {len(self.history['step'])}, last {shown})"


@takes_nnx
def train(
    model: PyTree,
    data: Sequence[Any],
    loss: Callable[..., Any],
    *,
    steps: int,
    batch_size: int | None = None,
    key: Array | None = None,
    solver: AbstractSolver | None = None,
    optimizer: optax.GradientTransformation | None = None,
    metric: Metric | None = None,
    copies: Copies | None = None,
    tau: float | None = None,
    noise: Noise = "unreached",
    solver_steps: int | None = None,
    precondition: bool | None = None,
    method: Literal["projection", "gradient"] = "projection",
    eval_data: Sequence[Any] | None = None,
    eval_every: int | None = None,
    evaluate: Metrics | None = None,
    constraints: Sequence[Constraint] = (),
    has_aux: bool = False,
    progress: bool = False,
) -> TrainResult:
    """Trains a model by projections.

    **Arguments:**

    - `model`: any pytree; its inexact arrays are trained, complex ones too. Those of bfloat16 or float16, and the state
        of the optimizer, are kept in float32 between the steps; the model runs, and is returned, in its own types. Of
        an nnx module the `nnx.Param` variables are trained, its other variables follow the calls of the loss, and the
        returned model is a new module. Optimizers are given the conjugates of complex gradients and displacements.
    - `data`: `(x, y)`, or any tuple of pytrees of arrays with one entry a sample along their first axis.
    - `loss`: `loss(model, *batch)`, a scalar. One with an argument named `key` gets a new PRNG key each step.
    - `steps`: number of minibatches. `batch_size`: their samples; 256, or all of them if they are fewer, by default.
    - `key`: PRNG key of the shuffling and of the loss's `key`; `jax.random.key(0)` by default.
    - `solver`, `solver_steps`: the solver on each minibatch, and its steps from the forward pass; one cyclic sweep by
        default. Another solver, or this one with a `metric` of a grade below 100, means the projection regime:
        `metric`, `copies`, `tau` and `solver_steps` then follow from the solver and the depth of the graph.
    - `optimizer`: any optax transformation of the displacements. In the projection regime there is none by default: the
        new parameters are the projection's, without rate or schedule. In the gradient regime it is Adam, its rate
        rising to 3e-3 at first and falling with a cosine to a hundredth of that over the last four tenths of the
        `steps`.
    - `metric`, `copies`, `tau`, `noise`: of the feasibility problem, see [`feasibility_problem`][]; by default those of
        [`filter_value_and_displacement`][].
    - `precondition`: whether the steps of layers are measured by how much they change the layers' outputs, given the
        mean, deviation and number of their inputs: the origin and unit of the inputs then make no difference. By
        default wherever the default optimizer runs on displacements. One rate means larger steps with it than without.
    - `method`: `"projection"`, or `"gradient"` to run the same loop on gradients.
    - `eval_data`: further data, evaluated before the first step, every `eval_every` steps (a twentieth of `steps` by
        default) and after the last, in one call of each function of `evaluate`.
    - `evaluate`: name to `function(model, *eval_data) -> scalar`, which is compiled; the loss by default.
    - `constraints`: pairs `(where, set)`: `where(model)` picks an array, as in `equinox.tree_at`, and the array is
        projected onto the set after every step. For discrete sets (`Sparse`, `Quantized`) the steps move an array that
        is kept for it, and the loss sees its projection: of more and more entries, those with the shortest way first,
        and from six tenths of the steps on of all. Evaluations see models that satisfy the constraints exactly, and so
        does the returned one. An array that several constraints pick is held in all of their sets; `sets.Together`
        holds several arrays in one.
    - `has_aux`: whether the loss returns `(value, auxiliary)`; the auxiliary output is dropped.
    - `progress`: show a progress bar.

    **Returns:** A [`TrainResult`][].

    **Raises:** `ValueError` or `TypeError` for unusable arguments, before any training; `NonFiniteError` where a
    state becomes NaN or infinite, `EvaluationError` where a function of `evaluate` raises or returns no number, and
    `TrainingInterrupted` on Ctrl-C, all with the last good model and the history; `ConstraintError`, with the trained
    model, where several sets of one array were left and not found again.
    """
    check_positive("steps", steps)
    check_function("loss", loss, "loss(model, *batch) -> scalar")
    check_flag("has_aux", has_aux)
    check_flag("progress", progress)
    if method not in ("projection", "gradient"):
        raise ValueError(f'`method` must be "projection" or "gradient", got {described(method)}.')
    arrays, count = check_data(data, "data")
    _check_arguments(loss, arrays)
    batch_size = _check_batch_size(batch_size, count)
    evaluation = _evaluation(eval_data, evaluate, eval_every, ValueAlone(loss, has_aux), int(steps))
    check_model(model)
    given, model = model, on_automatic_mesh(model)
    all_held = held(model, constraints)
    options = _options(solver, solver_steps, metric, copies, tau, noise, replaces=optimizer is None)
    optimizer = REPLACING if options.raw and method == "projection" else optimizer
    is_preconditioned = _check_precondition(precondition, optimizer, method)
    fixed = frozenset(p for one in all_held for p in one.positions) if is_preconditioned else None
    displacement = Displacement(loss, has_aux, options, fixed)
    direction = displacement if method == "projection" else Gradient(loss, has_aux)
    optimizer = default_optimizer(int(steps)) if optimizer is None else optimizer
    key = check_key(key)
    check_common_points(model, all_held)
    _check_first_value(direction, model, arrays, count)
    chain = checked_optimizer(optimizer, widened(eqx.filter(model, eqx.is_inexact_array)))
    step, state = prepare(model, direction, chain, all_held, int(steps))
    rows = batches(count, batch_size, key)
    picks = ((picked, jax.random.fold_in(key, number)) for number, picked in enumerate(rows))
    trained, history = fit(step, state, arrays, picks, evaluation, progress)
    if names := outside(trained, all_held):
        raise ConstraintError(names, trained, history)
    return TrainResult(placed_as(trained, given), history)


def _options(
    solver: AbstractSolver | None,
    solver_steps: int | None,
    metric: Metric | None,
    copies: Copies | None,
    tau: float | None,
    noise: Noise,
    replaces: bool,
) -> Options:
    """The options of the displacement. In the projection regime it may be the projection that `replaces` parameters."""
    if solver is not None:
        check_solver(solver)
    if metric is not None:
        check_metric(metric)
    if not in_projection_regime(solver, metric):
        steps = 1 if solver is None or solver.is_cyclic else None
        steps = steps if solver_steps is None else solver_steps
        return checked_options(solver, steps, metric, copies, tau, noise, "solver_steps")
    assert solver is not None
    own = settings(solver)
    metric, copies = metric or own.metric, copies or own.copies
    tau = own.tau if tau is None and replaces else tau
    chosen = checked_options(solver, solver_steps, metric, copies, tau, noise, "solver_steps", replaces)
    return replace(chosen, accuracy=ROUGH)


def _check_precondition(precondition: bool | None, optimizer: Any, method: str) -> bool:
    if precondition is None:
        return optimizer is None and method == "projection"
    if not isinstance(precondition, bool):
        raise TypeError(f"`precondition` must be True, False or None, got {described(precondition)}.")
    if precondition and method == "gradient":
        raise ValueError('`precondition` needs `method="projection"`, whose problem knows the inputs of the layers.')
    return precondition


def _check_arguments(loss: Callable[..., Any], data: tuple[PyTree, ...]) -> None:
    """Raises a `TypeError` where a loss does not take the model and as many parts of data as there are."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # of some callables there is none to be had
        return
    try:
        signature.bind(None, *data, **key_argument(loss, None))
    except TypeError as error:
        raise TypeError(
            f"`loss` is called with the model and the {len(data)} parts of `data`, and with a `key` where it has such "
            f"an argument, but it takes {signature}: {error}."
        ) from error


def _check_batch_size(batch_size: int | None, count: int) -> int:
    if batch_size is None:
        return min(256, count)
    check_positive("batch_size", batch_size)
    if batch_size > count:
        raise ValueError(
            f"`batch_size` is {batch_size}, but `data` has only {count} samples. Use a batch size of at most {count}."
        )
    return int(batch_size)


def _evaluation(
    eval_data: Sequence[Any] | None, evaluate: Metrics | None, every: int | None, loss: Callable[..., Any], steps: int
) -> Evaluation:
    """The evaluation of these arguments; of the loss alone where no functions are given."""
    if evaluate is not None and not isinstance(evaluate, Mapping):
        wanted = "must map names to functions `(model, *eval_data) -> scalar`, as in `{'accuracy': accuracy}`"
        raise TypeError(f"`evaluate` {wanted}, got {described(evaluate)}.")
    for name, function in ({} if evaluate is None else evaluate).items():
        if not isinstance(name, str):
            raise TypeError(f"`evaluate` must map names to functions, got the name {described(name)}.")
        check_function(f"evaluate[{name!r}]", function, "(model, *eval_data) -> scalar")
    if evaluate is not None and eval_data is None:
        raise ValueError("`evaluate` was given without data. Pass the data to evaluate on as `eval_data`.")
    if every is not None:
        check_positive("eval_every", every)
    data = None if eval_data is None else check_data(eval_data, "eval_data")[0]
    functions = {"loss": loss} if evaluate is None else dict(evaluate)
    return Evaluation(data, functions, evaluate is None, every, steps)


def _check_first_value(direction: AbstractDirection, model: PyTree, data: Sequence[PyTree], count: int) -> None:
    """Traces the loss on the first sample, and on those with the least and the largest entry of each integer array."""
    integers = [x for x in jtu.tree_leaves(data) if x.dtype.kind in "iu"]
    flat = [x.reshape(count, -1) for x in integers]
    extremes = [int(row) for x in flat for row in (np.argmin(x.min(1)), np.argmax(x.max(1)))]
    rows = np.unique(np.array([0, *extremes], int))
    value = direction.first_value(model, take(data, rows), data)
    if bool(jnp.isfinite(value)):
        return
    labels = [f"{x.min()} to {x.max()}" for x in integers]
    hint = f" The integer arrays of `data` run from {', '.join(labels)}: are labels out of range?" if labels else ""
    raise ValueError(
        f"`loss` is {float(value)} at the initial parameters, on samples {rows.tolist()}, though data and "
        f"parameters are finite.{hint}"
    )
