"""Which elementwise results become values of the graph, and of what each is a function.

Views need no node, and elementwise operations are fused: what is a function of one unknown, however many equations it
takes, becomes one node $y = \\phi(\\sum_i c_i x_i + d)$.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._program._equations import Equation, Program, Variable, live
from .._program._primitives import AFFINE, ELEMENTWISE, VIEW_DATA, VIEWS
from ..rules._registry import RULES
from ..rules._scalar import AffineTerm


def takes_precedence(name: str) -> bool:
    """Whether a primitive has a rule that is asked before the operation is fused or made part of the objective."""
    rule = RULES.get(name)
    return rule is not None and rule.takes_precedence


def is_view(equation: Equation, unknown: frozenset[int]) -> bool:
    """Whether an equation is a view of its unknown operands, all of which must carry data and be floats."""
    if equation.name not in VIEWS or takes_precedence(equation.name):
        return False
    data = range(len(equation.inputs))[VIEW_DATA.get(equation.name, slice(0, 1))]
    return all(i in data and v.is_float for i, v in enumerate(equation.inputs) if v.index in unknown)


def is_elementwise(equation: Equation) -> bool:
    return equation.name in ELEMENTWISE and not takes_precedence(equation.name)


class Fusion:
    """Finds which elementwise results become values, and of what each is a function.

    The *root* of a variable is the one variable that it is an elementwise function of. Where two roots meet, the
    result is a junction and its own root. `kept` are the variables that become values of the graph; the analysis is
    repeated until it no longer grows.
    """

    def __init__(self, program: Program, equations: Sequence[Equation], unknown: frozenset[int], kept: set[int]):
        self.program = program
        self.equations = [e for e in equations if any(v.index in unknown for v in e.outputs)]
        self.unknown = unknown
        self.kept = set(kept)
        self.makers = {v.index: e for e in self.equations for v in e.outputs}
        self.variables = {v.index: v for e in equations for v in (*e.inputs, *e.outputs)}
        self.views = frozenset(v.index for e in self.equations if is_view(e, unknown) for v in e.outputs)
        self._keep_operands()
        while True:
            before = len(self.kept)
            self.roots = self._find_roots()
            self._keep_operands_of_junctions()
            self._keep_shared_junctions()
            if len(self.kept) == before:
                break

    def inputs(self, equation: Equation) -> list[Variable]:
        """The distinct unknown operands of an equation."""
        return list({v.index: v for v in equation.inputs if v.index in self.unknown}.values())

    def is_leaf(self, variable: Variable) -> bool:
        """Whether a variable can be an operand as it is: a value, or a view of values."""
        index = variable.index
        return index in self.kept or index in self.views or index not in self.makers

    def fused(self, variable: Variable) -> Equation | None:
        """The elementwise equation that makes a variable that is not a value of its own."""
        maker = self.makers.get(variable.index)
        return maker if maker is not None and is_elementwise(maker) else None

    def _keep_operands(self) -> None:
        for equation in self.equations:
            if not is_elementwise(equation) or is_view(equation, self.unknown):
                self.kept.update(v.index for v in self.inputs(equation) if v.index not in self.views)
                if not is_view(equation, self.unknown):
                    self.kept.update(v.index for v in equation.outputs)

    def root_of(self, variable: Variable) -> int:
        return variable.index if self.is_leaf(variable) else self.roots.get(variable.index, variable.index)

    def _find_roots(self) -> dict[int, int]:
        self.roots: dict[int, int] = {}
        for equation in self.equations:
            out = equation.outputs[0]
            if not is_elementwise(equation):
                continue
            roots = {self.root_of(v) for v in self.inputs(equation)}
            opens = len(roots) > 1 or self._scales_by_array(equation)
            self.roots[out.index] = out.index if opens else roots.pop()
        return self.roots

    def _scales_by_array(self, equation: Equation) -> bool:
        """An affine step with a known array: the start of a new root, so that what follows stays a plain function."""
        out = equation.outputs[0]
        known = [v for v in equation.inputs if v.index not in self.unknown and v.index not in self.program.static]
        return bool(known) and out.is_float and self._affine_step(equation) is not None

    def _affine_step(self, equation: Equation) -> list[tuple[Variable, float, tuple[tuple[Variable, int], ...]]] | None:
        """The terms of one affine equation, `None` where it is not affine in its unknown operands."""
        ins, name, static = equation.inputs, equation.name, self.program.static
        has = [v.index in self.unknown for v in ins]
        if name not in AFFINE or not equation.outputs[0].is_float:
            return None
        if name in ("add", "add_any", "sub"):
            signs = (1.0, -1.0 if name == "sub" else 1.0)
            return [(v, s, ()) for v, s, u in zip(ins, signs, has, strict=True) if u]
        if name in ("neg", "copy", "convert_element_type"):
            return [(ins[0], -1.0 if name == "neg" else 1.0, ())] if ins[0].is_float else None
        if sum(has) != 1 or (name == "div" and has[1]):
            return None
        value, factor, power = ins[has.index(True)], ins[has.index(False)], 1 if name == "mul" else -1
        if factor.index in static:
            scale = static[factor.index]
            return None if scale == 0 or not np.isfinite(scale) else [(value, scale**power, ())]
        return [(value, 1.0, ((factor, power),))]

    def affine(self, variable: Variable, top: bool = True) -> list[AffineTerm] | None:
        """A variable as an affine function of leaves; `None` where it is not one."""
        if not top and self.is_leaf(variable):
            return [AffineTerm(variable, 1.0, (), ())]
        maker = self.makers.get(variable.index)
        if maker is not None and maker.name == "reduce_sum" and top:
            return [AffineTerm(maker.inputs[0], 1.0, (), tuple(int(a) for a in maker.params["axes"]))]
        if maker is None or not is_elementwise(maker):
            return None
        steps = self._affine_step(maker)
        found: list[AffineTerm] = []
        for operand, scale, factors in steps or ():
            inner = self.affine(operand, top=False)
            if inner is None:
                return None
            found.extend(AffineTerm(t.variable, t.scale * scale, t.factors + factors, t.axes) for t in inner)
        return _merged(found) if steps else None

    def _keep_operands_of_junctions(self) -> None:
        for equation in self.equations:
            if not is_elementwise(equation) or self.roots[equation.outputs[0].index] != equation.outputs[0].index:
                continue
            if self._affine_step(equation) is not None:
                self.kept.update(
                    v.index for v in self.inputs(equation) if self.affine(v, top=False) is None and v.is_float
                )
            else:
                self.kept.add(equation.outputs[0].index)
                self.kept.update(v.index if v.is_float else self.root_of(v) for v in self.inputs(equation))
                self.kept -= self.views

    def _keep_shared_junctions(self) -> None:
        """A junction that several values are functions of becomes a value itself."""
        sinks: dict[int, set[int]] = {}
        for equation in self.equations:
            out = equation.outputs[0].index
            if not is_elementwise(equation):
                continue
            if out in self.kept or self.roots[out] == out:
                reads = (
                    {self.roots[out]} if self.roots[out] != out else {self.root_of(v) for v in self.inputs(equation)}
                )
                for root in reads - {out}:
                    sinks.setdefault(root, set()).add(out)
        self.kept.update(r for r, found in sinks.items() if len(found) > 1 and r in self.roots and r not in self.views)

    def between(self, start: Sequence[Variable], *stop: Variable) -> tuple[Equation, ...]:
        """The equations that lead from the operands `start` to `stop`."""
        wall = {v.index for v in start}
        return live([e for e in self.equations if not any(v.index in wall for v in e.outputs)], stop)


def _merged(found: list[AffineTerm]) -> list[AffineTerm]:
    """Terms of the same variable with plain coefficients, added up."""
    kept: list[AffineTerm] = []
    for term in found:
        for i, other in enumerate(kept):
            if other.variable == term.variable and not other.factors and not term.factors and other.axes == term.axes:
                kept[i] = AffineTerm(term.variable, other.scale + term.scale, (), term.axes)
                break
        else:
            kept.append(term)
    return kept
