"""`train`: an existing model and loss, trained by projections in one call.

Each step takes a minibatch, builds the feasibility problem of the loss on it (while tracing, once), runs the solver
from the forward pass, and hands the displacement to an optax optimizer. With `method="gradient"` the same loop,
batches and evaluation run on gradients, for comparison.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree
from tqdm.auto import tqdm

from .._errors import NonFiniteError, TrainingInterrupted
from .._graph._build import check_dependence
from .._metric import Metric, check_metric
from .._problem._make import check_copies, check_labels, check_tau, feasibility_problem, make_problem
from .._problem._problem import Copies, FeasibilityProblem
from .._program._canonical import lowered
from .._program._trace import trace
from ..sets import Constraint, apply_constraints, check_constraints, constrained
from ..solvers import AbstractSolver, CyclicProjections
from ..solvers._solve import check_positive, check_solver, finite_nodes, first_bad
from ._data import batches, check_data, check_model, take
from ._displacement import DEFAULT_METRIC, DEFAULT_TAU, default_tau, displacement_of, run
from ._preconditioner import preconditioner

Metrics = Mapping[str, Callable[..., Any]]


class TrainResult(eqx.Module):
    """What [`train`][] returns.

    - `model`: the trained model.
    - `history`: `"step"`, `"loss"` (of that step's minibatch), `"seconds"` (of training, without compilation and
        evaluation) and `"eval_<name>"` as arrays with one entry an evaluation, and `"compile_seconds"`.
    """

    model: PyTree
    history: dict[str, Any]


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
    solver_steps: int = 1,
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

    - `model`: any pytree; its inexact arrays are trained. Those of bfloat16 or float16 are kept in float32 between the
        steps, and so is the state of the optimizer; the model runs, and is returned, in its own types.
    - `data`: `(x, y)`, or any tuple of pytrees of arrays with one entry a sample along their first axis.
    - `loss`: `loss(model, *batch)`, a scalar: what is given to `equinox.filter_value_and_grad` otherwise. A loss with
        an argument named `key` gets a fresh PRNG key each step.
    - `steps`: number of minibatches.
    - `batch_size`: samples a minibatch; 256, or all of them if they are fewer, by default.
    - `key`: PRNG key of the shuffling and of the loss's `key`; `jax.random.key(0)` by default.
    - `solver`, `solver_steps`: what runs on each minibatch, from the forward pass; one cyclic sweep by default.
    - `optimizer`: any optax transformation of the displacements; by default Adam, its rate rising to 3e-3 at first and
        falling with a cosine to a hundredth of that over the last four tenths of the `steps`.
    - `metric`, `copies`, `tau`: of the feasibility problem, see [`feasibility_problem`][]; by default those of
        [`filter_value_and_displacement`][].
    - `precondition`: whether the steps of layers are measured by what they change, given the mean, deviation and number
        of the layers' inputs (centered and scaled steps, which no origin or unit of the inputs changes); by default
        wherever the default optimizer runs on displacements. Rates then mean more than without.
    - `method`: `"projection"`, or `"gradient"` to run the same loop on gradients.
    - `eval_data`: further data, evaluated before the first step, every `eval_every` steps (a twentieth of `steps` by
        default) and after the last, in one call of each function of `evaluate`.
    - `evaluate`: name to `function(model, *eval_data) -> scalar`, which is compiled; the loss by default.
    - `constraints`: pairs `(where, set)`: `where(model)` picks an array, as in `equinox.tree_at`, and the array is
        projected onto the set after every step, or, for sets of isolated pieces (`sparse`, `quantized`), before every
        step, from an array that is kept for it. The returned model satisfies the constraints exactly.
    - `has_aux`: whether the loss returns `(value, auxiliary)`; the auxiliary output is dropped.
    - `progress`: show a progress bar.

    **Returns:**

    A [`TrainResult`][].

    **Raises:** `ValueError` or `TypeError` for unusable arguments, before any training; `NonFiniteError` where a
    state becomes NaN or infinite, and `TrainingInterrupted` on Ctrl-C, both with the last good model and the history.
    """
    check_positive("steps", steps)
    if not callable(loss):
        raise TypeError(f"`loss` must be a function `loss(model, *batch) -> scalar`, got {loss!r}.")
    if evaluate is not None and not (isinstance(evaluate, Mapping) and all(map(callable, evaluate.values()))):
        raise TypeError(f"`evaluate` must map names to functions `(model, *eval_data) -> scalar`, got {evaluate!r}.")
    if evaluate is not None and eval_data is None:
        raise ValueError("`evaluate` was given without data. Pass those that it is to be evaluated on as `eval_data`.")
    arrays, count = check_data(data, "data")
    batch_size = _check_batch_size(batch_size, count)
    check_model(model)
    precondition = _check_precondition(precondition, optimizer, method)
    optimizer = default_optimizer(int(steps)) if optimizer is None else optimizer
    run_ = _Run(loss, solver, optimizer, metric, copies, tau, solver_steps, method, has_aux)
    check_constraints(model, constraints)
    run_.excluded = constrained(model, constraints) if precondition else None
    held = None if eval_data is None else check_data(eval_data, "eval_data")[0]
    if eval_every is not None:
        check_positive("eval_every", eval_every)
    run_.check(model, arrays, count)
    run_.check_optimizer(model)
    key = jax.random.key(0) if key is None else key
    model = apply_constraints(model, [c for c in constraints if not c[1].keeps])
    watch = _Watch(held, {"loss": _plain(loss, has_aux)} if evaluate is None else evaluate, eval_every, steps)
    rows = batches(count, batch_size, key)
    return _loop(run_, model, arrays, rows, key, int(steps), tuple(constraints), watch, progress)


