"""Flax models, of linen and of nnx, as callable Equinox modules that train like any other model.

`from_linen` and `from_nnx` transform a Flax model into a pytree whose only inexact arrays are its parameters: the
collection `"params"` of linen, the `nnx.Param` variables of nnx. Calling the pytree applies the module. `train` and the
displacements also take an nnx module as it is.

All other arrays (running statistics, caches, PRNG states) are held as the bits of their numbers, in unsigned integers,
so that nothing that asks `equinox.is_inexact_array` takes them for parameters. Numpy arrays and static fields would not
do: `jit` and `vmap` turn numpy arrays into JAX arrays, and a static field that changes needs a new compilation.

Limits: Flax layers take whole batches, so a loss calls the model without `jax.vmap`. `train` drops the auxiliary output
of a loss, and new running statistics with it; see `LinenModel` for how to carry them.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

try:
    from flax import linen, nnx
    from flax.core import DenyList, FrozenDict
except ImportError as error:
    raise ImportError(
        f"`eqxproj.flax` needs Flax, which could not be imported ({error}). Install it: `pip install 'eqxproj[flax]'`."
    ) from error


# --- arrays that are no parameters ---


class _Frozen(eqx.Module):
    """An inexact array, held as its bits."""

    bits: Any
    dtype: Any = eqx.field(static=True)

    @property
    def value(self) -> Any:
        if not jnp.issubdtype(self.dtype, jnp.complexfloating):
            return jax.lax.bitcast_convert_type(self.bits, self.dtype)
        part = jnp.finfo(self.dtype).dtype
        real, imaginary = (jax.lax.bitcast_convert_type(self.bits[..., i], part) for i in (0, 1))
        return jax.lax.complex(real, imaginary)


def _freeze(tree: Any) -> Any:
    """The same pytree without inexact arrays."""

    def freeze(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf
        if not eqx.is_inexact_array(leaf):
            return leaf
        parts = jnp.stack([leaf.real, leaf.imag], axis=-1) if jnp.iscomplexobj(leaf) else leaf
        unsigned = f"uint{jnp.finfo(leaf.dtype).bits}"
        return _Frozen(jax.lax.bitcast_convert_type(parts, unsigned), leaf.dtype)

    return jtu.tree_map(freeze, tree)


def _thaw(tree: Any) -> Any:
    """The inverse of `_freeze`."""
    return jtu.tree_map(lambda x: x.value if _is_frozen(x) else x, tree, is_leaf=_is_frozen)


def _is_frozen(x: Any) -> bool:
    return isinstance(x, _Frozen)


def _trainable(tree: Any) -> Any:
    """The same pytree with its numbers as JAX arrays, since parameters restored from a file are often numpy's."""
    return jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic, float)) else x, tree)


def _check_updates(updates: Any, wanted: str) -> None:
    if not isinstance(updates, Mapping):
        raise TypeError(
            f"`updates` must be {wanted}, as a call with `mutable` returns it beside the output; got "
            f"{type(updates).__name__}."
        )


# --- linen ---


@dataclass(frozen=True, eq=False)
class _Program:
    """The computation of a linen model. Always hashable; compared by value where the module's fields allow it."""

    module: Any
    method: Any
    mutable: Any
    container: type

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Program):
            return NotImplemented
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__]
        try:
            return all(a is b or bool(a == b) for a, b in pairs)
        except (TypeError, ValueError):  # arrays among the module's fields do not compare to a Boolean
            return False

    def __hash__(self) -> int:
        return hash((type(self.module), self.container))


