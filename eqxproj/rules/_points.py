r"""Rules written in points, for a library that works in duals.

A user's rule takes inputs and a target and returns new inputs. In the projection regime it is asked for the wanted
target ([`of_whole_step`][]), in the gradient regime for what it would do about small wishes ([`of_small_steps`][]):
with wishes $\mu/\kappa$ at weights of the metric, its answer would be lost to rounding. Limits: the second is exact to
first order, for a rule that answers small wanted changes in proportion.

**What a rule is asked for in the gradient regime.** The exact projection answers to a wanted change $r$ of the output

$$d = \arg\min_d\; w |d|^2 + \kappa |J d - r|^2
    = \frac{\kappa}{w}\, J^T \Big(I + \frac{\kappa}{w} J J^T\Big)^{-1} r ,$$

so that $(w/\kappa)\, d \to J^T r$ as $\kappa/w \to 0$. The pullback of $\mu$ is that limit along $r = s\,\mu$, divided
by $s$. Only the *ratio* of the weights and the size $s$ are to be chosen, and they need not be those of the metric.

- The ratio. With $d$ the answer at a first ratio, $g = |J d| / |d|$ is the gain along it, measured by the function
  itself. The ratio is chosen with $g^2 \kappa/w = \epsilon^{0.4}$, where $\epsilon$ is the precision: so much is the
  answer damped.
- The size. The wanted change is as large as makes the inputs move by $\epsilon^{0.4}$ of their size: of that, rounding
  leaves $\epsilon^{0.6}$, and curvature takes $\epsilon^{0.4}$. So a target may be farther from the output than the
  output is from zero.
- Two wishes, one half of the other. Twice their difference is the answer, so that what a rule does about no wish at
  all, such as a margin to be kept, does not count as an answer to one.
- Units. Inputs and outputs are measured by their largest element, each output is asked about alone, at a weight so much
  larger than that of the other outputs that they do not hold it, and arithmetic is in float32 at least.

A rule that does *not depend on the weight of the output* answers as at unit weights: $d = A r$ gives $\nu = A \mu$. For
a step along the gradient, $d = J^T r$, that is the pullback. For an inversion, $d = J^{-1} r$, it is the inversion.
Whether an input's answer depends on that weight is read off the rule's own trace. A rule that needs weights as Python
numbers (`float(ctx.kappa[0])`) cannot be asked at weights that depend on the values: it is compiled for ten ratios, and
all inputs weigh one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._program._normal_form import normal_form
from ._base import Scale

Ask = Callable[[Sequence[Scale], Sequence[Scale], Sequence[Array]], Sequence[Array]]
"""A rule: from the weights of inputs and outputs, and targets, to new inputs."""

_PILOT = 0.01  # the first ratio of the weights, in units of inputs and output
_SPACING = 100.0
_LADDER = tuple(_SPACING**n for n in (3, 2, 1, 0, -1, -2, -3, -4, -5, -6))  # the ratios for rules that need numbers
_OTHERS = 1e-6  # the weights of the other outputs, in units of that of the output that is asked about
_WISH = 0.01  # the first wanted change, in units of the output; ten times that where it is damped by the weights
_LEAST, _MOST = 1e-3, 10.0  # the wanted changes that are tried


@dataclass(frozen=True)
class Dependence:
    """How a rule's answers depend on the weights of the outputs.

    - `of`: for each input whether its answer does.
    - `needs_numbers`: whether the rule cannot be traced by the weights.
    """

    of: tuple[bool, ...]
    needs_numbers: bool = False


@dataclass(frozen=True)
class Point:
    """Where a rule is asked: the inputs, in float32 at least, and the function and its outputs there."""

    function: Callable[[Sequence[Array]], Sequence[Array]]
    inputs: Sequence[Array]
    outputs: Sequence[Array]
    is_discontinuous: bool = False


def dependence(ask: Ask, point: Point) -> Dependence:
    """How a rule's answers depend on the weights of the outputs, by its trace."""
    ones, kappas = [1.0] * len(point.inputs), [1.0] * len(point.outputs)
    try:
        return Dependence(_tainted(lambda k, w: ask(w, k, point.outputs), kappas, ones))
    except jax.errors.JAXTypeError:  # it asks for their values
        pass
    try:
        return Dependence(_tainted(lambda k: ask(ones, k, point.outputs), kappas), True)
    except jax.errors.JAXTypeError:
        return Dependence((True,) * len(point.inputs), True)


def _tainted(function: Callable[..., Sequence[Array]], first: Sequence[float], *others: Sequence[float]):
    """For each result of a function whether it depends on its first argument."""
    program = normal_form(jax.make_jaxpr(function)(list(first), *map(list, others)))
    found = {v.index for v in program.inputs[: len(first)]}
    for equation in program.equations:
        if any(v.index in found for v in equation.inputs):
            found.update(v.index for v in equation.outputs)
    return tuple(v.index in found for v in program.outputs)


