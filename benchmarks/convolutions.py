"""What does it gain on a CPU that the library brings convolutions into a form that XLA has fast programs for?

    python benchmarks/convolutions.py [--repeats 15] [--groups 1 4 16 32] [--sweeps 8] [--json FILE]

Programs that `eqxproj` compiles have their convolutions canonicalised (a fixed order of axes, groups as channels);
programs that the user compiles with `jax.jit` have them as JAX writes them. Compared are, in both forms:

- gradient steps on a 3x3 convolution of 32 channels in groups, on 64 images of 16x16: its value, and its transpose to
  the input or to the kernel, once (`outermost`) and several times in the body of a `scan` (`in a loop`); canonicalised
  by `eqxproj.train(..., method="gradient")`, which says itself how long each step took, the next batch and its checks
  included, and plain in a step of one's own, timed right before and right after;
- a step of Adam on the displacement by `--sweeps` sweeps of alternating projections, on the convolutional network of
  `step_time.py`; canonicalised by `eqxproj.filter_displacement`, and plain by a loop of one's own over the solver's
  steps; both in turn within a round.

Printed are the medians over the repeats of the milliseconds of each (in a loop: of one turn), and the ratio of the
plain form to the canonicalised one. No spread is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from shared import classification, in_turn, steady, training_seconds, write
from step_time import models

import eqxproj

_TURNS = 5
_WARM = 2


def mean_of_convolution(groups: int, kernel_of: Callable, input_of: Callable, turns: int):
    """A loss of a single array: the mean of a convolution times an array of its size, over so many turns.

    **Arguments:**

    - `groups`: of the convolution's channels.
    - `kernel_of`, `input_of`: functions of the array and the data to kernel and input.
    - `turns`: turns of a `scan`; one is taken without it.
    """

    def once(array, x, g, scale):
        kernel, inputs = kernel_of(array), scale * input_of(array, x)
        out = jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", feature_group_count=groups)
        return jnp.mean(out * g)

    def loss(array, x, g):
        if turns == 1:
            return once(array, x, g, 1.0)
        scales = 1.0 + 1e-6 * jnp.arange(turns)  # all alike, it would be computed once
        return jax.lax.scan(lambda sum_, scale: (sum_ + once(array, x, g, scale), None), jnp.asarray(0.0), scales)[0]

    return loss


def plain_milliseconds(loss: Callable, array: jax.Array, data, optimizer, repeats: int) -> float:
    """The median over the steps of a loop of gradients as one writes it by hand."""

    @jax.jit
    def step(array, state, *data):
        value, gradient = jax.value_and_grad(loss)(array, *data)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(array, updates), state, value

    state = optimizer.init(array)
    return in_turn({"plain": lambda: step(array, state, *data)}, repeats, _WARM)["plain"]["ms"]


def convolution(groups: int, repeats: int) -> dict[str, dict[str, float]]:
    """A convolution in groups: value and a transpose, outermost and in a loop (milliseconds of one turn)."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(k1, (64, 32, 16, 16)), jax.random.normal(k2, (32, 32 // groups, 3, 3))
    data, optimizer = (x, jax.random.normal(k3, x.shape)), optax.sgd(1e-3)
    parts = {
        "to the input": (jnp.zeros(x.shape[1:]), lambda array: kernel, lambda array, x: x + array),
        "to the kernel": (kernel, lambda array: array, lambda array, x: x),
    }
    rows = {}
    for name, (array, kernel_of, input_of) in parts.items():
        for where, turns in (("outermost", 1), ("in a loop", _TURNS)):
            loss = mean_of_convolution(groups, kernel_of, input_of, turns)
            before = plain_milliseconds(loss, array, data, optimizer, repeats)
            seconds = training_seconds(array, data, loss, repeats, _WARM, method="gradient", optimizer=optimizer)
            after = plain_milliseconds(loss, array, data, optimizer, repeats)
            plain, trained = (before + after) / 2, 1e3 * float(np.median(seconds))
            row = {"plain_ms": plain / turns, "canonicalised_ms": trained / turns, "ratio": plain / trained}
            rows[f"{name}, {where}"] = row
    return rows


def by_hand(metric: eqxproj.Metric, count: int) -> Callable:
    """The displacement of `eqxproj.filter_displacement(..., raw=True)`, by a loop of one's own."""
    solver = eqxproj.AlternatingProjections()

    def displacement(model, x, y):
        problem = eqxproj.feasibility_problem(classification, model, x, y, metric=metric)

        def step(state):
            return solver.step(problem, state)

        start = steady(step, solver.init(problem))
        state = jax.lax.fori_loop(0, count, lambda _, state: step(state), start)
        leaves, structure = jtu.tree_flatten(eqx.filter(model, eqx.is_inexact_array))
        moved = [before - after for before, after in zip(leaves, solver.postprocess(problem, state), strict=True)]
        return jtu.tree_unflatten(structure, moved)

    return displacement


def sweeps(count: int, repeats: int) -> dict[str, float]:
    """A step of Adam on a displacement of so many sweeps, in both forms, whose results are compared."""
    model, x, y = models()["cnn"](jax.random.key(0))
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    metric, adam = eqxproj.Metric(), optax.adam(1e-3)
    canonicalised = eqxproj.filter_displacement(
        classification, solver=eqxproj.AlternatingProjections(), steps=count, metric=metric, raw=True
    )

    def compiled(direction):
        def step(parameters, state, x, y):
            moved = direction(eqx.combine(parameters, static), x, y)
            updates, state = adam.update(moved, state, parameters)
            return eqx.apply_updates(parameters, updates), state, moved

        arguments = (parameters, adam.init(parameters), x, y)
        made = jax.jit(step).lower(*arguments).compile()
        return lambda: made(*arguments)

    steps = {"canonicalised": compiled(canonicalised), "plain": compiled(by_hand(metric, count))}
    found = (jtu.tree_leaves(step()[2]) for step in steps.values())
    for parameter, a, b in zip(jtu.tree_leaves(parameters), *found, strict=True):
        # By hand, a move is the difference of two parameters: below their rounding it is lost.
        rounding = jnp.finfo(parameter.dtype).eps * jnp.max(jnp.abs(parameter))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=float(1e-3 * jnp.max(jnp.abs(a)) + rounding))
    times = in_turn(steps, repeats, _WARM)
    return {
        "plain_ms": times["plain"]["ms"],
        "canonicalised_ms": times["canonicalised"]["ms"],
        "ratio": times["plain"]["ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (default 15)")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16, 32], help="divisors of 32")
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':12} {'':26} {'plain ms':>10} {'canonical':>10} {'ratio':>8}")

    def show(name, part, row):
        results.setdefault(name, {})[part] = row
        numbers = f"{row['plain_ms']:10.2f} {row['canonicalised_ms']:10.2f} {row['ratio']:8.2f}"
        print(f"{name:12} {part:26} {numbers}", flush=True)

    for groups in args.groups:
        for part, row in convolution(groups, args.repeats).items():
            show(f"{groups} groups", part, row)
    show("cnn", f"step, {args.sweeps} sweeps", sweeps(args.sweeps, max(args.repeats // 3, 1)))
    write(args.json, results)


if __name__ == "__main__":
    main()
