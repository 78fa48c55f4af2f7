"""Hostile inputs of the parts: metrics, solvers, sets, losses, rules, data sets, the command line, Flax models."""

from __future__ import annotations

import contextlib
import fractions
import io
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from hostile_inputs import INF, MODEL, NAN, NO_FLAG, NO_FUNCTION, NO_POSITIVE, Case, X, Y, each, right, train

import eqxproj
from eqxproj import losses, sets
from eqxproj._compare._command import main


def cases_of_numbers() -> Iterator[Case]:
    yield from each(eqxproj.Metric, "grade", *NO_POSITIVE)
    yield from each(eqxproj.Metric, "parameter", *NO_POSITIVE)
    yield from each(eqxproj.DouglasRachford, "relaxation", *NO_POSITIVE, 1.5)
    yield from each(eqxproj.DifferenceMap, "beta", *NO_POSITIVE, 2.5)
    yield from each(eqxproj.RelaxedReflectReflect, "beta", *NO_POSITIVE, 2.5)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5), fractions.Fraction(1, 2)):
        kind = type(number).__name__
        yield right(f"Metric({kind})", lambda n=number: eqxproj.Metric(n, n), lambda m: m == eqxproj.Metric(0.5, 0.5))
        yield right(f"DifferenceMap({kind})", lambda n=number: eqxproj.DifferenceMap(n), lambda s: s.beta == 0.5)
        yield right(f"Box({kind})", lambda n=number: sets.Box(-n, n), lambda s: (s.low, s.high) == (-0.5, 0.5))
    for number in (np.int64(2), np.int32(2), np.uint8(2)):
        kind = type(number).__name__
        yield right(f"Metric({kind})", lambda n=number: eqxproj.Metric(n), lambda m: m.grade == 2.0)
        yield right(f"Sparse(k={kind})", lambda n=number: sets.Sparse(k=n), lambda s: s.k == 2)
        yield right(f"LowRank({kind})", lambda n=number: sets.LowRank(n), lambda s: s.rank == 2)


def cases_of_sets() -> Iterator[Case]:
    yield from each(sets.Box, "low", "1", None, NAN, INF, [0.0], 1j, 2.0, True, high=1.0)
    yield from each(sets.Box, "high", "1", None, NAN, -INF, [0.0], 1j, -2.0, True, low=-1.0)
    yield from each(sets.Sparse, "kept_fraction", 0.0, -0.5, 1.5, NAN, True, "half", [0.5])
    yield from each(sets.Sparse, "k", 0, -1, 1.5, True, "2", [2])
    yield from each(sets.Sparse, "of", 0, -1, 1.5, True, "2", [2], k=1)
    yield Case("Sparse()", sets.Sparse, "kept_fraction")
    yield Case("Sparse(0.1, k=1)", lambda: sets.Sparse(0.1, k=1), "kept_fraction")
    for made in (sets.Sparse, sets.L1Ball, sets.L2Ball, sets.Sphere, sets.Simplex, sets.Equal):
        more: dict[str, Any] = {"k": 1} if made is sets.Sparse else {}
        yield from each(made, "axis", 1.5, "last", [0, 1], (), (0, "a"), True, **more)
        for axis in (2, -3, (0, 0), (0, 2)):
            chosen = made(axis=axis, **more)
            yield Case(f"{chosen} of a matrix", lambda s=chosen: s(jnp.ones((2, 3))), "axis")
    for made in (sets.L1Ball, sets.L2Ball, sets.Sphere, sets.SpectralBall):
        yield from each(made, "radius", *NO_POSITIVE)
    yield from each(sets.Simplex, "total", *NO_POSITIVE)
    yield from each(sets.LowRank, "rank", 0, -1, 1.5, True, "2", None)
    yield from each(sets.Monotone, "axis", 1.5, None, "last", (0,), True)
    yield from each(sets.Monotone, "increasing", *NO_FLAG)
    yield from each(sets.Quantized, "levels", [], "12", [NAN], [INF], ["a"], None, True, 2, 1.5, [[1.0], [2.0]])
    yield from each(sets.Quantized, "levels", 0, 9, [0.0], scale="learned")
    yield from each(sets.Quantized, "scale", 0, -1, NAN, INF, "fit", True, [1.0], levels=[0.0, 1.0])
    for s in (sets.Orthogonal(), sets.LowRank(1), sets.SpectralBall()):
        yield Case(f"{s} of a vector", lambda s=s: s(jnp.ones(3)), type(s).__name__)
    for s in (
        sets.Sphere(),
        sets.L2Ball(),
        sets.Orthogonal(),
        sets.LowRank(1),
        sets.Monotone(),
        sets.SpectralBall(),
        sets.Equal(),
    ):
        big = jnp.asarray([[3e38, -3e38, 1e38], [1e38, 2e38, 3e38]])
        yield right(f"{s} of 3e38", lambda s=s: s(big), lambda y: np.isfinite(np.asarray(y, np.float64)).all())


