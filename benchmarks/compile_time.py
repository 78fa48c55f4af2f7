"""How long does a recurrence take to compile, for few and for many time steps?

    python benchmarks/compile_time.py [--steps 8 512] [--repeats 3] [--json FILE]

The network is a GRU of 64 units in `jax.lax.scan`, over a batch of 8 sequences. Compared are:

- its gradient;
- its displacement by one cyclic sweep, in which one node goes back through time in order;
- its displacement by a loop of alternating projections, which take all time steps at once. The loop makes several
  sweeps, since a single one reaches only what is next to the loss.

Printed are the medians over the repeats of the seconds for tracing and compilation, with caches cleared before each,
and of the ratio of the longest sequence to the shortest within a round. No spread is given. The number of equations
tells whether anything was unrolled.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from shared import classification, write

import eqxproj


class Recurrent(eqx.Module):
    """A GRU cell along a sequence, and a linear layer at its end."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __call__(self, x):
        state = jax.lax.scan(lambda h, xt: (self.cell(xt, h), None), jnp.zeros(self.cell.hidden_size), x)[0]
        return self.last(state)


_SWEEPS = 8  # so many run in a loop, whose body projects every node

METHODS = {
    "gradient": lambda: eqx.filter_grad(classification),
    "one cyclic sweep": lambda: eqxproj.filter_displacement(classification),
    "alternating projections": lambda: eqxproj.filter_displacement(
        classification,
        solver=eqxproj.AlternatingProjections(),
        steps=_SWEEPS,
    ),
}


def compile_once(method: str, steps: int) -> tuple[float, int]:
    """Seconds from the function to its executable, and the number of equations of its jaxpr."""
    jax.clear_caches()
    k1, k2 = jax.random.split(jax.random.key(0))
    model = Recurrent(eqx.nn.GRUCell(16, 64, key=k1), eqx.nn.Linear(64, 10, key=k2))
    dynamic, static = eqx.partition(model, eqx.is_inexact_array)
    x, y = jnp.zeros((8, steps, 16)), jnp.zeros(8, int)
    direction = METHODS[method]()

    def function(dynamic, x, y):
        return direction(eqx.combine(dynamic, static), x, y)

    start = time.perf_counter()
    traced = jax.jit(function).trace(dynamic, x, y)
    traced.lower().compile()
    return time.perf_counter() - start, _count(traced.jaxpr.jaxpr)


def _count(jaxpr) -> int:
    """The equations of a jaxpr and of all inside it."""
    inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=lambda v: hasattr(v, "jaxpr"))]
    return len(jaxpr.eqns) + sum(_count(p.jaxpr) for p in inner if hasattr(p, "jaxpr"))


def measure(method: str, steps: list[int], repeats: int) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {count: [] for count in steps}
    equations: dict[int, int] = {}
    for _ in range(repeats):
        for count in steps:
            found, equations[count] = compile_once(method, count)
            seconds[count].append(found)
    ratios = np.asarray(seconds[max(steps)]) / np.asarray(seconds[min(steps)])
    return {
        "seconds": {count: float(np.median(s)) for count, s in seconds.items()},
        "equations": equations,
        "ratio": float(np.median(ratios)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 512], help="lengths of the sequence")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    results = {}
    print(f"{'method':26} " + " ".join(f"{f'T={count}':>10}" for count in args.steps) + f" {'ratio':>7}  equations")
    for method in args.method:
        results[method] = found = measure(method, args.steps, args.repeats)
        seconds = " ".join(f"{found['seconds'][count]:9.2f}s" for count in args.steps)
        print(f"{method:26} {seconds} {found['ratio']:7.2f}  {list(found['equations'].values())}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
