"""Hostile inputs: what a user may pass by mistake to each public function, with the argument that is at fault.

Each case is a call that must raise a `ValueError`, a `TypeError` or an error of the library whose message names the
argument, or must give the right answer, which a function then checks.
"""

from __future__ import annotations

import functools as ft
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import eqxproj
from eqxproj import losses, sets

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)).astype(np.float32)
Y = (np.arange(20) % 3).astype(np.int32)
MODEL = {"a": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "n": jnp.arange(3)}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A call, and the argument that its error must name; or, without one, what its answer must satisfy.

    `given` holds the value of the argument, if that is known: the error must say what it was.
    """

    name: str
    call: Callable[[], Any]
    argument: str | None
    holds: Callable[[Any], Any] | None = None
    given: tuple[Any, ...] = ()

    def says_what_it_got(self, message: str) -> bool:
        return not self.given or any(re.search(pattern, message) for pattern in names_of(self.given[0]))


def _shown_of(value: np.ndarray | jax.Array) -> Iterator[str]:
    """What a message may say of an array: its length, its range, what kinds of numbers it holds."""
    yield from map(str, np.shape(value)[:1])
    yield from ["masked"] if isinstance(value, np.ma.MaskedArray) else []
    yield from ["complex"] if np.iscomplexobj(value) else []
    if jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer):
        numbers = np.asarray(value)
        yield from [str(numbers.min()), str(numbers.max())] if numbers.size else []
        yield from [] if np.isfinite(numbers).all() else ["NaN", "infinity"]


def names_of(value: Any) -> Iterator[str]:
    """What a message may call a value, as patterns: itself, its kind, its shape or type, or one of its parts."""
    texts = [getattr(value, "__name__", type(value).__name__), type(value).__name__]
    if not isinstance(value, Odd) and len(repr(value)) < 100:
        texts.append(" ".join(repr(value).split()))
    if isinstance(value, np.ndarray | jax.Array | pd.DataFrame | pd.Series):
        texts += [str(np.shape(value)), str(getattr(value, "dtype", "DataFrame"))]
    if isinstance(value, np.ndarray | jax.Array):
        texts += _shown_of(value)
    if isinstance(value, optax.GradientTransformation):
        texts += ["raised", "returned"]  # what it did with updates
    if isinstance(value, eqxproj.FeasibilityProblem):
        texts.append(repr(value.metric))
    if isinstance(value, dict) and not value:
        texts.append("[]")
    yield from (rf"(?<!\w)(?<!\d\.){re.escape(text)}(?!\w|\.\d)" for text in texts)
    if isinstance(value, dict):
        yield from (pattern for pair in value.items() for part in pair for pattern in names_of(part))
    elif isinstance(value, list | tuple | set):
        yield from (pattern for part in value for pattern in names_of(part))


def loss(p, x, y):
    return losses.cross_entropy(x @ p["a"], y).mean()


def train(model=MODEL, data=(X, Y), loss=loss, steps=2, **options):
    return eqxproj.train(model, data, loss, steps=steps, **options)


def problem(loss=loss, model=MODEL, x=X, y=Y, **options):
    return eqxproj.feasibility_problem(loss, model, x, y, **options)


def displacement(loss=loss, model=MODEL, x=X, y=Y, **options):
    return eqxproj.filter_displacement(loss, **options)(model, x, y)


def value_and_displacement(loss=loss, model=MODEL, x=X, y=Y, **options):
    return eqxproj.filter_value_and_displacement(loss, **options)(model, x, y)


@ft.cache
def small_problem():
    return eqxproj.feasibility_problem(lambda w: jnp.sum((w - 1) ** 2), jnp.zeros(2))


def solve(problem=None, solver=None, steps=1, **options):
    problem = small_problem() if problem is None else problem
    solver = eqxproj.AlternatingProjections() if solver is None else solver
    return eqxproj.solve(problem, solver, steps=steps, **options)


FACTORS = (jnp.ones((2, 3)), jnp.ones((3, 2)))


def project(f=jnp.matmul, primals=FACTORS, target=None, **options):
    out, back = eqxproj.projection(f, *primals, **options)
    return back(out) if target is None else back(target)


def shown(value: Any) -> str:
    text = getattr(value, "__name__", None) or (type(value).__name__ if isinstance(value, Odd) else repr(value))
    return " ".join(text.split())[:60]


def each(call: Callable[..., Any], argument: str, *values: Any, named: str = "", **more: Any) -> Iterator[Case]:
    """A call with each of these values of one argument."""
    label = getattr(call, "__name__", str(call))
    for value in values:
        bound = ft.partial(call, **{argument: value}, **more)
        yield Case(f"{label}({argument}={shown(value)})", bound, named or argument, given=(value,))


def right(name: str, call: Callable[[], Any], holds: Callable[[Any], Any]) -> Case:
    return Case(name, call, None, holds)


NO_COUNT = (0, -1, 2.5, True, "3", NAN, [3], np.array([1, 2]), 1j, np.bool_(True))
NO_POSITIVE = (0, -1, NAN, INF, True, "1", [1.0], 1j, np.ones(2), None, 10**400)
NO_FLAG = (1, "yes", None, np.array([True]))
NO_FUNCTION = (3, None, "mse", [loss], jnp.ones(3))
NO_SOLVER = (eqxproj.DouglasRachford, "douglas_rachford", 3, optax.adam(1e-3))
NO_METRIC = ("steep", 3.0, {"grade": 1.0}, eqxproj.Metric)
NO_COPIES = ("all", 3, True, ["neuron"])


class Odd:
    """Neither an array nor a pytree."""

    def __repr__(self):
        raise RuntimeError("no text")


class AsArray:
    def __array__(self, dtype=None, copy=None):
        return np.ones((20, 4), np.float32)


def with_entry(x, value):
    x = np.array(x)
    x[3, 1] = value
    return x


FRAME = pd.DataFrame(X)
NO_PART = {
    "frame": FRAME,
    "series": FRAME[0],
    "object with __array__": AsArray(),
    "odd object": Odd(),
    "text": "text",
    "ragged list": [[1.0], *[[1.0, 2.0]] * 19],
    "list of text": ["a"] * 20,
    "object array": np.array([object()] * 20),
    "array of arrays": np.array([np.ones(i % 3) for i in range(20)], object),
    "array of text": np.array(["a"] * 20),
    "array of bytes": np.array([b"a"] * 20),
    "dates": np.array(["2026-01-01"] * 20, "datetime64[D]"),
    "durations": np.arange(20).astype("timedelta64[s]"),
    "structured": np.zeros(20, [("u", "f4"), ("v", "i4")]),
    "void": np.zeros(20, "V8"),
    "masked": np.ma.masked_array(X, X > 1),
    "NaN": with_entry(X, NAN),
    "infinity": with_entry(X, INF),
    "float64 beyond float32": with_entry(X.astype(np.float64), 1e300),
    "int64 beyond int32": Y.astype(np.int64) + 2**32,
    "uint64": np.full(20, 2**63, np.uint64),
    "other length": X[:7],
    "scalar": 3.0,
    "scalar array": np.float32(3),
    "empty": X[:0],
    "keys": jax.random.split(jax.random.key(0), 20),
    "function": loss,
    "nested text": {"u": X, "v": ("a", X)},
}
NO_DATA = (X, None, "text", [], (), 3, {"x": X, "y": Y}, FRAME, [(X, Y), (X, Y)], [[1.0, 2.0]], loss, {1, 2}, (None,))


def cases_of_data() -> Iterator[Case]:
    yield from each(train, "data", *NO_DATA)
    yield from each(train, "eval_data", *(d for d in NO_DATA if d is not None))
    for name, part in NO_PART.items():
        yield Case(f"train(data={name})", lambda part=part: train(data=(part, Y)), "data")
        yield Case(f"train(eval_data={name})", lambda part=part: train(eval_data=(part, Y)), "eval_data")
    for shift in (1, -1, 1000):
        yield Case(f"labels, {shift} too many", lambda shift=shift: train(data=(X, Y + shift)), "labels")
        yield Case(f"eval labels, {shift}", lambda s=shift: train(eval_data=(X, Y + s)), "eval_data")
    yield Case("traced data", lambda: jax.jit(lambda x: train(data=(x, Y)).model["a"])(X), "data[0]")
    yield Case("too few parts", lambda: train(data=(X,)), "loss")
    yield Case("too many parts", lambda: train(data=(X, Y, Y)), "loss")
    for bad in (X, 3, ("a",)):
        yield Case(f"metric of data {shown(bad)}", lambda b=bad: train(evaluate={"m": loss}, eval_data=b), "eval_data")


def not_updates(updates, state, params=None):
    return [updates["a"]], state


def cases_of_train() -> Iterator[Case]:
    yield from each(train, "loss", *NO_FUNCTION)
    yield from each(train, "steps", *NO_COUNT, None)
    yield from each(train, "batch_size", *NO_COUNT, 21)
    yield from each(train, "solver_steps", *NO_COUNT)
    yield from each(train, "eval_every", *NO_COUNT)
    keys = jax.random.split(jax.random.key(0), 3)
    yield from each(train, "key", 3, "seed", np.arange(2), jnp.ones(2), keys, jnp.zeros((3, 2), jnp.uint32), [])
    yield from each(train, "solver", *NO_SOLVER)
    yield from each(train, "metric", *NO_METRIC)
    yield from each(train, "copies", *NO_COPIES)
    yield from each(train, "tau", *(x for x in NO_POSITIVE if x is not None))
    yield from each(train, "precondition", 1, 0, "yes", np.array([True]))
    yield from each(train, "method", "adam", 3, None, True, ["gradient"])
    yield Case("precondition of gradients", lambda: train(precondition=True, method="gradient"), "precondition")
    yield from each(train, "has_aux", *NO_FLAG)
    yield from each(train, "progress", *NO_FLAG)
    opaque = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True)
    other = optax.GradientTransformation(lambda p: (), not_updates)
    yield from each(train, "optimizer", "adam", optax.adam, 3, opaque, other, Odd())
    for name, model in {
        "none": None, "text": "model", "integers": {"a": jnp.arange(3)}, "number": 1.0, "odd": Odd(),
        "NaN": MODEL | {"a": MODEL["a"] * NAN}, "infinite": MODEL | {"a": MODEL["a"] * INF},
    }.items():  # fmt: skip
        yield Case(f"train(model={name})", lambda model=model: train(model=model), "model")


def raising(model, x, y):
    raise RuntimeError("no metric")


def cases_of_evaluate() -> Iterator[Case]:
    def found(function):
        return train(evaluate={"m": function}, eval_data=(X, Y))

    yield Case("evaluate without data", lambda: train(evaluate={"m": loss}), "evaluate")
    yield from each(train, "evaluate", [loss], loss, "loss", 3, {3: loss}, {"m": 3}, {"m": None}, eval_data=(X, Y))
    for name, function in {
        "raises": raising,
        "a vector": lambda m, x, y: x[:, 0],
        "text": lambda m, x, y: "good",
        "none": lambda m, x, y: None,
        "a tuple": lambda m, x, y: (1.0, 2.0),
        "a dictionary": lambda m, x, y: {"a": x.sum()},
        "complex": lambda m, x, y: 1j * x.sum(),
        "with a key": lambda m, x, y, key: x.sum(),
        "with too few arguments": lambda m, x: x.sum(),
        "by numpy": lambda m, x, y: np.asarray(x).sum(),
        "by Python": lambda m, x, y: float(x.sum()),
        "labels out of range": lambda m, x, y: losses.cross_entropy(x @ m["a"], y + 1).mean(),
    }.items():
        yield Case(f"evaluate: {name}", lambda f=function: found(f), "evaluate['m']")


class First(sets.AbstractSet):
    def __call__(self, x):
        return x[:1]


class Nothing(sets.AbstractSet):
    def __call__(self, x):
        return None  # pyright: ignore[reportReturnType]


def cases_of_constraints() -> Iterator[Case]:
    a, box = (lambda p: p["a"]), sets.Box(-1.0, 1.0)
    for name, constraint in {
        "a set alone": box,
        "a list for a pair": [a, box],
        "text for a function": ("a", box),
        "a number for a set": (a, 0.1),
        "a class for a set": (a, sets.NonNegative),
        "three things": (a, box, 1),
        "a missing name": (lambda p: p["z"], box),
        "a missing attribute": (lambda p: p.weight, box),
        "a part": (lambda p: p["a"][0], box),
        "a transpose": (lambda p: p["a"].T, box),
        "integers": (lambda p: p["n"], box),
        "nothing": (lambda p: None, box),
        "a number": (lambda p: 3, box),
        "an axis that is not there": (a, sets.Sphere(axis=5)),
        "another shape": (a, First()),
        "no array": (a, Nothing()),
        "arrays of two shapes stacked": (lambda p: (p["a"], p["b"]), sets.Together(sets.Equal(0), stacked=True)),
        "an intersection that does not fit": (a, sets.Intersection(box, sets.Sphere(axis=5))),
        "an intersection that is empty": (a, sets.Intersection(sets.Box(1.0, 2.0), sets.Box(-2.0, -1.0))),
    }.items():
        yield Case(f"constraint: {name}", lambda c=constraint: train(constraints=[c]), "constraints[0]")
    for name, make, argument in [
        ("a number in an intersection", lambda: sets.Intersection(box, 3), "sets[1]"),
        ("several arrays in an intersection", lambda: sets.Intersection(box, sets.Together(box)), "sets[1]"),
        ("one set in an intersection", lambda: sets.Intersection(box), "sets"),
        ("arrays together in a class", lambda: sets.Together(sets.NonNegative), "chosen"),
        ("arrays together twice", lambda: sets.Together(sets.Together(box)), "chosen"),
        ("arrays that are stacked once", lambda: sets.Together(box, stacked=1), "stacked"),
    ]:
        yield Case(f"set: {name}", make, argument)
    for name, pair in {
        "two boxes apart": (sets.Box(1.0, 2.0), sets.Box(-2.0, -1.0)),
        "a ball and a sphere": (sets.L2Ball(1.0), sets.Sphere(3.0)),
        "sums": (sets.Simplex(axis=None, total=1.0), sets.Simplex(axis=None, total=2.0)),
        "signs and few entries": (sets.Sparse(k=2), sets.Quantized(1, scale="learned")),
    }.items():
        both = [(a, s) for s in pair]
        yield Case(f"constraints: {name}", lambda both=both: train(constraints=both), "constraints[1]")
    yield from each(train, "constraints", box, {"a": box}, "a", 3)


BAD_LOSSES = {
    "a vector": lambda p, x, y: x @ p["a"],
    "an integer": lambda p, x, y: jnp.argmax((x @ p["a"]).sum(0)),
    "a Python integer": lambda p, x, y: 3,
    "a tuple": lambda p, x, y: (loss(p, x, y), 1),
    "a dictionary": lambda p, x, y: {"loss": loss(p, x, y)},
    "none": lambda p, x, y: None,
    "text": lambda p, x, y: "loss",
    "complex": lambda p, x, y: loss(p, x, y) * 1j,
    "without the model": lambda p, x, y: jnp.mean(jnp.asarray(x)),
    "stopped": lambda p, x, y: jax.lax.stop_gradient(loss(p, x, y)),
}


def cases_of_problems() -> Iterator[Case]:
    for call in (train, problem, displacement, value_and_displacement):
        for name, bad in BAD_LOSSES.items():
            yield Case(f"{call.__name__}: a loss that is {name}", ft.partial(call, loss=bad), "loss")
        yield Case(f"{call.__name__}: no auxiliary", ft.partial(call, has_aux=True), "loss")
    for call in (problem, displacement, value_and_displacement):
        yield from each(call, "loss", *NO_FUNCTION)
        yield from each(call, "model", None, "model", {"a": jnp.arange(3)}, 1.0)
        yield from each(call, "copies", *NO_COPIES)
        yield from each(call, "metric", *NO_METRIC)
        yield from each(call, "tau", 0, -1, NAN, INF, True, "1", 1j)
        yield from each(call, "has_aux", *NO_FLAG)
    yield from each(displacement, "raw", *NO_FLAG)
    yield from each(displacement, "steps", *NO_COUNT)
    yield from each(displacement, "solver", *NO_SOLVER)
    yield from each(problem, "data", "variable", 3, None)
    yield from each(problem, "kwargs", [1], "key", 3)
    yield from each(problem, "y", Y + 1, Y - 1, named="labels")
    yield from each(solve, "problem", 3, loss, MODEL)
    yield from each(solve, "solver", *NO_SOLVER)
    yield from each(solve, "steps", *NO_COUNT)
    yield from each(solve, "tol", -1.0, NAN, True, "0", [0.0], 1j)
    yield from each(eqxproj.as_published, "problem", 3, loss, problem(metric=eqxproj.Metric(10.0)))


def cases_of_projection() -> Iterator[Case]:
    yield from each(project, "f", *NO_FUNCTION)
    yield from each(project, "solver", *NO_SOLVER)
    yield from each(project, "steps", *NO_COUNT)
    yield from each(project, "metric", *NO_METRIC)
    yield from each(project, "copies", *NO_COPIES)
    bad = (jnp.full((2, 2), NAN), np.full((2, 2), INF), jnp.ones(3), (jnp.ones((2, 2)),), "text", 3.0, {"a": 1.0})
    yield from each(project, "target", *bad, np.ma.masked_array(np.ones((2, 2)), np.eye(2)), jnp.ones((2, 2)) * 1j)
    integers, nans = jnp.ones((2, 2), int), jnp.full((2, 3), NAN)
    yield from each(project, "primals", (), (integers, integers), ("a", "b"), (nans, jnp.ones((3, 2))))
