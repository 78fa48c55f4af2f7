"""`custom_projection`: a function with a projection rule of its own, as `jax.custom_vjp` gives it a derivative.

Transforms a call into one equation of the jaxpr, of a primitive that keeps the function whole. It is evaluated,
lowered, differentiated and batched as the function itself, so that the same model trains with optax. Limits: as with
`jax.custom_vjp`, arrays that the function needs must be arguments, not closed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .._errors import check_shapes

_P = ParamSpec("_P")
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One call of a function with a rule, both on flat arrays: `function(*inputs) -> [outputs]`.

    `rule(ctx, inputs, targets) -> [new inputs]`, or for a loss `rule(inputs, tau) -> displacement of the first input`.
    """

    name: str
    function: Callable[..., list[Array]]
    rule: Callable[..., Any]
    hard: bool = False

    def __repr__(self) -> str:
        return self.name

    def batched(self, dims: Sequence[Any]) -> Call:
        """The same call over a batch. `dims` are the batch dimensions of the inputs; outputs have it in front."""

        def rule(*args):
            *ctx, inputs, given = args
            new = jax.vmap(lambda *each: self.rule(*ctx, *each), in_axes=(list(dims), 0))(list(inputs), given)
            return [_front(n, d) for n, d in zip(new, dims, strict=True)] if ctx else _front(new, dims[0])

        return replace(self, function=jax.vmap(self.function, in_axes=tuple(dims)), rule=rule)


def _front(x: Array, dim: int | None) -> Array:
    """Moves a batch dimension from the front to where the operand has it. Without one there, it takes the mean."""
    return x.mean(0).astype(x.dtype) if dim is None else jnp.moveaxis(x, 0, dim)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    def evaluate(*args, call):
        return call.function(*args)

    def abstract(*avals, call):
        shapes = jax.eval_shape(call.function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]

    def batch(args, dims, *, call):
        out = primitive.bind(*args, call=call.batched(dims))
        return out, [0] * len(out)

    def jvp(primals, tangents, *, call):
        full = [_zero(p) if isinstance(t, ad.Zero) else t for p, t in zip(primals, tangents, strict=True)]
        return jax.jvp(call.function, tuple(primals), tuple(full))

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=True))
    return primitive


def _zero(primal: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(primal), jnp.inexact):
        return jnp.zeros_like(primal)
    return np.zeros(jnp.shape(primal), jax.dtypes.float0)


projection_p = _primitive("custom_projection")
loss_p = _primitive("custom_loss")


