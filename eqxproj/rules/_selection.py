r"""Selections: operations that read the position of a maximum, such as `one_hot(argmax(x))` or `table[argmax(x)]`.

The node is everything from the scores $x$ to the next floating-point values: $y = g(k, z)$ with $k = \arg\max_j x_j$
(or a slot of `top_k`) and further operands $z$. The operands $z$ are answered for at the position of the forward pass.

- The pullback to the scores is the expectation under noise. With Gumbel noise on the scores the position is random with
  $p = \mathrm{softmax}(x)$, and $\mathbb{E}\,\langle\mu, g(k, z)\rangle = \sum_k p_k v_k$ with $v_k =
  \langle\mu, g(k, z)\rangle$ has the derivative $p_k (v_k - \sum_j p_j v_j)$ by the scores. No operation is
  differentiated: $g$ is evaluated for every position.
- The projection enumerates the positions and takes the nearest: to make $k$ the position, it and the scores above it
  meet at their mean.

Limits: the outputs must have the axes of the position as their first ones (so that it is known which sample is whose),
else the position stays as the forward pass has it. Of `top_k` and `argsort`, each slot is moved while the others stay,
which takes as many evaluations as there are pairs of slots and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._program._equations import Equation
from .._program._fragment import Fragment
from ._base import AbstractRule, Context, transposed
from ._local import nearest_locally

Move = Callable[[Array, Array, Array, float], Array]
"""From scores, the worth of each position, its distance and the scores' weight to the scores' dual."""
POSITIONS = ("argmax", "argmin", "top_k", "sort")
"""Operations whose outputs are positions."""


class Selection(AbstractRule):
    """The projection onto the graph of an operation that reads positions of maxima."""

    label: ClassVar[str] = "selection"

    def __init__(self, fragment: Fragment):
        self.fragment = fragment
        self.chosen = tuple(e for e in fragment.equations if e.name in POSITIONS and self._movable(e))

    def _movable(self, equation: Equation) -> bool:
        batch = equation.outputs[-1].shape
        if equation.name in ("top_k", "sort"):
            batch = batch[:-1]
        if equation.name == "sort" and not _is_argsort(equation):
            return False
        aligned = all(v.shape[: len(batch)] == batch for v in self.fragment.outputs)
        return aligned and any(equation.inputs[0] == v for v in self.fragment.operands)

    @property
    def is_discontinuous(self) -> bool:
        return bool(self.chosen)

    def describe(self, equation: Equation | None) -> str:
        return self.label if self.chosen else "local solver, position of the forward pass"

    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        input_duals = transposed(self, ctx, inputs, duals)
        return input_duals if ctx.noise == "never" else self._with_scores(ctx, inputs, duals, input_duals, _expected)

    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
        return self._with_scores(ctx, inputs, duals, nearest_locally(ctx, inputs, duals), _nearest)

    def _with_scores(
        self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array], input_duals: list[Array], move: Move
    ) -> list[Array]:
        """The duals of the further operands, and to those of the scores what moving the positions adds."""
        for equation in self.chosen:
            slot = [v.index for v in self.fragment.operands].index(equation.inputs[0].index)
            more = self._of_scores(ctx, equation, inputs, duals, slot, move)
            input_duals = [nu + more.astype(nu.dtype) if i == slot else nu for i, nu in enumerate(input_duals)]
        return input_duals

    def _of_scores(self, ctx: Context, equation: Equation, inputs, duals, slot: int, move: Move) -> Array:
        """The dual of the scores of one position."""
        scores = inputs[slot]
        axis = _axis(equation, scores)
        x = jnp.moveaxis(-scores if equation.name in _LEAST else scores, axis, -1)
        found = self._outputs(ctx, equation, scores)[-1]
        if equation.name not in ("top_k", "sort"):
            return _signed(equation, self._slot(ctx, equation, inputs, duals, x, found, found, None, move), axis)
        total, free = jnp.zeros_like(x), jnp.ones(x.shape, bool)
        for j in range(found.shape[-1]):
            masked = jnp.where(free, x, -jnp.inf)
            total = total + self._slot(ctx, equation, inputs, duals, masked, found, found[..., j], j, move)
            free = free & (jnp.arange(x.shape[-1]) != found[..., j, None])
        return _signed(equation, total, axis)

    def _outputs(self, ctx: Context, equation: Equation, scores: Array) -> list[Array]:
        return equation.bind(scores, *(ctx.known[v.index] for v in equation.inputs[1:]))

    def _slot(
        self, ctx: Context, equation: Equation, inputs, duals, x: Array, found: Array, now: Array, j, move: Move
    ) -> Array:
        """The dual of the scores `x`, over their last axis, by moving one position through all its values."""
        known = {i: ctx.known[i] for i in self.fragment.known}
        rest = Fragment(
            tuple(e for e in self.fragment.equations if e is not equation),
            (*self.fragment.operands, *equation.outputs),
            self.fragment.outputs,
        )
        base = ctx.function(*inputs)
        batch = now.ndim
        slot = [v.index for v in self.fragment.operands].index(equation.inputs[0].index)
        others = self._outputs(ctx, equation, inputs[slot])[:-1]

        def worth(k: Array) -> tuple[Array, Array]:
            """The worth of the outputs with this position to the duals, and their distance from the present ones."""
            place = jnp.full_like(found, k) if j is None else found.at[..., j].set(k)
            outputs = rest(known, [*inputs, *others, place])
            axes = [tuple(range(batch, y.ndim)) for y in outputs]
            gaps = [new - old for new, old in zip(outputs, base, strict=True)]
            value = sum(jnp.sum(mu * g, a) for mu, g, a in zip(duals, gaps, axes, strict=True))
            apart = sum(jnp.sum(kappa * g * g, a) for kappa, g, a in zip(ctx.output_weights, gaps, axes, strict=True))
            return jnp.asarray(value), jnp.asarray(apart)

        value, apart = jax.lax.map(worth, jnp.arange(x.shape[-1]))
        value, apart = jnp.moveaxis(value, 0, -1), jnp.moveaxis(apart, 0, -1)
        return move(x, value, apart, ctx.weights[slot])


_LEAST = ("argmin", "sort")
"""Operations that put the least first."""


def _is_argsort(equation: Equation) -> bool:
    """Whether a sort of scores along their last axis takes their positions with it."""
    scores, *others = equation.inputs
    last = equation.params["dimension"] == len(scores.shape) - 1
    return last and equation.params["num_keys"] == 1 and len(others) == 1 and not others[0].is_float


def _axis(equation: Equation, scores: Array) -> int:
    return int(equation.params["axes"][0]) if equation.name in ("argmax", "argmin") else scores.ndim - 1


def _signed(equation: Equation, nu: Array, axis: int) -> Array:
    return jnp.moveaxis(-nu if equation.name in _LEAST else nu, -1, axis)


def _expected(x: Array, value: Array, apart: Array, weight: float) -> Array:
    """The dual by the expectation under Gumbel noise on the scores."""
    p = jax.nn.softmax(x, -1)
    return p * (value - jnp.sum(p * value, -1, keepdims=True))


def _nearest(x: Array, value: Array, apart: Array, weight: float) -> Array:
    r"""The dual of the move to the best position: least $w d_k^2 + \kappa|g_k - g|^2 - 2\langle\mu, g_k - g\rangle$.

    To put $k$ on top, $x_k$ and the scores above the level $l$ meet at $l$, their mean: with the others sorted,
    $l$ is the largest mean of $x_k$ and the first so many of them.
    """
    n = x.shape[-1]
    finite = jnp.where(jnp.isfinite(x), x, jnp.finfo(x.dtype).min / n)
    ordered = -jnp.sort(-finite, -1)
    sums = jnp.cumsum(ordered, -1)
    count = jnp.arange(1, n + 1, dtype=x.dtype)

    def level(xk: Array) -> tuple[Array, Array]:
        # Only scores above x_k are pulled down, so that x_k itself never counts among the first.
        means = (xk[..., None] + sums) / (count + 1)
        means = jnp.where(ordered > xk[..., None], means, xk[..., None])
        top = jnp.max(means, -1)
        over = jnp.maximum(finite - top[..., None], 0)
        return top, jnp.square(top - xk) + jnp.sum(jnp.square(over), -1)

    top, distance = jax.lax.map(level, jnp.moveaxis(finite, -1, 0))
    top, distance = jnp.moveaxis(top, 0, -1), jnp.moveaxis(distance, 0, -1)
    best = jnp.argmin(weight * distance + apart - 2 * value, -1)[..., None]
    top = jnp.take_along_axis(top, best, -1)
    # A hair above the level, so that rounding does not leave the old position on top.
    size = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0), -1, keepdims=True)
    hair = 8 * jnp.finfo(x.dtype).eps * jnp.maximum(size, 1e-30)
    chosen = jnp.arange(n) == best
    new = jnp.where(chosen, jnp.maximum(finite, top + hair), jnp.minimum(finite, top))
    stays = jnp.take_along_axis(apart, best, -1) == 0
    return jnp.where(stays, 0.0, weight * (new - finite))
