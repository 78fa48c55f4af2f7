"""An nnx module in the place of a model, without importing Flax where no such module is given.

Transforms `train` into a function that takes one too: in goes the module as a pytree (`eqxproj.flax.from_nnx`), out
comes a module. Limits: a module inside of another pytree is not found.
"""

from __future__ import annotations

import functools as ft
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from .._errors import CheckpointError, EvaluationError, NonFiniteError, TrainingInterrupted, described
from ._watch import Report

_F = TypeVar("_F", bound=Callable[..., Any])


def flax_for(model: Any) -> Any:
    """`eqxproj.flax` where a model is an nnx module, else `None`."""
    nnx = sys.modules.get("flax.nnx")
    is_module = nnx is not None and isinstance(model, nnx.Module)
    return importlib.import_module("..flax", __package__) if is_module else None


def takes_nnx(train: _F) -> _F:
    """A function like `train`, whose `model` may be an nnx module too."""
    signature = inspect.signature(train)

    @ft.wraps(train)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        flax = flax_for(bound.arguments["model"])
        if flax is None:
            return train(*args, **kwargs)
        bound.arguments |= _converted(flax, bound.arguments)
        try:
            result = train(*bound.args, **bound.kwargs)
        except (CheckpointError, EvaluationError, NonFiniteError, TrainingInterrupted) as error:
            error.model = error.model.to_nnx()
            raise
        return replace(result, model=result.model.to_nnx())  # not as a pytree, which shares no layers

    return wrapped  # pyright: ignore[reportReturnType]


def _converted(flax: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `train` that see the model, as they are for a pytree."""
    if given.get("model_state") is not None:
        raise TypeError(
            "`model_state` is that of Equinox's layers; an nnx module holds its own: leave it out. Got "
            f"{described(given['model_state'])}."
        )
    found = {"model": flax.from_nnx(given["model"])}
    if callable(given["loss"]):
        found |= {"loss": flax.ModuleLoss(given["loss"], given.get("has_aux", False)), "has_aux": True}
    if isinstance(given.get("evaluate"), Mapping):
        found["evaluate"] = {name: flax.of_module(f) if callable(f) else f for name, f in given["evaluate"].items()}
    if isinstance(given.get("callbacks"), (list, tuple)):
        found["callbacks"] = [_of_module(f) if callable(f) else f for f in given["callbacks"]]
    pairs = [(flax.picked(c[0]), *c[1:]) if isinstance(c, tuple) and c else c for c in given.get("constraints", ())]
    return {**found, "constraints": pairs}


def _of_module(callback: Callable[[int, Report], Any]) -> Callable[[int, Report], Any]:
    """A callback that is shown the module."""
    return lambda step, seen: callback(step, Report(step, seen.values, seen.history, seen.model.to_nnx()))
