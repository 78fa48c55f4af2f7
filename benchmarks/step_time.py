"""What one projection step costs beside one gradient step, in time and in temporary memory.

    python benchmarks/step_time.py [--repeats 25] [--json FILE] [--model mlp128 mlp1024 cnn gru]

For each model the steps run in turn in one process (A B C A B C ...), so that the machine's noise hits all of them
(alternating projections in turn with the gradient step alone: their state would empty the caches of the others);
printed are the medians, and the medians of the ratios to the gradient step of the same round. A gradient step is
`value_and_grad` and Adam; the displacement step is `filter_value_and_displacement` with its defaults and Adam; the
projection step is one step of alternating projections with a copy a neuron, from a state of the loop. The last two are
whole steps of `train` without an optimizer of one's own, by gradients and by its defaults (preconditioned), each with
its checks for non-finite states. Temporary memory is what XLA reports for the compiled step.
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
from shared import classification, in_turn, projection_step, write

import eqxproj
from eqxproj._training._direction import Displacement, Gradient
from eqxproj._training._displacement import checked_options
from eqxproj._training._optimizer import default_optimizer
from eqxproj._training._step import prepare


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


def steps_of(make):
    """The compiled steps of one model, each with its arguments: a function of the last carry."""
    model, x, y = make(jax.random.key(0))
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

    def trained(direction):
        update, start = prepare(model, direction, optax.with_extra_args_support(default_optimizer(1000)), ())

        def step(state, batch):
            return update(state, np.int32(0), batch, jax.random.key(0))[0]

        return jax.jit(step).lower(start, (x, y)).compile(), start, (x, y)

    options = checked_options(None, 1, None, None, None)

    return {
        "gradient + adam": optimized(eqx.filter_value_and_grad(classification)),
        "displacement + adam": optimized(eqxproj.filter_value_and_displacement(classification)),
        "alternating projections": projection_step(model, x, y, copies="neuron"),
        "train, gradients": trained(Gradient(classification, False)),
        "train, defaults": trained(Displacement(classification, False, options, frozenset())),
    }


def measure(make, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, ratio to the gradient step, and temporary bytes, for each step of one model."""
    steps = steps_of(make)
    carries = {name: carry for name, (_, carry, _) in steps.items()}

    def advance(name):
        step, _, data = steps[name]
        carries[name] = step(carries[name], data)
        return carries[name]

    first, large = "gradient + adam", "alternating projections"
    few = {name: ft.partial(advance, name) for name in steps if name != large}
    times = in_turn(few, repeats, warm=3)
    # The state of this one is so large that it would empty the caches for the step after it.
    times[large] = in_turn({first: few[first], large: ft.partial(advance, large)}, repeats, warm=3)[large]
    reports = {name: step.memory_analysis() for name, (step, _, _) in steps.items()}
    memory = {name: r.temp_size_in_bytes for name, r in reports.items()}
    written = {name: r.temp_size_in_bytes + r.output_size_in_bytes for name, r in reports.items()}
    for carry in carries.values():
        assert all(bool(jnp.all(jnp.isfinite(a))) for a in jtu.tree_leaves(carry) if eqx.is_inexact_array(a))
    return {
        name: {
            **row,
            "temporary_mb": memory[name] / 1e6,
            "temporary_ratio": memory[name] / max(memory[first], 1),
            "written_mb": written[name] / 1e6,
            "written_ratio": written[name] / written[first],
        }
        for name, row in times.items()
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
            print(
                f"{name:10} {step:26} {row['ms']:9.2f} {row['ratio']:7.2f} {row['temporary_mb']:9.2f} "
                f"{row['written_mb']:9.2f} {row['written_ratio']:7.2f}"
            )
    write(args.json, results)


if __name__ == "__main__":
    main()
