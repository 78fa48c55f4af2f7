"""How well do networks train under hard constraints on the weights: by projections, and by projected Adam?

    python benchmarks/constraints.py [--quick] [--seeds 3] [--task sparse ...] [--data-dir DIR] [--json FILE]

Compared are `eqxproj.train` with its defaults, and projected Adam: gradients with the same optimizer, initial
parameters and batches, and a projection onto the sets after every step. The tasks:

- `sparse`: a relu MLP with two hidden layers of 128, nine tenths of the weights of each layer zero; test accuracy;
- `two_bits`: the same, every weight one of four levels, with a learned scale for each layer; test accuracy;
- `monotone`: an MLP with weights that are not negative and increasing activations, hence increasing in every input,
  fitted to noisy values of an increasing function of 8 inputs; mean squared error to the function itself;
- `orthogonal`: the MLP with orthonormal rows in its first layer; test accuracy.

Images are MNIST from a folder (`--data-dir`), or the digits of the package. The table also has, for both methods, the
same run without constraints (`free`), and that model projected onto the sets once, at the end (`projected at the end`).
Printed are the mean over the seeds, and as spread the least and the largest.

The script stops where a model that was trained under constraints does not satisfy them: zeros, signs and the number of
levels without any error, orthonormality up to 1e-5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from shared import classification, write

import eqxproj
from eqxproj import datasets, sets

METHODS = ("projection", "projected adam")
ROWS = ("constrained", "free", "projected at the end")


class Mlp(eqx.Module):
    """Linear layers, with an activation behind each but the last."""

    layers: list[eqx.nn.Linear]
    activations: tuple[Callable, ...] = eqx.field(static=True)

    def __init__(self, sizes: Sequence[int], activations: Sequence[Callable], key: jax.Array):
        pairs = zip(sizes[:-1], sizes[1:], jax.random.split(key, len(sizes) - 1), strict=True)
        self.layers = [eqx.nn.Linear(before, after, key=k) for before, after, k in pairs]
        self.activations = tuple(activations)

    def __call__(self, x):
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(layer(x))
        return self.layers[-1](x)


class Plain(sets.AbstractSet):
    """A set as it is, projected onto after every step whatever it is made of: projected Adam."""

    chosen: sets.AbstractSet

    def __call__(self, x):
        return self.chosen(x)


class Task(NamedTuple):
    """What is trained, under which set, and how membership is seen."""

    make: Callable[[jax.Array], Mlp]
    loss: Callable[..., Any]
    score: Callable[..., Any]
    data: Callable[[int], tuple[Any, Any]]
    where: Callable[[Mlp], list[jax.Array]]
    chosen: sets.AbstractSet
    holds: Callable[[np.ndarray], bool]


def accuracy(model, x, y):
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=-1) == y)


def regression(model, x, y):
    return jnp.mean(eqxproj.losses.squared_error(jax.vmap(model)(x), y))


def mean_squared_error(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def increasing_data(seed: int):
    """Noisy samples for training and exact ones for testing of a function that increases in each of its 8 inputs."""
    rng = np.random.default_rng(seed)

    def sample(count: int, noise: float):
        x = rng.uniform(size=(count, 8)).astype(np.float32)
        y = x[:, 0] * x[:, 1] + np.sqrt(x[:, 2]) + np.tanh(6 * (x[:, 3] - 0.5)) + x[:, 4] ** 3
        y = y + np.maximum(x[:, 5], x[:, 6]) + (x[:, 7] > 0.5) + noise * rng.normal(size=count)
        return x, y[:, None].astype(np.float32)

    return sample(4096, 0.2), sample(2048, 0.0)


def tasks(data: datasets.Dataset) -> dict[str, Task]:
    """The tasks by name."""
    inputs = int(data.train[0].shape[1])

    def classify(chosen, holds, where=lambda m: [layer.weight for layer in m.layers]):
        def make(key):
            return Mlp((inputs, 128, 128, 10), (jax.nn.relu, jax.nn.relu), key)

        return Task(make, classification, accuracy, lambda _: (data.train, data.test), where, chosen, holds)

    return {
        "sparse": classify(sets.Sparse(0.1), lambda w: np.count_nonzero(w) <= 0.1 * w.size),
        "two_bits": classify(sets.Quantized(2, scale="learned"), has_two_bits),
        "monotone": Task(
            lambda key: Mlp((8, 32, 32, 1), (jax.nn.relu, jnp.tanh), key),
            regression,
            mean_squared_error,
            increasing_data,
            lambda m: [layer.weight for layer in m.layers],
            sets.NonNegative(),
            lambda w: bool(np.all(w >= 0)),
        ),
        "orthogonal": classify(sets.Orthogonal(), has_orthonormal_rows, lambda m: [m.layers[0].weight]),
    }


def has_two_bits(w: np.ndarray) -> bool:
    """Whether all entries are -3, -1, 1 or 3 times one number."""
    sizes = np.unique(np.abs(w)).astype(np.float64)
    return len(sizes) == 1 or (len(sizes) == 2 and abs(sizes[1] / sizes[0] - 3) < 1e-6)


def has_orthonormal_rows(w: np.ndarray) -> bool:
    """Whether the rows, or the columns where these are fewer, are orthonormal."""
    wide = (w if w.shape[0] <= w.shape[1] else w.T).astype(np.float64)
    return bool(np.abs(wide @ wide.T - np.eye(len(wide))).max() < 1e-5)


def measure(task: Task, seed: int, steps: int, batch_size: int) -> dict[str, dict[str, float]]:
    """The score of one seed, by method and row."""
    train, test = task.data(seed)
    model_key, train_key = jax.random.split(jax.random.key(seed))
    model = task.make(model_key)
    constraints = {"projection": [(task.where, task.chosen)], "projected adam": [(task.where, Plain(task.chosen))]}
    score = eqx.filter_jit(task.score)

    def run(method, constraints):
        return eqxproj.train(
            model,
            train,
            task.loss,
            steps=steps,
            batch_size=batch_size,
            key=train_key,
            method="projection" if method == "projection" else "gradient",
            constraints=constraints,
        ).model

    def check(trained):
        weights = [np.asarray(w) for w in task.where(trained)]
        assert all(task.holds(w) for w in weights), "a constraint does not hold"
        again = eqxproj.apply_constraints(trained, constraints["projection"])
        assert eqx.tree_equal(again, trained), "a projection moves the model that was projected"
        return trained

    found = {}
    for method in METHODS:
        constrained, free = check(run(method, constraints[method])), run(method, ())
        end = check(eqxproj.apply_constraints(free, constraints["projection"]))
        models = dict(zip(ROWS, (constrained, free, end), strict=True))
        found[method] = {row: float(score(trained, *test)) for row, trained in models.items()}
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "least": min(values),
        "largest": max(values),
        "values": list(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, to see that it works")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--task", nargs="+", choices=("sparse", "two_bits", "monotone", "orthogonal"))
    parser.add_argument("--data-dir", help="folder with MNIST; the digits of the package by default")
    parser.add_argument("--steps", type=int, help="default 1,200 on MNIST, 600 otherwise")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    name = "mnist" if args.data_dir else "digits"
    data = datasets.load(name, args.data_dir).flatten()
    steps = args.steps or (1200 if args.data_dir else 600) // (10 if args.quick else 1)
    batch_size = 256 if args.data_dir else 128
    results: dict[str, Any] = {"data": name, "steps": steps, "batch_size": batch_size, "seeds": args.seeds}
    print(f"{name}, {steps} steps of {batch_size} samples, {args.seeds} seeds: mean (least to largest)")
    print(f"{'task':12} {'':22} {METHODS[0]:>26} {METHODS[1]:>26}")
    for task in args.task or tasks(data):
        runs = [measure(tasks(data)[task], seed, steps, batch_size) for seed in range(args.seeds)]
        results[task] = {m: {row: summary([run[m][row] for run in runs]) for row in ROWS} for m in METHODS}
        for row in ROWS:
            cells = [results[task][method][row] for method in METHODS]
            texts = [f"{c['mean']:.4f} ({c['least']:.4f} to {c['largest']:.4f})" for c in cells]
            print(f"{task:12} {row:22} {texts[0]:>26} {texts[1]:>26}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
