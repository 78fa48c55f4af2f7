"""From a program to its factor graph.

An equation that depends on no parameter is evaluated once, on the forward pass, and so is the result of a
`stop_gradient`. Of the rest, views become the edges' maps, everything downstream of the last use of a parameter
becomes the objective, elementwise operations are fused into nodes $y = \\phi(\\sum_i c_i x_i + d)$, and what remains is
one node an equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import Unsupported, UnsupportedPrimitiveError
from .._program._comparisons import with_differences
from .._program._composites import with_composites
from .._program._equations import Equation, Variable, dependents, live
from .._program._fragment import Fragment, View
from .._program._primitives import VIEWS
from .._program._terms import Term, terms
from .._program._trace import Trace
from .._program._unroll import unroll
from ..rules._base import AbstractRule
from ..rules._custom import Custom
from ..rules._derivative import CustomDerivative
from ..rules._local import FLAT, LocalSolver, flattened_by, is_differentiable
from ..rules._loss import CustomObjective, GenericObjective
from ..rules._registry import RULES, RegisteredRule
from ..rules._scalar import AffineTerm, Scalar
from ..rules._selection import POSITIONS, Selection
from ._fusion import Fusion, is_elementwise, is_view
from ._graph import Edge, Graph, Node


def check_dependence(trace: Trace) -> None:
    """Raises a `ValueError` where the value of the loss depends on no parameter."""
    program = trace.program
    found = dependents(live(program.equations, program.outputs[:1]), program.inputs[: len(trace.parameters)])
    if program.outputs[0].index not in found:
        raise ValueError(
            "`loss` does not depend on any floating-point array of `model`, so that there is nothing to train. "
            "Check that the loss uses the model that it is given, and that nothing stops the gradient on the way."
        )


class GraphBuilder:
    """Builds a graph, value by value, from the terms of the objective back."""

    def __init__(self, trace: Trace, data: str, in_order: bool, composites: bool):
        self.composites = composites
        check_dependence(trace)
        self.trace = trace
        count = len(trace.parameters)
        self.parameters, self.arguments = trace.program.inputs[:count], trace.program.inputs[count:]
        seeds = [*self.parameters, *(v for v in self.arguments if v.is_float and data == "pinned")]
        layout = unroll(trace.program, seeds, in_order)
        self.program, self.delayed = with_differences(layout.program, seeds), layout.delayed
        self.loss = self.program.outputs[0]
        self.equations, self.fed = self._live()
        self.unknown = self._dependents(self.parameters)
        self._split_objective()
        if data == "pinned":
            self._pin()
        self.fusion = self._fuse()
        self.values: list[Variable] = []
        self.edges: list[Edge] = []
        self.nodes: list[Node] = []
        self.position: dict[int, int] = {}
        self.missing: list[Unsupported] = []

    def _live(self) -> tuple[tuple[Equation, ...], list[Variable]]:
        """The equations that the loss depends on, and the variables that delayed ones show.

        What shows a delayed variable comes later than its readers, so that it is no equation of the list.
        """
        plain = [e for e in self.program.equations if not any(v.index in self.delayed for v in e.outputs)]
        fed: list[Variable] = []
        while True:
            kept = live(plain, [self.loss, *fed])
            reads = {v.index for e in kept for v in e.inputs}
            made = {v.index for late in self.delayed.values() for e in late.equations for v in e.outputs}
            sources = [v for i in self.delayed if i in reads for e in self.delayed[i].equations for v in e.inputs]
            found = list({v.index: v for v in sources if v.index not in made}.values())
            if len(found) == len(fed):
                return kept, fed
            fed = found

    def _dependents(self, seeds: Sequence[Variable]) -> frozenset[int]:
        """What depends on the seeds; delayed variables do."""
        return dependents(self.equations, [*seeds, *(Variable(i, (), None) for i in self.delayed)])

    # The objective.

    def _split_objective(self) -> None:
        names = [name for name, rule in RULES.items() if isinstance(rule, CustomObjective)]
        found = terms(self.program, self.loss, self.unknown, self._of_data(), names)
        found = [t for t in found if t.variable.index in self.unknown]
        self.custom = [t for t in found if t.custom is not None and self._accepts(t)]
        self.generic = [Term(t.variable, t.coefficient, t.factors) for t in found if t not in self.custom]
        plain = [abs(t.coefficient) for t in found if t.coefficient != 0 and np.isfinite(t.coefficient)]
        self.largest = max(plain, default=1.0)
        self.region = self._region([t.variable for t in self.generic])

    def _accepts(self, term: Term) -> bool:
        """A prox needs a positive coefficient, and the unknowns where it expects them."""
        assert term.custom is not None
        unknown = [v.index in self.unknown for v in term.custom.inputs]
        return term.coefficient > 0 and CustomObjective.has_prox(term.custom, unknown)

    def _of_data(self) -> frozenset[int]:
        """The variables that depend on data: arguments of the loss that are no keys, and arrays that it holds."""
        data = [v for v in self.arguments if not jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]
        used = {v.index for e in self.equations for v in e.inputs}
        constants = self.program.constants.items()
        data += [Variable(i, np.shape(c), None) for i, c in constants if i in used and np.size(c) > 1]
        return self._dependents(data)

    def _region(self, ends: Sequence[Variable]) -> frozenset[int]:
        """The equations, by the number of their first output, downstream of the last that holds a parameter.

        What they read from outside is real: complex numbers, predicates and positions are no values of the graph.
        """
        scope = live(self.equations, list(ends))
        makers = {v.index: e.outputs[0].index for e in scope for v in e.outputs}
        staying = self._staying(scope)
        while True:
            inside = self._downstream(scope, ends, staying)

            def reads_more(e: Equation, inside=inside) -> bool:
                odd = [v.index for v in e.inputs if v.index in self.unknown and not v.is_float]
                return e.outputs[0].index in inside and any(makers.get(i) not in inside for i in odd)

            found = {id(e) for e in scope if reads_more(e)}
            if not found:
                return inside
            staying |= found

    def _downstream(self, scope: Sequence[Equation], ends: Sequence[Variable], staying: set[int]) -> frozenset[int]:
        """Those of a scope, without the ones that stay nodes and what leads to these."""
        of_data = self._of_data()
        inside: set[int] = set()
        idle: set[int] = set()  # equations that only lead to stopped values
        final = {v.index for v in ends}
        fed = {v.index for v in self.fed}
        pure = {v.index for v in ends if v.index not in of_data}
        readers: dict[int, list[Equation]] = {}
        for equation in self.equations:
            for v in equation.inputs:
                readers.setdefault(v.index, []).append(equation)
        stops = {id(t.custom) for t in self.custom}
        for equation in reversed(scope):
            outs = [v.index for v in equation.outputs if v.index in self.unknown]
            after = [r for i in outs for r in readers.get(i, ()) if r in scope or id(r) in stops]
            after = [r for r in after if any(v.index in self.unknown for v in r.outputs)]  # not what is stopped
            after = [r for r in after if id(r) not in idle]
            if not after and not any(i in final for i in outs):
                idle.add(id(equation))
                continue
            ok = all(r.outputs[0].index in inside for r in after) or all(i in final for i in outs)
            holds = any(v.index in self.unknown and v.index not in of_data for v in equation.inputs)
            holds = holds or self._ends_objective(equation) or any(i in fed for i in outs)
            is_pure = all(i in pure for i in outs)
            if outs and ok and (not holds or is_pure) and id(equation) not in staying:
                inside.add(equation.outputs[0].index)
                if is_pure:
                    pure.update(v.index for v in equation.inputs)
        return frozenset(inside)

    def _ends_objective(self, equation: Equation) -> bool:
        """Operations that stay nodes of their own though no parameter comes after them."""
        if equation.name in ("dot_general", "conv_general_dilated"):
            return all(v.index in self.unknown for v in equation.inputs)
        return self._stays(equation)

    def _stays(self, equation: Equation) -> bool:
        """Operations that are never part of the objective: a local solver is blind to them, or a user has a rule."""
        rule = RULES.get(equation.name)
        return equation.name in (*FLAT, *POSITIONS) or isinstance(rule, (Custom, CustomDerivative, RegisteredRule))

    def _staying(self, equations: Sequence[Equation]) -> set[int]:
        """Those, and what reads their positions up to the next floating-point values."""
        staying: set[int] = set()
        positions: set[int] = set()
        for equation in equations:
            if self._stays(equation) or any(v.index in positions for v in equation.inputs):
                staying.add(id(equation))
                positions |= {v.index for v in equation.outputs if v.index in self.unknown and not v.is_float}
        return staying

    def _boundary(self) -> list[Variable]:
        """What the generic terms read from outside their region."""
        region = [e for e in self.equations if e.outputs[0].index in self.region]
        made = {v.index for e in region for v in e.outputs}
        reads = [v for e in region for v in e.inputs] + [t.variable for t in self.generic]
        return list({v.index: v for v in reads if v.index in self.unknown and v.index not in made}.values())

    def _pin(self) -> None:
        """Data that reaches a node becomes a variable, held in place. What reaches the objective alone stays known."""
        outside = [
            e
            for e in self.equations
            if e.outputs[0].index not in self.region and all(e is not t.custom for t in self.custom)
        ]
        outside = live(outside, [v for e in outside for v in e.outputs if v.index in self.unknown])
        read = {v.index for e in outside for v in e.inputs}
        self.pinned = [v for v in self.arguments if v.is_float and v.index in read]
        self.unknown = self._dependents([*self.parameters, *self.pinned])

    pinned: Sequence[Variable] = ()

    def _fuse(self) -> Fusion:
        ends = self._boundary() + [v for t in self.custom for v in self._custom_operands(t)]
        ends += [v for v in self.fed if v.index in self.unknown]
        objective = {id(t.custom) for t in self.custom}
        inner = [e for e in self.equations if id(e) not in objective]
        self.inner = live(inner, ends)
        if self.composites:
            self.inner = with_composites(self.inner, self.unknown, ends)
        views = {v.index for e in self.inner if is_view(e, self.unknown) for v in e.outputs}
        kept = {v.index for v in ends} | {v.index for v in (*self.parameters, *self.pinned)}
        return Fusion(self.program, self.inner, self.unknown, kept - views)

    def _custom_operands(self, term: Term) -> list[Variable]:
        assert term.custom is not None
        return [v for v in term.custom.inputs if v.index in self.unknown]

    # Values, edges and nodes.

    def value(self, variable: Variable) -> int:
        if variable.index not in self.position:
            self.values.append(variable)
            self.position[variable.index] = len(self.values) - 1
        return self.position[variable.index]

    def edge(self, variable: Variable) -> int:
        """The edge that shows a variable: the views that lead to it from values."""
        equations, sources, late = self._shown(variable)
        view = View(equations, tuple(sources), (variable,))
        parameters = {p.index for p, stiff in zip(self.parameters, self.trace.stiff, strict=True) if stiff}
        only = all(v.index in parameters for v in sources)
        delayed = frozenset(self.value(v) for v in sources if v.index in late)
        self.edges.append(Edge(variable, view, tuple(self.value(v) for v in sources), len(self.nodes), only, delayed))
        return len(self.edges) - 1

    def _shown(self, variable: Variable) -> tuple[tuple[Equation, ...], list[Variable], set[int]]:
        """The views that lead to a variable, the values that they show, and which of these in a delayed way alone."""
        views = {v.index: e for e in self.fusion.equations for v in e.outputs if v.index in self.fusion.views}
        stops = self.fusion.kept - self.fusion.views
        before: list[Equation] = []
        sources: dict[int, Variable] = {}
        seen: set[tuple[int, bool]] = set()
        prompt: set[int] = set()
        stack = [(variable, False)]
        while stack:
            v, late = stack.pop()
            if (v.index, late) in seen or v.index not in self.unknown:
                continue
            seen.add((v.index, late))
            if v.index in self.delayed:
                found = self.delayed[v.index]
                made = {w.index for e in found.equations for w in e.outputs}
                before.extend(found.equations)
                reads = [w for e in found.equations for w in e.inputs if w.index not in made]
                stack.extend((w, late or w.index == found.leaving) for w in reads)
            elif v.index in views and v.index not in stops:
                before.append(views[v.index])
                stack.extend((w, late) for w in views[v.index].inputs)
            else:
                sources[v.index] = v
                if not late:
                    prompt.add(v.index)
        return _ordered(before), list(sources.values()), set(sources) - prompt

    def add(
        self,
        kind,
        operation: str,
        source: str,
        rule: AbstractRule,
        operands: Sequence[Variable],
        function: Fragment | None,
        outputs: Sequence[Variable],
        **extra,
    ) -> None:
        edges = tuple(self.edge(v) for v in operands)
        values = tuple(self.value(v) for v in outputs)
        self.nodes.append(Node(kind, operation, source, rule, function, edges, values, **extra))

    def build(self) -> Graph:
        for term in self.custom:
            self._add_custom_objective(term)
        if self.generic:
            self._add_generic_objective()
        done = 0
        while done < len(self.values):
            self._produce(self.values[done])
            done += 1
        if self.missing:
            raise UnsupportedPrimitiveError(self.missing)
        inputs = [self.position.get(v.index) for v in self.parameters]
        hard = not self.generic and all(t.custom.params["call"].hard for t in self.custom if t.custom is not None)
        return Graph(
            self.program, tuple(self.values), tuple(self.edges), tuple(self.nodes), tuple(inputs), self.largest, hard
        )

    def _add_custom_objective(self, term: Term) -> None:
        equation = term.custom
        assert equation is not None
        rule = CustomObjective(term.factors)
        operands = self._custom_operands(term)
        fragment = Fragment((equation,), tuple(operands), equation.outputs)
        unknown = tuple(v.index in self.unknown for v in equation.inputs)
        scale = term.coefficient / self.largest
        self.add(
            "objective",
            "objective",
            equation.source,
            rule,
            operands,
            fragment,
            (),
            equation=equation,
            unknown=unknown,
            scale=scale,
        )

    def _add_generic_objective(self) -> None:
        operands = self._boundary()
        equations = tuple(e for e in self.equations if e.outputs[0].index in self.region)
        fragment = Fragment(equations, tuple(operands), tuple(t.variable for t in self.generic))
        rule = GenericObjective(tuple((t.coefficient / self.largest, t.factors) for t in self.generic))
        source = equations[-1].source if equations else "the value of the loss"
        self.add("objective", "objective", source, rule, operands, fragment, ())

    def _produce(self, variable: Variable) -> None:
        """Adds the node that a value is the output of."""
        if any(variable == v for v in self.parameters):
            name = self.trace.names[self.parameters.index(variable)]
            self._add_input("parameter", name, variable)
        elif any(variable == v for v in self.pinned):
            self._add_input("data", "data", variable)
        elif variable.index not in self._produced:
            equation = self.fusion.makers[variable.index]
            self._produced.update(v.index for v in equation.outputs)
            if is_elementwise(equation) or (
                equation.name == "reduce_sum" and not isinstance(RULES.get("reduce_sum"), RegisteredRule)
            ):
                self._add_scalar(variable, equation)
            else:
                self._add_operation(equation)

    @property
    def _produced(self) -> set[int]:
        return self.__dict__.setdefault("_made", set())

    def _add_input(self, kind, name: str, variable: Variable) -> None:
        self.nodes.append(Node(kind, name, "", None, None, (), (self.value(variable),)))

    def _add_scalar(self, variable: Variable, equation: Equation) -> None:
        affine = self.fusion.affine(variable)
        root = variable
        if affine is None:
            index = self.fusion.roots[variable.index]
            root = self.fusion.variables[index]
            if index == variable.index:
                self._add_operation(equation)
                return
            affine = self.fusion.affine(root) if not self.fusion.is_leaf(root) else [AffineTerm(root, 1.0, (), ())]
            assert affine is not None
        operands = [t.variable for t in affine]
        if not all(v.is_float for v in operands):
            self._add_opened(equation)
            return
        distinct = _distinct(operands)
        before = self.fusion.between(operands, root) if root not in operands else ()
        after = self.fusion.between([root], variable) if root != variable else ()
        function = Fragment((*before, *after), tuple(distinct), (variable,))
        head, tail = Fragment(before, tuple(distinct), (root,)), Fragment(after, (root,), (variable,))
        rule = Scalar.create(tuple(affine), head, tail, self.program.static)
        name = "+".join(dict.fromkeys(e.name for e in (*before, *after))) or "identity"
        self.add("operation", name, equation.source, rule, distinct, function, (variable,))

    def _add_operation(self, equation: Equation) -> None:
        unknown = tuple(v.index in self.unknown for v in equation.inputs)
        operands = [v for v, is_unknown in zip(equation.inputs, unknown, strict=True) if is_unknown]
        if equation.name in ("cond", "scan"):  # integers and predicates stay as the forward pass has them
            unknown = tuple(u and v.is_float for u, v in zip(unknown, equation.inputs, strict=True))
            operands = [v for v, is_unknown in zip(equation.inputs, unknown, strict=True) if is_unknown]
        rule: AbstractRule | None = RULES.get(equation.name)
        if rule is None or not all(v.is_float for v in operands) or not rule.accepts(equation, unknown):
            self._add_opened(equation)
            return
        self.missing.extend(rule.missing(equation, unknown))
        fragment = _with_separate_operands(operands, equation)
        self.add(
            "operation",
            equation.name,
            equation.source,
            rule,
            operands,
            fragment,
            equation.outputs,
            equation=equation,
            unknown=unknown,
        )

    def _add_opened(self, equation: Equation) -> None:
        """A node for an equation without a rule of its own, and for what leads to it from floating-point values.

        Predicates and positions are no values of the graph: they are read through to what they are made of.
        """
        leaves: dict[int, Variable] = {}
        stack = self.fusion.inputs(equation)[::-1]
        while stack:
            v = stack.pop()
            if v.is_float and self.fusion.is_leaf(v) or v.index not in self.fusion.makers:
                leaves[v.index] = v
            else:
                stack.extend(self.fusion.inputs(self.fusion.makers[v.index])[::-1])
        operands = tuple(leaves.values())
        outputs = tuple(v for v in equation.outputs if v.is_float)
        equations = self.fusion.between(operands, *outputs)
        fragment = Fragment(equations, operands, outputs)
        rule: AbstractRule = LocalSolver()
        if any(e.name in POSITIONS for e in equations):
            rule = Selection(fragment)
        if not outputs or not all(v.is_float for v in operands) or not is_differentiable(fragment, self.program):
            flat = " and ".join(flattened_by(fragment))
            why = f"which reads what {flat} makes of unknowns" if flat else ""
            self.missing.append(Unsupported(equation.name, equation.source, why))
        name = "+".join(dict.fromkeys(e.name for e in equations if e.name not in VIEWS or e is equation))
        self.add("operation", name, equation.source, rule, operands, fragment, outputs)


def _ordered(equations: Sequence[Equation]) -> tuple[Equation, ...]:
    """Equations after those that they read from, each once."""
    makers = {v.index: e for e in equations for v in e.outputs}
    done: dict[int, Equation] = {}
    stack = [(e, False) for e in equations]
    while stack:
        equation, ready = stack.pop()
        if ready:
            done.setdefault(id(equation), equation)
        elif id(equation) not in done:
            stack.append((equation, True))
            stack.extend((makers[v.index], False) for v in equation.inputs if v.index in makers)
    return tuple(done.values())


def _distinct(variables: Sequence[Variable]) -> list[Variable]:
    return list({v.index: v for v in variables}.values())


def _with_separate_operands(operands: Sequence[Variable], equation: Equation) -> Fragment:
    """A fragment whose operands are separate slots even where one variable fills two of them (`w * w`)."""
    if len(_distinct(operands)) == len(operands):
        return Fragment((equation,), tuple(operands), equation.outputs)
    fresh = [Variable(-1 - i, v.shape, v.dtype) for i, v in enumerate(operands)]
    slots: Callable = iter(fresh).__next__
    unknown = {v.index for v in operands}
    inputs = tuple(slots() if v.index in unknown else v for v in equation.inputs)
    renamed = Equation(equation.primitive, equation.params, inputs, equation.outputs, equation.source)
    return Fragment((renamed,), tuple(fresh), equation.outputs)


def build(trace: Trace, data: str = "constant", in_order: bool = False, composites: bool = True) -> Graph:
    """Builds the factor graph of a traced loss.

    **Arguments:**

    - `trace`: the traced loss.
    - `data`: `"constant"` (data is known) or `"pinned"` (data is a variable that is held in place).
    - `in_order`: whether a recurrence is one node, which goes through time in order, or its steps are nodes.
    - `composites`: whether softmax, normalization and the like are one node each.

    **Returns:**

    A [`Graph`][], not yet two-colored.

    **Raises:** `UnsupportedPrimitiveError` naming every operation without a rule; `ValueError` where the loss does not
    depend on the model.
    """
    if data not in ("constant", "pinned"):
        raise ValueError(f'`data` must be "constant" or "pinned", got {data!r}.')
    return GraphBuilder(trace, data, in_order, composites).build()
