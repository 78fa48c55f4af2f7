"""Softmax and normalization as one constraint each, or as chains of elementary ones: which learns better.

    python benchmarks/composites.py [--steps 150] [--seeds 2] [--json FILE] [--model attention ...] [--metric ...]

Each model is trained on the digits of the package, with the same initial parameters, batches and Adam, from the
displacements of both graphs. Three metrics: the default of `train`, where both graphs are close to the gradient; one
in between; and the unit metric, where each constraint pulls as hard as the next. In each metric, cyclic projections
and, in the unit metric, alternating projections as well. Printed are the loss over the test set at the end, the mean
over the seeds, its ratio (single nodes to chains), the number of nodes, and the ratio of the seconds of a step.
"""

from __future__ import annotations

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from shared import classification, write

import eqxproj
from eqxproj._problem._make import make_problem
from eqxproj._program._trace import trace
from eqxproj._training._data import batches
from eqxproj._training._displacement import DEFAULT_METRIC, DEFAULT_TAU, displacement_of, run


class Attention(eqx.Module):
    """The eight rows of an image attend to each other."""

    first: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(8, 16, key=k1)
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=k2)
        self.last = eqx.nn.Linear(128, 10, key=k3)

    def __call__(self, x):
        h = jax.vmap(self.first)(x.reshape(8, 8))
        return self.last((h + self.attention(h, h, h)).ravel())


class Normalized(eqx.Module):
    """A hidden layer behind a normalization of Equinox."""

    first: eqx.nn.Linear
    norm: eqx.Module
    last: eqx.nn.Linear

    def __init__(self, norm, key):
        k1, k2 = jax.random.split(key)
        self.first, self.norm, self.last = eqx.nn.Linear(64, 32, key=k1), norm, eqx.nn.Linear(32, 10, key=k2)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.norm(self.first(x))))  # pyright: ignore[reportCallIssue]


class Gated(eqx.Module):
    """Linear experts, mixed by a softmax."""

    gate: eqx.nn.Linear
    experts: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.gate, self.experts = eqx.nn.Linear(64, 4, key=k1), eqx.nn.Linear(64, 40, key=k2)

    def __call__(self, x):
        return jax.nn.softmax(self.gate(x)) @ self.experts(x).reshape(4, 10)


MODELS = {
    "attention": Attention,
    "layer norm": lambda key: Normalized(eqx.nn.LayerNorm(32), key),
    "rms norm": lambda key: Normalized(eqx.nn.RMSNorm(32), key),
    "group norm": lambda key: Normalized(eqx.nn.GroupNorm(4, 32), key),
    "softmax gate": Gated,
}
SETTINGS = {
    "default": (DEFAULT_METRIC, DEFAULT_TAU, eqxproj.CyclicProjections()),
    "between": (eqxproj.Metric(30.0, 100.0), 0.1, eqxproj.CyclicProjections()),
    "unit": (eqxproj.Metric(), 0.1, eqxproj.CyclicProjections()),
    "unit, two-color": (eqxproj.Metric(), 0.1, eqxproj.AlternatingProjections()),
}


def train(make, setting, composites: bool, data, steps: int, seed: int) -> tuple[float, float, int]:
    """The loss over the test set after the last step, the median of the milliseconds of a step, and the nodes."""
    metric, tau, solver = setting
    parameters, static = eqx.partition(make(jax.random.key(seed)), eqx.is_inexact_array)
    adam = optax.adam(1e-3)
    nodes = []

    @jax.jit
    def step(parameters, state, x, y):
        traced = trace(classification, eqx.combine(parameters, static), (x, y), None)
        problem = make_problem(traced, metric, "neuron", tau, "constant", solver.needs_two_colors, 0.0, composites)
        nodes.append(len(problem.graph.nodes))
        moved = displacement_of(problem, run(problem, solver, 4 if solver.needs_two_colors else 1), False)
        updates, state = adam.update(moved, state, parameters)
        return eqx.apply_updates(parameters, updates), state

    state, times = adam.init(parameters), []
    rows = batches(len(data.train[1]), 64, jax.random.key(100 + seed))
    for _ in range(steps):
        picked = next(rows)
        start = time.perf_counter()
        parameters, state = jax.block_until_ready(step(parameters, state, *(a[picked] for a in data.train)))
        times.append(time.perf_counter() - start)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jtu.tree_leaves(parameters))
    return (
        float(classification(eqx.combine(parameters, static), *data.test)),
        1e3 * float(np.median(times[1:])),
        nodes[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--metric", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    data = eqxproj.datasets.load("digits").flatten()
    results = []
    print(f"{'model':14} {'metric':16} {'single':>8} {'chains':>8} {'ratio':>6} {'nodes':>9} {'time':>6}")
    for name in args.model:
        for setting in args.metric:
            found = {
                joined: [train(MODELS[name], SETTINGS[setting], joined, data, args.steps, s) for s in range(args.seeds)]
                for joined in (True, False)
            }
            single, chains = (np.mean(found[joined], axis=0) for joined in (True, False))
            row = {"model": name, "metric": setting, "single": single.tolist(), "chains": chains.tolist()}
            results.append(row)
            print(
                f"{name:14} {setting:16} {single[0]:8.3f} {chains[0]:8.3f} {single[0] / chains[0]:6.2f} "
                f"{single[2]:4.0f}/{chains[2]:4.0f} {single[1] / chains[1]:6.2f}",
                flush=True,
            )
    write(args.json, results)


if __name__ == "__main__":
    main()
