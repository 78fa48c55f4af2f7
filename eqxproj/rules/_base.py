r"""What every rule is: two answers of one operation $y = f(x_1, \dots, x_n)$, both in duals.

A dual is a weight times a wanted change. A rule receives the operands $x$ and the dual $\mu = \kappa r$ of each output,
where $\kappa$ is the output's weight and $r$ the wanted change. It answers with the duals $\nu_i = w_i (x'_i - x_i)$ of
the operands, in one of two regimes:

- `pullback`, the gradient regime: $\nu = J^T \mu$. Where $f$ has no slope, a slope of its own choice takes the place of
  $J$. Weights play no part.
- `project`, the projection regime: $x'$ solves
  $\min_{x'} \sum_i w_i |x'_i - x_i|^2 + \kappa |f(x') - (f(x) + r)|^2$.

The projector chooses the regime, moves the operands and evaluates the outputs. Limits: one weight an operand. Weights
are clamped to what float32 holds (`_metric.py`); `ratio(i)`, $\kappa / w_i$, is exact.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._errors import Unsupported
from .._metric import Metric, clamped, clamped_output, ratio
from .._program._equations import Equation

Scale = float | Array | np.ndarray
"""A weight: one number, or one an element."""
EXACT = 1e-4
"""What may be left of an equation that is solved by iteration, as a part of its right side."""
SOLVING = "highest"
"""The precision of the products with which equations are solved, whatever that of the user's own products is."""
Noise = Literal["unreached", "everywhere", "never"]
"""Where operations with jumps answer under noise: where no gradient reaches, wherever they are, or nowhere."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a rule may know of its node.

    - `function`: the operation, from the unknown operands to a list of outputs.
    - `known`: values of the program's known variables.
    - `equation`: the equation of an operation that is one primitive, else `None`.
    - `unknown`: for each operand of `equation`, whether it is unknown.
    - `read`: for each output of `equation`, whether it is one of the node; see `AbstractRule.answers_for_some`.
    - `weights`: weight of each unknown operand, clamped. `output_weights`: weight of each output, clamped. Numbers of
        Python, but for outputs whose elements weigh differently, and for a user's rule in the gradient regime.
    - `log_weights`: logarithms of the operands' weights, not clamped.
    - `ratios`: `ratios[o][i]` is the weight of output o over the weight of operand i, exact.
    - `copies`: `"neuron"` or `"none"`. `store_copies`: the operands hold one entry a copy.
    - `is_parameter`: for each unknown operand, whether it shows a parameter and nothing else.
    - `scale`: for an objective, the factor of the loss in its prox.
    - `metric`: of the problem, for rules that make a problem of their own.
    - `unit`: what divides a dual to give it the size of a gradient of the loss.
    - `residuals_hold`: whether the operands are those of the forward pass, so that its residuals can be used.
    - `noise`: for a pullback, whether jumps answer under noise; with `"never"` by the derivative, as JAX defines it.
    - `reached`: for each output, whether its dual is a gradient. A node that is a program needs it.
    - `prepared`: what the rule's `prepare` returned.
    - `accuracy`: of projections that are found by iteration, what may be left of their equations.
    """

    function: Callable[..., list[Array]]
    known: Mapping[int, Any]
    equation: Equation | None
    unknown: tuple[bool, ...]
    read: tuple[bool, ...] = ()
    weights: tuple[Any, ...] = ()
    log_weights: tuple[Any, ...] = ()
    output_weights: tuple[Scale, ...] = ()
    ratios: tuple[tuple[Scale, ...], ...] = ()
    copies: str = "neuron"
    store_copies: bool = False
    is_parameter: tuple[bool, ...] = ()
    scale: float = 1.0
    metric: Metric = Metric()
    unit: float = 1.0
    residuals_hold: bool = False
    noise: Noise = "everywhere"
    reached: tuple[bool, ...] = ()
    prepared: Any = None
    accuracy: float = EXACT

    @classmethod
    def plain(cls, unknown: Sequence[bool] = ()) -> Context:
        """A context that says nothing, to find out what a rule needs without projecting anything."""
        return cls(lambda *values: list(values), {}, None, tuple(unknown))

    def reweighted(
        self, log_weights: Sequence[float], log_output_weights: Sequence[float], copy_counts: Sequence[Scale] = ()
    ) -> Context:
        """The context with other weights.

        **Arguments:**

        - `log_weights`, `log_output_weights`: logarithms of the weights of the unknown operands and of the outputs.
        - `copy_counts`: for each output how many copies of its elements its consumers own, one by default. They
            multiply its weight.
        """
        counts = tuple(copy_counts) or (1.0,) * len(log_output_weights)
        outputs = tuple(zip(counts, log_output_weights, strict=True))
        return replace(
            self,
            weights=tuple(clamped(w) for w in log_weights),
            log_weights=tuple(log_weights),
            output_weights=tuple(n * clamped_output(k) for n, k in outputs),
            ratios=tuple(tuple(n * ratio(k, w) for w in log_weights) for n, k in outputs),
        )

    @property
    def kappa(self) -> tuple[Scale, ...]:
        r"""`output_weights`, by their symbol $\kappa$ in the formulas."""
        return self.output_weights

    def ratio(self, operand: int, output: int = 0) -> Scale:
        r"""$\kappa / w_i$."""
        return self.ratios[output][operand]

    def relative(self, i: int, j: int) -> float:
        """$w_i / w_j$, clamped to [1e-30, 1e30]."""
        return math.exp(min(max(float(self.log_weights[i] - self.log_weights[j]), -69.0), 69.0))

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the primitive."""
        return {} if self.equation is None else self.equation.params

    def operands(self, unknown: Sequence[Array]) -> list[Array]:
        """All operands of the primitive, the known ones looked up."""
        assert self.equation is not None
        values = iter(unknown)
        return [
            next(values) if is_unknown else self.known[v.index]
            for v, is_unknown in zip(self.equation.inputs, self.unknown, strict=True)
        ]


class Projected(NamedTuple):
    """The answer of a rule that says where the outputs go, as one that owns several copies without holding them must.

    - `input_duals`: for each operand the sum of its copies' duals.
    - `output_moves`: how far each output moves. It cannot be evaluated at the operands where each of its elements was
        reached with copies of its own.
    """

    input_duals: Sequence[Array]
    output_moves: Sequence[Array]


class AbstractRule(abc.ABC):
    """A projection rule. Rules are stateless: what they need to know is in the context."""

    label: ClassVar[str]
    takes_precedence: ClassVar[bool] = False
    """Whether the rule is asked before the operation is fused with others or made part of the objective."""
    answers_for_some: ClassVar[bool] = False
    """Whether the node has, of the outputs of its equation, only the floats that others read: those that `ctx.read`
    marks. No dual of zeros takes the place of what nothing is wanted of: a derivative may be infinite there."""
    wants_concurrence: ClassVar[bool] = False
    """Whether solvers find solutions where all operations have one color, and what makes copies equal the other."""

    @property
    def is_discontinuous(self) -> bool:
        """Whether the output may jump where an operand hardly moves."""
        return False

    @property
    def has_slope(self) -> bool | None:
        """Whether there is a derivative by every operand (by none, if not); `None` where JAX is to be asked."""
        return None

    def of(self, equation: Equation, unknown: Sequence[bool]) -> AbstractRule:
        """The rule of one equation: itself, unless it has to know something of it."""
        return self

    @abc.abstractmethod
    def pullback(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> Sequence[Array]:
        r"""The gradient regime: the duals of the operands, $J^T \mu$.

        **Arguments:**

        - `ctx`: the node.
        - `inputs`: the unknown operands, of any shapes.
        - `duals`: the dual of each output, shaped like it.

        **Returns:**

        One dual an operand, shaped like it.
        """

    @abc.abstractmethod
    def project(self, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> Sequence[Array] | Projected:
        r"""The projection regime: the duals $w_i (x'_i - x_i)$ of the nearest point of the operation's graph.

        **Arguments:**

        - `ctx`: the node, with its weights.
        - `inputs`: the unknown operands, of any shapes.
        - `duals`: weight times wanted change of each output, shaped like it.

        **Returns:**

        One dual an operand, shaped like it; as [`Projected`][] where the outputs do not follow from them.
        """

    def accepts(self, equation: Equation, unknown: Sequence[bool]) -> bool:
        """Whether the rule can project onto this equation with these operands unknown."""
        return True

    def missing(self, equation: Equation, unknown: Sequence[bool]) -> Sequence[Unsupported]:
        """What has no rule inside of an operation that is a program of its own."""
        return ()

    def describe(self, equation: Equation | None) -> str:
        """What `explain()` prints in the column of the rule."""
        return self.label

    def prepare(self, ctx: Context, inputs: Sequence[Array]) -> Any:
        """What projections need of known values, or of the operands on the forward pass, as arrays.

        It is computed once, and then in `ctx`.
        """
        return None

    def evaluate(self, ctx: Context, inputs: Sequence[Array]) -> list[Array]:
        """The function of these operands, which hold one entry a copy where the context says so."""
        return ctx.function(*inputs)

    def expand(self, ctx: Context, operand: int, value: Array) -> Array:
        """The copies that the node owns of an operand: a linear map, the identity unless a rule owns several."""
        return value

    def gathered(self, ctx: Context, copies: Sequence[Array], outputs: Sequence[Array]) -> Array:
        """What is given for each copy of the operands and for each output, added up for each constraint of the node.

        A node is one constraint, unless its rule says that it is many.
        """
        return sum((x.sum() for x in (*copies, *outputs)), start=jnp.asarray(0.0))

    def gathered_alike(
        self, ctx: Context, operand: int, value: Array, copies: Sequence[Array], outputs: Sequence[Array]
    ) -> Array:
        """What `gathered` makes of the copies of one operand where these hold the same values, and of zeros elsewhere.

        A rule that owns many copies can say so without them. `copies` and `outputs` are zeros.
        """
        alone = [self.expand(ctx, i, value) if i == operand else x for i, x in enumerate(copies)]
        return self.gathered(ctx, alone, outputs)

    def copy_counts(
        self, equation: Equation | None, unknown: Sequence[bool], operand: int, copies: str
    ) -> float | np.ndarray:
        """How many copies the node owns of each element of its unknown operand number `operand`."""
        return 1.0

    def known_variables(self) -> Sequence[int]:
        """The numbers of known variables that the rule reads beside those of the node's function."""
        return ()


def transposed(rule: AbstractRule, ctx: Context, inputs: Sequence[Array], duals: Sequence[Array]) -> list[Array]:
    r"""$J^T \mu$ of the operation itself: the pullback of what has a derivative.

    A derivative may hold thresholds in units of the loss: a gradient that is clipped, the tolerance of a linear solver.
    """
    outputs, back = jax.vjp(lambda *values: rule.evaluate(ctx, values), *inputs)
    pulled = back([step(ctx.unit, mu).astype(y.dtype) for mu, y in zip(duals, outputs, strict=True)])
    return [in_duals(ctx.unit, x) for x in pulled]


def step(weight: Scale, dual: Array) -> Array:
    """The displacement that belongs to a dual. Weights are beyond what float16 holds."""
    wide = jnp.promote_types(dual.dtype, jnp.float32)
    return (dual.astype(wide) / jnp.asarray(weight, wide)).astype(dual.dtype)


def in_duals(weight: Scale, change: Array) -> Array:
    """The dual that belongs to a displacement, as `step` takes it back."""
    wide = jnp.promote_types(change.dtype, jnp.float32)
    return (change.astype(wide) * jnp.asarray(weight, wide)).astype(change.dtype)


def as_duals(answer: Sequence[Array] | Projected) -> list[Array]:
    """The duals of the operands in a rule's answer."""
    return list(answer.input_duals if isinstance(answer, Projected) else answer)


def outputs_after(
    rule: AbstractRule,
    ctx: Context,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    answer: Sequence[Array] | Projected,
) -> list[Array]:
    """The outputs after the operands have moved by a rule's answer.

    Where the answer does not say, the function is evaluated at the moved operands. Of copies that are not stored the
    dual is a sum, and their mean moves.

    **Arguments:**

    - `rule`, `ctx`, `inputs`: the rule, and what it was given.
    - `outputs`: the function of `inputs`.
    - `answer`: what the rule returned.
    """
    if isinstance(answer, Projected):
        return [y + move.astype(y.dtype) for y, move in zip(outputs, answer.output_moves, strict=True)]
    moved = []
    for i, (x, nu) in enumerate(zip(inputs, answer, strict=True)):
        count = 1.0 if ctx.store_copies else rule.copy_counts(ctx.equation, ctx.unknown, i, ctx.copies)
        moved.append(x + step(ctx.weights[i] * np.maximum(count, 1.0), nu).astype(x.dtype))
    return rule.evaluate(ctx, moved)
