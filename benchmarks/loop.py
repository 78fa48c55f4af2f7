"""Steps per second of small networks: `eqxproj.train` beside a hand-written loop over a compiled step.

Run it as `python benchmarks/loop.py`. The hand-written loop is what one finds in the documentation of Equinox: a step
under `filter_jit`, batches gathered by numpy. Both are run in turns, several times. Compilation is not counted.
"""

from __future__ import annotations

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import classification

import eqxproj

SIZES = {"tiny": (8, 8, 2, 16), "small": (64, 128, 10, 64)}
"""Name to the inputs, the hidden width, the classes, and the samples of a batch."""


def by_hand(model, x, y, steps: int, batch_size: int) -> float:
    """Seconds of a hand-written loop over gradients."""
    optimizer = optax.adam(3e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)

    @eqx.filter_jit
    def step(model, state, x, y):
        value, gradient = eqx.filter_value_and_grad(classification)(model, x, y)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    jax.block_until_ready(step(model, state, x[:batch_size], y[:batch_size]))
    start = time.perf_counter()
    for _ in range(steps):
        rows = rng.choice(len(x), batch_size, replace=False)
        model, state, value = step(model, state, x[rows], y[rows])
    jax.block_until_ready((model, value))
    return time.perf_counter() - start


def by_train(model, x, y, steps: int, batch_size: int, method: str) -> float:
    """Seconds of `train`, whose history holds them."""
    options = {"optimizer": optax.adam(3e-3)} if method == "gradient" else {}
    result = eqxproj.train(model, (x, y), classification, steps=steps, batch_size=batch_size, method=method, **options)
    return float(result.history["seconds"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"Steps per second, mean (deviation) of {options.repeats} runs of {options.steps} steps.")
    for name, (inputs, width, classes, batch_size) in SIZES.items():
        x = rng.normal(size=(1024, inputs)).astype(np.float32)
        y = rng.integers(0, classes, 1024)
        model = eqx.nn.MLP(inputs, classes, width, 2, key=jax.random.key(0))
        found: dict[str, list[float]] = {"by hand": [], "train, gradient": [], "train, projection": []}
        for _ in range(options.repeats):
            found["by hand"].append(by_hand(model, x, y, options.steps, batch_size))
            for method in ("gradient", "projection"):
                found[f"train, {method}"].append(by_train(model, x, y, options.steps, batch_size, method))
        base = np.asarray(found["by hand"])
        for what, seconds in found.items():
            rate, ratio = options.steps / np.asarray(seconds), base / np.asarray(seconds)
            print(f"{name:6} {what:18} {rate.mean():7.0f} ({rate.std():.0f})  {ratio.mean():.2f} times by hand")


if __name__ == "__main__":
    jnp.zeros(())  # starts the backend before anything is timed
    main()
