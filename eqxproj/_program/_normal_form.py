"""The normal form of a jaxpr: a flat list of primitive equations.

Transforms a closed jaxpr into a [`Program`][]. Limits: control flow other than a short polynomial (`scan`, `while`,
`cond`) stays one equation.

In the normal form,

- calls (`jit`, `remat2`, `closed_call`) are inlined; constants are the program's own, and each call has variables of
  its own;
- a `custom_vjp_call` stays whole, and so does a `custom_jvp_call` whose derivative is not that of what it does; their
  operands and outputs are real, and what their derivative closes over is an operand, also of the `scan` or `cond`
  around them;
- implicit broadcasting of elementwise operations is a `broadcast_in_dim`;
- a short `scan` of elementwise operations over constants, as in JAX's special functions, is unrolled, so that such a
  function is elementwise throughout;
- a `scan` or `cond` of complex numbers is one of their real and imaginary parts;
- a product that is only read transposed, as `vmap` of a matrix times a vector leaves it, is computed transposed;
- dead code is dropped, but for side effects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.extend.core import primitives as jp

from ._calls import holds_only, inner_jaxpr
from ._complex import in_pairs, is_complex
from ._effects import acts, inner_programs
from ._equations import Equation, Fresh, Program, Variable, dependents, live
from ._fragment import evaluate
from ._kept import Kept, on_reals, with_closure
from ._primitives import ELEMENTWISE, FLAT, OWN_DERIVATIVE
from ._source import source_of

_ALIASES = ("copy", "copy_p", "name", "device_put", "optimization_barrier")
_KEEPS_NUMBERS = ("broadcast_in_dim", "convert_element_type", "copy", "neg", "reshape", "squeeze", "stop_gradient")
_UNROLLED = 32  # steps up to which a `scan` of elementwise operations is unrolled


class _Builder:
    """Walks through nested jaxprs and collects the equations, constants and known numbers of a program."""

    def __init__(
        self,
        unknown: Iterable[int],
        fresh: Fresh,
        seen: Mapping[Any, Variable] = MappingProxyType({}),
        moved: Iterable[int] | None = None,
    ):
        self.equations: list[Equation] = []
        self.fresh = fresh
        self.unknown = set(unknown)
        self.moved = set(self.unknown if moved is None else moved)  # those that have a derivative by unknowns
        self.seen = dict(seen)  # the variables of all jaxprs that were walked through, and of those around them
        self.parts: dict[int, tuple[Variable, ...]] = {}  # the real and the imaginary part of what is made of them

    def _literal(self, literal: Any) -> Variable:
        variable = self.fresh.constant(np.asarray(literal.val, literal.aval.dtype))
        if np.size(literal.val) == 1:
            self.fresh.note(variable, literal.val)  # before it was rounded to the dtype
        return variable

    def _append(self, equation: Equation) -> None:
        self.equations.append(equation)
        self.unknown |= dependents([equation], [v for v in equation.inputs if v.index in self.unknown])
        if equation.name not in FLAT:
            found = dependents([equation], [v for v in equation.inputs if v.index in self.moved])
            self.moved |= {v.index for v in equation.outputs if v.index in found and v.is_inexact}

    def _emit(
        self,
        primitive: Primitive,
        params: Mapping[str, Any],
        inputs: Sequence[Variable],
        avals,
        source: str,
        effects: Iterable[Any] = (),
    ):
        outputs = tuple(self.fresh.variable(aval.shape, aval.dtype) for aval in avals)
        self._append(Equation(primitive, params, tuple(inputs), outputs, source, acts=acts(effects)))
        static = self.fresh.static
        if primitive.name == "complex":
            self.parts[outputs[0].index] = tuple(inputs)
        if primitive.name in _KEEPS_NUMBERS and inputs[0].index in static:
            value = static[inputs[0].index] * (-1 if primitive.name == "neg" else 1)
            kind = np.dtype(outputs[0].dtype).kind if hasattr(outputs[0].dtype, "kind") else "f"
            static[outputs[0].index] = float(int(value)) if kind in "iu" else value
        return outputs

    def _broadcast(self, variable: Variable, shape: tuple[int, ...], source: str) -> Variable:
        """An explicit broadcast of `variable` to `shape`, of the same rank or from a scalar."""
        dimensions = tuple(range(len(shape))) if len(variable.shape) == len(shape) else ()
        params = dict(shape=shape, broadcast_dimensions=dimensions, sharding=None)
        aval = jax.ShapeDtypeStruct(shape, variable.dtype)
        return self._emit(jp.broadcast_in_dim_p, params, [variable], [aval], source)[0]

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Variable], outer: str | None = None):
        """Takes over the equations of a jaxpr, inlined at the place `outer`; returns its outputs."""
        env: dict[Any, Variable] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update((var, self.fresh.constant(value)) for var, value in zip(jaxpr.constvars, consts, strict=True))
        self.seen.update(env)

        def read(atom: Any) -> Variable:
            return self._literal(atom) if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self._results(equation, operands, source_of(equation.source_info, outer))
            made = dict(zip(equation.outvars, results, strict=True))
            env.update(made)
            self.seen.update(made)
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, equation: Any, operands: list[Variable], source: str) -> Sequence[Variable]:
        """The results of one equation of a jaxpr: of its inner jaxpr if it is inlined, else of a new equation."""
        name, inner = equation.primitive.name, inner_jaxpr(equation)
        if name in _ALIASES:
            return operands
        if inner is not None:
            return self.walk(inner[0], inner[1], operands, source)
        if name in OWN_DERIVATIVE:
            return self._own_derivative(equation, operands, source)
        if name in ("real", "imag") and operands[0].index in self.parts:
            return [self.parts[operands[0].index][name == "imag"]]
        if name in ("scan", "cond"):
            counts = scan_counts(equation.params) if name == "scan" else None
            programs = self._programs(equation, operands, counts)
            held = _read_from_outside(programs)
            real = in_pairs(equation, counts, [_function(p, held) for p in programs] if held else (), held)
            if real is not None:
                return self.walk(real.jaxpr, real.consts, [*operands, *held], source)
        polynomial = self._polynomial(equation, operands, source) if name == "scan" else None
        if polynomial is not None:
            return polynomial
        if name in ELEMENTWISE:
            shape = equation.outvars[0].aval.shape
            same = [v.shape == shape or v.index in self.fresh.static for v in operands]
            operands = [v if s else self._broadcast(v, shape, source) for v, s in zip(operands, same, strict=True)]
        avals = [v.aval for v in equation.outvars]
        return self._emit(equation.primitive, equation.params, operands, avals, source, equation.effects)

    def _own_derivative(self, equation: Any, operands: list[Variable], source: str) -> list[Variable]:
        """A call that is kept whole, on real arrays. What it returns beside numbers passes no derivative on."""
        unknown = [v.index in self.unknown for v in operands]
        closed = with_closure(equation, unknown, self.seen)
        primitive = equation.primitive if closed is None else jp.custom_vjp_call_p
        plain = Equation(equation.primitive, equation.params, (), (), "").bind
        function, held = (plain, []) if closed is None else closed
        self._check_closure(equation, [*operands[: equation.params.get("num_consts", 0)], *held], source)
        operands = [*operands, *held]
        inputs = [part for v in operands for part in self._parts(v, source)]
        avals = [v.aval for v in equation.outvars]
        reals = [jax.ShapeDtypeStruct(a.shape, d) for a in avals for d in _real_types(a.dtype)]
        results = tuple(self.fresh.variable(a.shape, a.dtype) for a in reals)
        args = (primitive, equation.params, tuple(inputs), results, source)
        same = closed is None and len(inputs) == len(operands) and len(reals) == len(avals)
        whole = on_reals(function, [v.dtype for v in operands])
        self._append(Equation(*args) if same else Kept(*args, function=whole))
        rest, found = iter(results), []
        for aval in avals:
            parts = [next(rest) for _ in _real_types(aval.dtype)]
            joins = jp.complex_p if len(parts) == 2 else None if parts[0].is_float else jp.stop_gradient_p
            found += parts if joins is None else self._emit(joins, {}, parts, [aval], source)
        return found

    def _check_closure(self, equation: Any, held: Sequence[Variable], source: str) -> None:
        """Raises a `ValueError` where a call closes over what has a derivative by parameters."""
        moved = [v for v in held if v.index in self.moved]
        if moved:
            kind = "custom_jvp" if equation.primitive.name == "custom_jvp_call" else "custom_vjp"
            raise ValueError(
                f"The function with a `jax.{kind}` at {source} closes over an array that depends on parameters, "
                f"{moved[0].describe()}. Its derivative says nothing of that array, and JAX refuses to differentiate "
                "it too: pass the array as an argument, or close over `jax.lax.stop_gradient` of it."
            )

    def _programs(self, equation: Any, operands: Sequence[Variable], counts: tuple[int, int] | None) -> list[Program]:
        """The body or branches of a `scan` or `cond`, where they hold calls with a derivative of their own.

        They read what such a derivative closes over, variables of this program, beside their own operands.
        """
        closed = [equation.params["jaxpr"]] if counts is not None else equation.params["branches"]
        if not self.unknown or not any(_has_own_derivative(c.jaxpr) for c in closed):
            return []
        unknown = [v.index in self.unknown for v in operands]
        if counts is None:
            return [self._program(c, operands[1:], unknown[1:])[0] for c in closed]
        constants, carries = counts
        while True:  # carries may become unknown on the way
            program, reached = self._program(closed[0], operands, unknown)
            through = [False] * constants + reached[:carries] + [False] * (len(unknown) - constants - carries)
            more = [a or b for a, b in zip(unknown, through, strict=True)]
            if more == unknown:
                return [program]
            unknown = more

    def _program(
        self, closed: ClosedJaxpr, operands: Sequence[Variable], unknown: Sequence[bool]
    ) -> tuple[Program, list[bool]]:
        """An inner program, given what it is called with, and what of that is unknown; and which of its outputs are.

        A carry may be unknown though what the first step is given is not.
        """
        fresh = Fresh(self.fresh.count)
        inputs = [fresh.variable(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]  # pyright: ignore[reportAttributeAccessIssue]
        seeds = [(v.index, o.index) for v, o, u in zip(inputs, operands, unknown, strict=True) if u]
        moved = {v for v, o in seeds if o in self.moved or o not in self.unknown}
        builder = _Builder(self.unknown | {v for v, _ in seeds}, fresh, self.seen, self.moved | moved)
        outputs = builder.walk(closed.jaxpr, closed.consts, inputs)
        equations = live(builder.equations, outputs, with_effects=True)
        program = Program(tuple(inputs), equations, tuple(outputs), fresh.constants, fresh.static)
        return program, [v.index in builder.unknown for v in outputs]

    def _parts(self, variable: Variable, source: str) -> list[Variable]:
        """The real and the imaginary part of a complex variable; any other as it is."""
        if not is_complex(variable.dtype):
            return [variable]
        avals = [jax.ShapeDtypeStruct(variable.shape, d) for d in _real_types(variable.dtype)]
        pairs = zip((jp.real_p, jp.imag_p), avals, strict=True)
        return [self._emit(primitive, {}, [variable], [aval], source)[0] for primitive, aval in pairs]

    def _polynomial(self, equation: Any, operands: Sequence[Variable], source: str) -> list[Variable] | None:
        """The last carries of a short `scan` of elementwise operations over constants; `None` of any other `scan`."""
        params = equation.params
        closed, (held, carried) = params["jaxpr"], scan_counts(params)
        scanned = [self.fresh.constants.get(v.index) for v in operands[held + carried :]]
        known = all(x is not None and not isinstance(x, jax.core.Tracer) for x in scanned)
        short = params["length"] <= _UNROLLED and len(equation.outvars) == carried
        if not (known and short and scanned and holds_only(closed.jaxpr, ELEMENTWISE | {"broadcast_in_dim"})):
            return None
        carry = list(operands[held : held + carried])
        rows = [np.asarray(x) for x in scanned]
        steps = range(params["length"])
        for i in reversed(steps) if params["reverse"] else steps:
            elements = [self.fresh.constant(x[i]) for x in rows]
            carry = self.walk(closed.jaxpr, closed.consts, [*operands[:held], *carry, *elements], source)
        return carry


def _real_types(dtype: Any) -> list[Any]:
    """The types of the real arrays that an array of a type is made of."""
    return [np.dtype(dtype).type(0).real.dtype] * 2 if is_complex(dtype) else [dtype]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a `scan` are constants, and how many carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, *_ = params["ft_in"].unpack()  # from JAX 0.11 on the operands are a tree of three branches
    return len(constants), len(carries)


def _has_own_derivative(jaxpr: Jaxpr) -> bool:
    """Whether a call is kept whole for its own derivative, in a jaxpr or in those that it holds."""
    return any(
        (e.primitive.name in OWN_DERIVATIVE and inner_jaxpr(e) is None)
        or any(map(_has_own_derivative, inner_programs(e.params)))
        for e in jaxpr.eqns
    )


def _read_from_outside(programs: Sequence[Program]) -> list[Variable]:
    """The variables that inner programs read beside their own."""
    found: dict[Variable, None] = {}
    for program in programs:
        own = {v.index for v in (*program.inputs, *(v for e in program.equations for v in e.outputs))}
        read = [*(v for e in program.equations for v in e.inputs), *program.outputs]
        found.update((v, None) for v in read if v.index not in own and v.index not in program.constants)
    return list(found)


def _function(program: Program, held: Sequence[Variable]) -> Callable[..., list[Any]]:
    """A program as a function of the values of what it reads from outside, and of its inputs."""

    def function(further: Sequence[Any], *inputs: Any) -> list[Any]:
        given = zip((*held, *program.inputs), (*further, *inputs), strict=True)
        found = evaluate(program.equations, {**program.constants, **{v.index: x for v, x in given}})
        return [jnp.asarray(found[v.index]) for v in program.outputs]

    return function


def _turned(equations: Sequence[Equation], outputs: Sequence[Variable]) -> tuple[Equation, ...]:
    """The equations, without transposes of products that are read nowhere else: the operands are exchanged instead."""
    reads = Counter(v.index for v in (*outputs, *(v for e in equations for v in e.inputs)))
    transposes = {e.inputs[0].index: e for e in equations if e.name == "transpose"}
    products = [e for e in equations if e.name == "dot_general" and reads[e.outputs[0].index] == 1]
    pairs = [(e, transposes[e.outputs[0].index]) for e in products if e.outputs[0].index in transposes]
    found = {e.outputs[0].index: _exchanged(e, after) for e, after in pairs}
    turned = {e.outputs: e for e in found.values() if e is not None}
    gone = {pair[0].outputs for pair in pairs if found[pair[0].outputs[0].index] is not None}
    return tuple(turned.get(e.outputs, e) for e in equations if e.outputs not in gone)


def _exchanged(equation: Equation, after: Equation) -> Equation | None:
    """A `dot_general` with its operands exchanged, where that does the work of the transpose `after` it."""
    (contract, batch), params = equation.params["dimension_numbers"], dict(equation.params)
    a, b = equation.inputs
    shared, own = len(batch[0]), len(a.shape) - len(batch[0]) - len(contract[0])
    axes = range(len(after.outputs[0].shape))
    exchange = (*axes[:shared], *axes[shared + own :], *axes[shared : shared + own])
    if params.get("out_sharding") is not None or tuple(after.params["permutation"]) != exchange:
        return None
    params["dimension_numbers"] = (tuple(reversed(contract)), tuple(reversed(batch)))
    if isinstance(params.get("precision"), tuple):
        params["precision"] = tuple(reversed(params["precision"]))
    return replace(equation, params=params, inputs=(b, a), outputs=after.outputs)


def normal_form(jaxpr: ClosedJaxpr, unknowns: int = 0) -> Program:
    """The normal form of a closed jaxpr, of whose inputs the first `unknowns` are unknown.

    What the derivative of a call closes over is looked for where its operands depend on these.
    """
    fresh = Fresh()
    inputs = [fresh.variable(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars]  # pyright: ignore[reportAttributeAccessIssue]
    builder = _Builder((v.index for v in inputs[:unknowns]), fresh)
    outputs = builder.walk(jaxpr.jaxpr, jaxpr.consts, inputs)
    equations = _turned(live(builder.equations, outputs, with_effects=True), outputs)
    return Program(tuple(inputs), equations, tuple(outputs), fresh.constants, fresh.static)


def traced_for(equation: Equation, function: Callable[..., Any], fresh: Fresh) -> tuple[list[Equation], list[Variable]]:
    """The equations and outputs of a function of an equation's inputs, to stand in its place and at its source."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in equation.inputs]
    body, outputs = fresh.splice(normal_form(jax.make_jaxpr(function)(*shapes)), equation.inputs)
    return [replace(e, source=equation.source) for e in body], outputs
