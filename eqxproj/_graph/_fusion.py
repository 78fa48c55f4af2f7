r"""Which elementwise results become values of the graph, and of what each is a function.

Transforms the equations between the parameters and the objective into a [`Fusion`][]: what is a function of one
unknown, however many equations it takes, becomes one node $y = \phi(\sum_i c_i x_i + d)$. Views need no node. Limits:
a nonlinear function of several unknowns is not fused with what leads to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .._program._affine import AffineTerm, affine_terms
from .._program._equations import Equation, Program, Variable, live, ways
from .._program._primitives import ELEMENTWISE, VIEW_DATA, VIEWS
from ..rules._registry import RULES, is_registered


def takes_precedence(equation: Equation) -> bool:
    """Whether an operation's rule is asked before it is fused with others or made part of the objective."""
    rule = RULES.get(equation.name)
    return is_registered(equation.name) or (rule is not None and rule.takes_precedence)


def is_view(equation: Equation, unknown: frozenset[int]) -> bool:
    """Whether an equation is a view of its unknown operands, all of which must carry data and be floats."""
    if equation.name not in VIEWS or takes_precedence(equation):
        return False
    data = range(len(equation.inputs))[VIEW_DATA.get(equation.name, slice(0, 1))]
    return all(i in data and v.is_float for i, v in enumerate(equation.inputs) if v.index in unknown)


def is_elementwise(equation: Equation) -> bool:
    """Whether an equation may be fused: each element of its output comes from one element of each operand."""
    return equation.name in ELEMENTWISE and not takes_precedence(equation)


