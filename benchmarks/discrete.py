"""How well do networks with steps that have no gradient train: by projections, straight through, by gradients?

    python benchmarks/discrete.py [--data-dir path/to/mnist] [--steps 1000] [--seeds 3] [--task sign-mlp ...]
    python benchmarks/discrete.py --quick

The model, initial parameters, batches, steps and optimizer (the default of `train`) are the same for all. Compared are:

- `projection`: `train` with its defaults;
- `straight-through`: gradients with the derivative of something smooth in the place of the step's: of the identity
  between -1 and 1 for signs, of the identity for rounding, of softmax for the position of a maximum;
- `gradient`: gradients as they are, which pass nothing through the step;
- `alternating`: alternating projections in a metric of the gradient regime; `difference-map`: that solver in the
  projection regime. They are run only if `--method` names them, and are several times slower.

Printed is the accuracy on the test set: the mean over the seeds, and in brackets their standard deviation. The data are
MNIST from a folder (`--data-dir`), or the digits of the package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from shared import write

import eqxproj

_EXPERTS, _PATCHES = 8, 4


def through(hard: jax.Array, smooth: jax.Array, estimate: bool) -> jax.Array:
    """The hard value; with `estimate`, with the derivative of the smooth one."""
    return smooth + jax.lax.stop_gradient(hard - smooth) if estimate else hard


def sign(x: jax.Array, estimate: bool) -> jax.Array:
    return through(jnp.sign(x), jnp.clip(x, -1, 1), estimate)


def largest(scores: jax.Array, estimate: bool) -> jax.Array:
    """The position of the largest score as a one-hot vector."""
    hard = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1])
    return through(hard, jax.nn.softmax(scores), estimate)


class SignMlp(eqx.Module):
    """Two hidden layers of signs."""

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, side: int, key: jax.Array):
        sizes = (side * side, 128, 128, 10)
        keys = jax.random.split(key, 3)
        self.layers = tuple(eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False))

    def __call__(self, x, estimate):
        x = x.ravel()
        for layer in self.layers[:-1]:
            x = sign(layer(x), estimate)
        return self.layers[-1](x)


class SignCnn(eqx.Module):
    """Two convolutions with signs."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, side: int, key: jax.Array):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 16, 3, padding=1, stride=2, key=k1)
        self.second = eqx.nn.Conv2d(16, 32, 3, padding=1, stride=2, key=k2)
        self.last = eqx.nn.Linear(32 * (-(-side // 4)) ** 2, 10, key=k3)

    def __call__(self, x, estimate):
        x = sign(self.first(x), estimate)
        return self.last(sign(self.second(x), estimate).ravel())


class TwoBits(eqx.Module):
    """Two hidden layers of relus, all weights rounded to four levels, equally far apart."""

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, side: int, key: jax.Array):
        self.layers = SignMlp(side, key).layers

    def __call__(self, x, estimate):
        x = x.ravel()
        for i, layer in enumerate(self.layers):
            unit = 1.0 / np.sqrt(layer.in_features)
            scaled = layer.weight / unit
            rounded = jnp.clip(jnp.floor(scaled), -2.0, 1.0) + 0.5
            weight = unit * through(rounded, scaled, estimate)
            x = weight @ x + layer.bias
            x = jax.nn.relu(x) if i < len(self.layers) - 1 else x
        return x


class HardMixture(eqx.Module):
    """Small networks, one of which is picked for each sample by a gate."""

    gate: eqx.nn.Linear
    first: jax.Array
    second: jax.Array

    def __init__(self, side: int, key: jax.Array):
        k1, k2, k3 = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(side * side, _EXPERTS, key=k1)
        self.first = jax.random.normal(k2, (_EXPERTS, 8, side * side)) / side
        self.second = jax.random.normal(k3, (_EXPERTS, 10, 8)) / np.sqrt(8)

    def __call__(self, x, estimate):
        x = x.ravel()
        hidden = jax.nn.relu(self.first @ x)
        outputs = jnp.einsum("eoh,eh->eo", self.second, hidden)
        return largest(self.gate(x), estimate) @ outputs


class HardAttention(eqx.Module):
    """Strips of the image, each of which looks at one other."""

    first: eqx.nn.Linear
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, side: int, key: jax.Array):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        size = 32
        self.first = eqx.nn.Linear(side * side // _PATCHES, size, key=k1)
        self.query = eqx.nn.Linear(size, 8, key=k2)
        self.key = eqx.nn.Linear(size, 8, key=k3)
        self.last = eqx.nn.Linear(size, 10, key=k4)

    def __call__(self, x, estimate):
        h = jax.nn.relu(jax.vmap(self.first)(x.reshape(_PATCHES, -1)))
        scores = jax.vmap(self.query)(h) @ jax.vmap(self.key)(h).T
        seen = largest(scores, estimate) @ h
        return self.last(jnp.max(seen, 0))


TASKS: dict[str, Callable[[int, jax.Array], Any]] = {
    "sign-mlp": SignMlp,
    "sign-cnn": SignCnn,
    "two-bit-weights": TwoBits,
    "hard-mixture": HardMixture,
    "argmax-attention": HardAttention,
}


_ALTERNATING = {
    "solver": eqxproj.AlternatingProjections(),
    "solver_steps": 24,
    "metric": eqxproj.Metric(1e3, 1e4),
    "tau": 0.1,
    "copies": "neuron",
}

METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "projection": (False, {"method": "projection"}),
    "straight-through": (True, {"method": "gradient"}),
    "gradient": (False, {"method": "gradient"}),
    "alternating": (False, _ALTERNATING),
    "difference-map": (False, {"solver": eqxproj.DifferenceMap(), "solver_steps": 8}),
}
"""Whether straight through, and the options of `train`. The first three are compared if nothing else is said."""


def train(task: str, method: str, data, steps: int, seed: int) -> tuple[float, float]:
    """Test accuracy and seconds of training."""
    estimate, options = METHODS[method]

    def outputs(model, x):
        return jax.vmap(lambda v: model(v, estimate))(x)

    def loss(model, x, y):
        return jnp.mean(eqxproj.losses.cross_entropy(outputs(model, x), y))

    @eqx.filter_jit
    def correct(model, x, y):
        return jnp.sum(jnp.argmax(outputs(model, x), -1) == y)

    model = TASKS[task](data.input_shape[-1], jax.random.key(seed))
    result = eqxproj.train(
        model,
        data.train,
        loss,
        steps=steps,
        batch_size=128,
        key=jax.random.key(100 + seed),
        **options,
    )
    x, y = data.test
    total = sum(int(correct(result.model, x[i : i + 1000], y[i : i + 1000])) for i in range(0, len(y), 1000))
    return total / len(y), float(result.history["seconds"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with MNIST, in the layout of the hub; without it, the digits")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS)[:3])
    parser.add_argument("--quick", action="store_true", help="one seed, 100 steps")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 100, 1
    data = eqxproj.datasets.load("digits" if args.data_dir is None else "mnist", args.data_dir)
    results = []
    print(f"{'task':18} " + " ".join(f"{method:>18}" for method in args.method) + "   (test accuracy, spread)")
    for task in args.task:
        row: dict[str, Any] = {"task": task}
        for method in args.method:
            found = [train(task, method, data, args.steps, seed) for seed in range(args.seeds)]
            accuracies = [a for a, _ in found]
            row[method] = {"test": accuracies, "seconds": float(np.mean([s for _, s in found]))}
        results.append(row)
        cells = [f"{np.mean(row[m]['test']):.4f} ({np.std(row[m]['test']):.4f})" for m in args.method]
        print(f"{task:18} " + " ".join(f"{cell:>18}" for cell in cells), flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
