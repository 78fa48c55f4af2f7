"""How well are logic circuits learned from their inputs and outputs: by projections, by gradients?

    python benchmarks/boolean.py [--task rule30 ...] [--method projections ...] [--seeds 5] [--limit 60]
        [--first-seed 0]
    python benchmarks/boolean.py --quick

What is learned stands in `boolean_tasks.py`, how in `boolean_methods.py`. Printed are, for items that were not learned
from, the parts of bits and of items that are exact: the mean over the starts, and in brackets the standard deviation.
The seconds, without compilation, are those of all starts of a method together, which run at once; those of `default`
run in turn. A method takes its own number of steps, but no more than fit into `--limit` seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
from boolean_methods import METHODS, STEPS, exact
from boolean_tasks import TASKS, Task
from shared import write


def row(task: Task, method: str, seeds: range, steps: int | None, limit: float) -> dict[str, Any]:
    """One line of the table."""
    keys = jax.random.split(jax.random.key(1), seeds.stop)[seeds.start :]
    found = METHODS[method](task, keys, steps or STEPS.get(method, 60_000), limit)
    learned, (bits, items) = exact(found.networks, task.learned)[0], exact(found.networks, task.unseen)
    figures = {"learned_bits": learned, "bits": bits, "items": items}
    return {"steps": found.steps, "seconds": found.seconds, **{k: v.tolist() for k, v in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="starts of each method")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first start")
    parser.add_argument("--steps", type=int, help="steps of every method, in place of its own number")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="of one method on one task")
    parser.add_argument("--quick", action="store_true", help="the multiplier alone, two starts, 200 steps")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    if args.quick:
        args.task, args.seeds, args.steps = ["multiplier"], 2, 200
    print(f"{jax.devices()[0].device_kind}, {args.seeds} starts\n")
    heads = ("bits exact", "items exact", "bits learned")
    print(f"{'task':13} {'method':12} " + " ".join(f"{h:>16}" for h in heads) + f" {'seconds':>8} {'steps':>8}")
    results = []
    for name in args.task:
        task = TASKS[name]()
        for method in args.method:
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            found = row(task, method, seeds, args.steps, args.limit)
            results.append({"task": name, "method": method, **found})
            cells = [f"{np.mean(found[k]):.4f} ({np.std(found[k]):.4f})" for k in ("bits", "items", "learned_bits")]
            ends = f"{found['seconds']:8.1f} {found['steps']:8}"
            print(f"{name:13} {method:12} " + " ".join(f"{cell:>16}" for cell in cells) + " " + ends, flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