class Fusion:
    """Which elementwise results are values, and of what each of them is a function.

    The *root* of a variable is the one variable that it is an elementwise function of. Where two roots meet, the
    result is a junction and its own root. `kept` are the variables that become values of the graph, beside those of
    `ends`, what the equations are for. To keep one more may change the roots, so that the analysis is repeated until it
    keeps no more.
    """

    def __init__(
        self,
        program: Program,
        equations: Sequence[Equation],
        unknown: frozenset[int],
        kept: frozenset[int],
        ends: Sequence[Variable],
    ):
        self.program = program
        self.unknown = unknown
        self.equations = [e for e in equations if any(v.index in unknown for v in e.outputs)]
        self._order = {e: i for i, e in enumerate(self.equations)}
        self.makers = {v.index: e for e in self.equations for v in e.outputs}
        self.variables = {v.index: v for e in equations for v in (*e.inputs, *e.outputs)}
        self._read = {v.index for v in (*ends, *(v for e in live(self.equations, ends) for v in e.inputs))}
        self.views = frozenset(v.index for e in self.equations if is_view(e, unknown) for v in e.outputs)
        self._elementwise = [e for e in self.equations if is_elementwise(e)]
        self.kept = kept | self._ends_of_others()
        self.roots: dict[int, int] = {}
        count = -1
        while len(self.kept) != count:
            count = len(self.kept)
            self.roots = self._find_roots()
            self._keep_operands_of_junctions()
            self.kept |= self._shared_junctions()

    def inputs(self, equation: Equation) -> list[Variable]:
        """The distinct unknown operands of an equation."""
        return list(dict.fromkeys(v for v in equation.inputs if v.index in self.unknown))

    def is_read(self, variable: Variable) -> bool:
        """Whether a variable is a float that leads to one of the ends, other than by a value that is stopped."""
        return variable.is_float and variable.index in self._read

    def is_leaf(self, variable: Variable) -> bool:
        """Whether a variable can be an operand as it is: a value, or a view of values."""
        index = variable.index
        return index in self.kept or index in self.views or index not in self.makers

    def junction_of(self, variable: Variable) -> Variable:
        """The root of an elementwise result: itself, if it is a junction."""
        return self.variables[self.roots[variable.index]]

    def _root(self, variable: Variable, roots: Mapping[int, int]) -> int:
        return variable.index if self.is_leaf(variable) else roots.get(variable.index, variable.index)

    def _ends_of_others(self) -> set[int]:
        """What is read and returned by operations that are no elementwise functions. Views are read through."""
        others = [e for e in self.equations if is_view(e, self.unknown) or not is_elementwise(e)]
        return {v.index for e in others for v in (*self.inputs(e), *e.outputs)} - self.views

    def _find_roots(self) -> dict[int, int]:
        """The root of each elementwise result."""
        roots: dict[int, int] = {}
        for equation in self._elementwise:
            out = equation.outputs[0].index
            found = {self._root(v, roots) for v in self.inputs(equation)}
            roots[out] = out if len(found) > 1 or self._scales_by_array(equation) else found.pop()
        return roots

    def _scales_by_array(self, equation: Equation) -> bool:
        """Whether an equation is affine with a known array in it. What follows its result is one function then."""
        known = [v for v in equation.inputs if v.index not in self.unknown and v.index not in self.program.static]
        return bool(known) and self._affine_terms(equation) is not None

    def _affine_terms(self, equation: Equation) -> tuple[AffineTerm, ...] | None:
        """The terms of one affine equation; `None` where it is not affine, or a coefficient is zero or infinite."""
        found = affine_terms(equation, self.unknown, self.program.static)
        usable = found is not None and all(t.scale != 0 and np.isfinite(t.scale) for t in found)
        return found if usable else None

    def affine(self, variable: Variable, top: bool = True) -> list[AffineTerm] | None:
        """A variable as an affine function of leaves; `None` where it is not one.

        At the `top`, a sum over axes is affine too, and a leaf is read through to what it is made of.
        """
        if not top and self.is_leaf(variable):
            return [AffineTerm(variable)]
        maker = self.makers.get(variable.index)
        if maker is not None and maker.name == "reduce_sum" and top:
            return [AffineTerm(maker.inputs[0], axes=tuple(int(a) for a in maker.params["axes"]))]
        outer = self._affine_terms(maker) if maker is not None and is_elementwise(maker) else None
        if not outer:
            return None
        found: list[AffineTerm] = []
        for term in outer:
            inner = self.affine(term.variable, top=False)
            if inner is None:
                return None
            found += [AffineTerm(t.variable, t.scale * term.scale, t.factors + term.factors, t.axes) for t in inner]
        return _merged(found)

    def _keep_operands_of_junctions(self) -> None:
        """Keeps what a junction reads, if it is not affine in it; and a junction that is not affine itself.

        What is kept for one junction counts for the next: the junctions are in the order of the program.
        """
        for equation in self._elementwise:
            out = equation.outputs[0].index
            if self.roots[out] != out:
                continue
            if self._affine_terms(equation) is not None:
                for v in self.inputs(equation):
                    if v.is_float and self.affine(v, top=False) is None:
                        self.kept |= {v.index}
            else:
                reads = {v.index if v.is_float else self._root(v, self.roots) for v in self.inputs(equation)}
                self.kept = (self.kept | {out} | reads) - self.views

    def _shared_junctions(self) -> set[int]:
        """The junctions that several values are functions of."""
        sinks: dict[int, set[int]] = {}
        for equation in self._elementwise:
            out = equation.outputs[0].index
            root = self.roots[out]
            if out in self.kept or root == out:
                reads = {root} if root != out else {self._root(v, self.roots) for v in self.inputs(equation)}
                for read in reads - {out}:
                    sinks.setdefault(read, set()).add(out)
        return {r for r, found in sinks.items() if len(found) > 1 and r in self.roots and r not in self.views}

    def between(self, start: Sequence[Variable], *stop: Variable) -> tuple[Equation, ...]:
        """The equations that lead from the operands `start` to `stop`."""
        wall = {v.index for v in start}
        return ways(self.makers, self._order, [v.index for v in stop], wall)


def _merged(found: list[AffineTerm]) -> list[AffineTerm]:
    """Terms of the same variable with plain coefficients, added up."""
    merged: dict[object, AffineTerm] = {}
    for position, term in enumerate(found):
        key = position if term.factors else (term.variable, term.axes)
        before = merged.get(key)
        merged[key] = term if before is None else replace(term, scale=before.scale + term.scale)
    return list(merged.values())
