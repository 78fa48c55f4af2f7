"""What does each method reach with the same model, initial parameters, batches, number of steps and evaluation?

    python benchmarks/accuracy.py --data-dir path/to/data [--out accuracy] [--seeds 3]
    python benchmarks/accuracy.py --data-dir path/to/data --task mnist higgs --method adam default
    python benchmarks/accuracy.py --quick          # a smoke run on the digits of the package, about two minutes

Compared are `eqxproj.train` with its defaults, with other solvers, and on plain gradients: Adam at a constant rate,
Adam and Muon with warm-up and cosine decay, and gradient descent with momentum (`accuracy_methods.py`). The tasks are
in `accuracy_tasks.py`.

A method with several settings, such as the peak rate, is run at each of them with the first seed. The setting that is
best on the validation split, the last tenth of the training data, is taken for all seeds. Reported is the value on the
test set after the last step: the mean over the seeds, and as `spread` their standard deviation.

Seconds are those of training, without compilation and evaluation. `to 99%` are the seconds until the validation value
comes within one percent of the best that Adam at a constant rate reaches with the same seed; `to end` are the seconds
until it is the value that this Adam ends with.

`--data-dir` holds one folder a data set (`mnist`, `cifar10`, `higgs_sample`, `tiny_shakespeare`), in the layout of the
Hugging Face hub. Without it, they are read from the hub, except for the HIGGS sample, which is in no hub.

Every run is a process of its own, so that its peak memory is its own, and writes one JSON file into the folder `--out`.
A run whose file is there is not run again: an interrupted benchmark goes on where it was. The two-color solvers take
up to hundreds of times as long as the defaults. With `--limit`, a run that takes more seconds than that, all included,
is stopped, left out of the choice, and named; `--sweeps 8` leaves half of their settings.
Written are `table.md`, `results.json` and `accuracy.png`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accuracy_methods import METHODS
from accuracy_tasks import TASKS, Half, Task

Run = Mapping[str, Any]


def run(
    task_name: str, method: str, setting: int, seed: int, data_dir: str | None, steps: int | None
) -> dict[str, Any]:
    """One run, in this process."""
    import resource

    import jax

    import eqxproj

    task = TASKS[task_name]
    train, valid, test = task.split(data_dir)
    chosen = METHODS[method][setting]
    count = task.steps if steps is None else steps
    model = task.make(jax.random.key(seed))
    result = eqxproj.train(
        Half(model) if chosen.half else model,
        train,
        task.loss,
        steps=count,
        batch_size=task.batch_size,
        key=jax.random.key(1000 + seed),
        eval_data=valid,
        eval_every=max(1, count // 40),
        evaluate={"value": task.value},
        **chosen.options(count),
    )
    history = {k: np.asarray(v).tolist() for k, v in result.history.items()}
    return {
        "task": task_name,
        "method": method,
        "setting": chosen.name,
        "index": setting,
        "seed": seed,
        "test": task.over(result.model, test),
        "valid": history["eval_value"][-1],
        "seconds": history["seconds"][-1],
        "compile_seconds": float(result.history["compile_seconds"]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "history": {k: history[k] for k in ("step", "seconds", "eval_value")},
    }


class Bench:
    """The runs that are there, and those that are not yet."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = pathlib.Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, task: str, method: str, setting: int, seed: int) -> dict[str, Any] | None:
        """A run's results: from its file, or from a new process. `None` if that failed, which is said."""
        steps = self.options.steps
        name = f"{task}-{method}-{setting}-{seed}" + ("" if steps is None else f"-{steps}")
        path = self.folder / f"{name}.json"
        if not path.exists():
            words = [sys.executable, __file__, "--one", task, method, str(setting), str(seed), "--write", str(path)]
            words += [] if steps is None else ["--steps", str(steps)]
            words += [] if self.options.data_dir is None else ["--data-dir", self.options.data_dir]
            problem = self._start(words, path.with_suffix(".late"))
            if problem is not None:
                print(f"{name:36} {problem}", flush=True)
                return None
        found = json.loads(path.read_text())
        print(
            f"{name:36} {found['setting']:32} valid {found['valid']:.4f} test {found['test']:.4f} "
            f"{found['seconds']:7.1f} s",
            flush=True,
        )
        return found

    def _start(self, words: Sequence[str], late: pathlib.Path) -> str | None:
        """Runs a process; what went wrong, if anything did. The file `late` tells of a limit that was not enough."""
        limit = self.options.limit
        if limit is None or not late.exists() or limit > float(late.read_text()):
            try:
                done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=limit)
                return f"failed: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else None
            except subprocess.TimeoutExpired:
                late.write_text(f"{limit:g}")
        return f"left out: took longer than {late.read_text()} s"

    def best(self, task: Task, name: str, method: str) -> list[dict[str, Any]]:
        """The runs of all seeds at the setting that is best on the validation split with the first."""
        sweeps = self.options.sweeps
        places = [i for i, s in enumerate(METHODS[method]) if sweeps is None or s.sweeps in (None, sweeps)]
        first = [self.get(name, method, i, 0) for i in places]
        tried = [r for r in first if r is not None and np.isfinite(r["valid"])]
        if not tried:
            return []
        best = max(tried, key=lambda r: task.sign * r["valid"])
        rest = [self.get(name, method, best["index"], seed) for seed in range(1, self.options.seeds)]
        return [best, *(r for r in rest if r is not None)]


