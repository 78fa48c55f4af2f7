"""Does it pay to take all time steps of a recurrent network at once, beside backpropagation through time?

    python benchmarks/time_parallel.py [--length 64 256 1024 4096] [--cell rnn gru] [--repeats 9] [--quick]

The data are batches of 4 sequences of 8 numbers; the network has 32 hidden units and a linear layer at the end of the
sequence; the label is the sign of the mean of the last 16 entries. Compared are:

- `gradient`: `value_and_grad`, which goes through the cells forth and back, one after the other;
- `one step`: one step of alternating projections on the unrolled recurrence, as it is in the middle of a run, in the
  unit metric (`flat`) and in the default one: two rounds of projections, in each of which all time steps are
  independent;
- `displacement`: the forward pass, which is sequential, and 16 such steps.

Timed in turn within a round; printed are the medians over the rounds of the milliseconds and of the ratios to the
gradient of the same round. No spread is given. `dependent` counts the cells or rounds that wait for each other.
`to the loss` is how many seconds of Adam 3e-3 steps on the displacement pass until the loss is what 60 gradient steps
reach, as a ratio to the seconds of these; `-` where 180 steps do not reach it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import STEEP, classification, in_turn, projection_step, write

import eqxproj

_SWEEPS = 16


class Plain(eqx.Module):
    """The cell of a plain recurrent network."""

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, inputs: int, size: int, key: jax.Array):
        k1, k2 = jax.random.split(key)
        self.inner = eqx.nn.Linear(inputs, size, key=k1)
        self.outer = eqx.nn.Linear(size, size, use_bias=False, key=k2)

    def __call__(self, x, h):
        return jnp.tanh(self.inner(x) + self.outer(h))


class Recurrent(eqx.Module):
    """A cell along a sequence, and a linear layer at its end."""

    cell: Any
    last: eqx.nn.Linear

    def __init__(self, cell: str, key: jax.Array, size: int = 32):
        k1, k2 = jax.random.split(key)
        self.cell = Plain(8, size, k1) if cell == "rnn" else eqx.nn.GRUCell(8, size, key=k1)
        self.last = eqx.nn.Linear(size, 2, key=k2)

    def __call__(self, x):
        start = jnp.zeros(self.last.in_features)
        return self.last(jax.lax.scan(lambda h, xt: (self.cell(xt, h), None), start, x)[0])


def sequences(length: int, key: jax.Array, batch: int = 4):
    x = jax.random.normal(key, (batch, length, 8))
    return x, (x[:, -16:, 0].mean(1) > 0).astype(int)


def displacement():
    return eqxproj.filter_value_and_displacement(classification, solver=eqxproj.AlternatingProjections(), steps=_SWEEPS)


def measure(cell: str, length: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median ratio to the gradient of the same round."""
    k1, k2 = jax.random.split(jax.random.key(0))
    model, (x, y) = Recurrent(cell, k1), sequences(length, k2)
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(classification))
    displaced = eqx.filter_jit(displacement())
    flat, state, data = projection_step(model, x, y)
    default, start, arrays = projection_step(model, x, y, metric=STEEP)
    steps: dict[str, Callable[[], Any]] = {
        "gradient": lambda: gradient(model, x, y),
        "one step, flat": lambda: flat(state, data),
        "one step, default": lambda: default(start, arrays),
        f"displacement, {_SWEEPS} steps": lambda: displaced(model, x, y),
    }
    times = in_turn(steps, repeats, warm=2)
    dependent = dict(zip(steps, (2 * length, 2, 2, length + 2 * _SWEEPS), strict=True))
    return {name: {**row, "dependent": dependent[name]} for name, row in times.items()}


def steps_to_loss(cell: str, length: int, direction, count: int, goal: float | None) -> tuple[int | None, float]:
    """After how many steps the mean of the last ten losses is at the goal, and that mean at the end."""
    adam = optax.adam(3e-3)
    parameters, static = eqx.partition(Recurrent(cell, jax.random.key(0)), eqx.is_inexact_array)
    state, losses = adam.init(parameters), []

    @jax.jit
    def step(parameters, state, key):
        x, y = sequences(length, key, 16)
        value, moved = direction(eqx.combine(parameters, static), x, y)
        updates, state = adam.update(moved, state, parameters)
        return eqx.apply_updates(parameters, updates), state, value

    for i in range(count):
        parameters, state, value = step(parameters, state, jax.random.key(1000 + i))
        losses.append(float(value))
        if goal is not None and i >= 10 and np.mean(losses[-10:]) <= goal:
            return i + 1, float(np.mean(losses[-10:]))
    return None, float(np.mean(losses[-10:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--cell", nargs="+", choices=["rnn", "gru"], default=["rnn", "gru"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-loss", action="store_true", help="only the times of a step")
    parser.add_argument("--quick", action="store_true", help="two short lengths, three rounds, times only")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    if args.quick:
        args.length, args.repeats, args.no_loss = [16, 64], 3, True
    print(f"on {jax.devices()[0].device_kind}")
    print(f"{'cell':5} {'T':>6} {'':24} {'ms':>9} {'ratio':>7} {'dependent':>10} {'to the loss':>12}")
    results = []
    for cell in args.cell:
        for length in args.length:
            found = measure(cell, length, args.repeats)
            last = f"displacement, {_SWEEPS} steps"
            if not args.no_loss:
                _, goal = steps_to_loss(cell, length, eqx.filter_value_and_grad(classification), 60, None)
                count, _ = steps_to_loss(cell, length, displacement(), 180, goal)
                found[last]["to_the_loss"] = float("nan") if count is None else count / 60 * found[last]["ratio"]
            results.append({"cell": cell, "length": length, "steps": found})
            for name, row in found.items():
                reached = row.get("to_the_loss")
                text = "" if reached is None else ("-" if np.isnan(reached) else f"{reached:.2f}")
                cells = f"{row['ms']:9.2f} {row['ratio']:7.2f} {row['dependent']:10} {text:>12}"
                print(f"{cell:5} {length:6} {name:24} {cells}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
