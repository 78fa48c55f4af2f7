"""`train`: an existing model and loss, trained by projections in one call.

Each step takes a minibatch, builds the feasibility problem of the loss on it (while tracing, once), runs the solver
from the forward pass, and hands the displacement to an optax optimizer. With `method="gradient"` the same loop,
batches and evaluation run on gradients, for comparison. This module checks the arguments before any training.
"""

from __future__ import annotations

import functools as ft
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from .._errors import ConstraintError, as_number, check_flag, check_function, check_key, described
from .._files import check_packages, check_picture, write_figure
from .._metric import Metric, check_metric
from .._problem._constraints import Constraint, Held, check_common_points, held, outside
from .._problem._problem import Copies
from .._program._sharding import automatic, on_automatic_mesh, on_mesh_of, placed_as, stacked_on
from ..rules._base import Noise
from ..solvers import AbstractSolver
from ..solvers._solve import check_positive, check_solver
from ._checkpoint import TrainingState, check_folder, state_of
from ._data import check_data, check_model
from ._direction import AbstractDirection, Displacement, Gradient, ValueAlone, key_argument
from ._displacement import Options, checked_options
from ._evaluation import Evaluation
from ._loop import Loop, Plan
from ._nnx import takes_nnx
from ._optimizer import REPLACING, checked_optimizer, default_optimizer
from ._plot import checked_runs, plotted
from ._regime import AVERAGE, ROUGH, in_projection_regime, settings
from ._revisits import kept_states, persisting
from ._source import AbstractSource, source_of
from ._step import Extras, Step, TrainState, prepare, transformed, widened
from ._watch import Callback, EarlyStopping, check_watchers

M = TypeVar("M")
Metrics = Mapping[str, Callable[..., Any]]


class TrainResult(eqx.Module, Generic[M]):
    """What [`train`][] returns.

    - `model`: the trained model; with `early_stopping`, the best one.
    - `history`: `"step"`, `"loss"` (of that step's minibatch), `"norm"` (of its gradient or displacement), `"seconds"`
        (of training, without compilation and evaluation), `"learning_rate"` where the optimizer tells it, and
        `"eval_<name>"` as arrays with one entry a record, and `"compile_seconds"`.
    - `state`: what `train(resume=result.state)` goes on from.
    - `reason`: why training ended: `"steps"`, `"callback"`, `"early_stopping"`, `"data"` where an iterable gave no
        more, or `"terminated"` by the system.
    - `model_state`: the state of the model's layers, where `train` was given one.
    """

    model: M
    history: dict[str, Any]
    state: TrainingState
    reason: str = "steps"
    model_state: PyTree = None

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        others: Mapping[str, Any] | None = None,
        name: str = "this run",
    ) -> Any:
        """Plots the loss and each evaluation, over steps and over seconds, of this run and of others beside it.

        **Arguments:**

        - `path`: the file to write, one of `.png`, `.svg` and `.pdf`, in a folder that is there; by default none.
        - `others`: name to [`TrainResult`][], or to a history, such as that of a `TrainingInterrupted`.
        - `name`: that of this run in the legend, where there are others.

        **Returns:**

        The `matplotlib.figure.Figure`, which a notebook shows. It belongs to no window: nothing is to be closed.

        **Raises:** `TypeError`, `ValueError` and `FileNotFoundError` for unusable arguments, and `ImportError` where
        matplotlib is missing (`pip install 'eqxproj[plot]'`).
        """
        target = None if path is None else check_picture(path)
        runs = checked_runs(name, self, others)
        check_packages("`result.plot`", ("matplotlib",))
        figure = plotted(runs)
        if target is not None:
            write_figure(target, figure)
        return figure

    def __repr__(self) -> str:
        last = {name: values[-1] for name, values in self.history.items() if np.ndim(values) and len(values)}
        shown = ", ".join(f"{name}={value:.4g}" for name, value in last.items())
        return f"TrainResult(model=<{type(self.model).__name__}>, history of {len(self.history['step'])}, last {shown})"


