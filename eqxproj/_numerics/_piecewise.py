"""Piecewise affine functions of one scalar: an algebra to recognize them.

[`PiecewiseAffine`][] holds a function that is affine on finitely many open intervals, together with its values at the
breakpoints between them, in float64 and without any JAX. [`apply_primitive`][] interprets one elementwise JAX primitive
on such functions, so that the equations of `jax.nn.relu6` or of a user's own `jnp.where` yield the function in closed
form. `_piecewise_dual.py` then solves the scalar node exactly.

Limits: at most 32 pieces; no function with infinitely many pieces (rounding); values are real numbers, so integer
division and bitwise operations on anything else than 0 and 1 are not represented.
"""

import itertools
import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

MAX_PIECES = 32
_SAME_POINT = 1e-13  # relative distance below which two float64 breakpoints are one
_SAME_VALUE = 1e-14  # relative distance below which two float64 values are one
_SAME_LIMIT = 1e-7  # relative size of a jump that float32 constants cannot resolve: the function counts as continuous
_Line = tuple[float, float]  # slope, intercept
_Operation = Callable[[Sequence["PiecewiseAffine"]], "PiecewiseAffine"]


class _NotRepresentable(Exception):
    """The result is not piecewise affine, not known to be, or has too many pieces."""


@dataclass(frozen=True)
class PiecewiseAffine:
    """A function of one scalar, affine on finitely many open intervals.

    Piece $j$ is $m_j s + c_j$ on the open interval $(b_{j-1}, b_j)$, with $b_{-1} = -\\infty$ and $b_k = \\infty$. A
    boolean function is one with the values 0 and 1. An infinite intercept, with slope 0, is an infinite constant;
    `values` holds the values at the breakpoints themselves. Hashable and comparable, hence usable as a static argument.
    """

    breakpoints: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def identity(cls) -> "PiecewiseAffine":
        """The function $s$."""
        return cls((), (1.0,), (0.0,), ())

    @classmethod
    def constant(cls, value: float) -> "PiecewiseAffine":
        """The function that is `value` everywhere."""
        return cls((), (0.0,), (float(value),), ())

    @property
    def is_piecewise_constant(self) -> bool:
        """Whether every slope is zero."""
        return not any(self.slopes)

    def __call__(self, s: ArrayLike) -> np.ndarray:
        """Evaluates the function in NumPy and float64."""
        s = np.asarray(s, np.float64)
        piece = np.searchsorted(self.breakpoints, s, side="left")
        out = np.asarray(self.slopes)[piece] * s + np.asarray(self.intercepts)[piece]
        for point, value in zip(self.breakpoints, self.values, strict=True):
            out = np.where(s == point, value, out)
        return np.asarray(out)

    def jumps(self, i: int) -> tuple[bool, bool]:
        """Whether the limit from the left, and the one from the right, differ from the value at breakpoint `i`."""
        left, right, tolerance = self._limits(i)
        return not abs(left - self.values[i]) <= tolerance, not abs(right - self.values[i]) <= tolerance

    @property
    def has_jumps(self) -> bool:
        """Whether the limits from the left and from the right differ at some breakpoint."""
        limits = map(self._limits, range(len(self.breakpoints)))
        return any(abs(right - left) > tolerance for left, right, tolerance in limits)

    def describe(self) -> str:
        """A short name for people to read, such as `relu`, `clip` or `piecewise affine (4 pieces)`."""
        continuous = not any(any(self.jumps(i)) for i in range(len(self.breakpoints)))
        through_zero = not any(self.intercepts)
        if not self.breakpoints:
            return "identity" if self.slopes == (1.0,) and through_zero else "affine"
        if self.breakpoints == (0.0,) and continuous and through_zero and self.slopes[1] == 1.0:
            if self.slopes[0] in (0.0, -1.0):
                return "abs" if self.slopes[0] else "relu"
            if 0 < self.slopes[0] < 1:
                return "leaky_relu"
        if self.slopes == (0.0, 1.0, 0.0) and continuous and self.intercepts[1] == 0.0:
            return "clip"
        if self.slopes == (0.0, 0.0) and self.intercepts == (0.0, 1.0):
            return "step"
        if self.slopes == (0.0, 0.0) and self.intercepts == (-1.0, 1.0) and self.breakpoints == (0.0,):
            return "sign"
        return f"piecewise affine ({len(self.slopes)} pieces)"

    def line(self, j: int) -> _Line:
        return self.slopes[j], self.intercepts[j]

    def _limits(self, i: int) -> tuple[float, float, float]:
        """The limits from the left and from the right at breakpoint `i`, and how far apart equal ones may be."""
        point, left, right = self.breakpoints[i], self.line(i), self.line(i + 1)
        return at(left, point), at(right, point), _SAME_LIMIT * _scale(point, left, right)

    def _line_at(self, s: float) -> _Line:
        return self.line(bisect_left(self.breakpoints, s))

    def _value_at(self, s: float) -> float:
        known = (value for point, value in zip(self.breakpoints, self.values, strict=True) if _same_point(point, s))
        return next(known, at(self._line_at(s), s))


