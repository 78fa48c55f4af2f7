r"""Elementwise nodes: $y = \phi(s)$ with $s = \sum_i c_i x_i + d$, whatever the function and however many terms.

The pullback passes $c_i \phi'(s) \mu$ to term $i$. Where $\phi$ jumps, the slope is that of its expectation under
noise.

The projection: with weights $w_i$ on the terms and $\sigma = \sum_i c_i^2/w_i$, moving $s$ by $\sigma\lambda$ costs
least where each $x_i$ moves by $c_i\lambda/w_i$. What is left is one-dimensional, $\min_s (s-s_0)^2/\sigma +
\kappa(\phi(s)-y_0)^2$, and the dual of $x_i$ is $c_i\lambda$. A term may be a sum over $n$ elements, which counts $n$
times in $\sigma$. Affine nodes (add, sub, neg, scaling, sums, means) are those with $\phi$ the identity.

$\phi$ is recognized from its equations. A function that is affine on finitely many pieces is projected exactly, and so
are square, round, floor and ceil. A smooth one goes through Newton's method where its step is moderate, and any other
through a search without derivatives, whose limits are those of `_numerics/_scalar.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._numerics._differences import difference_slope
from .._numerics._noise import expected_slope, expected_slope_of_pieces, jumps_of, within
from .._numerics._piecewise import PiecewiseAffine, apply_primitive
from .._numerics._piecewise_dual import piecewise_affine_dual
from .._numerics._scalar import round_dual, square_dual
from .._numerics._search import generic_dual
from .._numerics._smooth import Bounds, bounds_of, smooth_dual
from .._program._affine import AffineTerm as AffineTerm
from .._program._equations import Equation, Variable
from .._program._fragment import Fragment, OfOne
from .._program._primitives import FLAT
from ._base import AbstractRule, Context

Special = Literal["square", "round", "floor", "ceil"]


def recognize(phi: Fragment, static: Mapping[int, float]) -> PiecewiseAffine | None:
    """The function that a fragment of one operand computes, where it is affine on finitely many pieces."""
    env: dict[int, Any] = {phi.operands[0].index: PiecewiseAffine.identity()}
    for equation in phi.equations:
        args = [env[v.index] if v.index in env else static.get(v.index) for v in equation.inputs]
        if any(a is None for a in args):
            return None
        result = apply_primitive(equation.name, equation.params, args)  # pyright: ignore[reportArgumentType]
        if result is None:
            return None
        env[equation.outputs[0].index] = result
    return env[phi.outputs[0].index]


def _special(phi: Fragment) -> Special | None:
    """The name of a function with a closed form that is not piecewise affine."""
    if len(phi.equations) != 1:
        return None
    equation = phi.equations[0]
    if equation.name == "square" or (equation.name == "integer_pow" and equation.params["y"] == 2):
        return "square"
    if equation.name == "mul" and equation.inputs == (phi.operands[0], phi.operands[0]):
        return "square"
    if equation.name == "round":
        return "round" if int(equation.params["rounding_method"]) == 1 else None
    return "floor" if equation.name == "floor" else "ceil" if equation.name == "ceil" else None


class Scalar(AbstractRule):
    """The projection onto the graph of $\\phi(\\sum_i c_i x_i + d)$, elementwise."""

    label: ClassVar[str] = "scalar"

    def __init__(self, terms: Sequence[AffineTerm], head: Fragment, phi: Fragment, static: Mapping[int, float]):
        """The function `phi` of the affine function `head`, whose coefficients are `terms`."""
        self.terms, self.head, self.phi = tuple(terms), head, phi
        self.static = {i: static[i] for i in phi.known if i in static}
        self.special: Special | None = _special(phi)
        self.pieces = None if self.special else recognize(phi, static)
        self.slots = tuple(v.index for v in head.operands)

    @property
    def repeats(self) -> bool:
        """Whether the output is the one operand, maybe of another type, and maybe plus a known constant."""
        first = self.terms[0]
        return self.is_sum and len(self.terms) == 1 and first.scale == 1 and not first.factors

    @property
    def is_sum(self) -> bool:
        """Whether the output is the sum of the operands, each times a coefficient, entry by entry."""
        plain = not any(t.axes for t in self.terms)
        return plain and self.pieces is not None and self.pieces.describe() == "identity"

    def describe(self, equation: Equation | None) -> str:
        if self.pieces is None:
            return f"scalar: {self.special or 'generic solver'}"
        name = self.pieces.describe()
        if name != "identity":
            return f"scalar: {name}"
        return name if self.repeats else "affine"

    def _coefficients(self, ctx: Context, inputs: Sequence[Array]) -> list[tuple[float | Array, int, tuple[int, ...]]]:
        """For each operand its coefficient, how many elements of it one output adds up, and over which axes."""
        found = []
        for slot, x in zip(self.slots, inputs, strict=True):
            mine = [t for t in self.terms if t.variable.index == slot]
            coefficient = sum((t.coefficient(ctx.known) for t in mine[1:]), start=mine[0].coefficient(ctx.known))
            found.append((coefficient, math.prod(x.shape[axis] for axis in mine[0].axes), mine[0].axes))
        return found

    def gathered(self, ctx: Context, copies: Sequence[Array], outputs: Sequence[Array]) -> Array:
        """One constraint an element, unless the head adds up elements."""
        if any(t.axes for t in self.terms):
            return super().gathered(ctx, copies, outputs)
        return sum(copies, start=outputs[0])

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        return self.phi(ctx.known, self.head(ctx.known, inputs))

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        if not self.phi.equations:  # a sum: there is nothing to evaluate
            return self._shared(ctx, inputs, duals[0].astype(self.phi.operands[0].dtype))
        s0 = self.head(ctx.known, inputs)[0]
        dual = duals[0].astype(s0.dtype)
        return self._shared(ctx, inputs, _passed(self._slope(ctx, s0), dual))

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        s0 = self.head(ctx.known, inputs)[0]
        q, sigma = 0.0, 0.0
        for i, (c, count, _) in enumerate(self._coefficients(ctx, inputs)):
            q = q + c * c * count * ctx.ratio(i)
            sigma = sigma + c * c * count / ctx.weights[i]
        wide = jnp.promote_types(s0.dtype, jnp.float32)  # no weight fits into float16
        sigma = jnp.clip(jnp.asarray(sigma, wide), 1e-30, 1e30)
        multiplier = self.nearest(ctx, s0, duals[0].astype(s0.dtype), jnp.asarray(q, wide), sigma)
        return self._shared(ctx, inputs, multiplier.astype(s0.dtype))

    def _shared(self, ctx: Context, inputs: Sequence[Array], multiplier: Array) -> list[Array]:
        """The dual of every operand from the one of their sum: its coefficient times that."""
        input_duals = []
        for (c, _, axes), x in zip(self._coefficients(ctx, inputs), inputs, strict=True):
            is_one = isinstance(c, float) and c == 1.0
            nu = (multiplier if is_one else c * multiplier).astype(x.dtype)
            input_duals.append(jnp.broadcast_to(jnp.expand_dims(nu, axes), x.shape) if axes else nu)
        return input_duals

    def nearest(self, ctx: Context, s0: Array, dual: Array, q: Array, sigma: Array) -> Array:
        r"""The dual $(s - s_0)/\sigma$ of the nearest point of the graph of $\phi$."""
        if self.pieces is not None and self.pieces.describe() == "relu":
            return relu_dual(s0, dual, jnp.asarray(ctx.output_weights[0], sigma.dtype), sigma, q)
        if self.pieces is not None:
            return piecewise_affine_dual(self.pieces, s0, dual, sigma, q)
        if self.special == "square":
            return square_dual(s0, dual, sigma, q)
        if self.special is not None:
            return round_dual(s0, dual, sigma, q, self.special)
        phi = functools.partial(self._value, ctx)
        otherwise = functools.partial(generic_dual, phi, s0, dual, sigma, q)
        if s0.dtype != sigma.dtype or self._bounds is None:
            return otherwise()
        return smooth_dual(phi, self._bounds, s0, dual, sigma, q, otherwise)

    def _slope(self, ctx: Context, s0: Array) -> Array:
        r"""The slope of $\phi$, or where $\phi$ jumps, the slope of its expectation under noise."""
        if ctx.noise == "never":
            return self._plain_slope(ctx, s0)
        if self.special in ("round", "floor", "ceil"):
            return jnp.ones_like(s0)
        if self.pieces is not None and self.pieces.has_jumps:
            return expected_slope_of_pieces(self.pieces, s0)
        if self.pieces is not None or not self._jumps:
            return self._plain_slope(ctx, s0)
        phi = functools.partial(self._value, ctx)
        if any(e.name in FLAT for e in self.phi.equations):
            return expected_slope(phi, s0)
        slope = self._plain_slope(ctx, s0)
        plain = jnp.where(jnp.isfinite(slope), slope, 0.0)
        # Many functions with jumps are smooth where they are used: noise answers near a jump, or where all is flat.
        noisy = within(self._jumps, s0) | ~jnp.any(plain != 0)
        return jax.lax.cond(noisy, lambda: expected_slope(phi, s0), lambda: plain)

    def _plain_slope(self, ctx: Context, s0: Array) -> Array:
        """The derivative of this one function; by differences where JAX knows none."""
        if self.phi.known <= self.static.keys():
            return _slope_of(self._kind)(s0)
        return _slope_at(functools.partial(self._value, ctx), s0)

    def _value(self, ctx: Context, s: Array) -> Array:
        """The function without its affine head."""
        return self.phi(ctx.known, [s])[0]

    def known_variables(self) -> list[int]:
        return [v.index for term in self.terms for v, _ in term.factors]

    @property
    def is_discontinuous(self) -> bool:
        if self.pieces is not None:
            return self.pieces.has_jumps
        return self.special in ("round", "floor", "ceil") or (self.special is None and bool(self._jumps))

    @property
    def has_slope(self) -> bool | None:
        return None if self.pieces is None else any(self.pieces.slopes)

    @functools.cached_property
    def _bounds(self) -> Bounds | None:
        """Of a function that reads known arrays nothing is known."""
        return _bounds_of(self._kind) if self.phi.known <= self.static.keys() else None

    @functools.cached_property
    def _jumps(self) -> tuple[float, ...]:
        """Where a function of known numbers has jumps. Of one that reads known arrays that is not found out."""
        may = any(e.name in MAY_JUMP for e in self.phi.equations) and self.phi.known <= self.static.keys()
        return _jumps_of(self._kind) if may else ()

    @property
    def _kind(self) -> OfOne:
        return OfOne.of(self.phi, self.static)


_KINDS = 256  # whose jumps and bounds are remembered


@jax.jit
def _passed(slope: Array, dual: Array) -> Array:
    """A slope times a dual. A slope that is not finite, as of a square root at zero, passes nothing on."""
    return jnp.where(jnp.isfinite(slope), slope * dual, jnp.zeros_like(dual))


def _slope_at(phi: Callable[[Array], Array], s0: Array) -> Array:
    try:
        return jax.jvp(phi, (s0,), (jnp.ones_like(s0),))[1]
    except Exception:  # what a primitive without a derivative raises is its own choice
        return difference_slope(phi, s0)


# The slopes of functions of the same steps are traced once.
_slope_of = functools.lru_cache(_KINDS)(lambda kind: jax.jit(functools.partial(_slope_at, kind)))
# What is found out of a function by evaluating it, once for all functions of the same steps.
_jumps_of = functools.lru_cache(_KINDS)(lambda kind: jumps_of(kind, kind.dtype))
_bounds_of = functools.lru_cache(_KINDS)(lambda kind: bounds_of(kind, kind.dtype))


def clear_kinds() -> None:
    """Forgets what was found out of functions."""
    _jumps_of.cache_clear()
    _bounds_of.cache_clear()


MAY_JUMP = ("sign", "threshold", "round", "floor", "ceil", "gt", "ge", "lt", "le", "eq", "ne", "is_finite", "rem")


def relu_dual(s0: Array, dual: Array, kappa: Array, sigma: Array, q: Array) -> Array:
    r"""As `piecewise_affine_dual` for the relu, in one pass: it is the most used function of all.

    For $s_0 > 0$ the answer is $\lambda = \mu/(1+q)$, which may not pass zero. For $s_0 \le 0$ and $y_0 = \mu/\kappa
    > 0$ the rising half-line is at cost $\kappa(y_0-s_0)^2/(1+q)$ and staying at $\kappa y_0^2$: it is worth going
    where $s_0^2 - 2 y_0 s_0 < q y_0^2$, and then $\lambda = (\mu - \kappa s_0)/(1+q)$.
    """
    y0 = dual / kappa
    goes = (dual > 0) & (s0 * (s0 - 2.0 * y0) < q * y0 * y0)
    inverse = 1.0 / (1.0 + q)
    above = jnp.maximum(dual * inverse, -s0 / sigma)
    return jnp.where(s0 > 0, above, jnp.where(goes, (dual - kappa * s0) * inverse, 0.0))


def identity(variable: Variable) -> Scalar:
    """The rule of a node that only sets two values equal."""
    fragment = Fragment((), (variable,), (variable,))
    return Scalar((AffineTerm(variable, 1.0, (), ()),), fragment, fragment, {})
