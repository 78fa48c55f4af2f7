"""Arrays that are divided among devices over axes that are part of their types: meshes with explicit axes.

The programs of this library are made from shapes and dtypes alone. So they run with automatic axes, as an array is
placed; their results are placed as the arrays that they belong to. Limits: a loss that itself gives shardings of the
explicit kind (`out_sharding=...`) is refused by JAX there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._errors import is_key


def _typed(x: Any) -> Any:
    """The sharding in the type of an array, where its mesh has explicit axes; `None` elsewhere."""
    if not isinstance(x, jax.Array):
        return None
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and AxisType.Explicit in getattr(mesh, "axis_types", ()) else None


def with_automatic_axes(function: Callable[[PyTree], tuple[PyTree, PyTree]], given: PyTree, like: PyTree) -> Any:
    """`function(given)`, which returns two pytrees, the second one of arrays like those of `like`.

    Where arrays of `given` have explicit axes, the function sees automatic ones; the second pytree is divided as `like`
    is, and the first one is not divided.
    """
    meshes = [s.mesh for s in map(_typed, jtu.tree_leaves(given)) if s is not None]
    if not meshes:
        return function(given)
    arrays, others = eqx.partition(given, eqx.is_array)
    fixed: list[Any] = []

    def inner(arrays: PyTree) -> tuple[PyTree, PyTree]:
        first, second = function(eqx.combine(arrays, others))
        first, rest = eqx.partition(first, eqx.is_array)
        fixed[:] = [rest]
        return first, second

    specs = jtu.tree_map(lambda x: PartitionSpec() if _typed(x) is None else _typed(x).spec, like)
    names = tuple(
        n for n, kind in zip(meshes[0].axis_names, meshes[0].axis_types, strict=True) if kind == AxisType.Explicit
    )
    with jax.sharding.use_abstract_mesh(getattr(meshes[0], "abstract_mesh", meshes[0])):
        run = jax.sharding.auto_axes(inner, axes=names, out_sharding=(PartitionSpec(), specs))
        first, second = run(arrays)  # pyright: ignore[reportGeneralTypeIssues]
    return eqx.combine(first, fixed[0]), second


def on_automatic_mesh(tree: PyTree) -> PyTree:
    """A pytree with its arrays on meshes without explicit axes, divided as they are."""

    def place(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or _typed(x) is None:
            return x
        return jax.device_put(x, automatic(x.sharding))

    return jtu.tree_map(place, tree)


def placed_as(tree: PyTree, like: PyTree) -> PyTree:
    """A pytree with its arrays on the devices, and divided, as those of another; what has one device stays."""

    def place(x: Any, y: Any) -> Any:
        is_divided = isinstance(y, jax.Array) and isinstance(y.sharding, NamedSharding)
        return jax.device_put(x, y.sharding) if is_divided else x

    return jtu.tree_map(place, tree, like)


def constrained_as(x: Array, sharding: Any) -> Array:
    """Inside of a `jit`, an array divided as a sharding says, where that is one over named axes."""
    is_named = isinstance(sharding, NamedSharding)
    return jax.lax.with_sharding_constraint(jnp.asarray(x), sharding) if is_named else x


def automatic(sharding: NamedSharding) -> NamedSharding:
    """A sharding on the mesh of the same devices whose axes are all automatic."""
    mesh: Any = sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return sharding
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types), sharding.spec)


def on_mesh_of(sharding: NamedSharding, tree: Any) -> Any:
    """A pytree whose arrays lie on all devices of a mesh: those that are divided stay so, the others are repeated."""
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(x: Any) -> Any:
        if is_key(x):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        is_placed = not isinstance(x, jax.Array) or isinstance(x.sharding, NamedSharding)
        return x if is_placed else jax.device_put(x, everywhere)

    return jtu.tree_map(place, tree)


def stacked_on(sharding: NamedSharding, batches: PyTree) -> PyTree:
    """Batches of the host, stacked along a first axis, on devices: each divided as the sharding says.

    Where there are several processes, each one gives its part of the batches.
    """

    def place(x: Any) -> Array:
        spec = PartitionSpec(None, *sharding.spec[: max(0, x.ndim - 1)])
        return jax.make_array_from_process_local_data(NamedSharding(sharding.mesh, spec), x)

    return jtu.tree_map(place, batches)
