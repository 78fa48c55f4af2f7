"""What two programs have in common that are the same but for their values.

Transforms a program into a signature: a hashable structure, and the objects in it that are compared by identity. Two
programs with equal signatures compile to the same code. Limits: functions that a trace makes anew, as those of
`jax.custom_vjp`, differ from one trace to the next, and so do the programs that hold them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ._custom import Call
from ._equations import Program, Variable


class Signature(NamedTuple):
    """`structure` is hashable; `objects` are what stands in it by its place alone, to be compared by identity."""

    structure: Hashable
    objects: tuple[Any, ...]


class _Reader:
    """Writes down a program. Variables are numbered in the order in which they are met."""

    def __init__(self):
        self.objects: list[Any] = []
        self.names: dict[Any, int] = {}

    def name(self, variable: Any) -> Hashable:
        return self.names.setdefault(variable, len(self.names))

    def of(self, value: Any) -> Hashable:
        """A parameter of an equation, or a part of one."""
        if isinstance(value, ClosedJaxpr):
            return ("closed", self.jaxpr(value.jaxpr), tuple(map(self.array, value.consts)))
        if isinstance(value, Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, Mapping):
            return ("map", tuple((k, self.of(v)) for k, v in value.items()))
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, tuple(map(self.of, value)))
        if isinstance(value, (jax.Array, np.ndarray)):
            return self.array(value)
        if isinstance(value, Call) and value.origin:
            each = None if value.each is None else self.of(value.each)
            flags = (value.name, value.hard, value.is_discontinuous, value.dims, value.size)
            return ("call", flags, each, self.of(value.origin))
        if isinstance(value, (float, complex, np.generic)):  # the two zeros differ, and NaN equals itself
            return (type(value).__name__, _content(value))
        if value is None or not (callable(value) or type(value).__hash__ in (None, object.__hash__)):
            return (type(value).__name__, value)
        self.objects.append(value)
        return ("object", len(self.objects))

    def array(self, value: Any) -> Hashable:
        """An array inside of a program, which is compiled into it."""
        if isinstance(value, jax.Array):
            self.objects.append(value)
            return ("object", len(self.objects))
        return ("array", *_content(value))

    def jaxpr(self, jaxpr: Jaxpr) -> Hashable:
        heads = tuple((self.name(v), str(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
        equations = tuple(
            (e.primitive, self.of(e.params), tuple(map(self._atom, e.invars)), tuple(map(self._atom, e.outvars)))
            for e in jaxpr.eqns
        )
        return ("jaxpr", heads, equations, tuple(map(self._atom, jaxpr.outvars)))

    def _atom(self, atom: Any) -> Hashable:
        if isinstance(atom, Literal):
            return ("literal", _content(atom.val), str(atom.aval))
        return (self.name(atom), str(atom.aval))

    def variable(self, v: Variable) -> Hashable:
        return (v.index, v.shape, str(v.dtype))


def _content(value: Any) -> tuple[Hashable, ...]:
    """A number or an array of numpy to the last bit, which its text does not always show."""
    array = np.asarray(value)
    data = array.tobytes()
    return (array.shape, str(array.dtype), data if len(data) <= 64 else hashlib.sha256(data).digest())


def signature(program: Program) -> Signature:
    """The signature of a program. Its constants are arguments of what is compiled: of them only shapes count."""
    reader = _Reader()
    equations = tuple(
        (
            e.primitive,
            e.acts,
            reader.of(e.params),
            tuple(map(reader.variable, e.inputs)),
            tuple(map(reader.variable, (*e.outputs, *e.residuals))),
        )
        for e in program.equations
    )
    constants = tuple((i, np.shape(x), str(jax.numpy.result_type(x))) for i, x in program.constants.items())
    static = tuple((i, repr(number)) for i, number in program.static.items())
    ends = tuple(map(reader.variable, program.inputs)), tuple(map(reader.variable, program.outputs))
    return Signature((equations, constants, static, ends), tuple(reader.objects))