class LinenModel(eqx.Module):
    """A linen module with its variables; made by [`from_linen`][].

    `params` is the collection `"params"`, the only arrays that are trained; a constraint picks one as, for instance,
    `lambda model: model.params["Dense_0"]["kernel"]`. Running statistics are carried by the auxiliary output of a loss:

        def loss(model, x, y):
            out, updates = model(x, train=True, mutable=["batch_stats"])
            return jnp.mean((out - y) ** 2), updates
        (value, updates), moved = eqxproj.filter_value_and_displacement(loss, has_aux=True)(model, x, y)
        model = model.with_updates(updates)

    After `train`, call the model in the same way on some batches, for their statistics. A loss with an argument `key`
    gets a fresh key each step, for dropout: `model(x, rngs={"dropout": key})`.
    """

    params: Any
    _collections: Any
    _program: _Program = eqx.field(static=True)

    def __call__(self, *args: Any, rngs: Any = None, mutable: Any = None, method: Any = None, **kwargs: Any) -> Any:
        """Applies the module to its variables.

        **Arguments:**

        - `args`, `kwargs`, `rngs`: as in `Module.apply`.
        - `mutable`, `method`: as in `Module.apply`; by default as given to `from_linen`.

        **Returns:** As `Module.apply`: the output, or `(output, updates)` with `mutable`.
        """
        program = self._program
        mutable = program.mutable if mutable is None else _checked_mutable(mutable)
        method = program.method if method is None else method
        return program.module.apply(self.variables, *args, rngs=rngs, mutable=mutable, method=method, **kwargs)

    @property
    def variables(self) -> Any:
        """All collections, of the types that `from_linen` was given, with the present parameters."""
        return self._program.container({"params": self.params, **_thaw(self._collections)})

    def with_updates(self, updates: Any) -> LinenModel:
        """The model with new collections.

        **Arguments:**

        - `updates`: name to collection, as a call with `mutable` returns it. Collections that are not named stay.

        **Returns:** A new `LinenModel`.

        **Raises:** `TypeError` where `updates` is no mapping, `ValueError` where it holds parameters.
        """
        _check_updates(updates, "a mapping from collection names to collections")
        if "params" in updates:
            raise ValueError(
                f"`updates` must hold no parameters, which are the model's own, but got the collections "
                f"{list(updates)}. Name the others in the call that returns them: `mutable=['batch_stats']`."
            )
        collections = {**self._collections, **{name: _freeze(updates[name]) for name in updates}}
        return LinenModel(self.params, collections, self._program)