def _check_precondition(precondition: bool | None, optimizer: Any, method: str) -> bool:
    if precondition is None:
        return optimizer is None and method == "projection"
    if not isinstance(precondition, bool):
        raise TypeError(f"`precondition` must be True, False or None, got {precondition!r}.")
    if precondition and method == "gradient":
        raise ValueError('`precondition` needs `method="projection"`, whose problem knows the inputs of the layers.')
    return precondition


def _check_batch_size(batch_size: int | None, count: int) -> int:
    if batch_size is None:
        return min(256, count)
    check_positive("batch_size", batch_size)
    if batch_size > count:
        raise ValueError(
            f"`batch_size` is {batch_size}, but `data` has only {count} samples. Use a batch size of at most {count}."
        )
    return int(batch_size)


def _plain(loss: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss as an evaluation function: its value alone."""

    def value(model, *args):
        extra = {"key": jax.random.key(0)} if takes_key(loss) else {}
        out = loss(model, *args, **extra)
        return out[0] if has_aux else out

    return value


def default_optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with a rate that suits most networks without a search: it warms up, stays, and falls when training ends.

    With gradients and displacements alike it reaches what the best of three constant rates reaches, or more, on
    multilayer perceptrons of 2 to 20 layers, and less on a deep autoencoder, unless its steps are preconditioned
    (`benchmarks/accuracy.py`). What the loss is multiplied with does not matter.
    """
    peak, warm, hold = 3e-3, min(100, steps // 20), 6 * steps // 10
    parts = [
        optax.linear_schedule(0.1 * peak, peak, warm),
        optax.constant_schedule(peak),
        optax.cosine_decay_schedule(peak, max(steps - hold, 1), 0.01),
    ]
    return optax.chain(_in_first_units(), optax.adam(optax.join_schedules(parts, [warm, hold]), b2=0.99))


def _in_first_units() -> optax.GradientTransformation:
    """Divides by the largest entry of the first updates, so that Adam's epsilon means the same at any scale of loss."""

    def init(params: PyTree) -> Array:
        return jnp.asarray(0.0, jnp.float32)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        leaves = [jnp.max(jnp.abs(u), initial=0.0).astype(jnp.float32) for u in jtu.tree_leaves(updates)]
        unit = jnp.where(state > 0, state, jnp.max(jnp.stack(leaves)))
        divisor = jnp.where(unit > 0, unit, 1.0)
        return jtu.tree_map(lambda u: (u / divisor).astype(u.dtype), updates), unit

    return optax.GradientTransformation(init, update)


def takes_key(loss: Callable[..., Any]) -> bool:
    """Whether a loss has an argument named `key`."""
    try:
        return "key" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


class _Run:
    """The options of one training run, checked, and its step."""

    def __init__(self, loss, solver, optimizer, metric, copies, tau, solver_steps, method, has_aux):
        self.loss, self.has_aux, self.method = loss, has_aux, method
        if method not in ("projection", "gradient"):
            raise ValueError(f'`method` must be "projection" or "gradient", got {method!r}.')
        self.solver = CyclicProjections() if solver is None else solver
        check_solver(self.solver)
        check_positive("solver_steps", solver_steps)
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(f"`optimizer` must be an optax transformation, got {optimizer!r}.")
        self.optimizer = optax.with_extra_args_support(optimizer)  # some go by the value of the loss
        self.metric = DEFAULT_METRIC if metric is None else metric
        self.copies: Copies = "neuron" if copies is None else copies
        self.tau = tau
        check_metric(self.metric)
        check_copies(self.copies)
        if tau is not None:
            check_tau(tau)
        self.solver_steps = solver_steps
        self.keyed = takes_key(loss)
        self.excluded: frozenset[int] | None = None
        """Parameters whose layers keep their coordinates; `None` for all of them."""

    def direction(self, model: PyTree, batch: Sequence[PyTree], key: Array) -> tuple[Any, PyTree, Any]:
        """The value of the loss, the gradient or displacement, and the coordinates of the step."""
        extra = self.extra(key)
        if self.method == "gradient":
            value, moved = eqx.filter_value_and_grad(self.loss, has_aux=self.has_aux)(model, *batch, **extra)
            return (value[0] if self.has_aux else value), moved, None
        problem = self.problem(model, batch, extra)
        moved = displacement_of(problem, run(problem, self.solver, self.solver_steps), False)
        return problem.value, moved, None if self.excluded is None else preconditioner(problem, self.excluded)

    def problem(self, model: PyTree, batch: Sequence[PyTree], extra: dict[str, Array]) -> FeasibilityProblem:
        traced = trace(self.loss, model, batch, extra, has_aux=self.has_aux)
        tau = default_tau(traced.program, self.metric) if self.tau is None else self.tau
        return make_problem(traced, self.metric, self.copies, tau, "constant", self.solver.needs_two_colors)

    def extra(self, key: Array) -> dict[str, Array]:
        return {"key": key} if self.keyed else {}

    def check(self, model: PyTree, data: Sequence[PyTree], count: int) -> None:
        """Traces the loss on samples that show what can go wrong, before any training."""
        rows = np.unique(np.array([0, *_extremes(data, count)], int))
        batch = take(data, rows)
        extra = self.extra(jax.random.key(0))
        if self.method == "projection":
            problem = feasibility_problem(
                self.loss,
                model,
                *batch,
                copies=self.copies,
                metric=self.metric,
                tau=DEFAULT_TAU if self.tau is None else self.tau,
                has_aux=self.has_aux,
                kwargs=extra,
            )
            check_labels(problem, data)
            value = problem.value
        else:
            traced = trace(self.loss, model, batch, extra, has_aux=self.has_aux)
            check_dependence(traced)
            value = _plain(self.loss, self.has_aux)(traced.rebuild(traced.parameters), *batch)
        if not bool(jnp.isfinite(value)):
            labels = [f"{x.min()} to {x.max()}" for x in jtu.tree_leaves(data) if x.dtype.kind in "iu"]
            hint = (
                f" The integer arrays of `data` run from {', '.join(labels)}: are labels out of range?"
                if labels
                else ""
            )
            raise ValueError(
                f"`loss` is {float(value)} at the initial parameters, on samples {rows.tolist()}, though data and "
                f"parameters are finite.{hint}"
            )

    def check_optimizer(self, model: PyTree) -> None:
        """Traces a first update."""
        parameters = _widened(eqx.filter(model, eqx.is_inexact_array))

        def first(parameters):
            state = self.optimizer.init(parameters)
            return self.optimizer.update(parameters, state, parameters, value=jnp.asarray(0.0))[0]

        try:
            jax.eval_shape(first, parameters)
        except Exception as error:
            raise TypeError(
                "`optimizer` must take an update like the parameters, its state, the parameters, and the value of the "
                f"loss as `value`, but it raised {type(error).__name__}: {error}. Optimizers with a line search "
                "evaluate the loss on their own, which `train` does not offer: turn it off, as in "
                "`optax.lbfgs(1e-2, linesearch=None)`, or write the loop yourself, with "
                "`eqxproj.filter_value_and_displacement`."
            ) from error

    def step(self, constraints: Sequence[Constraint], like: PyTree):
        """The jitted step: `(widened parameters, optimizer state, bad step, step, batch, key) -> ...`.

        The model is run with parameters of the types of `like`.
        """
        kept, others = ([c for c in constraints if c[1].keeps is flag] for flag in (True, False))

        def update(static, parameters, opt_state, bad, number, batch, key):
            model = apply_constraints(eqx.combine(_cast(parameters, like), static), kept)
            value, moved, inputs = self.direction(model, batch, key)
            moved = _cast(moved, parameters)
            moved = moved if inputs is None else inputs.centered(moved)
            updates, new_state = self.optimizer.update(moved, opt_state, parameters, value=value)
            updates = updates if inputs is None else inputs.applied(updates)
            new = eqx.apply_updates(parameters, updates)
            new = eqx.filter(apply_constraints(eqx.combine(new, static), others), eqx.is_inexact_array)
            finite = [jnp.isfinite(value)] + [
                jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves((moved, _cast(new, like)))
            ]
            ok = jnp.all(jnp.stack(finite)) & (bad < 0)
            keep = lambda a, b: jnp.where(ok, a, b) if eqx.is_array(a) else a  # noqa: E731
            new, new_state = jtu.tree_map(keep, new, parameters), jtu.tree_map(keep, new_state, opt_state)
            return new, new_state, jnp.where(ok | (bad >= 0), bad, number), value

        return update

    def failing_node(self, model: PyTree, batch: Sequence[PyTree], key: Array) -> str:
        """The node at which the state is not finite, when the step is taken again."""
        if self.method == "gradient":
            return "the gradient"
        problem = self.problem(model, batch, self.extra(key))
        started = jax.device_get(finite_nodes(problem, problem.start(False)))
        on_the_way = [i for i in problem.graph.forward_order if not started[i]]
        if on_the_way or not bool(jnp.isfinite(problem.value)):
            return problem.describe([*on_the_way, problem.graph.objectives[0]][0])
        state = run(problem, self.solver, self.solver_steps)
        bad = first_bad(problem, jax.device_get(finite_nodes(problem, state)))
        return "the optimizer's update" if bad is None else problem.describe(bad)


def _widened(parameters: PyTree) -> PyTree:
    """Parameters as training keeps them, in float32 at least: small steps would be lost to the rounding of bfloat16."""
    return jtu.tree_map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), parameters)


