"""`custom_projection`: a function with a projection rule of its own, as `jax.custom_vjp` gives it a derivative.

Transforms a call into one equation of the jaxpr, of a primitive that keeps the function whole. It is evaluated,
lowered, differentiated and batched as the function itself, so that the same model trains with optax. Limits: as with
`jax.custom_vjp`, arrays that the function needs must be arguments, not closed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar, overload

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .._errors import checked_arrays

_P = ParamSpec("_P")
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One call of a function with a rule, both on flat arrays: `function(*inputs) -> [outputs]`.

    `rule(ctx, inputs, targets) -> [new inputs]`, or for a loss `rule(inputs, tau) -> displacement of the first input`.
    `each`: where this is a batch of calls, one of them. `dims`, `size`: where the inputs have the batch, and its size.
    `origin`: what the two functions were made of; calls of equal origins do the same.
    """

    name: str
    function: Callable[..., list[Array]]
    rule: Callable[..., Any]
    hard: bool = False
    is_discontinuous: bool | None = None
    each: Call | None = None
    dims: tuple[int | None, ...] = ()
    size: int = 0
    origin: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return self.name

    def batched(self, dims: Sequence[int | None], size: int) -> Call:
        """The same call over a batch. `dims` are the batch dimensions of the inputs; outputs have it in front.

        The rule answers for each element of the batch, so that unknown inputs must not be shared: see `unshared`. What
        it answers for shared ones is dropped.
        """

        def rule(*args):
            *ctx, inputs, given = args
            if not ctx:
                new = jax.vmap(self.rule, in_axes=(list(dims), 0), axis_size=size)(list(inputs), given)
                return _moved(new, dims[0])
            arrays = _arrays_of_weights(ctx[0], given)
            call = jax.vmap(
                lambda arrays, *each: self.rule(_with_arrays(ctx[0], arrays), *each),
                in_axes=(0, list(dims), 0),
                axis_size=size,
            )
            new = call(arrays, list(inputs), given)
            return [x if d is None else _moved(n, d) for n, x, d in zip(new, inputs, dims, strict=True)]

        function = jax.vmap(self.function, in_axes=tuple(dims), axis_size=size)
        return replace(self, function=function, rule=rule, each=self, dims=tuple(dims), size=size)

    def shares(self, position: int) -> bool:
        """Whether elements of a batch share this input."""
        return self.each is not None and (self.dims[position] is None or self.each.shares(position))

    def unshared(self, positions: Sequence[int]) -> Call:
        """The call with every element's own copy of these inputs, whose batch dimensions are in front."""
        if self.each is None:
            return self
        dims = [0 if i in positions else d for i, d in enumerate(self.dims)]
        return self.each.unshared(positions).batched(dims, self.size)

    def copies(self, position: int, value: Array) -> Array:
        """The copies of an input that `unshared` takes."""
        if self.each is None:
            return value
        copies, dim = self.each.copies, self.dims[position]
        if dim is None:
            one = copies(position, value)
            return jnp.broadcast_to(one, (self.size, *one.shape))
        return jax.vmap(lambda x: copies(position, x), in_axes=dim)(value)


def _moved(x: Array, dim: int | None) -> Array:
    """Moves a batch dimension from the front to where an input has it."""
    if dim is None:
        raise AssertionError("A batch of rules must not share what they answer for.")
    return jnp.moveaxis(x, 0, dim)


def _arrays_of_weights(ctx: Any, targets: Sequence[Array]) -> list[Any]:
    """For each output its weight and ratios, shaped like it; `None` where they are numbers, which a batch shares."""
    return [
        jtu.tree_map(lambda k, t=t: jnp.broadcast_to(k, t.shape), [weight, *row]) if jnp.ndim(weight) else None
        for weight, row, t in zip(ctx.output_weights, ctx.ratios, targets, strict=True)
    ]