def from_linen(module: Any, variables: Any, *, method: Any = None, mutable: Any = False) -> LinenModel:
    """Transforms a linen module and its variables into a callable pytree that trains like an Equinox model.

    **Arguments:**

    - `module`: a `flax.linen.Module`.
    - `variables`: what `module.init` returns, a dictionary or `FrozenDict`. The collection `"params"` is trained; the
        others are held fixed. Numpy arrays are taken as JAX arrays.
    - `method`: the method that a call applies, as in `Module.apply`; `__call__` by default.
    - `mutable`: the collections that a call, by default, may change and returns beside its output, as there.

    **Returns:** A [`LinenModel`][]: `model(x, rngs=..., **kwargs)` is `module.apply(variables, x, rngs=..., **kwargs)`.

    **Raises:** `TypeError` where `module` is no linen module, `variables` no mapping, or `method` or `mutable` of a
    type that `Module.apply` does not take; `ValueError` where `variables` lacks the collection `"params"`.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"`module` must be a `flax.linen.Module`, got {_described(module)}.")
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"`variables` must be the dictionary that `module.init(key, x)` returns, got {type(variables).__name__}."
        )
    if "params" not in variables:
        raise ValueError(
            f"`variables` must hold the collection 'params', as `module.init(key, x)` returns it, but got the keys "
            f"{list(variables)}. If these name the parameters themselves, pass `{{'params': variables}}`."
        )
    if method is not None and not (isinstance(method, str) or callable(method)):
        raise TypeError(f"`method` must be a method of the module or its name, got {method!r}.")
    container = FrozenDict if isinstance(variables, FrozenDict) else dict
    collections = {name: _freeze(variables[name]) for name in variables if name != "params"}
    program = _Program(module, method, _checked_mutable(mutable), container)
    return LinenModel(_trainable(variables["params"]), collections, program)


def _checked_mutable(mutable: Any) -> Any:
    """A filter of collections, for `Module.apply`."""
    if isinstance(mutable, (bool, str, DenyList)):
        return mutable
    if isinstance(mutable, Collection) and all(isinstance(name, str) for name in mutable):
        return tuple(mutable)
    raise TypeError(
        f"`mutable` must be True, False, or the names of collections such as ['batch_stats'], got {mutable!r}."
    )


def _described(module: Any) -> str:
    """The object that was given in place of a module, and the remedy."""
    if isinstance(module, type):
        return f"the class {module.__name__}: make an instance of it"
    if isinstance(module, nnx.Module):
        return f"{type(module).__name__}, a `flax.nnx.Module`: use `eqxproj.flax.from_nnx(module)`"
    if isinstance(module, linen.Module):
        return f"{type(module).__name__}, a `flax.linen.Module`: use `eqxproj.flax.from_linen(module, variables)`"
    if isinstance(module, eqx.Module):
        return f"{type(module).__name__}, an Equinox module, which needs no conversion"
    return type(module).__name__


# --- nnx ---


class NNXModel(eqx.Module):
    """An nnx module, split into its parameters and the rest; made by [`from_nnx`][].

    `params` holds the values of the `nnx.Param` variables as nested dictionaries, the only arrays that are trained; a
    constraint picks one as, for instance, `lambda model: model.params["linear"]["kernel"]`. A call that needs more than
    the module's `__call__` builds the module: with a loss's `key`, for dropout,

        module = model.to_nnx()
        nnx.reseed(module, dropout=key)
        return jnp.mean((module(x) - y) ** 2)

    and likewise `module.train()` or `module.eval()` before the call, or another method in its place.
    """

    params: Any
    _rest: Any
    _graphdef: Any = eqx.field(static=True)

    def __call__(self, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Applies the module.

        **Arguments:**

        - `args`, `kwargs`: arguments of the module.
        - `mutable`: also return all variables but the parameters, as they are after the call: running statistics,
            counts of random numbers.

        **Returns:** The output, or `(output, updates)` with `mutable`; `model.with_updates(updates)` is the model with
        them. The model itself does not change.
        """
        if not isinstance(mutable, bool):
            raise TypeError(f"`mutable` must be True or False for a model of nnx, got {mutable!r}.")
        module = self.to_nnx()
        out = module(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return (out, _parts(module)[2]) if mutable else out

    def to_nnx(self) -> nnx.Module:
        """The module, built anew from the present parameters, in the modes that it had in `from_nnx`."""
        return nnx.merge(self._graphdef, self.params, _thaw(self._rest))

    def update(self, module: Any) -> None:
        """Writes the parameters, and all other variables but the random numbers' state, into an nnx module, in place.

        **Arguments:**

        - `module`: the module that `from_nnx` was given, or one with the same variables.

        **Raises:** `TypeError` where it is no `nnx.Module`, `ValueError` where it has other variables.
        """
        _check_nnx(module)
        own = self.to_nnx()
        difference = _difference(nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(own)))
        if difference:
            raise ValueError(
                "`module` must have the variables of the module that `from_nnx` was given, but this "
                f"{type(module).__name__} has not: {difference}."
            )
        nnx.update(module, nnx.state(own, nnx.Not(nnx.RngState)))

    def with_updates(self, updates: Any) -> NNXModel:
        """The model with new values of all variables but the parameters.

        **Arguments:**

        - `updates`: as a call with `mutable=True` returns them beside the output.

        **Returns:** A new `NNXModel`.

        **Raises:** `TypeError` where `updates` is no mapping, `ValueError` where it holds other variables.
        """
        _check_updates(updates, "a nested dictionary of variables")
        difference = _difference(updates, _thaw(self._rest))
        if difference:
            raise ValueError(f"`updates` must hold the model's variables that are no parameters, but {difference}.")
        return NNXModel(self.params, _freeze(updates), self._graphdef)


def from_nnx(module: Any) -> NNXModel:
    """Transforms an nnx module into a callable pytree that trains like an Equinox model.

    **Arguments:**

    - `module`: an `nnx.Module`, which is copied. Its `nnx.Param` variables are trained; all others are held fixed.

    **Returns:** An [`NNXModel`][]: `model(x)` is `module(x)`.

    **Raises:** `TypeError` where it is no `nnx.Module`, `ValueError` where it has no `nnx.Param`.
    """
    _check_nnx(module)
    graphdef, params, rest = _parts(module)
    if not jtu.tree_leaves(params):
        raise ValueError(
            f"`module` must have variables of type `nnx.Param` to train, but {type(module).__name__} has none."
        )
    return NNXModel(_trainable(params), _freeze(rest), graphdef)


