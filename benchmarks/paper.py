"""The experiments of arXiv 2506.05878 in the projection regime: what does each solver learn from each minibatch?

    python benchmarks/paper.py --data-dir path/to/data [--task mnist higgs] [--solver DifferenceMap] [--seeds 3]
    python benchmarks/paper.py --quick         # a smoke run on the digits of the package

Every solver is run as `eqxproj.train(..., solver=X())`, with nothing else said: the parameters become the projection's,
and there is no optimizer, rate or schedule. Beside them stand the defaults of `train`, and Adam with warm-up and cosine
at the best of three peak rates by validation, both for the same number of minibatches. Batches have 256 samples.

A run of a solver ends after `--minibatches`, or where the validation value has not risen for five looks in a row, one
each `--every` minibatches. The best model by validation counts, on the test set. `to paper` are the minibatches, and
the seconds of training without compilation, until the validation value is that of the paper's own software.

`--sweeps 50` takes the number of projection steps a minibatch that the paper has, in place of the default, which
follows the depth of the network. `--parameter` and `--tau` are other weights of parameters and factors of the loss than
the defaults, for what was tried. `--data-dir` is that of `accuracy.py`. `--limit` ends a run after so many seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from accuracy_methods import METHODS
from accuracy_tasks import TASKS, Task
from shared import write

import eqxproj

SOLVERS = (
    "AlternatingProjections",
    "AlternatingReflections",
    "DouglasRachford",
    "DifferenceMap",
    "RelaxedReflectReflect",
    "CyclicProjections",
    "CyclicDouglasRachford",
)
PAPER = {"mnist": 0.958, "cifar10-cnn": 0.337, "higgs": 0.67, "shakespeare": 0.324}
"""The best of the paper's algorithms on each task, on test data, with 50 steps a minibatch."""
_BATCH, _PATIENCE = 256, 5


class Run(NamedTuple):
    """What a run reached: on validation after each look, at which minibatch and second, and on test data."""

    valid: list[float]
    minibatches: list[int]
    seconds: list[float]
    test: float

    def until(self, value: float) -> str:
        """When the validation value was first as good."""
        for found, count, seconds in zip(self.valid, self.minibatches, self.seconds, strict=True):
            if found >= value:
                return f"{count}, {seconds:.1f} s"
        return "not reached"


def projected(task: Task, data: Sequence[Any], solver: str, seed: int, options: argparse.Namespace) -> Run:
    """A run in the projection regime, in parts of `--every` minibatches; only the parameters pass from one to the next.

    `CyclicProjections` is given a flat metric: without one it is the gradient regime.
    """
    train, valid, test = data
    model, key, began = task.make(jax.random.key(seed)), jax.random.key(1000 + seed), time.time()
    chosen: dict[str, Any] = {"solver": getattr(eqxproj, solver)(), "solver_steps": options.sweeps, "tau": options.tau}
    if options.parameter is not None or solver == "CyclicProjections":
        chosen["metric"] = eqxproj.Metric(1.0, options.parameter or 300.0)
    run, best, kept = Run([], [], [], 0.0), -np.inf, model
    while len(run.valid) * options.every < options.minibatches:
        part = jax.random.fold_in(key, len(run.valid))
        batch = min(_BATCH, len(train[0]))
        result = eqxproj.train(model, train, task.loss, steps=options.every, batch_size=batch, key=part, **chosen)
        model = result.model
        run.valid.append(task.over(model, valid))
        run.minibatches.append(options.every * len(run.valid))
        run.seconds.append(float(result.history["seconds"][-1]) + (run.seconds[-1] if run.seconds else 0.0))
        if run.valid[-1] > best:
            best, kept = run.valid[-1], model
        has_stalled = len(run.valid) - 1 - int(np.argmax(run.valid)) >= _PATIENCE
        if has_stalled or (options.limit is not None and time.time() - began > options.limit):
            break
    return run._replace(test=task.over(kept, test))


def optimized(task: Task, data: Sequence[Any], setting: Any, seed: int, options: argparse.Namespace) -> Run:
    """A run by an optimizer, for the whole number of minibatches, to which its schedule is made."""
    train, valid, test = data
    result = eqxproj.train(
        task.make(jax.random.key(seed)),
        train,
        task.loss,
        steps=options.minibatches,
        batch_size=min(_BATCH, len(train[0])),
        key=jax.random.key(1000 + seed),
        eval_data=valid,
        eval_every=options.every,
        evaluate={"value": task.value},
        **setting.options(options.minibatches),
    )
    history = {name: np.asarray(values).tolist() for name, values in result.history.items() if name != "loss"}
    values, steps, seconds = (history[name][1:] for name in ("eval_value", "step", "seconds"))
    return Run(values, steps, seconds, task.over(result.model, test))


def best_of(task: Task, data: Sequence[Any], method: str, options: argparse.Namespace) -> list[Run]:
    """The runs of all seeds at the setting that is best on the validation split with the first."""
    first = [optimized(task, data, setting, 0, options) for setting in METHODS[method]]
    place = int(np.argmax([run.valid[-1] for run in first]))
    rest = [optimized(task, data, METHODS[method][place], seed, options) for seed in range(1, options.seeds)]
    return [first[place], *rest]


def row(name: str, method: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A line of the table, which is printed."""
    tests, first = [run.test for run in runs], runs[0]
    paper = PAPER.get(name)
    found = {
        "task": name,
        "method": method,
        "test": float(np.mean(tests)),
        "spread": float(np.std(tests)),
        "minibatches": first.minibatches[-1],
        "seconds": first.seconds[-1],
        "to paper": "" if paper is None else first.until(paper),
        "curve": dict(zip(first.minibatches, first.valid, strict=True)),
    }
    print(
        f"| {name} | {method} | {found['test']:.3f} ({found['spread']:.3f}) | {found['minibatches']} | "
        f"{found['seconds']:.1f} | {found['to paper']} |",
        flush=True,
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--task", nargs="+", default=list(PAPER), choices=list(TASKS))
    parser.add_argument("--solver", nargs="*", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--method", nargs="*", default=["default", "adam-cosine"], choices=list(METHODS))
    parser.add_argument("--minibatches", type=int, default=200)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sweeps", type=int)
    parser.add_argument("--parameter", type=float)
    parser.add_argument("--tau", type=float)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.task, options.minibatches, options.every = ["digits"], 30, 10
        options.solver = [s for s in options.solver if s in SOLVERS[:2]]
    print("| task | method | test | minibatches | seconds | to paper |\n| --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in options.task:
        task = TASKS[name]
        data = task.split(options.data_dir)
        for solver in options.solver:
            runs = [projected(task, data, solver, seed, options) for seed in range(options.seeds)]
            rows.append(row(name, solver, runs))
        rows += [row(name, method, best_of(task, data, method, options)) for method in options.method]
    write(options.json, rows)


if __name__ == "__main__":
    main()
