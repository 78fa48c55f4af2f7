"""The methods that `accuracy.py` compares, each with the settings among which it chooses.

Methods of gradients differ in the optimizer alone. `adam` and `momentum` have a constant rate. With `adam-cosine` and
`muon`, the rate rises in a straight line to its peak, and falls to a hundredth of that with a cosine.
`muon` needs optax 0.2.6 or later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

import eqxproj

Optimizer = Callable[[float, int], optax.GradientTransformation]
"""A function of a rate and the number of steps."""


@dataclass(frozen=True)
class Setting:
    """One way to train.

    - `name`: what the table calls it.
    - `options`: a function of the number of steps; what it returns is passed to `eqxproj.train`.
    - `half`: train parameters and states of bfloat16.
    - `sweeps`: how many a two-color solver makes on each minibatch; `None` for all other methods.
    """

    name: str
    options: Callable[[int], Mapping[str, Any]]
    half: bool = False
    sweeps: int | None = None


def _gradient(name: str, optimizer: Optimizer, rate: float) -> Setting:
    return Setting(f"{name} {rate:g}", lambda steps: {"method": "gradient", "optimizer": optimizer(rate, steps)})


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(rate)


def _momentum(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def _schedule(peak: float, steps: int) -> optax.Schedule:
    """A rate that rises over the first twentieth of the steps, 100 at most, and then falls with a cosine."""
    return optax.warmup_cosine_decay_schedule(0.1 * peak, peak, min(100, steps // 20), steps, 0.01 * peak)


def _adam_cosine(peak: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(_schedule(peak, steps))


_ADAM_PEAK = 3e-3  # of what Muon leaves to Adam: the peak that `train` takes by default


def _muon(peak: float, steps: int) -> optax.GradientTransformation:
    """Muon (K. Jordan, 2024) on matrices and the kernels of convolutions, Adam on all else, both on one schedule."""
    return muon(
        _schedule(peak, steps),
        adam_learning_rate=_schedule(_ADAM_PEAK, steps),
        muon_weight_dimension_numbers=_as_matrices,
    )


def _as_matrices(parameters: Any) -> Any:
    """How Muon reads each parameter as a matrix, or `None` where Adam takes it.

    Equinox has the outputs of a layer on the first axis; a kernel sums over all others. A bias has no such axis, or
    others of length one.
    """

    def numbers(parameter):
        if parameter.ndim == 0 or parameter.size == parameter.shape[0]:
            return None
        return MuonDimensionNumbers(reduction_axis=tuple(range(1, parameter.ndim)), output_axis=0)

    return jax.tree.map(numbers, parameters)


def _solver(solver: Callable[[], eqxproj.AbstractSolver]) -> list[Setting]:
    """A solver in the projection regime, with few sweeps or many; all else follows from it."""

    def setting(sweeps: int) -> Setting:
        return Setting(f"{sweeps} sweeps", lambda steps: {"solver": solver(), "solver_steps": sweeps}, sweeps=sweeps)

    return [setting(8), setting(24)]


def _alternating() -> list[Setting]:
    """Alternating projections in both regimes: of the two-color solvers it is the one that has a gradient regime."""

    def setting(sweeps: int) -> Setting:
        metric = eqxproj.Metric(1e3, 1e4)
        options = {"metric": metric, "solver_steps": sweeps, "tau": 0.1, "copies": "neuron"}
        name = f"gradient regime, {sweeps} sweeps"
        return Setting(name, lambda steps: {"solver": eqxproj.AlternatingProjections(), **options}, sweeps=sweeps)

    return [*_solver(eqxproj.AlternatingProjections), setting(8), setting(24)]


METHODS: dict[str, list[Setting]] = {
    "adam": [_gradient("adam", _adam, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
    "adam-cosine": [_gradient("adam, cosine, peak", _adam_cosine, rate) for rate in (1e-3, 3e-3, 1e-2)],
    "adam-cosine-wide": [
        _gradient("adam, cosine, peak", _adam_cosine, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    ],
    "muon": [_gradient("muon, cosine, peak", _muon, rate) for rate in (3e-3, 1e-2, 3e-2)],
    "muon-wide": [_gradient("muon, cosine, peak", _muon, rate) for rate in (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)],
    "momentum": [_gradient("sgd, momentum 0.9,", _momentum, rate) for rate in (0.01, 0.03, 0.1)],
    "default": [Setting("defaults of train", lambda steps: {})],
    "default-raw-steps": [Setting("defaults of train, no preconditioner", lambda steps: {"precondition": False})],
    "default-gradient": [Setting("defaults of train, gradients", lambda steps: {"method": "gradient"})],
    "bfloat16": [Setting("defaults of train, bfloat16", lambda steps: {}, half=True)],
    "alternating": _alternating(),
    "reflections": _solver(eqxproj.AlternatingReflections),
    "douglas-rachford": _solver(eqxproj.DouglasRachford),
    "difference-map": _solver(eqxproj.DifferenceMap),
    "relaxed": _solver(eqxproj.RelaxedReflectReflect),
    "cyclic-dr": _solver(eqxproj.CyclicDouglasRachford),
}