def of_whole_step(
    rule: Callable[[Sequence[Array]], Sequence[Array]],
    point: Point,
    duals: Sequence[Array],
    weights: Sequence[float],
    output_weights: Sequence[Scale],
    grade: float,
) -> list[Array]:
    r"""The duals of the inputs, from a rule `targets -> new inputs` that is asked for the wanted target.

    Where weights grow with the depth, by `grade`, a wanted change may be below the rounding of the output. It is asked
    for in a visible size, and what the rule answers to it, beyond what it answers to no change, is scaled back.
    """
    wanted = [mu.astype(y.dtype) / jnp.asarray(k, y.dtype) for y, mu, k in _triples(point, duals, output_weights)]
    if grade <= 1:
        new = rule([y + r for y, r in zip(point.outputs, wanted, strict=True)])
        moves = [n - x for n, x in zip(new, point.inputs, strict=True)]
    else:
        sizes = [(_largest(r) / _scale(y)) for y, r in zip(point.outputs, wanted, strict=True) if y.size]
        size = jnp.max(jnp.stack(sizes)) if sizes else jnp.asarray(1.0)
        times = jnp.where(size > 0, jnp.maximum(_step(size.dtype) / size, 1.0), 1.0)
        still = rule(point.outputs)
        asked = [(y + times * r).astype(y.dtype) for y, r in zip(point.outputs, wanted, strict=True)]
        moves = [
            jnp.where(times > 1, _beyond_rounding(s - x, x), s - x) + (n - s) / times
            for n, s, x in zip(rule(asked), still, point.inputs, strict=True)
        ]
    return [move * jnp.asarray(w, move.dtype) for move, w in zip(moves, weights, strict=True)]


def _triples(point: Point, duals: Sequence[Array], output_weights: Sequence[Scale]):
    return zip(point.outputs, duals, output_weights, strict=True)


def _beyond_rounding(move: Array, x: Array) -> Array:
    return jnp.where(jnp.abs(move) > 32 * jnp.finfo(x.dtype).eps * _largest(x), move, 0.0)


def of_small_steps(ask: Ask, point: Point, duals: Sequence[Array]) -> list[Array]:
    """The duals of the inputs in the gradient regime, from a rule that is asked about one output after another."""
    found = [jnp.zeros_like(x) for x in point.inputs]
    if not any(x.size for x in point.inputs):
        return found
    depends = dependence(ask, point)
    for number, (y, mu) in enumerate(zip(point.outputs, duals, strict=True)):
        if y.size and jnp.issubdtype(y.dtype, jnp.inexact):
            answer = _Output(ask, point, depends, number, mu.astype(y.dtype)).answer()
            found = [(nu + part).astype(nu.dtype) for nu, part in zip(found, answer, strict=True)]
    return found