def seconds_to(runs: Sequence[Run], goals: Mapping[int, float], sign: int) -> float:
    """Mean seconds until the validation value, times `sign`, reaches the seed's goal; infinite where a run does not."""
    found = []
    for each in runs:
        history, goal = each["history"], goals[each["seed"]]
        reached = [s for s, v in zip(history["seconds"], history["eval_value"], strict=True) if sign * v >= goal]
        found.append(reached[0] if reached else float("inf"))
    return float(np.mean(found))


def rows(task: Task, name: str, runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """The lines of a task's table."""
    near, end = {}, {}
    for other in runs.get("adam", ()):
        best = max(task.sign * v for v in other["history"]["eval_value"][1:])
        near[other["seed"]] = best - 0.01 * abs(best)
        end[other["seed"]] = task.sign * other["valid"]
    found = []
    for method, each in runs.items():
        if not each:
            continue
        tests = [r["test"] for r in each]
        known = near.keys() >= {r["seed"] for r in each}
        found.append(
            {
                "task": name,
                "method": method,
                "setting": each[0]["setting"],
                "seeds": len(each),
                "test": float(np.mean(tests)),
                "spread": float(np.std(tests)),
                "seconds": float(np.mean([r["seconds"] for r in each])),
                "seconds_to_99": seconds_to(each, near, task.sign) if known else None,
                "seconds_to_end": seconds_to(each, end, task.sign) if known else None,
                "peak_mb": float(np.mean([r["peak_mb"] for r in each])),
            }
        )
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    head = "| task | method | setting (best of those tried) | test | spread | seconds | to 99% | to end | peak MB |"
    out = [head, "|" + " --- |" * 9]
    for r in lines:
        reach, end = ("-" if s is None else f"{s:.1f}" for s in (r["seconds_to_99"], r["seconds_to_end"]))
        out.append(
            f"| {r['task']} ({TASKS[r['task']].unit}) | {r['method']} | {r['setting']} | {r['test']:.4f} | "
            f"{r['spread']:.4f} | {r['seconds']:.1f} | {reach} | {end} | {r['peak_mb']:.0f} |"
        )
    return "\n".join(out) + "\n"


def draw(path: pathlib.Path, all_runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> None:
    """For each task, the validation value over the seconds of training."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture was drawn, since matplotlib is missing: pip install 'eqxproj[plot]'")
        return
    figure = Figure(figsize=(5.0 * len(all_runs), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, runs) in zip(figure.subplots(1, len(all_runs), squeeze=False)[0], all_runs.items(), strict=True):
        for method, each in runs.items():
            if each:
                curve = each[0]["history"]
                axes.plot(curve["seconds"], curve["eval_value"], marker=".", label=method)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(f"validation {TASKS[name].unit}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="all but those on digits by default")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--data-dir", help="folder of the data sets' folders")
    parser.add_argument("--out", default="accuracy", help="folder of the results (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="other than the task's own")
    parser.add_argument("--limit", type=float, help="seconds after which a run is stopped and left out")
    parser.add_argument("--sweeps", type=int, help="of two-color solvers, only the settings with so many sweeps")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, 100 steps")
    parser.add_argument("--one", nargs=4, metavar=("TASK", "METHOD", "SETTING", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        task, method, setting, seed = options.one
        found = run(task, method, int(setting), int(seed), options.data_dir, options.steps)
        partial = options.write.with_suffix(".part")
        partial.write_text(json.dumps(found))
        partial.rename(options.write)  # a file that is there is whole
        return
    if options.quick:
        options.task, options.seeds, options.steps = ["digits"], 1, 100
    names = options.task or [name for name in TASKS if not name.startswith("digits")]
    bench, lines, all_runs = Bench(options), [], {}
    for name in names:
        all_runs[name] = {method: bench.best(TASKS[name], name, method) for method in options.method}
        lines += rows(TASKS[name], name, all_runs[name])
        (bench.folder / "table.md").write_text(table(lines))
        (bench.folder / "results.json").write_text(json.dumps(lines, indent=1))
        draw(bench.folder / "accuracy.png", all_runs)
    print(table(lines))


if __name__ == "__main__":
    main()