@takes_nnx
def train(
    model: M,
    data: Any,
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
    persist: bool = False,
    precondition: bool | None = None,
    method: Literal["projection", "gradient"] = "projection",
    columns: Sequence[str] | None = None,
    sharding: NamedSharding | None = None,
    transform: Callable[..., Any] | None = None,
    accumulate: int = 1,
    model_state: PyTree = None,
    ema: float | None = None,
    eval_parameters: Callable[[PyTree, PyTree], PyTree] | None = None,
    eval_data: Sequence[Any] | None = None,
    eval_every: int | None = None,
    eval_batch_size: int | None = None,
    evaluate: Metrics | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: TrainingState | str | os.PathLike[str] | bool | None = None,
    constraints: Sequence[Constraint] = (),
    has_aux: bool = False,
    progress: bool = False,
) -> TrainResult[M]:
    """Trains a model by projections.

    **Arguments:**

    - `model`: any pytree; its inexact arrays are trained, complex ones too. Those of bfloat16 or float16, and the state
        of the optimizer, are kept in float32 between the steps; the model runs, and is returned, in its own types. Of
        an nnx module the `nnx.Param` variables are trained, its other variables follow the calls of the loss, and the
        returned model is a new module. Optimizers are given the conjugates of complex gradients and displacements.
    - `data`: `(x, y)`, or any tuple of pytrees of arrays with one entry a sample along their first axis; arrays that
        are mapped from a file (`numpy.memmap`) are read batch by batch. Or a `datasets.Dataset`, streamed or not, with
        `columns`. Or any iterable of batches, such as a loader of torch or grain: a batch is the tuple of what the loss
        takes after the model, or a dictionary, of which `columns` picks entries.
    - `loss`: `loss(model, *batch)`, a scalar. One with an argument named `key` gets a new PRNG key each step.
    - `steps`: number of minibatches. `batch_size`: their samples; 256, or all of them if they are fewer, by default.
    - `key`: PRNG key of the shuffling and of the loss's `key`; `jax.random.key(0)` by default.
    - `solver`, `solver_steps`: the solver on each minibatch, and its steps from the forward pass; one cyclic sweep by
        default. Another solver, or this one with a `metric` of a grade below 100, means the projection regime:
        `metric`, `copies`, `tau` and `solver_steps` then follow from the solver and the depth of the graph.
    - `optimizer`: any optax transformation of the displacements, also one with a line search, which is given the loss
        of the minibatch. In the projection regime there is none by default: the new parameters are the projection's,
        without rate or schedule. In the gradient regime it is Adam, its rate rising to 3e-3 at first and falling with
        a cosine to a hundredth of that over the last four tenths of the `steps`.
    - `metric`, `copies`, `tau`, `noise`: of the feasibility problem, see [`feasibility_problem`][]; by default those of
        [`filter_value_and_displacement`][].
    - `persist`: whether the solver keeps its state at each minibatch, and goes on from it at the next visit, with the
        parameters of then and, unless `solver_steps` says otherwise, a fifth of the sweeps. Minibatches stay the same
        in all epochs, the last one filled up with samples of the first. It needs a solver with a memory that comes to
        rest (`DouglasRachford`, `DifferenceMap`, `RelaxedReflectReflect`, `CyclicDouglasRachford`) in the projection
        regime, arrays or a data set with a length, a loss without random numbers, and memory for all these states.
    - `precondition`: whether the steps of layers are measured by how much they change the layers' outputs, given the
        mean, deviation and number of their inputs: the origin and unit of the inputs then make no difference. By
        default wherever the default optimizer runs on displacements. One rate means larger steps with it than without.
    - `method`: `"projection"`, or `"gradient"` to run the same loop on gradients.
    - `columns`: names of what the loss takes, of a data set or of batches that are dictionaries.
    - `sharding`: a `jax.sharding.NamedSharding` of batches, such as `NamedSharding(mesh, PartitionSpec("data"))`, whose
        axes divide the samples among devices. Parameters that are divided already stay so, with the state of the
        optimizer; others are repeated on all devices. With several processes (`jax.distributed`), `data` is the part
        of each, and the batch size counts the samples of all.
    - `transform`: `transform(*batch) -> batch`, compiled into the step, as for augmentation; with an argument named
        `key` it gets a new PRNG key each step.
    - `accumulate`: in how many parts a minibatch is computed, one after another, to save memory. The step is taken in
        the mean of their directions; it divides the batch size.
    - `model_state`: the state of layers such as `equinox.nn.BatchNorm`, from `equinox.nn.make_with_state`. The loss is
        then `loss(model, state, *batch) -> (value, state)`, and functions of `evaluate` take the state after the model.
    - `ema`: the decay, such as 0.999, of a moving average of the parameters, which then is the model that is evaluated
        and returned. It averages over a tenth of the steps at most, so that the initial parameters are forgotten. Zero
        means none; by default there is one where the parameters are the projection's, each of which fits its minibatch
        alone.
    - `eval_parameters`: `function(optimizer_state, parameters) -> parameters` of the model that is evaluated and
        returned, such as `optax.contrib.schedule_free_eval_params`.
    - `eval_data`: further data, evaluated before the first step, every `eval_every` steps (a twentieth of `steps` by
        default) and after the last. `eval_batch_size`: how many samples in one call; all by default. The mean over the
        batches is recorded.
    - `evaluate`: name to `function(model, *eval_data) -> scalar`, which is compiled; the loss by default. One that is
        marked with [`on_host`][] runs as it is, on all data.
    - `early_stopping`: an [`EarlyStopping`][], which keeps the best model and may stop.
    - `callbacks`: functions `(step, report)`, called after each record with a [`Report`][]; one that returns `True`
        stops training.
    - `checkpoint`, `checkpoint_every`: a folder for checkpoints, and after how many steps each is written; after as
        many as `eval_every` by default, and at the end, also at one by Ctrl-C or SIGTERM. The last two stay.
    - `resume`: goes on from `result.state`, a checkpoint, or the last whole one of a folder; `True` means that of
        `checkpoint`, if there is one. With the arguments of the first run, the result is the same bit for bit, as long
        as the data come in the same order; `steps` counts from the beginning.
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
    state becomes NaN or infinite, `EvaluationError` where a function of `evaluate` raises or returns no number,
    `CheckpointError` where a checkpoint cannot be written, and `TrainingInterrupted` on Ctrl-C, all with the last good
    model and the history; `ConstraintError`, with the trained model, where several sets of one array were left and not
    found again.
    """
    steps = _check_basics(steps, loss, method, (has_aux, progress))
    options = _options(solver, solver_steps, metric, copies, tau, noise, replaces=optimizer is None)
    replaces = options.raw and method == "projection"
    ema = AVERAGE if ema is None and eval_parameters is None and replaces else ema
    extras = _extras(transform, accumulate, (model_state, has_aux), ema, eval_parameters)
    run_key, divided = check_key(key), _check_sharding(sharding)
    source = source_of(data, columns, batch_size, run_key, divided is not None)
    projects = method == "projection" and in_projection_regime(solver, metric)
    options = persisting(persist, options, projects, source, loss, extras, divided is not None)
    has_aux = has_aux or extras.has_layers
    evaluation = _evaluation(eval_data, evaluate, (eval_every, eval_batch_size), ValueAlone(loss, has_aux), steps)
    plan = _plan(evaluation, (callbacks, early_stopping), checkpoint, checkpoint_every, progress, divided)
    check_model(model)
    given, model = model, on_automatic_mesh(model)
    model = model if divided is None else on_mesh_of(divided, model)
    all_held = held(model, constraints)
    optimizer = REPLACING if replaces else optimizer
    fixed = _fixed(precondition, optimizer, method, all_held)
    direction = Displacement(loss, has_aux, options, fixed) if method == "projection" else Gradient(loss, has_aux)
    check_common_points(model, all_held)
    prepared = _prepared(model, direction, optimizer, (all_held, steps, extras), model_state, source, run_key)
    return _run(*prepared, plan, (run_key, divided, resume), (all_held, given))


