"""The methods that `accuracy.py` compares, each with the settings of which the best is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax
from shared import copies_for

import eqxproj


@dataclass(frozen=True)
class Setting:
    """A name, and what is passed to `eqxproj.train`; `half` trains parameters and states of bfloat16.

    `sweeps` are those of a two-color solver on each minibatch.
    """

    name: str
    options: Callable[[], Mapping[str, Any]]
    half: bool = False
    sweeps: int | None = None


def _gradient(name: str, optimizer: Callable[[float], optax.GradientTransformation], rate: float) -> Setting:
    return Setting(f"{name} {rate:g}", lambda: {"method": "gradient", "optimizer": optimizer(rate)})


def _momentum(rate: float) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def _solver(solver: Callable[[], eqxproj.AbstractSolver]) -> list[Setting]:
    """A solver from the forward pass: a steep metric and two flatter ones, and few sweeps or many."""
    found = []
    for grade, parameter in ((1e3, 1e4), (5.0, 1e4), (1.0, 1e2)):
        for sweeps in (8, 24):

            def options(grade=grade, parameter=parameter, sweeps=sweeps):
                metric = eqxproj.Metric(grade, parameter)
                copies = copies_for(solver())
                return {"solver": solver(), "metric": metric, "solver_steps": sweeps, "tau": 0.1, "copies": copies}

            name = f"grade {grade:g}, parameter {parameter:g}, {sweeps} sweeps"
            found.append(Setting(name, options, sweeps=sweeps))
    return found


METHODS: dict[str, list[Setting]] = {
    "adam": [_gradient("adam", optax.adam, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
    "momentum": [_gradient("sgd, momentum 0.9,", _momentum, rate) for rate in (0.01, 0.03, 0.1)],
    "default": [Setting("defaults of train", dict)],
    "default-raw-steps": [Setting("defaults of train, no preconditioner", lambda: {"precondition": False})],
    "default-gradient": [Setting("defaults of train, gradients", lambda: {"method": "gradient"})],
    "bfloat16": [Setting("defaults of train, bfloat16", dict, half=True)],
    "alternating": _solver(eqxproj.AlternatingProjections),
    "reflections": _solver(eqxproj.AlternatingReflections),
    "douglas-rachford": _solver(eqxproj.DouglasRachford),
    "difference-map": _solver(eqxproj.DifferenceMap),
    "relaxed": _solver(eqxproj.RelaxedReflectReflect),
    "cyclic-dr": _solver(eqxproj.CyclicDouglasRachford),
}