def _with_arrays(ctx: Any, arrays: Sequence[Any]) -> Any:
    """The context with these weights and ratios of outputs, where they are arrays."""
    pairs = [
        (weight, row) if own is None else (own[0], tuple(own[1:]))
        for weight, row, own in zip(ctx.output_weights, ctx.ratios, arrays, strict=True)
    ]
    return replace(ctx, output_weights=tuple(k for k, _ in pairs), ratios=tuple(row for _, row in pairs))


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    def evaluate(*args, call):
        return call.function(*args)

    def abstract(*avals, call):
        shapes = jax.eval_shape(call.function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]

    def batch(args, dims, *, call):
        (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
        out = primitive.bind(*args, call=call.batched(dims, size))
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

    def __init__(self, function: Callable[_P, _T], is_discontinuous: bool | None = None):
        self.function = function
        self.is_discontinuous = is_discontinuous
        self._name = getattr(function, "__name__", "function")
        self.rule: Callable[..., Any] | None = None
        update_wrapper(self, function)

    def def_projection(self, rule: _F) -> _F:
        r"""Defines the projection; use as a decorator.

        **Arguments:**

        - `rule`: `rule(ctx, inputs, target) -> new_inputs`. `inputs` is the tuple of the arguments that the call gave:
            positional ones (also where they were given by name), then keyword-only ones, in the order of the signature;
            `target` has the structure of the output. It returns the new arguments as a tuple or list (or the one new
            argument of a function of one): inputs near the given ones, at which the output is the target, or nearer to
            it. New arguments in the place of known ones, or of arguments that are no floats, are ignored and may be
            `None`. Python numbers among the arguments are passed on as they are.

        `ctx.weights` weigh the distances of the unknown inputs, `ctx.kappa` those of the outputs. The exact projection
        is $\arg\min_{x'} \sum_i w_i |x'_i - x_i|^2 + \kappa |f(x') - t|^2$.

        In the gradient regime, the rule is asked what it would do about small wishes. One that depends on `ctx.kappa`
        (or `ctx.ratio`) is asked at weights at which the output hardly pulls, $\kappa \ll w$, with a target that may
        be farther from the output than the output is from zero; the exact projection then answers by
        $\frac{\kappa}{w} J^T (t - f(x))$, and this is scaled to the gradient. One that does not depend on it is asked
        for a target near the output, and counts as a projection at unit weights: `x + J^T (target - f(x))` answers by
        the gradient. Arrays are of float32 at least then, weights may be traced, and the rule is called several times.

        **Returns:**

        The rule, unchanged.

        **Raises:** `TypeError` where the rule is no function; later, `ValueError` and `TypeError` where it returns
        arguments of another number, structure, shape or kind.
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
        positional, named = self._arguments(args, kwargs)
        given = (*positional, *named.values())
        is_array = jtu.tree_map(_is_array, given)
        arrays, others = eqx.partition(given, is_array)
        leaves, treedef = jtu.tree_flatten(arrays)
        out_treedef: list[Any] = []
        call: Callable[..., Any] = self.function

        def join(flat: Sequence[Any]) -> Any:
            return eqx.combine(jtu.tree_unflatten(treedef, flat), others)

        def function(*flat):
            full = join(flat)
            by_name = dict(zip(named, full[len(positional) :], strict=True))
            out = call(*full[: len(positional)], **by_name)
            found, structure = jtu.tree_flatten(jtu.tree_map(jnp.asarray, out))
            out_treedef[:] = [structure]
            return found

        def rule(ctx, inputs, targets):
            assert self.rule is not None
            old = join(inputs)
            new = self._completed(self.rule(ctx, old, jtu.tree_unflatten(out_treedef[0], targets)), old)
            moved = jtu.tree_leaves(eqx.filter(new, is_array))
            kept = [n if unknown else o for n, o, unknown in zip(moved, inputs, ctx.unknown, strict=True)]
            return checked_arrays(kept, inputs, f"The projection of {self._name!r}")

        fixed = jtu.tree_flatten(others)
        origin = (call, self.rule, treedef, *fixed, tuple(named), len(positional))
        flat = Call(self._name, function, rule, is_discontinuous=self.is_discontinuous, origin=origin)
        out = projection_p.bind(*map(jnp.asarray, leaves), call=flat)
        return jtu.tree_unflatten(out_treedef[0], out)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that were given, positional ones first, and defaults between them; then those by name alone."""
        if not kwargs:
            return args, {}
        signature = inspect.signature(self.function)
        bound = signature.bind(*args, **kwargs)
        places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = [i for i, p in enumerate(places) if p.name in bound.arguments]
        between = {p.name: p.default for p in places[: max(given, default=-1) + 1]}
        full = {**between, **bound.arguments}
        bound.arguments = {name: full[name] for name in signature.parameters if name in full}
        return bound.args, bound.kwargs

    def _completed(self, new: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        """The new arguments as a tuple like the old ones; `None` for an argument stands for the old one."""
        is_one = len(old) == 1 and jtu.tree_structure(new) == jtu.tree_structure(old[0])
        new = (new,) if is_one or not isinstance(new, (tuple, list)) else tuple(new)
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


@overload
def custom_projection(
    function: Callable[_P, _T], *, is_discontinuous: bool | None = None
) -> CustomProjection[_P, _T]: ...


@overload
def custom_projection(
    *, is_discontinuous: bool | None = None
) -> Callable[[Callable[_P, _T]], CustomProjection[_P, _T]]: ...


def custom_projection(function: Any = None, *, is_discontinuous: bool | None = None) -> Any:
    """Decorates a function whose projection is then given with `def_projection`.

    **Arguments:**

    - `function`: any function of arrays or pytrees of arrays, differentiable or not. Without it, a decorator is
        returned: `@custom_projection(is_discontinuous=True)`.
    - `is_discontinuous`: whether the output may jump where an input hardly moves. In the gradient regime such an output
        stays as the forward pass has it, since a jump would count as a huge violation. By default found out where it
        is certain: by roundings, signs, positions of maxima, and choices between known values (`jnp.where(x > 0, 1.0,
        0.0)`). Say `True` for other functions with jumps, such as those of `jax.pure_callback`.

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

    **Raises:** `TypeError` where `function` is no function, or `is_discontinuous` neither a Boolean nor `None`;
    `ValueError` when called without a projection.
    """
    if not isinstance(is_discontinuous, bool | None):
        raise TypeError(f"`is_discontinuous` must be `True`, `False` or `None`, got {is_discontinuous!r}.")
    if function is None:
        return partial(custom_projection, is_discontinuous=is_discontinuous)
    if not callable(function):
        raise TypeError(f"`function` must be a function of arrays, got {function!r}.")
    return CustomProjection(function, is_discontinuous)


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
        moved = displacement(inputs[0], inputs[1], tau)
        return checked_arrays([moved], inputs[:1], f"The displacement of the loss {name!r}")[0]

    call = Call(name, lambda *args: [value(*args)], rule, hard, origin=(value, displacement))

    def loss(predictions: Any, targets: Any) -> Array:
        return loss_p.bind(jnp.asarray(predictions), jnp.asarray(targets), call=call)[0]

    return update_wrapper(loss, value, updated=())
