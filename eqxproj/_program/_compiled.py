"""Compiled functions that live as long as the functions that they are made of.

Transforms a pytree with functions as leaves (a loss, a step of training) into what is compiled from it, once: a second
call with the same functions and the same values beside them finds it again. Functions are held weakly and compared by
identity, so that what they close over is freed with them. Limits: as with `jax.jit`, a function that reads something
that has changed since is not traced again; at most 256 are kept, the last used ones.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

_SIZE = 256
_KEPT: OrderedDict[Hashable, tuple[Any, tuple[weakref.ref, ...]]] = OrderedDict()
"""Key to what was made, and the references that take the entry away when what they refer to is gone."""
_BY_VALUE = (str, bytes, bool, int, float, complex, type(None))


@dataclass(frozen=True)
class _Leaf:
    """A leaf as part of a key: its value, or the places in memory of what is held weakly."""

    kind: type
    value: Any
    targets: tuple[int, ...] = ()


def _targets(leaf: Any) -> tuple[Any, ...]:
    """What of a leaf is compared by identity: itself, or the two parts of a method, which is made anew at each use."""
    return (leaf.__self__, leaf.__func__) if isinstance(leaf, MethodType) else (leaf,)


def _is_by_identity(leaf: Any) -> bool:
    """Whether a leaf is a function, an array, which never changes, or what says not when two of it are equal."""
    return callable(leaf) or isinstance(leaf, jax.Array) or type(leaf).__eq__ is object.__eq__


def _key(leaves: list[Any]) -> tuple[_Leaf, ...]:
    def of(leaf: Any) -> _Leaf:
        if not isinstance(leaf, _BY_VALUE) and _is_by_identity(leaf):
            return _Leaf(type(leaf), None, tuple(map(id, _targets(leaf))))
        return _Leaf(type(leaf), leaf)

    return tuple(map(of, leaves))


def _recalled(leaf: Any) -> Callable[[], Any]:
    """A function that returns a leaf, without keeping it alive if it is compared by identity."""
    if isinstance(leaf, _BY_VALUE) or not _is_by_identity(leaf):
        return lambda: leaf
    first, *rest = map(weakref.ref, _targets(leaf))
    if not rest:
        return first
    return lambda: MethodType(rest[0](), first())  # pyright: ignore[reportArgumentType]


def kept(kind: str, make: Callable[[Callable[[], PyTree]], Any], tree: PyTree, *key: Hashable) -> Any:
    """What `make` makes of a pytree; the same object for the same `kind`, pytree and `key`.

    `make` is given a function that returns the pytree, so that what it makes need not keep the functions in it alive.
    That works as long as somebody else does, as the caller of what is made. What cannot be part of a key, nor be held
    weakly, is made anew.
    """
    leaves, treedef = jtu.tree_flatten(tree)
    full = (kind, treedef, key, _key(leaves))
    targets = [t for leaf, part in zip(leaves, full[-1], strict=True) if part.targets for t in _targets(leaf)]
    try:
        found = _KEPT.get(full)
        recalled = list(map(_recalled, leaves))
        references = tuple(weakref.ref(t, lambda _: _KEPT.pop(full, None)) for t in targets)
    except (TypeError, ValueError):  # there is no hash, no weak reference, or no answer to whether two are equal
        return make(lambda: tree)
    if found is not None:
        _KEPT.move_to_end(full)  # the key stays the object that the references know
        return found[0]
    made = make(lambda: jtu.tree_unflatten(treedef, [recall() for recall in recalled]))
    _KEPT[full] = made, references
    while len(_KEPT) > _SIZE:
        _KEPT.popitem(last=False)
    return made


@jtu.register_static
@dataclass(frozen=True)
class _Fixed:
    """A pytree without arrays, as an argument or a result that is not traced."""

    leaves: tuple[Any, ...]
    treedef: Any

    @classmethod
    def of(cls, tree: PyTree) -> _Fixed:
        leaves, treedef = jtu.tree_flatten(tree)
        return cls(tuple(leaves), treedef)

    @property
    def tree(self) -> PyTree:
        return jtu.tree_unflatten(self.treedef, self.leaves)


def _jit(recall: Callable[[], PyTree]) -> Callable[..., Any]:
    def run(arrays: PyTree, dynamic: PyTree, fixed: _Fixed) -> tuple[PyTree, _Fixed]:
        args, kwargs = eqx.combine(dynamic, fixed.tree)
        out, others = eqx.partition(eqx.combine(arrays, recall())(*args, **kwargs), eqx.is_array)
        return out, _Fixed.of(others)

    return jax.jit(run, static_argnums=2)


def configuration() -> Hashable:
    """The settings of JAX, on which a compiled program depends."""
    return tuple((name, repr(getattr(jax.config, name, value))) for name, value in jax.config.values.items())


def jitted(function: PyTree, *key: Hashable) -> Callable[..., Any]:
    """As `equinox.filter_jit(function)`, found again for the same function as long as that lives.

    `key`: what else the function depends on, beside its arguments and its own leaves.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays, static = eqx.partition(function, eqx.is_array)
        run = kept("jit", _jit, static, *key)
        dynamic, fixed = eqx.partition((args, kwargs), eqx.is_array)
        out, others = run(arrays, dynamic, _Fixed.of(fixed))
        return eqx.combine(out, others.tree)

    return call