def _check_basics(steps: Any, loss: Any, method: Any, flags: tuple[Any, Any]) -> int:
    """The number of steps; `flags` are `has_aux` and `progress`."""
    check_positive("steps", steps)
    check_function("loss", loss, "loss(model, *batch) -> scalar")
    for name, flag in zip(("has_aux", "progress"), flags, strict=True):
        check_flag(name, flag)
    if method not in ("projection", "gradient"):
        raise ValueError(f'`method` must be "projection" or "gradient", got {described(method)}.')
    return int(steps)


def _prepared(
    model: PyTree,
    direction: AbstractDirection,
    optimizer: optax.GradientTransformation | None,
    asked: tuple[Sequence[Held], int, Extras],
    model_state: PyTree,
    source: AbstractSource,
    key: Array,
) -> tuple[Step, TrainState, AbstractSource]:
    """A step of training, the state to start from, and the data, once the loss and the optimizer have been tried.

    `asked` are the constraints, the number of steps and the extras.
    """
    all_held, steps, extras = asked
    if source.batch_size % extras.parts:
        raise ValueError(f"`accumulate` must divide the batch size, {source.batch_size}; got {extras.parts}.")
    layers = jtu.tree_map(lambda x: jnp.asarray(x) if eqx.is_array(x) else x, model_state)
    _check_first_value(direction, model, source, extras, layers, key)
    optimizer = default_optimizer(steps) if optimizer is None else optimizer
    chain = checked_optimizer(optimizer, widened(eqx.filter(model, eqx.is_inexact_array)))
    extras, source, left = kept_states(direction, model, source, extras, layers)
    return *prepare(model, direction, chain, all_held, steps, extras, layers, left), source


