r"""Splits the end of a loss into terms, each of which has a prox.

Transforms the scalar of a loss into $L = \sum_k \sum_i c_{ki} l_k(z)_i$. Limits: it walks back through additions, known
factors, sums and changes of shape; what is none of these stays whole.

Each $l_k$ is either a loss with a projection or prox of its own, or anything else. What a mean over samples divides by
ends up in $c$, so that tau is the factor of the prox of *one sample's* loss, whatever the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ._affine import affine_terms
from ._equations import Equation, Program, Variable


@dataclass(frozen=True)
class Term:
    """`coefficient` times the product of the known `factors` times the sum over all elements of `variable`."""

    variable: Variable
    coefficient: float = 1.0
    factors: tuple[tuple[Variable, int], ...] = ()
    custom: Equation | None = None  # of a loss with a prox of its own, if the term ends at one


_SAME_SUM = ("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim")
"""Operations whose output has the same sum over all elements as their operand, if it is of the same size."""

_ELEMENT_BY_ELEMENT = ("add", "sub", "add_any", "neg", "mul")
"""What a term with an array among its factors may step through."""


def _step(
    term: Term, equation: Equation, program: Program, unknown: frozenset[int], of_data: frozenset[int]
) -> list[Term] | None:
    """One step back from a term through the equation that made its variable; `None` where it ends there."""
    name, inputs, size = equation.name, equation.inputs, math.prod(term.variable.shape)
    if any(factor.shape != () for factor, _ in term.factors) and name not in _ELEMENT_BY_ELEMENT:
        return None
    if name == "reduce_sum" or (name in _SAME_SUM and math.prod(inputs[0].shape) == size):
        return [Term(inputs[0], term.coefficient, term.factors)]
    if name in ("add", "add_any", "sub") and term.variable.shape:
        if any(v.index in unknown and v.index not in of_data for v in inputs):
            return None  # a parameter that is added to the states is part of the model
    found = affine_terms(equation, unknown, program.static)
    scale, factors = term.coefficient, term.factors
    return None if found is None else [Term(t.variable, scale * t.scale, factors + t.factors) for t in found]


def terms(
    program: Program, loss: Variable, unknown: frozenset[int], of_data: frozenset[int], custom: Sequence[str]
) -> list[Term]:
    """The terms of a loss, the scalar of a program.

    `unknown` and `of_data` are the variables that depend on a parameter or on data, and `custom` names the primitives
    that have a prox of their own. A term that ends at none of them is cut as near to the scalar as it was added.
    """
    makers = {v.index: e for e in program.equations for v in e.outputs}
    done: list[Term] = []
    queue = [Term(loss)]
    while queue:
        term = queue.pop(0)
        maker = makers.get(term.variable.index)
        if maker is not None and maker.name in custom:
            stepped, term = None, replace(term, custom=maker)
        else:
            stepped = None if maker is None else _step(term, maker, program, unknown, of_data)
        if stepped is None:
            done.append(term)
        else:
            queue.extend(stepped)
    return done
