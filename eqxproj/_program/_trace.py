"""From a loss function and a model to a program, with the model's inexact arrays as the unknowns.

A complex array is two unknowns, its real and its imaginary part.

Transforms `loss(model, *args, **kwargs)`, called once with abstract values, into a [`Trace`][]. Limits: all else that
is no argument's array is part of the trace (Python numbers, functions, integer arrays of the model).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._errors import check_function
from ._complex import is_complex, joined, pairs
from ._equations import Program, Variable
from ._normal_form import normal_form


class Trace(eqx.Module):
    """A traced loss: its program, the values of its inputs, and how to rebuild the model and the auxiliary output."""

    parameters: tuple[Array, ...]
    """The unknowns, all of them real."""
    arguments: tuple[Array, ...]
    static_model: PyTree
    treedef: Any = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    program: Program = eqx.field(static=True)
    aux_treedef: Any = eqx.field(static=True)
    aux_static: Any = eqx.field(static=True)
    is_parameter: tuple[bool, ...] = eqx.field(static=True)
    """For each unknown whether it is a parameter; the operands of an inner program may be states."""
    is_complex: tuple[bool, ...] = eqx.field(static=True)
    """For each inexact array of the model whether it is complex, and thus two unknowns."""

    @property
    def leaves(self) -> tuple[int | None, ...]:
        """For each unknown its place among the inexact arrays of the model; `None` for a part of a complex one."""
        return tuple(part for i, pair in enumerate(self.is_complex) for part in ((None, None) if pair else (i,)))

    @property
    def data(self) -> tuple[Variable, ...]:
        """The inputs of the program that are no parameters: the arguments, and the states of an inner program."""
        unknown = zip(self.program.inputs, self.is_parameter, strict=False)
        return (*(v for v, flag in unknown if not flag), *self.program.inputs[len(self.is_parameter) :])

    @property
    def imaginary(self) -> frozenset[int]:
        """The places of the unknowns that are imaginary parts."""
        parts = [part for pair in self.is_complex for part in ((False, True) if pair else (False,))]
        return frozenset(i for i, is_imaginary in enumerate(parts) if is_imaginary)

    def rebuild(self, parameters: Sequence[Array]) -> PyTree:
        """The model with these parameters in place of its inexact arrays."""
        return eqx.combine(self.tree(parameters), self.static_model)

    def tree(self, parts: Sequence[Array]) -> PyTree:
        """A pytree of the shape that `equinox.filter_grad` returns, from one array an unknown."""
        return jtu.tree_unflatten(self.treedef, joined(parts, self.is_complex))

    def auxiliary(self, leaves: Sequence[Any]) -> PyTree:
        """The auxiliary output of the loss, from the values of the program's outputs after the first."""
        return eqx.combine(jtu.tree_unflatten(self.aux_treedef, list(leaves)), self.aux_static)


def _as_arrays(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x, tree)


def _kind(value: Any) -> str:
    return "an array" if eqx.is_array(value) else type(value).__name__


def _check_value(value: Any) -> None:
    if not eqx.is_array(value) and not isinstance(value, (float, np.generic)):
        raise ValueError(
            f"`loss` must return a scalar array, but it returned {_kind(value)}. Return one number, and pass "
            "`has_aux=True` if the loss returns `(value, auxiliary)`."
        )
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"`loss` must return a floating-point scalar, but it returned shape {jnp.shape(value)} and dtype "
            f"{jnp.result_type(value)}. Take the mean or the sum over the samples."
        )


def _check_parameters(model: PyTree, parameters: Sequence[Array]) -> None:
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):  # its running statistics would be trained
        raise TypeError(
            f"`model` must be a pytree here, but it is {type(model).__name__}, an nnx module. Convert it with "
            "`eqxproj.flax.from_nnx(model)`; `train` and the displacements take it as it is."
        )
    if not parameters:
        raise ValueError(
            f"`model` holds no floating-point array, but got {type(model).__name__}: there is nothing to train. Pass "
            "a model whose parameters are floating-point arrays (Python numbers and integers are taken as fixed)."
        )


def _parts(name: str, is_complex: bool) -> tuple[str, ...]:
    """The names of the unknowns that a parameter is."""
    return (f"{name}.real", f"{name}.imag") if is_complex else (name,)


def trace(
    loss: Callable[..., Any],
    model: PyTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    has_aux: bool = False,
    is_parameter: Sequence[bool] | None = None,
) -> Trace:
    """Traces `loss(model, *args, **kwargs)`, which returns a scalar, or `(scalar, auxiliary)` with `has_aux`.

    The unknowns are the inexact arrays of `model`, all of them parameters unless `is_parameter` says otherwise. Raises
    a `ValueError` where there are none, or the loss returns no scalar.
    """
    check_function("loss", loss, "loss(model, *batch) -> scalar")
    unknown, static_model = eqx.partition(model, eqx.is_inexact_array)
    paths, treedef = jtu.tree_flatten_with_path(unknown)
    names = tuple(jtu.keystr(path).lstrip(".") or "parameter" for path, _ in paths)
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    _check_parameters(model, leaves)
    pair = tuple(is_complex(leaf.dtype) for leaf in leaves)
    flags = is_parameter or (True,) * len(leaves)
    arrays, static_inputs = eqx.partition(_as_arrays((tuple(args), dict(kwargs or {}))), eqx.is_array)

    def checked(parts: Sequence[Array], arrays: PyTree) -> tuple[Array, PyTree]:
        unknown = jtu.tree_unflatten(treedef, joined(parts, pair))
        full_args, full_kwargs = eqx.combine(arrays, static_inputs)
        out = loss(eqx.combine(unknown, static_model), *full_args, **full_kwargs)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                f"`loss` must return `(value, auxiliary)` with `has_aux=True`, but it returned {_kind(out)}."
            )
        value, aux = out if has_aux else (out, None)
        _check_value(value)
        return jnp.asarray(value), _as_arrays(aux)

    unknowns = 0 if is_parameter is not None else len(pairs(leaves))  # an inner program closes over nothing
    jaxpr, (_, aux), (_, aux_static) = eqx.filter_make_jaxpr(checked)(pairs(leaves), arrays)
    return Trace(
        parameters=tuple(pairs(leaves)),
        arguments=tuple(jtu.tree_leaves(arrays)),
        static_model=static_model,
        treedef=treedef,
        names=tuple(part for name, flag in zip(names, pair, strict=True) for part in _parts(name, flag)),
        program=normal_form(jaxpr, unknowns),
        aux_treedef=jtu.tree_structure(aux),
        aux_static=aux_static,
        is_parameter=tuple(f for f, is_pair in zip(flags, pair, strict=True) for f in (f,) * (1 + is_pair)),
        is_complex=pair,
    )
