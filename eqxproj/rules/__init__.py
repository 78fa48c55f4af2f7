"""Projection rules, one for each operation: what a rule is, what it may know of its node, and how to register one.

A rule answers for one node of the graph alone, in duals (weight times change): `pullback` in the gradient regime,
`project` in the projection regime. Limits: a rule keeps no state between calls, and does not see the rest of the graph.
"""

from ._base import AbstractRule as AbstractRule
from ._base import Context as Context
from ._base import Projected as Projected
from ._registry import register_projection as register_projection
