"""The library's own rules, by the name of the primitive."""

from __future__ import annotations

from .._names import OWN_DERIVATIVE
from .._registry import RULES
from ._objective import CustomObjective
from .bilinear import Bilinear
from .branch import Branch
from .custom import Custom
from .derivative import CustomDerivative
from .maximum import Maximum
from .scan import Scan

for _name in ("dot_general", "conv_general_dilated", "mul"):
    RULES[_name] = Bilinear()
for _name in ("max", "min", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"):
    RULES[_name] = Maximum()
RULES["scan"] = Scan()
RULES["cond"] = Branch()
RULES["custom_projection"] = Custom()
for _name in OWN_DERIVATIVE:
    RULES[_name] = CustomDerivative()
RULES["custom_loss"] = CustomObjective()
