"""What does one projection step cost beside one gradient step, in time and in temporary memory?

    python benchmarks/step_time.py [--repeats 25] [--json FILE] [--model mlp128 mlp1024 cnn gru]

Compared for each model:

- a gradient step: `value_and_grad` and Adam;
- a displacement step: `filter_value_and_displacement` with its defaults, and Adam;
- a projection step: one step of alternating projections with a copy a neuron, as it is in the middle of a run;
- a step of `train` without an optimizer of one's own, by gradients and by its defaults (preconditioned), with all that
  `train` does for it: its checks for non-finite states, and the next batch.

The first two run in turn in one process (A B A B ...), so that the machine's noise hits both; alternating projections
run in turn with the gradient step alone, since their state would empty the caches of the others. `train` runs on its
own and says itself how long each step took; gradient steps are timed right before and right after.
Printed are the medians over the repeats of the milliseconds, and of the ratios to the gradient step of the same round;
for `train` the ratio of the medians. No spread is given. Temporary memory is what XLA reports for the compiled step,
which `train` does not hand out.
"""

from __future__ import annotations

import argparse
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from shared import classification, in_turn, projection_step, training_seconds, write

import eqxproj


class Cnn(eqx.Module):
    """Two 3x3 convolutions of 16 channels on 28x28 images, and a linear layer."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 16, 3, padding=1, key=k1)
        self.second = eqx.nn.Conv2d(16, 16, 3, padding=1, key=k2)
        self.last = eqx.nn.Linear(16 * 28 * 28, 10, key=k3)

    def __call__(self, x):
        h = jax.nn.relu(self.first(x))
        return self.last(jax.nn.relu(self.second(h)).ravel())


class Gru(eqx.Module):
    """A GRU of 128 units along 64 characters, and the scores of the next one at each of them."""

    cell: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.cell, self.last = eqx.nn.GRUCell(65, 128, key=k1), eqx.nn.Linear(128, 65, key=k2)

    def __call__(self, x):
        def step(h, character):
            h = self.cell(jax.nn.one_hot(character, 65), h)
            return h, h

        return jax.vmap(self.last)(jax.lax.scan(step, jnp.zeros(128), x)[1])


def models():
    """Name to a function that makes `(model, x, y)`."""

    def mlp(width, batch):
        def make(key):
            model = eqx.nn.MLP(784, 10, width, 2, key=key)
            return model, jax.random.uniform(key, (batch, 784)), jax.random.randint(key, (batch,), 0, 10)

        return make

    def cnn(key):
        return Cnn(key), jax.random.uniform(key, (32, 1, 28, 28)), jax.random.randint(key, (32,), 0, 10)

    def gru(key):
        return Gru(key), *(jax.random.randint(k, (64, 64), 0, 65) for k in jax.random.split(key))

    return {"mlp128": mlp(128, 256), "mlp1024": mlp(1024, 512), "cnn": cnn, "gru": gru}


GRADIENT, PROJECTIONS = "gradient + adam", "alternating projections"
TRAINING = {"train, gradients": "gradient", "train, defaults": "projection"}
"""The steps of `train`, and their method."""
_WARM = 3


def steps_of(model, x, y):
    """The compiled steps of one model, each with its first carry and its arguments: a function of the last carry."""
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    adam = optax.adam(1e-3)

    def optimized(direction):
        def step(carry, batch):
            x, y = batch
            parameters, state = carry
            _, moved = direction(eqx.combine(parameters, static), x, y)
            updates, state = adam.update(moved, state, parameters)
            return eqx.apply_updates(parameters, updates), state

        carry = (parameters, adam.init(parameters))
        return jax.jit(step).lower(carry, (x, y)).compile(), carry, (x, y)

    return {
        GRADIENT: optimized(eqx.filter_value_and_grad(classification)),
        "displacement + adam": optimized(eqxproj.filter_value_and_displacement(classification)),
        PROJECTIONS: projection_step(model, x, y, copies="neuron"),
    }


def measure(make, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, ratio to the gradient step, and temporary memory, for each step of one model."""
    model, x, y = make(jax.random.key(0))
    steps = steps_of(model, x, y)
    carries = {name: carry for name, (_, carry, _) in steps.items()}

    def advance(name):
        step, _, data = steps[name]
        carries[name] = step(carries[name], data)
        return carries[name]

    def in_turn_with_gradient(*names):
        return in_turn({name: ft.partial(advance, name) for name in (GRADIENT, *names)}, repeats, _WARM)

    times = in_turn_with_gradient(*(name for name in steps if name not in (GRADIENT, PROJECTIONS)))
    times[PROJECTIONS] = in_turn_with_gradient(PROJECTIONS)[PROJECTIONS]
    for carry in carries.values():
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jtu.tree_leaves(carry) if eqx.is_inexact_array(a))
    rows = {name: {**times[name], **memory} for name, memory in memory_of(steps).items()}
    for name, method in TRAINING.items():
        before = in_turn_with_gradient()[GRADIENT]["ms"]
        seconds = training_seconds(model, (x, y), classification, repeats, _WARM, method=method)
        beside = (before + in_turn_with_gradient()[GRADIENT]["ms"]) / 2
        milliseconds = 1e3 * float(np.median(seconds))
        rows[name] = {"ms": milliseconds, "ratio": milliseconds / beside}
    return rows


def memory_of(steps) -> dict[str, dict[str, float]]:
    """What each compiled step takes beside its arguments, with and without its outputs."""
    reports = {name: step.memory_analysis() for name, (step, _, _) in steps.items()}
    memory = {name: r.temp_size_in_bytes for name, r in reports.items()}
    written = {name: r.temp_size_in_bytes + r.output_size_in_bytes for name, r in reports.items()}
    return {
        name: {
            "temporary_mb": memory[name] / 1e6,
            "temporary_ratio": memory[name] / max(memory[GRADIENT], 1),
            "written_mb": written[name] / 1e6,
            "written_ratio": written[name] / written[GRADIENT],
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="rounds that count (default 25)")
    parser.add_argument("--model", nargs="+", choices=list(models()), default=list(models()))
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    results = {}
    print(f"{'model':10} {'step':26} {'ms':>9} {'ratio':>7} {'temp MB':>9} {'+ output':>9} {'ratio':>7}")
    for name in args.model:
        results[name] = measure(models()[name], args.repeats)
        for step, row in results[name].items():
            columns = {"temporary_mb": 9, "written_mb": 9, "written_ratio": 7}
            cells = [f"{row[k]:{width}.2f}" if k in row else f"{'-':>{width}}" for k, width in columns.items()]
            print(f"{name:10} {step:26} {row['ms']:9.2f} {row['ratio']:7.2f} {' '.join(cells)}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
