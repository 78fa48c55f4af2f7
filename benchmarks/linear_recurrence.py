"""Is the exact projection of a linearized recurrence, in O(log T) dependent steps, worth its matrices?

    python benchmarks/linear_recurrence.py [--length 64 256 1024 4096] [--size 8 32] [--cell rnn gru] [--repeats 9]

Linearized at the states $h_t$ of a forward pass, a recurrence $h_t = f(h_{t-1}, x_t)$ is $\\delta_t = J_t \\delta_{t-1}
+ r_t$: a composition of affine maps, which an associative scan takes in $O(\\log T)$ dependent steps instead of T. The
duals go back likewise through $\\lambda_t = \\nu_t + J_{t+1}^T \\lambda_{t+1}$, and the duals of the parameters are a
sum over all time steps at once. The price is a matrix for each time step and sample, and products of them. Newton's
method on the whole sequence (DEER, Lim et al. 2023, arXiv 2309.12252) makes the forward pass of the same scans.

Compared are:

- `gradient`: `filter_grad`, one cell after another forth and back;
- `projection`: `filter_displacement`, whose node of the recurrence goes back in time in order;
- `scan back`: the forward pass in order, the duals by an associative scan;
- `scan both`: the forward pass too, by six of Newton's steps from zero.

Timed in turn within a round; printed are the medians over the rounds of the milliseconds and of the ratios to the
gradient of the same round. No spread is given. `cosine` is the least one of any parameter's answer with its gradient
(the best is 1), `dependent` the number of cells or products that wait for each other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from shared import classification, in_turn, write
from time_parallel import Recurrent, sequences

import eqxproj

_NEWTON = 6


def affine(matrices: jax.Array, offsets: jax.Array, reverse: bool = False) -> jax.Array:
    """$s_t = A_t s_{t-1} + b_t$ from $s_{-1} = 0$, along the first axis, by an associative scan."""

    def after(first, second):
        (a, b), (c, d) = first, second
        return c @ a, jnp.einsum("...ij,...j->...i", c, b) + d

    return jax.lax.associative_scan(after, (matrices, offsets), reverse=reverse)[1]


def jacobians(cell, xs, entering):
    """$\\partial f/\\partial h$ at each time step and sample."""
    return jax.vmap(jax.vmap(jax.jacfwd(cell, argnums=1)))(xs, entering)


def entering_of(states: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])


def in_order(cell, xs, start):
    """The states of the forward pass, one after the other."""
    over = jax.vmap(cell)

    def step(h, x):
        h = over(x, h)
        return h, h

    return jax.lax.scan(step, start, xs)[1]


def by_newton(cell, xs, start):
    """The states by Newton's method on the whole sequence."""
    states = jnp.zeros((xs.shape[0], *start.shape))
    for _ in range(_NEWTON):
        before = entering_of(states)
        matrices = jacobians(cell, xs, before)
        offsets = jax.vmap(jax.vmap(cell))(xs, before) - jnp.einsum("...ij,...j->...i", matrices, before)
        states = affine(matrices, offsets)
    return states


def direction(forward: Callable[..., jax.Array]):
    """The answer to the gradient of a `Recurrent` model, with duals that go back by an associative scan."""

    def answer(model: Recurrent, x: jax.Array, y: jax.Array):
        xs = jnp.swapaxes(x, 0, 1)
        states = forward(model.cell, xs, jnp.zeros((x.shape[0], model.last.in_features)))

        def head(last, h):
            return jnp.mean(eqxproj.losses.cross_entropy(jax.vmap(last)(h), y))

        of_last, nu = eqx.filter_grad(lambda pair: head(*pair))((model.last, states[-1]))
        before = entering_of(states)
        # What reaches the state that leaves step t is what the next step hands back of its own.
        back = jnp.swapaxes(jacobians(model.cell, xs[1:], before[1:]), -1, -2)
        back = jnp.concatenate([back, jnp.zeros_like(back[:1])])
        duals = affine(back, jnp.zeros_like(states).at[-1].set(nu), reverse=True)
        weights, rest = eqx.partition(model.cell, eqx.is_inexact_array)
        outputs = lambda w: jax.vmap(jax.vmap(eqx.combine(w, rest)))(xs, before)  # noqa: E731
        (of_cell,) = jax.vjp(outputs, weights)[1](duals)
        return eqx.tree_at(lambda m: (m.cell, m.last), eqx.filter(model, eqx.is_inexact_array), (of_cell, of_last))

    return answer


def least_cosine(found: Any, wanted: Any) -> float:
    pairs = zip(jtu.tree_leaves(found), jtu.tree_leaves(wanted), strict=True)
    return min(float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))) for a, b in pairs)


def measure(cell: str, size: int, length: int, repeats: int) -> dict[str, dict[str, float]]:
    k1, k2 = jax.random.split(jax.random.key(0))
    model, (x, y) = Recurrent(cell, k1, size), sequences(length, k2)
    gradient = eqx.filter_grad(classification)
    ways = {
        "gradient": gradient,
        "projection": eqxproj.filter_displacement(classification),
        "scan back": direction(in_order),
        "scan both": direction(by_newton),
    }
    compiled = {name: eqx.filter_jit(way) for name, way in ways.items()}
    times = in_turn({n: (lambda f=f: f(model, x, y)) for n, f in compiled.items()}, repeats, warm=2)
    depth = 2 * math.ceil(math.log2(length))
    dependent = dict(zip(ways, (2 * length, 2 * length, length + depth, (_NEWTON + 1) * depth), strict=True))
    wanted = compiled["gradient"](model, x, y)
    cosines = {name: least_cosine(f(model, x, y), wanted) for name, f in compiled.items()}
    return {n: {**row, "cosine": cosines[n], "dependent": dependent[n]} for n, row in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--size", type=int, nargs="+", default=[8, 32], help="hidden units")
    parser.add_argument("--cell", nargs="+", choices=["rnn", "gru"], default=["rnn", "gru"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one short length, three rounds")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    if args.quick:
        args.length, args.size, args.repeats = [32], [8], 3
    print(f"on {jax.devices()[0].device_kind}")
    print(f"{'cell':5} {'size':>5} {'T':>6} {'':12} {'ms':>9} {'ratio':>7} {'cosine':>8} {'dependent':>10}")
    results = []
    for cell in args.cell:
        for size in args.size:
            for length in args.length:
                found = measure(cell, size, length, args.repeats)
                results.append({"cell": cell, "size": size, "length": length, "ways": found})
                for name, row in found.items():
                    numbers = f"{row['ms']:9.2f} {row['ratio']:7.2f} {row['cosine']:8.4f} {row['dependent']:10}"
                    print(f"{cell:5} {size:5} {length:6} {name:12} {numbers}", flush=True)
    write(args.json, results)


if __name__ == "__main__":
    main()
