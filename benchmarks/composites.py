"""Does a network learn better with softmax and normalization as one constraint each, or as chains of elementary ones?

    python benchmarks/composites.py [--steps 150] [--seeds 2] [--json FILE] [--model attention ...] [--metric ...]

Every model is written in two ways that compute the same function. One sums with `jnp.sum`: the library then makes one
node of each softmax and each normalization. The other takes the product with a vector of ones for a sum, which the
library does not read as a part of either, so that their elementary operations remain a node each.

Both are trained on the digits of the package, with the same initial parameters, batches and Adam. Three metrics are
compared: the default of `train`, where both are close to the gradient; one in between; and the unit metric, where each
constraint pulls as hard as the next. The solver is cyclic projections, in the unit metric alternating projections too.

Printed are the loss over the test set after the last step, the mean over the seeds, for both ways and as a ratio
(single nodes to chains), the number of nodes of each, identities left out, and the ratio of the seconds of a step. The
spread is not printed: `--json` has the figures of each seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from shared import classification, write

import eqxproj


def total(x: jax.Array, chains: bool) -> jax.Array:
    """The sum along the last axis, which is kept; with `chains`, as a product."""
    return x @ jnp.ones((x.shape[-1], 1)) if chains else jnp.sum(x, -1, keepdims=True)


def softmax(x: jax.Array, chains: bool) -> jax.Array:
    shifted = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    return shifted / total(shifted, chains)


class Attention(eqx.Module):
    """The eight rows of an image attend to each other, with two heads."""

    first: eqx.nn.Linear
    projections: tuple[eqx.nn.Linear, ...]
    last: eqx.nn.Linear
    chains: bool = eqx.field(static=True)

    def __init__(self, key: jax.Array, chains: bool):
        keys = jax.random.split(key, 6)
        self.first = eqx.nn.Linear(8, 16, key=keys[0])
        self.projections = tuple(eqx.nn.Linear(16, 16, use_bias=False, key=k) for k in keys[1:5])
        self.last = eqx.nn.Linear(128, 10, key=keys[5])
        self.chains = chains

    def __call__(self, x):
        h = jax.vmap(self.first)(x.reshape(8, 8))
        query, key, value = (jax.vmap(p)(h).reshape(8, 2, 8) for p in self.projections[:3])
        scores = jnp.einsum("qhd,khd->hqk", query, key) / np.sqrt(8)
        seen = jnp.einsum("hqk,khd->qhd", softmax(scores, self.chains), value).reshape(8, 16)
        return self.last((h + jax.vmap(self.projections[3])(seen)).ravel())


class Normalized(eqx.Module):
    """A hidden layer behind a normalization in groups: centered, or by the root mean square alone."""

    first: eqx.nn.Linear
    scale: jax.Array
    shift: jax.Array
    last: eqx.nn.Linear
    groups: int = eqx.field(static=True)
    centered: bool = eqx.field(static=True)
    chains: bool = eqx.field(static=True)

    def __init__(self, key: jax.Array, chains: bool, groups: int = 1, centered: bool = True):
        k1, k2 = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(64, 32, key=k1), eqx.nn.Linear(32, 10, key=k2)
        self.scale, self.shift = jnp.ones(32), jnp.zeros(32)
        self.groups, self.centered, self.chains = groups, centered, chains

    def mean(self, h):
        return total(h, self.chains) / h.shape[-1]

    def deviation(self, h):
        return h - self.mean(h) if self.centered else h

    def __call__(self, x):
        h = self.first(x).reshape(self.groups, -1)
        # The deviation is computed twice, as by the layers of Equinox: what is used twice would be a node of its own.
        h = self.deviation(h) * jax.lax.rsqrt(self.mean(self.deviation(h) ** 2) + 1e-5)
        return self.last(jax.nn.relu(self.scale * h.ravel() + self.shift))


class Gated(eqx.Module):
    """Linear experts, mixed by a softmax."""

    gate: eqx.nn.Linear
    experts: eqx.nn.Linear
    chains: bool = eqx.field(static=True)

    def __init__(self, key: jax.Array, chains: bool):
        k1, k2 = jax.random.split(key)
        self.gate, self.experts = eqx.nn.Linear(64, 4, key=k1), eqx.nn.Linear(64, 40, key=k2)
        self.chains = chains

    def __call__(self, x):
        return softmax(self.gate(x), self.chains) @ self.experts(x).reshape(4, 10)


MODELS = {
    "attention": Attention,
    "layer norm": Normalized,
    "rms norm": lambda key, chains: Normalized(key, chains, centered=False),
    "group norm": lambda key, chains: Normalized(key, chains, groups=4),
    "softmax gate": Gated,
}
_CYCLIC = {"solver": eqxproj.CyclicProjections()}
_ALTERNATING = {"solver": eqxproj.AlternatingProjections(), "steps": 4}
SETTINGS = {
    "default": _CYCLIC,
    "between": {"metric": eqxproj.Metric(30.0, 100.0), "tau": 0.1, **_CYCLIC},
    "unit": {"metric": eqxproj.Metric(), "tau": 0.1, **_CYCLIC},
    "unit, two-color": {"metric": eqxproj.Metric(), "tau": 0.1, **_ALTERNATING},
}
"""Options of `eqxproj.filter_displacement`."""


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of one batch after another; each epoch has an order of its own and leaves out what fills no batch."""
    rng = np.random.default_rng(seed)
    while True:
        yield from np.split(rng.permutation(count)[: count // size * size], count // size)


def train(make, setting, chains: bool, data, steps: int, seed: int) -> tuple[float, float, int]:
    """The loss over the test set after the last step, the median of the milliseconds of a step, and the nodes."""
    parameters, static = eqx.partition(make(jax.random.key(seed), chains), eqx.is_inexact_array)
    adam = optax.adam(1e-3)
    direction = eqxproj.filter_displacement(classification, **setting)
    problem = eqxproj.feasibility_problem(classification, make(jax.random.key(seed), chains), *few(data.train))
    nodes = sum(node.kind != "identity" for node in problem.graph.nodes)

    @jax.jit
    def step(parameters, state, x, y):
        moved = direction(eqx.combine(parameters, static), x, y)
        updates, state = adam.update(moved, state, parameters)
        return eqx.apply_updates(parameters, updates), state

    state, times = adam.init(parameters), []
    rows = batches(len(data.train[1]), 64, 100 + seed)
    for _ in range(steps):
        picked = next(rows)
        start = time.perf_counter()
        parameters, state = jax.block_until_ready(step(parameters, state, *(a[picked] for a in data.train)))
        times.append(time.perf_counter() - start)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in jtu.tree_leaves(parameters))
    reached = float(classification(eqx.combine(parameters, static), *data.test))
    return reached, 1e3 * float(np.median(times[1:])), nodes


def few(data):
    return tuple(jnp.asarray(part[:4]) for part in data)


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
            found = [
                [train(MODELS[name], SETTINGS[setting], chains, data, args.steps, s) for s in range(args.seeds)]
                for chains in (False, True)
            ]
            single, chains = (np.mean(runs, axis=0) for runs in found)
            results.append({"model": name, "metric": setting, "single": found[0], "chains": found[1]})
            print(
                f"{name:14} {setting:16} {single[0]:8.3f} {chains[0]:8.3f} {single[0] / chains[0]:6.2f} "
                f"{single[2]:4.0f}/{chains[2]:4.0f} {single[1] / chains[1]:6.2f}",
                flush=True,
            )
    write(args.json, results)


if __name__ == "__main__":
    main()
