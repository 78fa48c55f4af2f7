"""Splits the end of a loss into terms, each of which has a prox.

A loss is usually a sum or mean over samples of something per sample, perhaps with further terms beside it. `terms`
walks back from the scalar through additions, known factors and sums, to find $L = \\sum_k \\sum_i c_{ki} l_k(z)_i$,
where each $l_k$ is either a loss with a projection or prox of its own, or anything else. What a mean divides by ends
up in $c$, so that tau is the factor of the prox of *one sample's* loss, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ._equations import Equation, Program, Variable


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of the known `factors` times the sum over all elements of `variable`."""

    variable: Variable
    coefficient: float = 1.0
    factors: tuple[tuple[Variable, int], ...] = ()
    custom: Equation | None = None


_TRANSPARENT = ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "broadcast_in_dim")


def _scaled(term: Term, variable: Variable, other: Variable, power: int, static: Mapping[int, float]) -> Term | None:
    """The term with a known factor moved into its coefficient; `None` where an array factor has another shape."""
    if other.index in static:
        if power < 0 and static[other.index] == 0:
            return None
        return Term(variable, term.coefficient * static[other.index] ** power, term.factors)
    if other.shape not in ((), variable.shape):
        return None
    return Term(variable, term.coefficient, (*term.factors, (other, power)))


def _step(
    term: Term, equation: Equation, program: Program, unknown: frozenset[int], of_data: frozenset[int]
) -> list[Term] | None:
    """One step back from a term through the equation that made its variable; `None` where it ends there."""
    ins = equation.inputs
    name = equation.name
    has = [v.index in unknown for v in ins]
    if any(factor.shape != () for factor, _ in term.factors) and name not in ("add", "sub", "add_any", "neg", "mul"):
        return None
    if name in ("add", "add_any", "sub"):
        if term.variable.shape and any(u and v.index not in of_data for v, u in zip(ins, has, strict=True)):
            return None  # a parameter that is added to the states is part of the model
        signs = (1.0, -1.0 if name == "sub" else 1.0)
        return [Term(v, term.coefficient * s, term.factors) for v, s, u in zip(ins, signs, has, strict=True) if u]
    if name == "neg":
        return [Term(ins[0], -term.coefficient, term.factors)]
    if name == "mul" and sum(has) == 1:
        scaled = _scaled(term, ins[has.index(True)], ins[has.index(False)], 1, program.static)
        return None if scaled is None else [scaled]
    if name == "div" and has[0] and not has[1]:
        scaled = _scaled(term, ins[0], ins[1], -1, program.static)
        return None if scaled is None else [scaled]
    if name == "reduce_sum":
        return [Term(ins[0], term.coefficient, term.factors)]
    if (
        name in _TRANSPARENT
        and ins[0].is_float
        and int(np.prod(ins[0].shape)) == int(np.prod(equation.outputs[0].shape))
    ):
        return [Term(ins[0], term.coefficient, term.factors)]
    return None


def terms(
    program: Program, loss: Variable, unknown: frozenset[int], of_data: frozenset[int], custom: Sequence[str]
) -> list[Term]:
    """The terms of a loss.

    **Arguments:**

    - `program`, `loss`: the program and the variable of its scalar value.
    - `unknown`: the variables that depend on a parameter. `of_data`: those that depend on data.
    - `custom`: names of primitives that have a prox of their own.

    **Returns:**

    One [`Term`][] a summand. A summand that ends at no such primitive is cut as near to the scalar as it was added.
    """
    makers = {v.index: e for e in program.equations for v in e.outputs}
    uses: dict[int, int] = {}
    for equation in program.equations:
        for v in equation.inputs:
            uses[v.index] = uses.get(v.index, 0) + 1
    done: list[Term] = []
    queue = [Term(loss)]
    while queue:
        term = queue.pop(0)
        maker = makers.get(term.variable.index)
        if maker is not None and maker.name in custom:
            done.append(Term(term.variable, term.coefficient, term.factors, maker))
            continue
        stepped = None if maker is None else _step(term, maker, program, unknown, of_data)
        if stepped is None:
            done.append(term)
        else:
            queue.extend(stepped)
    return done
