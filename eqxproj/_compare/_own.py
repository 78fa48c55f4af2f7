"""A user's own model and loss, named as `module:function` on the command line.

Transforms names into functions, and a function into a model. What the user's own code raises is not caught here.
Limits: a module is looked for in the current folder, then where Python looks.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._errors import described


def function_of(option: str, text: str) -> Callable[..., Any]:
    """The function that a text such as `"module:function"` names; `option` is where it was given, for messages.

    **Raises:** `ValueError` where there is no such function. What the module itself raises goes through.
    """
    module_name, colon, path = text.partition(":")
    if not (colon and path and module_name) or module_name.startswith(".") or module_name.endswith(".py"):
        example = module_name.removesuffix(".py").strip(".").replace("/", ".") or "models"
        raise ValueError(
            f"{option}: got {text!r}; wanted a module as Python imports it, a colon and a function in it, such as "
            f"{example}:{path or option.removeprefix('--')}."
        )
    found: Any = _module(option, text, module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            alike = difflib.get_close_matches(name, dir(found))
            hint = f" It has {' and '.join(alike)}." if alike else ""
            raise ValueError(f"{option}: got {text!r}, but {described(found)} has no name {name!r}.{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{option}: {text!r} must be a function, got {described(found)}.")
    return found


def _module(option: str, text: str, name: str) -> Any:
    """A module by its name, from the current folder first."""
    here = os.getcwd()
    before = list(sys.path)
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Not one that the module itself imports: that is shown as it is.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{option}: got {text!r}, but there is no module {error.name!r} in {here!r}, nor where Python looks."
        ) from None
    finally:
        sys.path[:] = before


def own_model(text: str, key: jax.Array) -> Any:
    """The model that `--model` names: what the function returns, called with a `key` if it has such an argument.

    **Raises:** `ValueError` where it is no function of a key or of nothing, or returns nothing.
    """
    make = function_of("--model", text)
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # of some callables there is none to be had
        signature = inspect.Signature()
    parameter = signature.parameters.get("key")
    takes_key = parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    given = {"key": key} if takes_key else {}
    try:
        signature.bind(**given)
    except TypeError as error:
        is_model = isinstance(make, Callable) and not inspect.isroutine(make) and not inspect.isclass(make)
        hint = " Is it a model already? Name a function that makes it." if is_model else ""
        raise ValueError(
            f"--model: {text!r} must be a function that makes the model, called as f(key=key), or as f() where it has "
            f"no argument of that name; it takes {signature}: {error}.{hint}"
        ) from None
    model = make(**given)
    if model is None:
        raise ValueError(f"--model: {text!r} returned None; it must return the model.")
    return model


def parameter_count(model: Any) -> int:
    """How many numbers of a model are trained, or could be."""
    leaves = jax.tree_util.tree_leaves(model)
    return sum(int(np.size(x)) for x in leaves if hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, np.inexact))


def without_accuracy(model: Any, x: np.ndarray, classes: int, may_raise: bool) -> str | None:
    """Why there is no accuracy to be had of a model: one that does not give a number a class. `None` where there is.

    What the model raises on two samples goes through if it `may_raise`, with a note.
    """
    samples = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
    try:
        found = jax.eval_shape(lambda samples: jax.vmap(model)(samples), samples)
    except Exception as error:
        if may_raise:
            flat = "" if x.ndim == 2 else "; --flatten gives it vectors"
            error.add_note(f"--model: the model is called on one sample, of the shape {list(x.shape[1:])}{flat}.")
            raise
        return f"jax.vmap(model)(x) raises {type(error).__name__}"
    shapes = [list(leaf.shape[1:]) for leaf in jax.tree_util.tree_leaves(found)]
    if shapes == [[classes]]:
        return None
    got = f"an output of the shape {shapes[0]}" if len(shapes) == 1 else f"{len(shapes)} arrays"
    return f"of one sample, the model gives {got}, not {classes} numbers, one a class"