def at(line: _Line, s: Any) -> Any:
    return line[0] * s + line[1] if line[0] else line[1]


def _scale(s: float, *lines: _Line) -> float:
    return max(abs(x) for m, c in lines for x in (m * s, c if math.isfinite(c) else 0.0))


def _same_point(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= _SAME_POINT * max(abs(a), abs(b))


def _interior(low: float, high: float) -> float:
    """A point strictly inside the interval."""
    if math.isinf(low) and math.isinf(high):
        return 0.0
    if math.isinf(low):
        return high - 1.0 - abs(high)
    return low + 1.0 + abs(low) if math.isinf(high) else low / 2 + high / 2


def _crossings(f: PiecewiseAffine, g: PiecewiseAffine) -> list[float]:
    """The points strictly inside their common pieces where the two functions cross."""
    found = []
    edges = [-math.inf, *sorted({*f.breakpoints, *g.breakpoints}), math.inf]
    for low, high in zip(edges, edges[1:], strict=False):
        middle = _interior(low, high)
        (m1, c1), (m2, c2) = f._line_at(middle), g._line_at(middle)
        if m1 != m2 and math.isfinite(c1) and math.isfinite(c2):
            s = (c2 - c1) / (m1 - m2)
            if low < s < high:
                found.append(s)
    return found


def _combine(
    functions: Sequence[PiecewiseAffine],
    line: Callable[[float, list[_Line]], _Line],
    value: Callable[[float, list[float]], float],
    cuts: Sequence[float] = (),
) -> PiecewiseAffine:
    """Combines functions piece by piece on their common refinement, cut at further points."""
    points: list[float] = []
    for point in sorted([p for f in functions for p in f.breakpoints] + list(cuts)):
        if not points or not _same_point(points[-1], point):
            points.append(point)
    edges = [-math.inf, *points, math.inf]
    middles = [_interior(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    lines = [line(s, [f._line_at(s) for f in functions]) for s in middles]
    lines = [(0.0, float(c)) if math.isinf(c) else (float(m), float(c)) for m, c in lines]
    values = [float(value(s, [f._value_at(s) for f in functions])) for s in points]
    if any(math.isnan(x) for x in itertools.chain(values, *lines)):
        raise _NotRepresentable
    return _simplify(points, lines, values)


def _simplify(points: list[float], lines: list[_Line], values: list[float]) -> PiecewiseAffine:
    """Drops the breakpoints at which nothing happens."""
    kept, kept_lines, kept_values = [], [lines[0]], []
    for point, line, value in zip(points, lines[1:], values, strict=True):
        last = kept_lines[-1]
        tolerance = _SAME_VALUE * max(_scale(point, last, line), abs(value) if math.isfinite(value) else 0.0)
        same = abs(last[0] - line[0]) <= _SAME_VALUE * abs(line[0])
        same = same and (last[1] == line[1] or abs(last[1] - line[1]) <= tolerance)
        same = same and (value == at(line, point) or abs(value - at(line, point)) <= tolerance)
        if not same:
            kept.append(point)
            kept_lines.append(line)
            kept_values.append(value)
    if len(kept_lines) > MAX_PIECES:
        raise _NotRepresentable
    slopes, intercepts = zip(*kept_lines, strict=True)
    return PiecewiseAffine(tuple(kept), slopes, intercepts, tuple(kept_values))


def _compare(f: PiecewiseAffine, g: PiecewiseAffine) -> PiecewiseAffine:
    """The sign of `f - g`, with the values at points compared up to float64 rounding."""

    def line(s: float, lines: list[_Line]) -> _Line:
        a, b = lines
        difference = 0.0 if a == b else at(a, s) - at(b, s)
        return 0.0, math.copysign(1.0, difference) if difference else 0.0

    def value(s: float, values: list[float]) -> float:
        a, b = values
        if a == b:
            return 0.0
        if math.isfinite(a) and math.isfinite(b):
            near = [h._line_at(s * (1 + k)) for h in (f, g) for k in (-2 * _SAME_POINT, 2 * _SAME_POINT)]
            if abs(a - b) <= _SAME_VALUE * max(_scale(s, *near), abs(a), abs(b)):
                return 0.0
        return math.copysign(1.0, a - b)

    return _combine((f, g), line, value, _crossings(f, g))


def _sum(*signs: float) -> _Operation:
    def total(terms: Sequence[float]) -> float:
        return sum(k * x for k, x in zip(signs, terms, strict=True))

    return lambda args: _combine(
        args,
        lambda _, lines: (total([m for m, _ in lines]), total([c for _, c in lines])),
        lambda _, values: total(values),
    )


def _product(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    def line(_: float, lines: list[_Line]) -> _Line:
        (m1, c1), (m2, c2) = lines
        if m1 and m2:
            raise _NotRepresentable
        return (m1 * c2 if m1 else m2 * c1), c1 * c2

    return _combine(args, line, lambda _, values: values[0] * values[1])


def _quotient(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    if not args[1].is_piecewise_constant or 0.0 in (*args[1].intercepts, *args[1].values):
        raise _NotRepresentable
    return _combine(args, lambda _, x: (x[0][0] / x[1][1], x[0][1] / x[1][1]), lambda _, x: x[0] / x[1])


def _select(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    if not _in_set(args[0], range(len(args) - 1)):
        raise _NotRepresentable
    return _combine(args, lambda _, x: x[1 + int(x[0][1])], lambda _, x: x[1 + int(x[0])])


def _extremum(sign: float) -> _Operation:
    return lambda args: _select((_where(_compare(*args), lambda x: x * sign < 0), *args))


def _where(f: PiecewiseAffine, test: Callable[[float], bool]) -> PiecewiseAffine:
    """The boolean function `test(f)` of a piecewise constant `f`."""
    return _pointwise((f,), lambda x: float(test(x)))


def _pointwise(args: Sequence[PiecewiseAffine], fn: Callable[..., float]) -> PiecewiseAffine:
    """Any function of piecewise constant functions. (Of an affine piece, finiteness is that of its intercept.)"""
    return _combine(args, lambda _, lines: (0.0, fn(*(c for _, c in lines))), lambda _, values: fn(*values))


def _comparison(test: Callable[[float, float], bool]) -> _Operation:
    return lambda args: _where(_compare(*args), lambda sign: test(sign, 0))


def _logical(fn: Callable[..., float]) -> _Operation:
    def apply(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
        if not all(_in_set(f, (0, 1)) for f in args):
            raise _NotRepresentable
        return _pointwise(args, fn)

    return apply


def _in_set(f: PiecewiseAffine, allowed: Sequence[int]) -> bool:
    return f.is_piecewise_constant and all(x in allowed for x in (*f.intercepts, *f.values))


def _sign(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    return _compare(args[0], PiecewiseAffine.constant(0.0))


def _threshold(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    return _pointwise((_sign(args),), lambda sign: 1.0 if sign >= 0 else -1.0)


def _clamp(args: Sequence[PiecewiseAffine]) -> PiecewiseAffine:
    low, x, high = args
    return _extremum(-1.0)((_extremum(1.0)((x, low)), high))


def _convert(f: PiecewiseAffine, dtype: Any) -> PiecewiseAffine:
    """A conversion keeps the values, unless it would round, wrap around or discard part of them."""
    dtype, values = np.dtype(dtype), (*f.intercepts, *f.values)
    if jnp.issubdtype(dtype, jnp.floating):
        return f
    if f.is_piecewise_constant and all(math.isfinite(x) and x == int(x) for x in values):
        if dtype == np.bool_:
            return _where(f, bool)
        info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else None
        if info and all(info.min <= x <= info.max for x in values):
            return f
    raise _NotRepresentable


_OPERATIONS: dict[str, _Operation] = {
    "add": _sum(1.0, 1.0),
    "add_any": _sum(1.0, 1.0),
    "sub": _sum(1.0, -1.0),
    "neg": _sum(-1.0),
    "mul": _product,
    "div": _quotient,
    "max": _extremum(1.0),
    "min": _extremum(-1.0),
    "abs": lambda args: _product((_sign(args), args[0])),
    "sign": _sign,
    "threshold": _threshold,
    "clamp": _clamp,
    "select_n": _select,
    **{name: _comparison(getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "and": _logical(lambda x, y: x * y),
    "or": _logical(max),
    "xor": _logical(lambda x, y: float(x != y)),
    "not": _logical(lambda x: 1.0 - x),
    "is_finite": lambda args: _pointwise(args, math.isfinite),
    "copy": lambda args: args[0],
}


def apply_primitive(
    name: str, params: Mapping[str, Any], args: Sequence[PiecewiseAffine | float]
) -> PiecewiseAffine | None:
    """Interprets one elementwise JAX primitive, with these parameters, on functions of one common scalar or numbers.

    The answer is None where the result is not piecewise affine, not known to be, or has more than 32 pieces.
    """
    functions = [f if isinstance(f, PiecewiseAffine) else PiecewiseAffine.constant(float(f)) for f in args]
    if any(math.isnan(c) for f in functions for c in f.intercepts):
        return None
    try:
        if name == "convert_element_type":
            return _convert(functions[0], params["new_dtype"])
        return _OPERATIONS[name](functions) if name in _OPERATIONS else None
    except _NotRepresentable:
        return None