@dataclass(frozen=True)
class _Output:
    """What a rule answers about one output, in units: inputs, outputs and weights are measured by the values' sizes."""

    ask: Ask
    point: Point
    depends: Dependence
    number: int
    dual: Array

    def answer(self) -> list[Array]:
        """The duals of the inputs."""
        return self._damped() if any(self.depends.of) else self._undamped()

    def _undamped(self) -> list[Array]:
        """From a rule that ignores the weight of the output; each input is asked for by a wish of its own size."""
        first = _WISH * self.unit
        moves, duals = self._moves(jnp.ones_like(first), first), []
        for i, (move, size) in enumerate(zip(moves, self.sizes, strict=True)):
            wish = self._wish(first, _largest(move) / size, _MOST * jnp.maximum(self.unit, size))
            duals.append(self._moves(jnp.ones_like(first), wish)[i] * (_largest(self.dual) / wish))
        return duals

    def _damped(self) -> list[Array]:
        """From a rule that depends on the weight of the output, asked at a ratio at which it is hardly damped."""
        first = 10 * _WISH * self.unit
        rho = self._possible(jnp.asarray(_PILOT, self.unit.dtype))
        moves = self._moves(rho, first)
        gain = self._squared_gain(moves)
        ratio = self._possible(jnp.minimum(rho, _step(rho.dtype) / jnp.where(gain > 0, gain, 1e-30)))
        moved = jnp.max(jnp.stack([_largest(m) / s for m, s in zip(moves, self.sizes, strict=True)]))
        moved = moved * (1 + rho * gain) / rho * ratio
        wish = self._wish(first, moved, _MOST * self.unit * jnp.maximum(1, jnp.sqrt(gain)) * self._room)
        duals = []
        for move, scale, is_damped in zip(self._moves(ratio, wish), self.scales, self.depends.of, strict=True):
            factor = _largest(self.dual) / wish
            if is_damped:  # by the weight of the input over that of the output
                factor = factor / ratio * (self.unit / scale) ** 2
            duals.append(move * factor)
        return duals

    @property
    def unit(self) -> Array:
        """The size of the output."""
        return _scale(self.point.outputs[self.number])

    @property
    def sizes(self) -> list[Array]:
        """The sizes of the inputs."""
        return [_scale(x) for x in self.point.inputs]

    @property
    def scales(self) -> list[Array]:
        """The sizes by which the inputs are weighed: one for all, where weights must be numbers."""
        top = jnp.max(jnp.stack(self.sizes))
        return [top] * len(self.sizes) if self.depends.needs_numbers else self.sizes

    @property
    def _room(self) -> float:
        """How much larger a wish may be because the ratio is smaller than asked for."""
        return _SPACING if self.depends.needs_numbers else 1.0

    def _wish(self, first: Array, moved: Array, most: Array) -> Array:
        """The size of the wish by which the inputs move as far as they should; they move by `moved` at the first."""
        wish = first * _step(first.dtype) / jnp.where(moved > 0, moved, 1e-30)
        return jnp.clip(wish, _LEAST * self.unit, most)

    def _possible(self, rho: Array) -> Array:
        """The ratio that the rule is asked at: for one that needs numbers, the next lower one of the ladder."""
        if not self.depends.needs_numbers:
            return rho
        into = (self.scales[0] / self.unit) ** 2
        return jnp.asarray(_LADDER, rho.dtype)[self._rung(rho)] / into

    def _rung(self, rho: Array) -> Array:
        """The number of the ratio of the ladder at `rho` or below it."""
        ratio = rho * (self.scales[0] / self.unit) ** 2 * (1 + 1e-3)
        return jnp.sum(jnp.asarray(_LADDER[:-1], rho.dtype) > ratio)

    def _moves(self, rho: Array, wish: Array) -> Sequence[Array]:
        """What the rule answers to a wish of this size at this ratio: twice what it does beyond half of the wish."""
        others = [1.0 if i == self.number else _OTHERS for i in range(len(self.point.outputs))]
        ones = [1.0] * len(self.point.inputs)
        if not any(self.depends.of):
            return self._asked(ones, [1.0] * len(others), wish)
        if self.depends.needs_numbers:
            asked = [lambda size, k=k: self._asked(ones, [k * other for other in others], size) for k in _LADDER]
            return jax.lax.switch(self._rung(rho), asked, wish)
        top = jnp.max(jnp.stack(self.sizes))
        units = [_scale(y) for y in self.point.outputs]
        kappas = [rho * other * (top / u) ** 2 for other, u in zip(others, units, strict=True)]
        return self._asked([(top / s) ** 2 for s in self.sizes], kappas, wish)

    def _asked(self, weights: Sequence[Scale], output_weights: Sequence[Scale], wish: Array) -> list[Array]:
        direction = self.dual / jnp.where((largest := _largest(self.dual)) > 0, largest, 1.0)

        def new(size: Array) -> Sequence[Array]:
            targets = list(self.point.outputs)
            y = targets[self.number]
            targets[self.number] = y + (size * direction).astype(y.dtype)
            return self.ask(weights, output_weights, targets)

        return [2 * (whole - half) for whole, half in zip(new(wish), new(wish / 2), strict=True)]

    def _squared_gain(self, moves: Sequence[Array]) -> Array:
        """How much farther the output moves than the inputs, both in their units, squared; zero where it jumps."""
        y = self.point.outputs[self.number]
        if self.point.is_discontinuous:
            return jnp.zeros_like(_scale(y))
        moved = [x + m for x, m in zip(self.point.inputs, moves, strict=True)]
        rise = (self.point.function(moved)[self.number] - y) / _scale(y)
        parts = [
            jnp.sum(jnp.abs((z - x) / s) ** 2) for z, x, s in zip(moved, self.point.inputs, self.scales, strict=True)
        ]
        run = sum(parts[1:], start=parts[0])
        gain = jnp.sum(jnp.abs(rise) ** 2) / jnp.where(run > 0, run, 1.0)
        return jnp.where(jnp.isfinite(gain) & (run > 0), gain, 0.0)


def _step(dtype: jnp.dtype) -> float:
    """How far inputs move, in units of their size: between what rounding and what curvature allow."""
    return float(jnp.finfo(dtype).eps) ** 0.4


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0.0)


def _scale(x: Array) -> Array:
    """The unit of an array: its largest element, one where it has none but zeros."""
    largest = _largest(jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.where(largest > 0, jnp.clip(largest, 1e-12, 1e12), 1.0)
