"""How well do networks train under hard constraints on the weights: by the defaults, and by what is done otherwise?

    python benchmarks/constraints.py [--quick] [--seeds 3] [--task sparse-90 ...] [--method pruning ...]
        [--data-dir DIR] [--steps N] [--json FILE]

The methods are in `constraints_methods.py`. All of them start from the same parameters and see the same batches, for
the same number of steps. A method with several settings, such as the peak rate, is run at each of them with the first
seed; the setting that is best on the validation split, the last tenth of the training data, is taken for all seeds.
The tasks:

- `sparse-90`, `-95`, `-98`: a relu MLP with two hidden layers of 128, this percentage of each layer's weights zero;
- `two-of-four`: the same, of every four neighbouring weights of a row at most two not zero;
- `two-bits`: the same, every weight one of four levels, with a learned scale for each layer;
- `orthogonal`: the same, orthonormal rows in the first layer;
- `monotone`: an MLP with weights that are not negative and increasing activations, hence increasing in every input,
  fitted to noisy values of an increasing function of 8 inputs.

Images are MNIST from a folder (`--data-dir`), or the digits of the package. Printed are, for each task and method, the
test accuracy (for `monotone` the mean squared error to the function itself): the mean over the seeds and the standard
deviation; the seconds of training, without compilation; and whether the constraint holds in all models: zeros, signs
and the number of levels without any error, orthonormality up to 1e-5. `free`, once for all classifiers, has no
constraint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import constraints_methods as methods
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from constraints_methods import Problem, Setting
from shared import classification, write

import eqxproj
from eqxproj import datasets, sets


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


class Task(NamedTuple):
    """What is trained, how membership is seen, and by which methods.

    `sign` is 1 where a larger score is better, else -1. `data` gives training and test data for a seed.
    """

    make: Callable[[jax.Array], Mlp]
    problem: Problem
    score: Callable[..., Any]
    sign: int
    data: Callable[[int], tuple[Any, Any]]
    holds: Callable[[np.ndarray], bool]
    methods: Mapping[str, Sequence[Setting]]


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


def has_zeros(fraction: float) -> Callable[[np.ndarray], bool]:
    return lambda w: bool(np.count_nonzero(w) <= round((1 - fraction) * w.size))


def has_two_of_four(w: np.ndarray) -> bool:
    return bool(np.all(np.count_nonzero(w.reshape(-1, 4), axis=1) <= 2))


def has_two_bits(w: np.ndarray) -> bool:
    """Whether all entries are -3, -1, 1 or 3 times one number."""
    sizes = np.unique(np.abs(w)).astype(np.float64)
    return len(sizes) == 1 or (len(sizes) == 2 and abs(sizes[1] / sizes[0] - 3) < 1e-6)


def has_orthonormal_rows(w: np.ndarray) -> bool:
    """Whether the rows, or the columns where these are fewer, are orthonormal."""
    wide = (w if w.shape[0] <= w.shape[1] else w.T).astype(np.float64)
    return bool(np.abs(wide @ wide.T - np.eye(len(wide))).max() < 1e-5)


def all_weights(model):
    return [layer.weight for layer in model.layers]


def tasks(data: datasets.Dataset) -> dict[str, Task]:
    """The tasks by name."""
    inputs = int(data.train[0].shape[1])
    everywhere = {
        "defaults": methods.DEFAULTS,
        "defaults, rate": methods.DEFAULTS_AT_RATES,
        "projected adam": methods.PROJECTED_ADAM,
    }
    discrete = {**everywhere, "straight-through": methods.STRAIGHT_THROUGH}
    pruned = {**discrete, "pruning": methods.PRUNING}
    free = {"free": methods.FREE}  # the same for all classifiers

    def classify(chosen, holds, by, where=all_weights):
        def make(key):
            return Mlp((inputs, 128, 128, 10), (jax.nn.relu, jax.nn.relu), key)

        problem = Problem(classification, where, chosen)
        return Task(make, problem, accuracy, 1, lambda _: (data.train, data.test), holds, by)

    return {
        "sparse-90": classify(sets.Sparse(0.1), has_zeros(0.9), {**pruned, **free}),
        "sparse-95": classify(sets.Sparse(0.05), has_zeros(0.95), pruned),
        "sparse-98": classify(sets.Sparse(0.02), has_zeros(0.98), pruned),
        "two-of-four": classify(sets.Sparse(k=2, of=4), has_two_of_four, pruned),
        "two-bits": classify(sets.Quantized(2, scale="learned"), has_two_bits, discrete),
        "orthogonal": classify(
            sets.Orthogonal(),
            has_orthonormal_rows,
            {**everywhere, "penalty": methods.PENALTY, "parametrised": methods.QR},
            lambda m: all_weights(m)[:1],
        ),
        "monotone": Task(
            lambda key: Mlp((8, 32, 32, 1), (jax.nn.relu, jnp.tanh), key),
            Problem(regression, all_weights, sets.NonNegative()),
            mean_squared_error,
            -1,
            increasing_data,
            lambda w: bool(np.all(w >= 0)),
            {**everywhere, "parametrised": methods.POSITIVE_FUNCTION, **free},
        ),
    }


class Run(NamedTuple):
    """The outcome of a setting with a seed: its scores, and whether the constraint holds."""

    valid: float
    test: float
    seconds: float
    holds: bool


def measure(task: Task, setting: Setting, seed: int, steps: int, batch_size: int) -> Run:
    """One run, on nine tenths of the training data."""
    train, test = task.data(seed)
    model_key, train_key = jax.random.split(jax.random.key(seed))
    first = len(train[0]) * 9 // 10
    rest, valid = ([part[rows] for part in train] for rows in (slice(None, first), slice(first, None)))
    model, seconds = methods.run(setting, task.problem, task.make(model_key), rest, steps, batch_size, train_key)
    score = eqx.filter_jit(task.score)
    holds = all(task.holds(np.asarray(w)) for w in task.problem.where(model))
    return Run(float(score(model, *valid)), float(score(model, *test)), seconds, holds)


def compare(task: Task, method: str, seeds: int, steps: int, batch_size: int) -> dict[str, Any]:
    """A method on a task: its best setting by validation with the first seed, then all seeds."""
    tried = {setting: measure(task, setting, 0, steps, batch_size) for setting in task.methods[method]}
    valid = {s: r.valid if np.isfinite(r.valid) else -task.sign * np.inf for s, r in tried.items()}
    best = max(tried, key=lambda setting: task.sign * valid[setting])
    runs = [tried[best], *(measure(task, best, seed, steps, batch_size) for seed in range(1, seeds))]
    tests = [run.test for run in runs]
    return {
        "setting": best.name,
        "mean": float(np.mean(tests)),
        "spread": float(np.std(tests)),
        "tests": tests,
        "seconds": float(np.mean([run.seconds for run in runs])),
        "holds": all(run.holds for run in runs),
        "tried": {setting.name: run._asdict() for setting, run in tried.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, to see that it works")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--task", nargs="+", help="all by default")
    parser.add_argument("--method", nargs="+", help="all of each task by default")
    parser.add_argument("--data-dir", help="folder with MNIST; the digits of the package by default")
    parser.add_argument("--steps", type=int, help="default 800 on MNIST, 600 otherwise")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    name = "mnist" if args.data_dir else "digits"
    data = datasets.load(name, args.data_dir).flatten()
    steps = args.steps or (800 if args.data_dir else 600) // (10 if args.quick else 1)
    batch_size = 256 if args.data_dir else 128
    results: dict[str, Any] = {"data": name, "steps": steps, "batch_size": batch_size, "seeds": args.seeds}
    known = tasks(data)
    if unknown := set(args.task or ()) - set(known):
        parser.error(f"`--task` must be among {', '.join(known)}; got {', '.join(sorted(unknown))}")
    print(f"{name}, {steps} steps of {batch_size} samples, {args.seeds} seeds: mean (standard deviation)\n")
    print("| task | method | setting | test | seconds | holds |\n| --- | --- | --- | --- | --- | --- |")
    for task in args.task or known:
        chosen = [m for m in known[task].methods if args.method is None or m in args.method]
        results[task] = {}
        for method in chosen:
            found = compare(known[task], method, args.seeds, steps, batch_size)
            results[task][method] = found
            text = f"{found['mean']:.4f} ({found['spread']:.4f}) | {found['seconds']:.1f}"
            print(f"| {task} | {method} | {found['setting']} | {text} | {found['holds']} |", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
