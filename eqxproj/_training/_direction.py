"""Directions: from a model and a minibatch to the value of the loss, and to the array tree that the optimizer follows.

A direction is a displacement or, for comparison, a gradient. Each kind also checks a loss before training, and names
the node at which a step went wrong. Limits: everything here is traced inside the jitted step, except for the checks.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._graph._build import check_dependence
from .._numerics._promotion import with_own_promotion
from .._problem._make import Labels, check_labels, feasibility_problem, labels_of
from .._problem._problem import FeasibilityProblem
from .._problem._state import State
from .._program._compiled import jitted
from .._program._trace import trace
from ..rules._registry import registry_version
from ..solvers._iterate import finite_nodes, first_bad
from ._displacement import DEFAULT_TAU, Options, displacement_of
from ._persistence import Left, left_by, taken_up
from ._preconditioner import Preconditioner, preconditioner
from ._regime import warn_of_few


class Direction(NamedTuple):
    """What a minibatch says.

    The loss, where it points, the coordinates of the step (`None` for the plain ones), the auxiliary output, and what
    the solver leaves at the minibatch, if it is to go on from there.
    """

    value: Float[Array, ""]
    moved: PyTree
    coordinates: Preconditioner | None
    auxiliary: PyTree
    left: Left | None = None


class Here(NamedTuple):
    """What a solver finds at a minibatch: what it left there, and whether it has not been there yet."""

    left: Left
    is_first: Bool[Array, ""]


class AbstractDirection(eqx.Module):
    """How a step of training gets its direction."""

    name: eqx.AbstractClassVar[str]
    loss: eqx.AbstractVar[Callable[..., Any]]
    has_aux: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> Direction:
        """The direction on a minibatch; `key` goes to a loss that takes one.

        `here` is what a solver finds at the minibatch, where it goes on from what it has left there.
        """

    @abc.abstractmethod
    def first_value(self, model: PyTree, batch: Sequence[PyTree], data: Sequence[PyTree]) -> Float[Array, ""]:
        """The loss on some samples of the data, for a check before training.

        **Raises:** `ValueError` for a loss that cannot be trained; `UnsupportedPrimitiveError` for operations without a
        rule.
        """

    @abc.abstractmethod
    def failing_node(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> str:
        """Where a step that gives NaN or infinity goes wrong, found by taking it again."""


class Gradient(AbstractDirection):
    """The gradient of the loss."""

    name: ClassVar[str] = "gradient"
    loss: Callable[..., Any]
    has_aux: bool

    def __call__(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> Direction:
        function = eqx.filter_value_and_grad(self.loss, has_aux=self.has_aux)
        value, moved = function(model, *batch, **key_argument(self.loss, key))
        value, auxiliary = value if self.has_aux else (value, None)
        return Direction(value, moved, None, auxiliary)

    def first_value(self, model: PyTree, batch: Sequence[PyTree], data: Sequence[PyTree]) -> Float[Array, ""]:
        return jitted(_CheckedValue(self.loss, self.has_aux))(model, batch)

    def failing_node(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> str:
        return "the gradient"


class Displacement(AbstractDirection):
    """The displacement of the loss by a solver, with the coordinates of the layers' inputs where they are asked for.

    - `options`: of the displacement.
    - `fixed`: positions of the parameters that are no biases of the coordinates; `None` for plain coordinates.
    """

    name: ClassVar[str] = "projection"
    loss: Callable[..., Any]
    has_aux: bool
    options: Options
    fixed: frozenset[int] | None

    def __call__(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> Direction:
        problem = self._problem(model, batch, key)
        state, left = self._state(problem, here)
        coordinates = None if self.fixed is None else preconditioner(problem, self.fixed)
        moved = displacement_of(problem, state, self.options.raw)
        return Direction(problem.value, moved, coordinates, problem.auxiliary, left)

    def left_at_first(self, model: PyTree, batch: Sequence[PyTree], key: Array) -> Left:
        """What is found at a minibatch before the first visit: the forward pass."""
        problem = self._problem(model, batch, key)
        return left_by(problem, self.options.start(problem))

    @with_own_promotion
    def _state(self, problem: FeasibilityProblem, here: Here | None) -> tuple[State, Left | None]:
        """The state whose parameters are read, and what of it stays at the minibatch."""
        if here is None:
            return self.options.state(problem), None
        state = self.options.moved(problem, taken_up(self.options.start(problem), *here))
        return self.options.solver.settled(problem, state), left_by(problem, state)

    def first_value(self, model: PyTree, batch: Sequence[PyTree], data: Sequence[PyTree]) -> Float[Array, ""]:
        first = _FirstValue(self.loss, self.has_aux, self.options)
        value, labels = jitted(first, registry_version())(model, batch)
        check_labels(labels, data)
        return value

    def failing_node(self, model: PyTree, batch: Sequence[PyTree], key: Array, here: Here | None = None) -> str:
        problem = self._problem(model, batch, key)
        started = jax.device_get(finite_nodes(problem, problem.start(False)))
        on_the_way = [i for i in problem.graph.forward_order if not started[i]]
        if on_the_way or not bool(jnp.isfinite(problem.value)):
            return problem.describe([*on_the_way, problem.graph.objectives[0]][0])
        state, _ = self._state(problem, here)
        bad = first_bad(problem, jax.device_get(finite_nodes(problem, state)))
        return "the optimizer's update" if bad is None else problem.describe(bad)

    def _problem(self, model: PyTree, batch: Sequence[PyTree], key: Array) -> FeasibilityProblem:
        return self.options.problem(trace(self.loss, model, batch, key_argument(self.loss, key), has_aux=self.has_aux))


def takes_key(loss: Callable[..., Any]) -> bool:
    """Whether a loss has an argument named `key`."""
    try:
        return "key" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


def key_argument(loss: Callable[..., Any], key: Any) -> dict[str, Any]:
    """The keyword arguments that give a loss its key, if it takes one."""
    return {"key": key} if takes_key(loss) else {}


class ValueAlone(eqx.Module):
    """The loss as a function to evaluate, without its auxiliary output, and with always the same key."""

    loss: Callable[..., Any]
    has_aux: bool = eqx.field(static=True)

    def __call__(self, model: PyTree, *args: Any) -> Any:
        out = self.loss(model, *args, **key_argument(self.loss, jax.random.key(0)))
        return out[0] if self.has_aux else out


class _CheckedValue(eqx.Module):
    """The value of a loss, which is checked while it is traced."""

    loss: Callable[..., Any]
    has_aux: bool = eqx.field(static=True)

    def __call__(self, model: PyTree, batch: Sequence[PyTree]) -> Array:
        check_dependence(
            trace(self.loss, model, batch, key_argument(self.loss, jax.random.key(0)), has_aux=self.has_aux)
        )
        return jnp.asarray(ValueAlone(self.loss, self.has_aux)(model, *batch))


class _FirstValue(eqx.Module):
    """The value of a loss, and the labels that are to be checked; its problem is made while it is traced."""

    loss: Callable[..., Any]
    has_aux: bool = eqx.field(static=True)
    options: Options = eqx.field(static=True)

    def __call__(self, model: PyTree, batch: Sequence[PyTree]) -> tuple[Array, list[Labels]]:
        problem = feasibility_problem(
            self.loss,
            model,
            *batch,
            copies=self.options.copies,
            metric=self.options.metric,
            tau=DEFAULT_TAU if self.options.tau is None else self.options.tau,
            noise=self.options.noise,
            has_aux=self.has_aux,
            kwargs=key_argument(self.loss, jax.random.key(0)),
        )
        if self.options.steps is not None and not self.options.persists:
            warn_of_few(problem, self.options.solver, self.options.steps)
        return problem.value, labels_of(problem)