def _run(
    step: Step,
    arrays: TrainState,
    source: AbstractSource,
    plan: Plan,
    start: tuple[Array, NamedSharding | None, Any],
    end: tuple[Sequence[Held], Any],
) -> TrainResult[Any]:
    """Trains from a state, or from where another run has ended.

    `start` holds the key, the sharding and the argument `resume`, `end` the constraints and the model as it was given.
    """
    (key, divided, resume), (all_held, given) = start, end
    if divided is not None:
        arrays, key = on_mesh_of(divided, arrays), on_mesh_of(divided, key)
    best = None
    if plan.early_stopping is not None:
        best = eqx.filter((step.model(arrays), arrays.layers), eqx.is_array)
    fresh = TrainingState(0, arrays, key, source.batch_size, source.count, best)
    state = state_of(resume, plan.folder, fresh)
    _check_steps(plan.evaluation.steps, state)
    trained = Loop(step, source, state, plan).run()
    if names := outside(trained.model, all_held):
        raise ConstraintError(names, trained.model, trained.history)
    model = placed_as(trained.model, given)
    return TrainResult(model, trained.history, trained.state, trained.reason, trained.layers)


def _plan(
    evaluation: Evaluation,
    watching: tuple[Any, Any],
    checkpoint: Any,
    every: int | None,
    shown: bool,
    sharding: NamedSharding | None,
) -> Plan:
    """What happens beside the steps, of these arguments; `watching` are `callbacks` and `early_stopping`."""
    callbacks, early_stopping = watching
    watchers = check_watchers(callbacks, early_stopping, evaluation.names)
    if every is not None:
        check_positive("checkpoint_every", every)
        if checkpoint is None:
            raise ValueError("`checkpoint_every` was given without a folder. Name one as `checkpoint`.")
    folder = None if checkpoint is None else check_folder(checkpoint)
    every = evaluation.every if every is None else int(every)
    divided = (lambda x: x) if sharding is None else ft.partial(stacked_on, sharding)
    return Plan(evaluation, watchers, early_stopping, folder, every, shown, divided)


def _check_sharding(sharding: Any) -> NamedSharding | None:
    """The sharding on automatic axes."""
    if sharding is None:
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            '`sharding` must be a `jax.sharding.NamedSharding` such as `NamedSharding(mesh, PartitionSpec("data"))`, '
            f"got {described(sharding)}."
        )
    return automatic(sharding)


def _extras(transform: Any, accumulate: Any, layers: tuple[PyTree, bool], ema: Any, eval_parameters: Any) -> Extras:
    """What a run asks for beside a direction and an optimizer, checked; `layers` are `model_state` and `has_aux`."""
    has_layers = _check_layers(*layers)
    check_positive("accumulate", accumulate)
    if transform is not None:
        check_function("transform", transform, "transform(*batch) -> batch")
    if eval_parameters is not None:
        check_function("eval_parameters", eval_parameters, "(optimizer_state, parameters) -> parameters")
    decay = as_number(0.0 if ema is None else ema)
    if decay is None or not 0 <= decay < 1:
        wanted = "a decay between 0 and 1 such as 0.999, or zero for no average"
        raise ValueError(f"`ema` must be {wanted}, got {described(ema)}.")
    if decay and eval_parameters is not None:
        raise ValueError("`ema` and `eval_parameters` both say which model is evaluated. Choose one of them.")
    return Extras(transform, int(accumulate), has_layers, decay or None, eval_parameters)


