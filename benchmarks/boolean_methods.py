"""Ways to learn a network on bits: by projections, and by gradients. All starts of one method run at once, by `vmap`.

- `projections`: every neuron and item is one constraint with a margin, and all of them hold at once where relaxed
  reflect-reflect ends. It starts from random copies of everything, and takes shorter steps in the second half.
- `relu`, `relu-l1`: hidden layers of relus, by AdamW. `sign`, `sign-l1`: hidden layers of signs, by Adam, straight
  through: with the derivative of the identity between -1 and 1. `default`: the same signs, by `eqxproj.train` and
  nothing else. The last three and `relu-l1` have a penalty on the absolute values of all weights.

Methods of gradients take all items at each step, a logistic loss, rates that rise and fall (a cosine) around the peak
of 1e-3, and end layers of plain sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from boolean_tasks import Task

import eqxproj

Hidden = Literal["threshold", "relu", "sign", "through"]
L1 = 1e-5


class Network(eqx.Module):
    """Layers whose neurons read the layer before and a constant; one row of weights a neuron."""

    weights: list[jax.Array]
    hidden: Hidden = eqx.field(static=True)
    sigma: float = eqx.field(static=True)

    def __init__(self, task: Task, hidden: Hidden, key: jax.Array):
        sizes = list(zip(task.widths, task.widths[1:], strict=False))
        keys = jax.random.split(key, len(sizes))
        normal = [jax.random.normal(k, (b, a + 1)) for k, (a, b) in zip(keys, sizes, strict=True)]
        self.weights = [w * np.sqrt(2 / w.shape[1]) for w in normal]
        self.hidden, self.sigma = hidden, task.sigma

    def __call__(self, x: jax.Array) -> jax.Array:
        """The outputs of one item: bits, or with gradients numbers with the signs of the bits."""
        for i, w in enumerate(self.weights):
            x = w @ jnp.append(x, 1.0)
            if self.hidden == "threshold":
                x = eqxproj.threshold(x, margin=np.sqrt(w.shape[1] / self.sigma))
            elif i < len(self.weights) - 1:
                x = {"relu": jax.nn.relu, "sign": jnp.sign, "through": _through}[self.hidden](x)
        return x


def _through(s: jax.Array) -> jax.Array:
    smooth = jnp.clip(s, -1.0, 1.0)
    return smooth + jax.lax.stop_gradient(jnp.where(s >= 0, 1.0, -1.0) - smooth)


class Found(NamedTuple):
    """Networks, their leaves stacked, one a start; the seconds that they took, without compilation; and the steps."""

    networks: Network
    seconds: float
    steps: int


def logistic(network: Network, x: jax.Array, y: jax.Array, *, l1: float) -> jax.Array:
    """The mean logistic loss of all bits, and a penalty."""
    penalty = sum(jnp.sum(jnp.abs(w)) for w in network.weights) if l1 else 0.0
    return jnp.mean(jax.nn.softplus(-y * jax.vmap(network)(x))) + l1 * penalty


def affordable(seconds: Callable[[int], float], steps: int, limit: float, probe: int = 50) -> int:
    """At most `steps`, and no more than take `limit` seconds at the pace of a few, after compilation."""
    seconds(1)
    return int(max(probe, min(steps, limit * probe / seconds(probe))))


def gradients(
    task: Task, keys: jax.Array, steps: int, limit: float, *, hidden: Hidden, l1: float, decay: float
) -> Found:
    """Adam or AdamW on all items at once."""
    x, y = map(jnp.asarray, task.learned)
    networks = eqx.filter_vmap(lambda key: Network(task, hidden, key))(keys)
    arrays, rest = eqx.partition(networks, eqx.is_array)

    @eqx.filter_jit
    def run(count: jax.Array, total: jax.Array) -> Any:
        def rate(step):
            return 1e-3 * jnp.minimum(step / (0.02 * total + 1), 0.5 * (1 + jnp.cos(jnp.pi * step / total)))

        optimizer = optax.adamw(rate, weight_decay=decay)

        def of_one(parameters):
            def step(_, carry):
                p, state = carry
                gradient = jax.grad(lambda p: logistic(eqx.combine(p, rest), x, y, l1=l1))(p)
                updates, state = optimizer.update(gradient, state, p)
                return optax.apply_updates(p, updates), state

            return jax.lax.fori_loop(0, count, step, (parameters, optimizer.init(parameters)))[0]

        return jax.vmap(of_one)(arrays)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(jnp.asarray(count), jnp.asarray(steps)))
        return time.perf_counter() - start

    most = affordable(seconds, steps, limit)
    start = time.perf_counter()
    found = jax.block_until_ready(run(jnp.asarray(most), jnp.asarray(most)))
    return Found(eqx.combine(found, rest), time.perf_counter() - start, most)


def default(task: Task, keys: jax.Array, steps: int, limit: float, *, l1: float) -> Found:
    """The defaults of `eqxproj.train`, one start after another."""

    def fit(key: jax.Array, count: int) -> eqxproj.TrainResult:
        batch = min(256, len(task.learned[0]))
        loss, model = partial(logistic, l1=l1), Network(task, "sign", key)
        return eqxproj.train(model, task.learned, loss, steps=count, batch_size=batch, key=key)

    def seconds(count: int) -> float:
        return float(fit(keys[0], count).history["seconds"][-1])

    most = affordable(seconds, steps, limit / len(keys))
    found = [fit(key, most) for key in keys]
    networks = jax.tree.map(lambda *w: jnp.stack(w), *(result.model for result in found))
    return Found(networks, sum(float(result.history["seconds"][-1]) for result in found), most)


_CHUNK, _EVERY = 100, 50  # steps of one call, and from one look at the gap to the next
_BETAS = (0.35, 0.1)  # in the first and in the second half of the steps, or of the time


def projections(task: Task, keys: jax.Array, steps: int, limit: float) -> Found:
    """Relaxed reflect-reflect on the constraints of all neurons and items, from random starts, until all are solved."""
    x, y = map(jnp.asarray, task.learned)
    model = Network(task, "threshold", jax.random.key(0))

    def loss(network, x, y):
        return jnp.sum(eqxproj.losses.equal(jax.vmap(network)(x), y))

    def rows(i: int) -> tuple[Callable[[Network], Any], eqxproj.sets.AbstractSet]:
        size = float(np.sqrt(model.weights[i].shape[1]))
        return lambda network: network.weights[i], eqxproj.sets.Sphere(radius=size, axis=-1)

    solvers = [eqxproj.RelaxedReflectReflect(beta, reweight=1e-3) for beta in _BETAS]
    options = {"steps": min(_CHUNK, steps), "tol": task.tol, "every": _EVERY}
    spheres = [rows(i) for i in range(len(model.weights))]

    def solve(solver: Any, **start: Any) -> tuple[Any, jax.Array, list[jax.Array]]:
        problem = eqxproj.feasibility_problem(loss, model, x, y, data="pinned", constraints=spheres)
        found = eqxproj.solve(problem, solver, **options, **start)
        return found.state, found.stats["steps"] < options["steps"], found.model.weights

    def more(solver, state, done, weights):
        """Goes on with those that are not done."""
        new = jax.vmap(lambda state: solve(solver, start=state))(state)
        return jax.tree.map(lambda a, b: jnp.where(_like(done, a), a, b), (state, done, weights), new)

    first = jax.jit(jax.vmap(lambda key: solve(solvers[0], start="random", key=key))).lower(keys)
    programs = [jax.jit(partial(more, solver)).lower(*first.out_info).compile() for solver in solvers]
    begin, start = first.compile(), time.perf_counter()
    carry, taken = jax.block_until_ready(begin(keys)), options["steps"]
    while (part := max(taken / steps, (time.perf_counter() - start) / limit)) < 1 and not bool(jnp.all(carry[1])):
        carry = jax.block_until_ready(programs[part >= 0.5](*carry))
        taken += options["steps"]
    return Found(eqx.tree_at(lambda n: n.weights, model, carry[2]), time.perf_counter() - start, taken)


def _like(done: jax.Array, x: jax.Array) -> jax.Array:
    return done.reshape(done.shape + (1,) * (x.ndim - done.ndim))


METHODS: dict[str, Callable[..., Found]] = {
    "projections": projections,
    "relu": partial(gradients, hidden="relu", l1=0.0, decay=1e-2),
    "relu-l1": partial(gradients, hidden="relu", l1=L1, decay=1e-2),
    "sign": partial(gradients, hidden="through", l1=0.0, decay=0.0),
    "sign-l1": partial(gradients, hidden="through", l1=L1, decay=0.0),
    "default": partial(default, l1=L1),
}
"""Called with the task, keys (one a start), and at most how many steps and seconds."""
STEPS = {"projections": 1_000_000}
"""At most so many steps; the others take 60,000 where time allows."""


def exact(networks: Network, items: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The parts of bits and of items that are exact, one of each a start."""
    x, y = map(jnp.asarray, items)
    right = eqx.filter_vmap(lambda n: (jax.vmap(n)(x) > 0) == (y > 0))(networks)
    return np.asarray(right.mean((1, 2))), np.asarray(right.all(2).mean(1))
