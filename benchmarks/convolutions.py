"""What laying out convolutions gains on a CPU: each, and its transposes, in the outermost program and in a loop.

    python benchmarks/convolutions.py [--repeats 15] [--groups 1 4 16 32] [--sweeps 8] [--json FILE]

A 3x3 convolution of 32 channels on 64 images of 16x16, in groups, as it is and as `eqxproj` writes it: its value, and
its transposes to the input and to the kernel. All run in turn in one process; printed are the medians of the
milliseconds of each, and of the ratios of the plain one to the one laid out. The last line is a step of
Adam on the displacement by so many sweeps of alternating projections, on the convolutional network of `step_time.py`.
"""

from __future__ import annotations

import argparse
import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import classification, in_turn, write
from step_time import models

import eqxproj
from eqxproj._program._canonical import lowered
from eqxproj._training._displacement import displacement_of, run

_IN_A_LOOP = 5


def pair(function: Callable, arguments: tuple, repeats: int) -> dict[str, float]:
    """Medians of a function as traced and as laid out, each compiled, and their ratio."""
    plain = jax.jit(function).lower(*arguments).compile()
    laid = lowered(function, *arguments).compile()
    for a, b in zip(*(jax.tree_util.tree_leaves(f(*arguments)) for f in (plain, laid)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(a), initial=0.0)))
    steps = {"laid out": ft.partial(laid, *arguments), "plain": ft.partial(plain, *arguments)}
    times = in_turn(steps, repeats, warm=2)
    return {
        "plain_ms": times["plain"]["ms"],
        "laid_out_ms": times["laid out"]["ms"],
        "ratio": times["plain"]["ratio"],
    }


def convolution(groups: int, repeats: int) -> dict[str, dict[str, float]]:
    """A convolution in groups: value and transposes, outermost and in a loop (milliseconds of one turn)."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(k1, (64, 32, 16, 16)), jax.random.normal(k2, (32, 32 // groups, 3, 3))
    g = jax.random.normal(k3, x.shape)

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups)

    parts = {
        "value": lambda x, w, g: conv(x, w),
        "to the input": lambda x, w, g: jax.vjp(lambda x: conv(x, w), x)[1](g)[0],
        "to the kernel": lambda x, w, g: jax.vjp(lambda w: conv(x, w), w)[1](g)[0],
    }

    def looped(part, x, w, g):
        def body(i, total):
            scale = 1.0 + 1e-6 * i.astype(x.dtype)  # or it would be computed once
            return total + part(scale * x, w, scale * g)

        return jax.lax.fori_loop(0, _IN_A_LOOP, body, jnp.zeros_like(part(x, w, g)))

    rows = {}
    for name, part in parts.items():
        rows[f"{name}, outermost"] = pair(part, (x, w, g), repeats)
        row = pair(ft.partial(looped, part), (x, w, g), repeats)
        rows[f"{name}, in a loop"] = {k: v / (1 if k == "ratio" else _IN_A_LOOP) for k, v in row.items()}
    return rows


def sweeps(count: int, repeats: int) -> dict[str, float]:
    """A step of Adam on a displacement of so many sweeps."""
    model, x, y = models()["cnn"](jax.random.key(0))
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    adam = optax.adam(1e-3)
    state = adam.init(parameters)

    def step(parameters, state, x, y):
        model = eqx.combine(parameters, static)
        problem = eqxproj.feasibility_problem(classification, model, x, y, metric=eqxproj.Metric(5.0, 1e4))
        found = run(problem, eqxproj.AlternatingProjections(), count)
        updates, state = adam.update(displacement_of(problem, found, False), state, parameters)
        return eqx.apply_updates(parameters, updates), state

    return pair(step, (parameters, state, x, y), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (default 15)")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16, 32], help="divisors of 32")
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':12} {'':26} {'plain ms':>10} {'laid out':>10} {'ratio':>8}")

    def show(name, part, row):
        results.setdefault(name, {})[part] = row
        print(f"{name:12} {part:26} {row['plain_ms']:10.2f} {row['laid_out_ms']:10.2f} {row['ratio']:8.2f}", flush=True)

    for groups in args.groups:
        for part, row in convolution(groups, args.repeats).items():
            show(f"{groups} groups", part, row)
    show("cnn", f"step, {args.sweeps} sweeps", sweeps(args.sweeps, max(args.repeats // 3, 1)))
    write(args.json, results)


if __name__ == "__main__":
    main()
