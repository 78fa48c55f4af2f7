"""Projection rules, one for each operation: what a rule is, what it may know of its node, and how to register one.

A rule answers for one node of the graph alone: it maps the node's inputs, and the changes wanted of its outputs, to
changes of the inputs. Limits: a rule keeps no state between calls, and does not see the rest of the graph.
"""

from ._base import AbstractRule as AbstractRule
from ._base import Context as Context
from ._registry import register_projection as register_projection