def cases_of_losses() -> Iterator[Case]:
    z, scores = jnp.ones((4, 3)), jnp.ones(4)
    good = np.array([0, 1, 2, 0])
    for loss in (losses.margin, losses.cross_entropy, losses.hinge):
        first = "scores" if loss is losses.hinge else "logits"
        integers, numbers = np.ones((4, 3), int), np.ones((4, 3)) * 1j
        for bad in (integers, numbers, np.ones((4, 0)), None, "text"):
            name = f"{loss.__name__} of {type(bad).__name__} {np.shape(bad)}"
            yield Case(name, lambda f=loss, b=bad: f(b, good), first)
        out_of_range = (good + 1, good - 1, good.astype(np.int64) + 2**32, np.full(4, 255, np.uint8))
        wrong = (good[:3], good[:, None], good.astype(np.float32), good * 1j, np.ones((4, 2)), None, "text")
        for bad in (*out_of_range, *wrong):
            name = f"{loss.__name__} with labels {type(bad).__name__} {np.shape(bad)}"
            yield Case(name, lambda f=loss, b=bad: f(z, b), "labels")
        masked = np.ma.masked_array(good, [True, False, False, False])
        yield Case(f"{loss.__name__} with masked labels", lambda f=loss, b=masked: f(z, b), "labels")
        inside = jax.jit(loss)
        yield right(f"{loss.__name__} out of range in a jit", lambda f=inside: f(z, good + 1), lambda v: np.isnan(v[2]))
        yield right(f"{loss.__name__} in range", lambda f=loss: f(z, good), lambda v: np.isfinite(v).all())

    def hinged(p, x, y):
        return losses.hinge((x @ p["a"])[:, 0], y).sum()

    for bad in (np.array([0, 1, 1, 0]), np.array([True, False, True, True]), np.array([1.0, -1.0, 0.5, 1.0])):
        yield Case(f"binary hinge with {bad}", lambda b=bad: losses.hinge(scores, b), "labels")
        data = (X, np.resize(bad, 20))
        yield Case(f"train a binary hinge with {bad}", lambda d=data: train(data=d, loss=hinged), "labels")
    for bad in (np.ones(3), np.ones((4, 1)), np.ones(4) * 1j, None, "text"):
        yield Case(f"squared_error with {shape_of(bad)}", lambda b=bad: losses.squared_error(scores, b), "targets")
    for bad in (np.ones(4, int), None, "text"):
        yield Case(f"squared_error of {shape_of(bad)}", lambda b=bad: losses.squared_error(b, scores), "predictions")
    yield from each(eqxproj.custom_loss, "value", *NO_FUNCTION, displacement=losses.margin)
    yield from each(eqxproj.custom_loss, "displacement", *NO_FUNCTION, value=losses.margin)
    yield from each(eqxproj.custom_loss, "hard", *NO_FLAG, value=losses.margin, displacement=losses.margin)


def shape_of(x: Any) -> str:
    return f"{type(x).__name__} {np.shape(x)}"


def cases_of_rules() -> Iterator[Case]:
    @eqxproj.custom_projection
    def doubled(x):
        return 2 * x

    yield Case("called without a projection", lambda: doubled(jnp.ones(2)), "@doubled.def_projection")
    yield from each(eqxproj.custom_projection, "function", *(f for f in NO_FUNCTION if f is not None))
    yield from each(doubled.def_projection, "rule", *NO_FUNCTION, named="(ctx, inputs, target)")
    yield from each(eqxproj.register_projection, "primitive", 3, None, "", jnp.tanh, ["tanh"])
    yield from each(eqxproj.register_projection, "form", "dual", 3, None, primitive="tanh")
    register = eqxproj.register_projection("tanh")
    yield from each(register, "function", *NO_FUNCTION, named="eqxproj.rules.AbstractRule")
    yield from each(eqxproj.unregister_projection, "primitive", 3, None, "", "tanh")