class CustomProjection(Generic[_P, _T]):
    """What [`custom_projection`][] returns: call it as the function itself."""

    def __init__(self, function: Callable[_P, _T]):
        self.function = function
        self._name = getattr(function, "__name__", "function")
        self.rule: Callable[..., Any] | None = None
        update_wrapper(self, function)

    def def_projection(self, rule: _F) -> _F:
        """Defines the projection; use as a decorator.

        **Arguments:**

        - `rule`: `rule(ctx, inputs, target) -> new_inputs`. `inputs` is the tuple of the call's positional arguments;
            `target` has the structure of the output. It returns the new arguments as a tuple (or the one new argument
            of a function of one): inputs near the given ones, at which the output is the target, or nearer to it. New
            arguments in the place of known ones, or of arguments that are no floats, are ignored and may be `None`.
            Python numbers among the arguments are passed on as they are. `ctx.weights` and `ctx.kappa` weigh the
            distances of the inputs and of the output.

        **Returns:**

        The rule, unchanged.
        """
        if not callable(rule):
            raise TypeError(
                f"The projection of {self._name!r} must be a function `(ctx, inputs, target) -> new_inputs`, got "
                f"{rule!r}."
            )
        self.rule = rule
        return rule

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if self.rule is None:
            raise ValueError(
                f"The function {self._name!r} is decorated with `custom_projection`, but has no projection. Define it "
                f"with `@{self._name}.def_projection` before the first call."
            )
        positional = self._positional(args, kwargs)
        is_array = jtu.tree_map(_is_array, positional)
        arrays, others = eqx.partition(positional, is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        out_treedef: list[Any] = []
        call: Callable[..., Any] = self.function

        def join(flat: Sequence[Any]) -> Any:
            return eqx.combine(jtu.tree_unflatten(treedef, flat), others)

        def function(*flat):
            found, structure = jtu.tree_flatten(jtu.tree_map(jnp.asarray, call(*join(flat))))
            out_treedef[:] = [structure]
            return found

        def rule(ctx, inputs, targets):
            assert self.rule is not None
            old = join(inputs)
            new = self._completed(self.rule(ctx, old, jtu.tree_unflatten(out_treedef[0], targets)), old)
            moved = jtu.tree_leaves(eqx.filter(new, is_array))
            kept = [n if unknown else o for n, o, unknown in zip(moved, inputs, ctx.unknown, strict=True)]
            check_shapes(kept, inputs, f"The projection of {self._name!r}")
            return [jnp.asarray(x) for x in kept]

        out = projection_p.bind(*map(jnp.asarray, leaves), call=Call(self._name, function, rule))
        return jtu.tree_unflatten(out_treedef[0], out)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments in the order of the function's signature, with its defaults."""
        if not kwargs:
            return args
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(
                f"The function {self._name!r} is decorated with `custom_projection`, whose rule takes a tuple of "
                f"arguments: it can have no keyword-only ones, but got {', '.join(bound.kwargs)}."
            )
        return bound.args

    def _completed(self, new: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        """The new arguments as a tuple like the old ones; `None` for an argument stands for the old one."""
        new = new if isinstance(new, tuple) and len(new) == len(old) else (new,)
        if len(new) != len(old):
            raise ValueError(
                f"The projection of {self._name!r} must return {len(old)} new inputs, a tuple like the arguments; it "
                f"returned {len(new)}."
            )
        new = tuple(o if n is None else n for n, o in zip(new, old, strict=True))
        found, wanted = jtu.tree_structure(new), jtu.tree_structure(old)
        if found != wanted:
            raise ValueError(
                f"The projection of {self._name!r} must return new inputs structured like the arguments, {wanted}; it "
                f"returned {found}."
            )
        return new


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def custom_projection(function: Callable[_P, _T]) -> CustomProjection[_P, _T]:
    """Decorates a function whose projection is then given with `def_projection`.

    **Arguments:**

    - `function`: any function of arrays or pytrees of arrays, differentiable or not.

    **Returns:**

    A callable that computes the same, under `jit`, `vmap`, `grad` and `scan` too, and which training by projections
    treats as one operation.

    !!! example

        ```python
        @eqxproj.custom_projection
        def soft_step(x):
            return jnp.where(x > 0, 1.0, 0.0)


        @soft_step.def_projection
        def _(ctx, inputs, target):
            (x,) = inputs
            near = jnp.abs(x) < 1  # where a step may still be taken back
            return jnp.where(near, x + target - soft_step(x), x)
        ```

    Training takes small steps, so that a rule should answer a target close by with a small move. A rule that moves
    nothing until the target is nearer to another output than to the present one will never see such a target.

    **Raises:** `ValueError` when called without a projection.
    """
    if not callable(function):
        raise TypeError(f"`function` must be a function of arrays, got {function!r}.")
    return CustomProjection(function)


def custom_loss(
    value: Callable[..., Array], displacement: Callable[..., Array], *, hard: bool = False
) -> Callable[..., Array]:
    r"""Makes a loss that brings its own proximal map.

    In the projection regime, training moves the predictions $z$ to
    $\mathrm{prox}_{\tau \ell}(z) = \arg\min_u \tfrac12 |u - z|^2 + \tau \ell(u, t)$, with $\ell$ the sum of the loss
    over the samples and $t$ the targets; `displacement` says how far that is from $z$. In the gradient regime, training
    takes the gradient of `value`, as `jax.grad` does.

    **Arguments:**

    - `value`: `value(predictions, targets)`, the loss, not reduced: `Float[Array, "*samples"]`. It must be
        differentiable by JAX. It is all that counts where the targets depend on parameters too, and where the loss is
        not the objective.
    - `displacement`: `displacement(predictions, targets, tau)`, which is $\mathrm{prox}_{\tau \ell}(z) - z$, of the
        shape of the predictions. `tau` is positive, `Float[Array, "*samples"]`; what multiplies the loss later, such as
        the $1/n$ of a mean, is in it. For small `tau` the displacement approaches $-\tau \nabla \ell$. Compute it
        directly, not as the difference of two nearly equal arrays, since `tau` may be small.
    - `hard`: whether the loss stands for the constraint that it is zero. The displacement then is that to the nearest
        predictions without loss, whatever `tau` is.

    **Returns:**

    The loss `(predictions, targets) -> Float[Array, "*samples"]`, of two arrays. It runs under `jit`, `vmap` and
    `grad`; average it, sum it, or weigh it as any other loss.

    **Raises:** `TypeError` where `value` or `displacement` is not callable, or `hard` no Boolean; later, in
    the projection regime, `ValueError` where a displacement has not the shape of the predictions.

    !!! example

        ```python
        def distance(predictions, targets):
            return jnp.abs(predictions - targets)


        def toward_targets(predictions, targets, tau):
            return jnp.clip(targets - predictions, -tau, tau)


        absolute_error = eqxproj.custom_loss(distance, toward_targets)


        def loss(model, x, y):
            return jnp.mean(absolute_error(jax.vmap(model)(x), y))
        ```
    """
    for argument, function in (("value", value), ("displacement", displacement)):
        if not callable(function):
            raise TypeError(f"`{argument}` must be a function, got {function!r}. See the example of `custom_loss`.")
    if not isinstance(hard, bool):
        raise TypeError(f"`hard` must be `True` or `False`, got {hard!r}.")
    name = getattr(value, "__name__", type(value).__name__)

    def rule(inputs: Sequence[Array], tau: Array) -> Array:
        moved = jnp.asarray(displacement(inputs[0], inputs[1], tau))
        check_shapes([moved], inputs[:1], f"The displacement of the loss {name!r}")
        return moved

    def loss(predictions: Any, targets: Any) -> Array:
        call = Call(name, lambda *args: [value(*args)], rule, hard)
        return loss_p.bind(jnp.asarray(predictions), jnp.asarray(targets), call=call)[0]

    return update_wrapper(loss, value, updated=())
