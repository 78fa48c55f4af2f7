"""The experiments of arXiv 2506.05878 in the projection regime: what does each solver learn from each minibatch?

    python benchmarks/paper.py --data-dir path/to/data [--task mnist higgs] [--solver DifferenceMap] [--seeds 3]
    python benchmarks/paper.py --quick         # a smoke run on the digits of the package

Every solver is run as `eqxproj.train(..., solver=X())`: the parameters become the projection's, and there is no
optimizer, rate or schedule. It has several settings: nothing else said; `persist`, where it keeps its state at each
minibatch, for solvers with a memory that comes to rest; four sweeps, `short`; a smaller tau and
parameters that are less stiff, `soft`; `flat`, where deeper states move more easily too; and, twice, more sweeps with
stiffer parameters. Beside them stand the defaults of `train`, and Adam with warm-up and cosine at six peak
rates, both for the same number of minibatches. Of every method the setting counts that is best on the validation split
with the first seed, which is `--first-seed`. Batches have 256 samples. With `--resplit` each seed divides the rows anew
into training, validation and test data: where a data set is small, one test set says little.

Every `--every` minibatches the validation value is looked at; the best model by it counts, on the test set. A run of a
solver ends after `--minibatches`, or where there was no better one for five looks in a row. `to paper` are the
minibatches, and the seconds of training without compilation, until the validation value is that of the paper's own
software. `--data-dir` is that of `accuracy.py`. `--limit` ends a run after so many seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
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
PERSISTENT = ("DouglasRachford", "DifferenceMap", "RelaxedReflectReflect", "CyclicDouglasRachford")
SETTINGS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "persist": {"persist": True},
    "short": {"solver_steps": 4},
    "soft": {"metric": eqxproj.Metric(1.0, 30.0), "tau": 0.03},
    "flat": {"metric": eqxproj.Metric(0.3, 300.0), "tau": 0.02},
    "long": {"metric": eqxproj.Metric(1.0, 1000.0), "tau": 2.0, "solver_steps": 16},
    "longer": {"metric": eqxproj.Metric(1.0, 10_000.0), "solver_steps": 40},
}
"""What is said beside the solver."""
PAPER = {"mnist": 0.958, "cifar10-cnn": 0.337, "higgs": 0.67, "shakespeare": 0.324}
"""The best of the paper's algorithms on each task, on test data, with 50 steps a minibatch."""
_BATCH, _PATIENCE = 256, 5


class Way(NamedTuple):
    """A way to train: its name, and options of `train` from the number of steps. Only a solver's run stops early."""

    name: str
    options: Callable[[int], Mapping[str, Any]]
    stops: bool


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


def ways(method: str, settings: Sequence[str]) -> list[Way]:
    """The settings of a solver, or of a method of `accuracy_methods.py`.

    `CyclicProjections` is given a flat metric: without one it is the gradient regime.
    """
    if method not in SOLVERS:
        return [Way(setting.name, setting.options, False) for setting in METHODS[method]]
    solver = getattr(eqxproj, method)()
    flat = {"metric": eqxproj.Metric(1.0, 300.0)} if method == "CyclicProjections" else {}

    def way(name: str) -> Way:
        options = {"solver": solver, **flat, **SETTINGS[name]}
        return Way(name, lambda steps: options, True)

    return [way(name) for name in settings if name != "persist" or method in PERSISTENT]


def trained(task: Task, data: Sequence[Any], way: Way, seed: int, options: argparse.Namespace) -> Run:
    """One run."""
    train, valid, test = data
    began = time.time()

    def is_late(step: int, report: Any) -> bool:
        return options.limit is not None and time.time() - began > options.limit

    result = eqxproj.train(
        task.make(jax.random.key(seed)),
        train,
        task.loss,
        steps=options.minibatches,
        batch_size=min(_BATCH, len(train[0])),
        key=jax.random.key(1000 + seed),
        eval_data=valid,
        eval_every=options.every,
        eval_batch_size=500,
        evaluate={"value": task.value},
        early_stopping=eqxproj.EarlyStopping("eval_value", "max", _PATIENCE if way.stops else None),
        callbacks=[is_late],
        **way.options(options.minibatches),
    )
    history = {name: np.asarray(values).tolist() for name, values in result.history.items() if name != "loss"}
    values, steps, seconds = (history[name][1:] for name in ("eval_value", "step", "seconds"))
    return Run(values, steps, seconds, task.over(result.model, test))


def best_of(
    task: Task, data: Mapping[int, Sequence[Any]], method: str, options: argparse.Namespace
) -> tuple[str, list[Run]]:
    """The setting that is best on the validation split with the first seed, and its runs with all seeds."""
    choices = ways(method, options.settings)
    first_seed, *seeds = data
    first = [trained(task, data[first_seed], way, first_seed, options) for way in choices]
    place = int(np.argmax([max(run.valid) for run in first]))
    rest = [trained(task, data[seed], choices[place], seed, options) for seed in seeds]
    return choices[place].name, [first[place], *rest]


def row(name: str, method: str, setting: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A line of the table, which is printed."""
    tests, first = [run.test for run in runs], runs[0]
    paper = PAPER.get(name)
    found = {
        "task": name,
        "method": method,
        "setting": setting,
        "test": float(np.mean(tests)),
        "spread": float(np.std(tests)),
        "minibatches": first.minibatches[-1],
        "seconds": first.seconds[-1],
        "to paper": "" if paper is None else first.until(paper),
        "curve": dict(zip(first.minibatches, first.valid, strict=True)),
    }
    print(
        f"| {name} | {method} | {setting} | {found['test']:.3f} ({found['spread']:.3f}) | {found['minibatches']} | "
        f"{found['seconds']:.1f} | {found['to paper']} |",
        flush=True,
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--task", nargs="+", default=list(PAPER), choices=list(TASKS))
    parser.add_argument("--solver", nargs="*", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--method", nargs="*", default=["default", "adam-cosine-wide"], choices=list(METHODS))
    parser.add_argument("--minibatches", type=int, default=200)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--resplit", action="store_true", help="each seed has its own training and test rows")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--limit", type=float)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.task, options.minibatches, options.every = ["digits"], 30, 10
        options.solver, options.settings = [s for s in options.solver if s in SOLVERS[:2]], ["default"]
    print("| task | method | setting | test | minibatches | seconds | to paper |\n" + "| --- " * 7 + "|", flush=True)
    rows = []
    for name in options.task:
        task = TASKS[name]
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        once = None if options.resplit else task.split(options.data_dir)
        data = {seed: task.split(options.data_dir, seed) if once is None else once for seed in seeds}
        rows += [
            row(name, method, *best_of(task, data, method, options)) for method in (*options.solver, *options.method)
        ]
    write(options.json, rows)


if __name__ == "__main__":
    main()
