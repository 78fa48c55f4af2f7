"""A logic circuit, found from its table: the product of two numbers of two bits, by a network of twelve thresholds.

    python examples/boolean.py [--steps 20000] [--restarts 8]

Every neuron is one constraint: its output is -1 or 1, and its sum is on that side by a margin. The rows of weights lie
on spheres. Nothing here has a gradient. From random copies, relaxed reflect-reflect looks for a point that satisfies
all constraints of all 16 lines of the table at once. Not every start gets there, so that several run side by side.
"""

import argparse
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqxproj

SIZES = (4, 4, 4, 4)
SIGMA = 3.0  # the squared size of a row over its squared margin: small gates, such as AND and majority, fit


class Thresholds(eqx.Module):
    """Layers of thresholds. Each reads -1 and 1, and a constant -1 in the place of a bias."""

    weights: list[jax.Array]

    def __init__(self, key: jax.Array):
        pairs = zip(SIZES[:-1], SIZES[1:], jax.random.split(key, len(SIZES) - 1), strict=True)
        self.weights = [jax.random.normal(k, (after, before + 1)) for before, after, k in pairs]

    def __call__(self, x):
        for weight in self.weights:
            x = jnp.concatenate([x, -jnp.ones(1)])
            x = eqxproj.threshold(weight @ x, margin=np.sqrt(weight.shape[1] / SIGMA))
        return x


def table() -> tuple[jax.Array, jax.Array]:
    """All pairs of numbers of two bits, and the four bits of their product."""

    def bits(number: int, count: int) -> list[int]:
        return [1 if number >> i & 1 else -1 for i in reversed(range(count))]

    pairs = [(a, b) for a in range(4) for b in range(4)]
    x = [bits(a, 2) + bits(b, 2) for a, b in pairs]
    return jnp.array(x, jnp.float32), jnp.array([bits(a * b, 4) for a, b in pairs], jnp.float32)


def loss(model: Thresholds, x: jax.Array, y: jax.Array) -> jax.Array:
    """A set rather than a number to make small: outputs equal targets."""
    return eqxproj.losses.equal(jax.vmap(model)(x), y).sum()


def row(i: int):
    """The constraint on the weights of a layer: each row lies on a sphere."""
    radius = float(np.sqrt(SIZES[i] + 1))
    return lambda model: model.weights[i], eqxproj.sets.Sphere(radius=radius, axis=-1)


def main(argv: Sequence[str] | None = None) -> int:
    """The number of starts that found the circuit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--restarts", type=int, default=8)
    args = parser.parse_args(argv)
    x, y = table()
    model = Thresholds(jax.random.key(0))
    solver = eqxproj.RelaxedReflectReflect(beta=0.5, reweight=1e-3)

    @eqx.filter_jit
    @eqx.filter_vmap
    def search(key):
        spheres = [row(i) for i in range(len(model.weights))]
        problem = eqxproj.feasibility_problem(loss, model, x, y, constraints=spheres)
        found = eqxproj.solve(problem, solver, steps=args.steps, tol=1e-2, start="random", key=key, every=50)
        return found.model, found.stats["steps"]

    models, steps = search(jax.random.split(jax.random.key(1), args.restarts))
    outputs = eqx.filter_vmap(lambda m: jax.vmap(m)(x))(models)
    exact = jnp.all(outputs == y, axis=-1).sum(axis=-1)
    for start in range(args.restarts):
        print(f"start {start}: {int(steps[start]):6} steps, {int(exact[start])} of {len(y)} lines of the table exact")
    return int((exact == len(y)).sum())


if __name__ == "__main__":
    main()
