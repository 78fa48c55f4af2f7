r"""Solvers that project onto all nodes of one color at once: sets A (with the objective in it) and B; $R = 2P - I$.

Limits: in the gradient regime, and where the graph branches, as in recurrences, alternating reflections,
Douglas-Rachford and the difference map would let their duals grow from step to step: they refuse.

Sources: section 3 of arXiv 2506.05878; Elser, "Learning without loss" (2021).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array

from .._errors import as_number, described
from .._problem._gains import check_gains, reweighted, unit_gains
from .._problem._problem import FeasibilityProblem
from .._problem._state import State, combine
from ._base import (
    AbstractCopyingSolver,
    AbstractGapSolver,
    AbstractSolver,
    check_has_projections,
    check_number,
    onto,
    reflect,
)

_A, _B = 0, 1


class AlternatingProjections(AbstractSolver):
    r"""$x \leftarrow P_B P_A x$. Returns to consensus before each projection, so that no copies are stored."""

    store_copies: ClassVar[bool] = False
    needs_two_colors: ClassVar[bool] = True

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        return onto(problem, onto(problem, state, _A), _B)


class AlternatingReflections(AbstractCopyingSolver):
    r"""$x \leftarrow R_B R_A x$.

    It need not converge, even for convex sets: reflections never move points apart, nor need they bring them together.
    Take Douglas-Rachford, which goes half of each step, where an end is to be reached.
    """

    @property
    def gap_scale(self) -> float:
        return 2.0

    def check(self, problem: FeasibilityProblem) -> None:
        check_has_projections(problem, self)

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        return reflect(problem, reflect(problem, state, _A), _B)


class DouglasRachford(AbstractGapSolver):
    r"""$x \leftarrow (1-\ell) x + \ell R_B R_A x$.

    **Arguments:**

    - `relaxation`: $\ell$ in (0, 1]; one half is the Douglas-Rachford algorithm proper.
    """

    relaxation: float = eqx.field(static=True)

    def __init__(self, relaxation: float = 0.5):
        self.relaxation = check_number("relaxation", relaxation, 0.0, 1.0)

    @property
    def gap_scale(self) -> float:
        return 2.0 * self.relaxation

    def check(self, problem: FeasibilityProblem) -> None:
        check_has_projections(problem, self)

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        reflected = reflect(problem, reflect(problem, state, _A), _B)
        return combine((1.0 - self.relaxation, self.relaxation), (state, reflected))

    def solution(self, problem: FeasibilityProblem, state: State) -> State:
        return onto(problem, state, _A)


class DifferenceMap(AbstractGapSolver):
    r"""$x \leftarrow x + \beta (P_A f_B x - P_B f_A x)$; for $\beta = 1$, $x + P_A(2P_B x - x) - P_B x$.

    Here $f_A = (1-1/\beta)P_A + I/\beta$ and $f_B = (1+1/\beta)P_B - I/\beta$.

    **Arguments:**

    - `beta`: in (0, 2].
    """

    beta: float = eqx.field(static=True)

    def __init__(self, beta: float = 1.0):
        self.beta = check_number("beta", beta, 0.0, 2.0)

    @property
    def gap_scale(self) -> float:
        return self.beta

    def check(self, problem: FeasibilityProblem) -> None:
        check_has_projections(problem, self)

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        beta = self.beta
        on_b = onto(problem, state, _B)
        if beta == 1.0:
            first = onto(problem, combine((2.0, -1.0), (on_b, state)), _A)
            return combine((1.0, 1.0, -1.0), (state, first, on_b))
        f_b = combine((1.0 + 1.0 / beta, -1.0 / beta), (on_b, state))
        return combine((1.0, beta, -beta), (state, onto(problem, f_b, _A), self.solution(problem, state)))

    def solution(self, problem: FeasibilityProblem, state: State) -> State:
        r"""$P_B f_A x$, where $f_A = I$ for $\beta = 1$."""
        if self.beta != 1.0:
            weights = (1.0 - 1.0 / self.beta, 1.0 / self.beta)
            state = combine(weights, (onto(problem, state, _A), state))
        return onto(problem, state, _B)


class RelaxedReflectReflect(AbstractGapSolver):
    r"""$x \leftarrow x + \beta (P_B(2P_A x - x) - P_A x)$.

    **Arguments:**

    - `beta`: in (0, 2].
    - `reweight`: $\rho$. After every iteration the weight of each constraint's copies moves by
        $g \leftarrow g + \rho\,(\mathrm{gap}^2 / \overline{\mathrm{gap}^2} - g)$: where the two projections are
        far apart, constraints stiffen. Small: of the order of one over the number of
        iterations. Zero keeps all weights.
        It needs the unit metric, and a problem with `concurrence=True`.
    """

    beta: float = eqx.field(static=True)
    reweight: float = eqx.field(static=True)

    def __init__(self, beta: float = 0.5, reweight: float = 0.0):
        self.beta = check_number("beta", beta, 0.0, 2.0)
        number = as_number(reweight)
        if number is None or not 0 <= number < 1:
            raise ValueError(f"`reweight` must be a number in [0, 1), got {described(reweight)}.")
        self.reweight = number

    @property
    def gap_scale(self) -> float:
        return self.beta

    def check(self, problem: FeasibilityProblem) -> None:
        if self.reweight:
            check_gains(problem, "reweight")

    def init(self, problem: FeasibilityProblem, key: Array | None = None) -> State:
        state = super().init(problem, key)
        return replace(state, gains=unit_gains(problem)) if self.reweight else state

    def step(self, problem: FeasibilityProblem, state: State) -> State:
        on_a = onto(problem, state, _A)
        on_b = onto(problem, combine((2.0, -1.0), (on_a, state)), _B)
        new = combine((1.0, self.beta, -self.beta), (state, on_b, on_a))
        return reweighted(problem, new, on_a, on_b, self.reweight) if self.reweight else new

    def solution(self, problem: FeasibilityProblem, state: State) -> State:
        return onto(problem, state, _A)
