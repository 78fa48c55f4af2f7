"""The library's own rules, by the name of the primitive. The package's `__init__` registers them."""

from __future__ import annotations

from collections.abc import Mapping

from .._program._primitives import OWN_DERIVATIVE
from ..rules._base import AbstractRule
from ..rules._bilinear import Bilinear
from ..rules._custom import Custom
from ..rules._derivative import CustomDerivative
from ..rules._loss import CustomObjective
from ..rules._maximum import Maximum
from ..rules._threshold import ThresholdNeuron
from ._branch import Branch
from ._scan import Scan

BUILTIN: Mapping[str, AbstractRule] = {
    **dict.fromkeys(("dot_general", "conv_general_dilated", "mul"), Bilinear()),
    **dict.fromkeys(("max", "min", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"), Maximum()),
    **dict.fromkeys(OWN_DERIVATIVE, CustomDerivative()),
    "threshold_neuron": ThresholdNeuron(),
    "scan": Scan(),
    "cond": Branch(),
    "custom_projection": Custom(),
    "custom_loss": CustomObjective(),
}