def _check_layers(model_state: PyTree, has_aux: bool) -> bool:
    """Whether the loss takes the state of layers."""
    if model_state is not None and has_aux:
        raise ValueError("With `model_state`, the loss returns `(value, state)`: leave `has_aux` out.")
    if model_state is not None and not any(map(eqx.is_array, jtu.tree_leaves(model_state))):
        raise TypeError(
            "`model_state` must be the state of layers, from `equinox.nn.make_with_state(...)(...)[1]`; got "
            f"{described(model_state)}, which holds no arrays."
        )
    return model_state is not None


def _check_steps(steps: int, state: TrainingState) -> None:
    if steps < state.step:
        raise ValueError(
            f"`steps` is {steps}, but the run to resume has taken {state.step}. It counts from the beginning: give at "
            f"least {state.step}."
        )


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
    follows, metric, copies = metric is None, metric or own.metric, copies or own.copies
    chosen = checked_options(solver, solver_steps, metric, copies, tau, noise, "solver_steps", replaces)
    return replace(chosen, accuracy=ROUGH, follows=follows)


def _fixed(precondition: bool | None, optimizer: Any, method: str, all_held: Sequence[Held]) -> frozenset[int] | None:
    """What the coordinates of preconditioned steps leave alone: the positions of parameters in sets.

    `None` where steps are not preconditioned.
    """
    if precondition is not None and not isinstance(precondition, bool):
        raise TypeError(f"`precondition` must be True, False or None, got {described(precondition)}.")
    if precondition and method == "gradient":
        raise ValueError('`precondition` needs `method="projection"`, whose problem knows the inputs of the layers.')
    by_default = optimizer is None and method == "projection"
    is_wanted = by_default if precondition is None else precondition
    return frozenset(p for one in all_held for p in one.positions) if is_wanted else None


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


def _evaluation(
    eval_data: Sequence[Any] | None,
    evaluate: Metrics | None,
    sizes: tuple[int | None, int | None],
    loss: Callable[..., Any],
    steps: int,
) -> Evaluation:
    """The evaluation of these arguments; of the loss alone where no functions are given.

    `sizes` are `eval_every` and `eval_batch_size`.
    """
    if evaluate is not None and not isinstance(evaluate, Mapping):
        wanted = "must map names to functions `(model, *eval_data) -> scalar`, as in `{'accuracy': accuracy}`"
        raise TypeError(f"`evaluate` {wanted}, got {described(evaluate)}.")
    for name, function in ({} if evaluate is None else evaluate).items():
        if not isinstance(name, str):
            raise TypeError(f"`evaluate` must map names to functions, got the name {described(name)}.")
        check_function(f"evaluate[{name!r}]", function, "(model, *eval_data) -> scalar")
    if evaluate is not None and eval_data is None:
        raise ValueError("`evaluate` was given without data. Pass the data to evaluate on as `eval_data`.")
    every, batch_size = sizes
    for name, size in (("eval_every", every), ("eval_batch_size", batch_size)):
        if size is not None:
            check_positive(name, size)
    if batch_size is not None and eval_data is None:
        raise ValueError("`eval_batch_size` was given without data. Pass the data to evaluate on as `eval_data`.")
    data = None if eval_data is None else check_data(eval_data, "eval_data")[0]
    functions = {"loss": loss} if evaluate is None else dict(evaluate)
    return Evaluation(data, functions, evaluate is None, every, steps, None if batch_size is None else int(batch_size))


def _check_first_value(
    direction: AbstractDirection, model: PyTree, source: AbstractSource, extras: Extras, layers: PyTree, key: Array
) -> None:
    """Traces the loss on a few samples, and evaluates it.

    **Raises:** `TypeError` where the loss does not take the data, `ValueError` where its value is not finite.
    """
    samples = source.first()
    batch = transformed(extras.transform, samples, jax.random.fold_in(key, 0))
    prefix = (layers,) if extras.has_layers else ()
    _check_arguments(direction.loss, (*prefix, *batch))
    checked = source.checked if extras.transform is None else batch
    value = direction.first_value(model, (*prefix, *batch), (*prefix, *checked))
    if bool(jnp.isfinite(value)):
        return
    labels = [f"{x.min()} to {x.max()}" for x in jtu.tree_leaves(source.checked) if x.dtype.kind in "iu"]
    hint = f" The integer arrays of `data` run from {', '.join(labels)}: are labels out of range?" if labels else ""
    raise ValueError(
        f"`loss` is {float(value)} at the initial parameters, on {len(jtu.tree_leaves(samples)[0])} samples, though "
        f"data and parameters are finite.{hint}"
    )