def cases_of_datasets() -> Iterator[Case]:
    load = eqxproj.datasets.load
    yield from each(load, "name", "nmist", 3, None, ["digits"], "")
    yield from each(load, "sequence_length", 0, -1, "64", 2.5, True, None, name="digits")
    yield from each(load, "data_dir", "/no/such/folder", 3, ["a"], name="mnist")
    yield Case("digits in a folder", lambda: load("digits", "/tmp"), "data_dir")
    yield Case("higgs from the hub", lambda: load("higgs_sample"), "data_dir")


def compare(*words: str) -> int:
    """The command line; its message and exit as a `ValueError`."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = main(["compare", *words])
        except SystemExit as error:
            status = error.code
    if status == 0:
        return 0
    raise ValueError(said.getvalue())


def cases_of_compare() -> Iterator[Case]:
    for option in ("--steps", "--batch-size", "--width"):
        for value in ("0", "-1", "x", "1.5"):
            yield Case(f"compare {option} {value}", lambda o=option, v=value: compare(o, v), option)
    for option in ("--seed", "--depth"):
        for value in ("-1", "x"):
            yield Case(f"compare {option} {value}", lambda o=option, v=value: compare(o, v), option)
    for option, value in (("--dataset", "nmist"), ("--solver", "newton"), ("--what", "3"), ("--batch-size", "99999")):
        yield Case(f"compare {option} {value}", lambda o=option, v=value: compare(o, v), option)
    yield Case(
        "compare --data-dir", lambda: compare("--dataset", "mnist", "--data-dir", "/no/such/folder"), "--data-dir"
    )


class Empty(nnx.Module):
    def __call__(self, x):
        return x


def cases_of_flax() -> Iterator[Case]:
    from_linen, from_nnx = eqxproj.flax.from_linen, eqxproj.flax.from_nnx
    dense = linen.Dense(3)
    variables = {"params": {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    made = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    yield from each(from_linen, "module", 3, linen.Dense, made, None, optax.adam(1.0), variables=variables)
    yield from each(from_linen, "variables", 3, None, {}, variables["params"], [variables], module=dense)
    yield from each(from_linen, "method", 3, [1], module=dense, variables=variables)
    yield from each(from_linen, "mutable", 3, [3], module=dense, variables=variables)
    yield from each(from_nnx, "module", 3, nnx.Linear, dense, None, Empty(), MODEL)
    model, other = from_linen(dense, variables), from_nnx(made)
    yield from each(model.with_updates, "updates", 3, None, [1], variables)
    yield from each(other.with_updates, "updates", 3, None, {"a": 1})
    yield from each(other.update, "module", 3, dense, nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    yield right("linen", lambda: model(X), lambda y: y.shape == (20, 3))


def cases_that_are_right() -> Iterator[Case]:
    def trains(result):
        return np.isfinite(result.history["loss"][-1])

    few: dict[str, Any] = {"steps": 1, "method": "gradient"}
    numpy: dict[str, Any] = few | {"steps": np.int64(1), "batch_size": np.int32(8)}
    yield right("steps and batch of numpy", lambda: train(**numpy), trains)
    yield right("lists as data", lambda: train(data=(X.tolist(), Y.tolist()), **few), trains)
    nothing_masked = np.ma.masked_array(X, np.zeros(X.shape, bool))
    yield right("a masked array without masked entries", lambda: train(data=(nothing_masked, Y), **few), trains)
    yield right("int64 labels in range", lambda: train(data=(X, Y.astype(np.int64)), **few), trains)
    yield right("half precision", lambda: train(data=(X.astype(np.float16), Y), **few), trains)
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))
    yield right("a transparent optimizer", lambda: train(optimizer=sam, **few), trains)
    frame_of = {"x": X, "more": (Y,)}
    nested = lambda p, d: losses.cross_entropy(d["x"] @ p["a"], d["more"][0]).mean()  # noqa: E731
    yield right("nested data", lambda: train(data=(frame_of,), loss=nested, **few), trains)
