"""Projection rules, one for each operation: what a rule is, what it may know of its node, and how to register one.

A rule answers for one node of the graph alone, in duals (weight times change): `pullback` in the gradient regime,
`project` in the projection regime. Limits: a rule keeps no state between calls, and does not see the rest of the graph.
"""

from ._base import AbstractRule as AbstractRule
from ._base import Context as Context
from ._base import Projected as Projected
from ._base import as_duals as as_duals
from ._base import outputs_after as outputs_after
from ._base import step as step
from ._base import transposed as transposed
from ._bilinear import Bilinear as Bilinear
from ._custom import Custom as Custom
from ._derivative import CustomDerivative as CustomDerivative
from ._local import LocalSolver as LocalSolver
from ._local import nearest_locally as nearest_locally
from ._loss import CustomObjective as CustomObjective
from ._loss import GenericObjective as GenericObjective
from ._maximum import Maximum as Maximum
from ._registry import RULES as RULES
from ._registry import register_projection as register_projection
from ._registry import registry_version as registry_version
from ._registry import unregister_projection as unregister_projection
from ._scalar import Scalar as Scalar
from ._selection import Selection as Selection