def _cast(parameters: PyTree, like: PyTree) -> PyTree:
    return jtu.tree_map(lambda p, q: p.astype(q.dtype), parameters, like)


def _extremes(data: Sequence[PyTree], count: int) -> list[int]:
    """The samples with the least and the largest entry of each integer array of labels."""
    found = []
    for leaf in jtu.tree_leaves(data):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu":
            flat = leaf.reshape(count, -1)
            found += [int(np.argmin(flat.min(1))), int(np.argmax(flat.max(1)))]
    return found


class _Watch:
    """Evaluates, and keeps the history."""

    def __init__(self, data, metrics: Metrics, every: int | None, steps: int):
        self.data, self.metrics = data, dict(metrics)
        self.every = max(1, steps // 20) if every is None else int(every)
        self.steps = steps
        self.records: dict[str, list[float]] = {"step": [], "loss": [], "seconds": []}
        self.compile_seconds = 0.0
        self.functions = {name: eqx.filter_jit(f) for name, f in self.metrics.items()}
        if data is not None:
            self.data = jtu.tree_map(jnp.asarray, data)
            self.records.update({f"eval_{name}": [] for name in self.metrics})

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def record(self, step: int, loss: float, seconds: float, model: PyTree) -> None:
        self.records["step"].append(step)
        self.records["loss"].append(loss)
        self.records["seconds"].append(seconds)
        if self.data is not None:
            for name, function in self.functions.items():
                self.records[f"eval_{name}"].append(float(function(model, *self.data)))

    def history(self) -> dict[str, Any]:
        return {**{k: np.asarray(v) for k, v in self.records.items()}, "compile_seconds": self.compile_seconds}


def _loop(
    run_: _Run,
    model: PyTree,
    data: Sequence[PyTree],
    rows: Iterator[np.ndarray],
    key: Array,
    steps: int,
    constraints: Sequence[Constraint],
    watch: _Watch,
    progress: bool,
) -> TrainResult:
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    like = jtu.tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    wide = _widened(parameters)
    state = (wide, run_.optimizer.init(wide), jnp.asarray(-1, jnp.int32))
    projected = eqx.filter_jit(lambda model: apply_constraints(model, constraints)) if constraints else lambda m: m

    def shown() -> PyTree:
        return projected(eqx.combine(_cast(state[0], like), static))

    seconds, value, done = 0.0, float("nan"), 0
    bar = tqdm(total=steps, desc=run_.method, disable=not progress, leave=True)
    picked = next(rows)
    batch, batch_key = take(data, picked), jax.random.fold_in(key, 0)
    recent: list[tuple[np.ndarray, Array]] = []
    try:
        start = time.perf_counter()
        step = _compiled(run_.step(constraints, like), static, state, batch, batch_key)
        watch.compile_seconds = time.perf_counter() - start
        watch.record(0, value, 0.0, shown())
        start = time.perf_counter()
        while done < steps:
            recent.append((picked, batch_key))
            state, value = step(state, np.int32(done), batch, batch_key)
            done += 1
            bar.update()
            if done < steps:
                picked = next(rows)
                batch, batch_key = take(data, picked), jax.random.fold_in(key, done)
            if watch.due(done):
                jax.block_until_ready(state)
                seconds += time.perf_counter() - start
                _raise_if_bad(run_, int(state[2]), shown, data, recent, done, watch)
                recent.clear()
                watch.record(done, float(value), seconds, shown())
                bar.set_postfix_str(f"loss {float(value):.4g}")
                start = time.perf_counter()
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(done, shown(), watch.history()) from error
    finally:
        bar.close()
    return TrainResult(shown(), watch.history())


def _compiled(update: Callable[..., Any], static: PyTree, state: tuple[Any, ...], batch: Any, key: Array):
    """The step compiled ahead of time, so that compilation is timed apart."""
    arrays, fixed = eqx.partition(state, eqx.is_array)

    def pure(arrays, number, batch, key):
        new = update(static, *eqx.combine(arrays, fixed), number, batch, key)
        return eqx.partition(new[:3], eqx.is_array)[0], new[3]

    compiled = lowered(pure, arrays, np.int32(0), batch, key).compile()

    def step(state, number, batch, key):
        out, value = compiled(eqx.filter(state, eqx.is_array), number, batch, key)
        return eqx.combine(out, fixed), value

    return step


def _raise_if_bad(run_: _Run, bad: int, shown: Callable[[], PyTree], data, recent, done: int, watch: _Watch) -> None:
    if bad < 0:
        return
    model = shown()
    picked, key = recent[bad - (done - len(recent))]
    raise NonFiniteError(run_.failing_node(model, take(data, picked), key), bad, model, watch.history())