class ModuleLoss:
    """A loss of an nnx module as one of an [`NNXModel`][], which also returns the variables that the call has changed.

    Its auxiliary output is `(the auxiliary output of the loss or None, the variables that are no parameters)`.
    """

    def __init__(self, loss: Callable[..., Any], has_aux: bool):
        self._loss, self._has_aux = loss, has_aux
        ft.update_wrapper(self, loss)

    def __call__(self, model: NNXModel, *args: Any, **kwargs: Any) -> Any:
        module = model.to_nnx()
        out = self._loss(module, *args, **kwargs)
        value, auxiliary = out if self._has_aux and isinstance(out, tuple) and len(out) == 2 else (out, None)
        return value, (auxiliary, _common(_parts(module)[2], _thaw(model._rest)))

    def updated(self, model: NNXModel, auxiliary: Any) -> NNXModel:
        """The model after a call, given the auxiliary output of that call."""
        return model.with_updates(auxiliary[1])


def _common(new: Any, old: Any) -> Any:
    """The entries of a nested dictionary that another one has too: what a call adds, such as `sow`, is left out."""
    if not isinstance(old, Mapping):
        return new
    return {name: _common(new[name], old[name]) for name in old}


def of_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an nnx module, such as a measure of accuracy, as one of an [`NNXModel`][]."""
    return ft.wraps(function)(lambda model, *args, **kwargs: function(model.to_nnx(), *args, **kwargs))


def picked(where: Any) -> Any:
    """A function that picks variables of an nnx module as one that picks their arrays of an [`NNXModel`][]."""

    def arrays(model: NNXModel) -> Any:
        rest = jtu.tree_map(lambda x: x.bits if _is_frozen(x) else x, model._rest, is_leaf=_is_frozen)
        found = where(nnx.merge(model._graphdef, jtu.tree_map(_Slot, model.params), rest))
        found = jtu.tree_map(lambda x: x.get_raw_value() if _is_variable(x) else x, found, is_leaf=_is_variable)
        return jtu.tree_map(lambda x: x.leaf if isinstance(x, _Slot) else x, found)

    return arrays if callable(where) else where


@dataclass(frozen=True, eq=False)
class _Slot:
    """The place of a parameter in a module, while it is picked; `leaf` need be no array."""

    leaf: Any

    def __getitem__(self, index: Any) -> _Slot:
        if index is not Ellipsis:
            raise TypeError(f"A constraint is on a whole variable, `variable` or `variable[...]`, got `[{index}]`.")
        return self


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def written_back(module: nnx.Module, moved: NNXModel, rest: Any) -> Any:
    """Writes the variables that are no parameters into a module, and returns displacements as `nnx.grad` does."""
    params, others = (jtu.tree_map(lambda x: x, part) for part in nnx.split(module, nnx.Param, ...)[1:])
    nnx.replace_by_pure_dict(others, rest)
    nnx.update(module, others)
    nnx.replace_by_pure_dict(params, moved.params)
    return params


def _check_nnx(module: Any) -> None:
    if not isinstance(module, nnx.Module):
        raise TypeError(f"`module` must be a `flax.nnx.Module`, got {_described(module)}.")


def _parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    """The graph of a module, its parameters, and its other variables, these two as nested dictionaries of arrays."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _difference(got: Any, wanted: Any) -> str:
    """The first difference in structure, shape or dtype between two pytrees of arrays; empty where there is none."""
    found, sought = (
        {jtu.keystr(path): _signature(leaf) for path, leaf in jtu.tree_leaves_with_path(tree)} for tree in (got, wanted)
    )
    for name in sorted({*found, *sought}):
        if found.get(name) != sought.get(name):
            return f"got {found.get(name, 'nothing')} at {name}, where {sought.get(name, 'nothing')} is wanted"
    return ""


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
