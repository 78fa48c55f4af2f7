r"""From equations to nodes: which rule projects an operation, and of what it is a function.

Transforms the equation of a value into a [`Draft`][]: a scalar node $y = \phi(\sum_i c_i x_i + d)$, a node of one
primitive with a rule, or a node for the local solver. Limits: a draft speaks of variables; `_build` gives it edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .._errors import Unsupported
from .._program._affine import AffineTerm
from .._program._equations import Equation, Variable
from .._program._fragment import Fragment
from .._program._kept import reached
from .._program._primitives import OWN_DERIVATIVE, PROGRAMS, VIEWS
from ..rules._local import LocalSolver, flattened_by, is_differentiable
from ..rules._registry import RULES
from ..rules._scalar import Scalar
from ..rules._selection import POSITIONS, Selection
from ._fusion import Fusion, is_elementwise, takes_precedence
from ._graph import Node


@dataclass(frozen=True, eq=False)
class Draft:
    """A node whose operands are not edges yet, and whose outputs are not values. `missing`: what of it has no rule."""

    node: Node
    operands: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    missing: tuple[Unsupported, ...] = ()


def draft_of(variable: Variable, fusion: Fusion) -> Draft:
    """The node that a value is the output of."""
    equation = fusion.makers[variable.index]
    is_sum = equation.name == "reduce_sum" and not takes_precedence(equation)
    return _scalar(variable, equation, fusion) if is_sum or is_elementwise(equation) else _primitive(equation, fusion)


def _scalar(variable: Variable, equation: Equation, fusion: Fusion) -> Draft:
    r"""A node $\phi(\sum_i c_i x_i + d)$; where the value is no such function, that of its own equation."""
    terms, root = fusion.affine(variable), variable
    if terms is None:
        root = fusion.junction_of(variable)
        if root == variable:
            return _primitive(equation, fusion)
        terms = [AffineTerm(root)] if fusion.is_leaf(root) else fusion.affine(root)
        assert terms is not None
    if not all(t.variable.is_float for t in terms):
        return _opened(equation, fusion)
    operands = tuple(dict.fromkeys(t.variable for t in terms))
    before = fusion.between(operands, root) if root not in operands else ()
    after = fusion.between([root], variable) if root != variable else ()
    head, phi = Fragment(before, operands, (root,)), Fragment(after, (root,), (variable,))
    name = _joined((*before, *after)) or "identity"
    rule = Scalar(tuple(terms), head, phi, fusion.program.static)
    function = Fragment((*before, *after), operands, (variable,))
    return Draft(Node("operation", name, equation.source, rule, function), operands, (variable,))


def _primitive(equation: Equation, fusion: Fusion) -> Draft:
    """A node of one primitive. If it has no rule that accepts it, it is opened."""
    unknown = tuple(v.index in fusion.unknown for v in equation.inputs)
    if equation.name in PROGRAMS:  # integers and predicates stay as the forward pass has them
        unknown = tuple(u and v.is_float for u, v in zip(unknown, equation.inputs, strict=True))
    if equation.name in OWN_DERIVATIVE:
        unknown = _reached(equation, unknown, [v for v in equation.outputs if fusion.is_read(v)])
    operands = tuple(v for v, is_unknown in zip(equation.inputs, unknown, strict=True) if is_unknown)
    rule = RULES.get(equation.name)
    if rule is None or not all(v.is_float for v in operands) or not rule.accepts(equation, unknown):
        return _opened(equation, fusion)
    rule = rule.of(equation, unknown)
    outputs = tuple(v for v in equation.outputs if fusion.is_read(v) or not rule.answers_for_some)
    function, read = _with_separate_operands(operands, equation, outputs), tuple(v in outputs for v in equation.outputs)
    node = Node("operation", equation.name, equation.source, rule, function, (), (), equation, unknown, read)
    missing = [m if m.source else replace(m, source=equation.source) for m in rule.missing(equation, unknown)]
    return Draft(node, operands, outputs, tuple(missing))


def _reached(equation: Equation, unknown: Sequence[bool], outputs: Sequence[Variable]) -> tuple[bool, ...]:
    """Which unknown operands the derivative of a call asks for: one that only checks others passes nothing to them."""
    held = equation.params.get("num_consts", 0)  # nothing is passed on to what the function closes over
    places = reached(equation, [i for i, is_unknown in enumerate(unknown) if is_unknown and i >= held], outputs)
    return tuple(i in places for i in range(len(unknown)))


def _opened(equation: Equation, fusion: Fusion) -> Draft:
    """A node for an equation without a rule of its own, and for what leads to it from floating-point values.

    Predicates and positions are no values of the graph: they are read through to what they are made of.
    """
    leaves: dict[Variable, None] = {}
    stack = fusion.inputs(equation)[::-1]
    while stack:
        v = stack.pop()
        if v.is_float and fusion.is_leaf(v) or v.index not in fusion.makers:
            leaves[v] = None
        else:
            stack.extend(fusion.inputs(fusion.makers[v.index])[::-1])
    operands = tuple(leaves)
    outputs = tuple(v for v in equation.outputs if fusion.is_read(v))
    equations = fusion.between(operands, *outputs)
    function = Fragment(equations, operands, outputs)
    solvable = outputs and all(v.is_float for v in operands) and is_differentiable(function, fusion.program)
    name = _joined(e for e in equations if e.name not in VIEWS or e is equation)
    rule = Selection(function) if any(e.name in POSITIONS for e in equations) else LocalSolver()
    node = Node("operation", name, equation.source, rule, function)
    if solvable:
        return Draft(node, operands, outputs)
    flat = " and ".join(flattened_by(function))
    reason = f"which reads what {flat} makes of unknowns" if flat else ""
    return Draft(node, operands, outputs, (Unsupported(equation.name, equation.source, reason),))


def _joined(equations: Iterable[Equation]) -> str:
    return "+".join(dict.fromkeys(e.name for e in equations))


def _with_separate_operands(
    operands: tuple[Variable, ...], equation: Equation, outputs: tuple[Variable, ...]
) -> Fragment:
    """A fragment whose operands are separate slots even where one variable fills two of them (`w * w`)."""
    if len(set(operands)) == len(operands):
        return Fragment((equation,), operands, outputs)
    slots = tuple(Variable(-1 - i, v.shape, v.dtype) for i, v in enumerate(operands))
    rest = iter(slots)
    inputs = tuple(next(rest) if v in operands else v for v in equation.inputs)
    return Fragment((replace(equation, inputs=inputs),), slots, outputs)
