"""How long does it take to trace and to compile a displacement, beside a gradient?

    python benchmarks/compile_time.py [--model NAME ...] [--method NAME ...] [--repeats 5] [--json FILE]

The models are residual chains of 25 to 200 layers, a GRU over 8 and over 512 time steps, an LSTM that reads and one
that writes, a small residual network with batch normalization, and two normalizing flows, which need `flowjax`
(`compile_models.py`). Compared are

- the value of the loss and its gradient;
- the value and the displacement by one cyclic sweep, the default;
- with `--method` also the displacement by a loop of alternating projections, which take all time steps at once. The
  loop makes several sweeps, since a single one reaches only what is next to the loss.

Each is timed once a round, one after another, with caches cleared before. Printed are the medians over the rounds of
the seconds to trace (to a program in XLA's language) and to compile, and of the ratios to the gradient of the same
round, each with its least and its largest; and the number of equations, which tells whether anything was unrolled.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import numpy as np
from compile_models import MODELS
from shared import write

import eqxproj
from eqxproj.rules import _scalar

_SWEEPS = 8  # so many run in a loop, whose body projects every node

METHODS = {
    "gradient": eqx.filter_value_and_grad,
    "one cyclic sweep": eqxproj.filter_value_and_displacement,
    "alternating projections": lambda loss: eqxproj.filter_value_and_displacement(
        loss, solver=eqxproj.AlternatingProjections(), steps=_SWEEPS
    ),
}


def compile_once(method: str, name: str) -> tuple[float, float, int]:
    """Seconds to trace and to compile, and the number of equations of the jaxpr."""
    loss, model, data = MODELS[name]()
    jax.clear_caches()
    _scalar.clear_kinds()
    dynamic, static = eqx.partition((model, data), eqx.is_array)

    def function(dynamic):
        model, data = eqx.combine(dynamic, static)
        return METHODS[method](loss)(model, *data)

    start = time.perf_counter()
    traced = jax.jit(function).trace(dynamic)
    lowered = traced.lower()
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle, _count(traced.jaxpr.jaxpr)


def _count(jaxpr) -> int:
    """The equations of a jaxpr and of all inside it."""
    inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=lambda v: hasattr(v, "jaxpr"))]
    return len(jaxpr.eqns) + sum(_count(p.jaxpr) for p in inner if hasattr(p, "jaxpr"))


def measure(name: str, methods: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """For each method the seconds of each round, and their ratios to those of the first method."""
    found = {method: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            found[method].append(compile_once(method, name))
    rounds = {method: np.asarray(rows, float) for method, rows in found.items()}
    first = rounds[methods[0]]
    return {
        method: {
            **{f"{what} seconds": rows[:, i].tolist() for i, what in enumerate(("trace", "compile"))},
            **{f"{what} ratios": (rows[:, i] / first[:, i]).tolist() for i, what in enumerate(("trace", "compile"))},
            "equations": int(rows[0, 2]),
        }
        for method, rows in rounds.items()
    }


def _spread(values: list[float], unit: str = "") -> str:
    return f"{np.median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="all by default")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS)[:2])
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    results = {}
    columns = ("trace", "compile", "trace ratio", "compile ratio")
    print(f"{'model':14} {'method':24} " + " ".join(f"{c:>20}" for c in columns) + "  equations")
    for name in args.model:
        results[name] = measure(name, args.method, args.repeats)
        for method, row in results[name].items():
            cells = [_spread(row[f"{what} seconds"], "s") for what in ("trace", "compile")]
            cells += [_spread(row[f"{what} ratios"]) for what in ("trace", "compile")]
            print(f"{name:14} {method:24} " + " ".join(f"{c:>20}" for c in cells) + f"  {row['equations']}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
