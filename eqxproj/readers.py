"""Functions that read a problem's state: for solvers, measures and tests of rules of one's own.

Each takes a problem and mostly a state, and returns an array, or for `context` what a rule may know of its node.
"""

from ._problem._measures import change as change
from ._problem._measures import violation as violation
from ._problem._readers import context as context
from ._problem._readers import moved_by as moved_by
from ._problem._readers import operand as operand
from ._problem._readers import output_weight as output_weight
from ._problem._readers import shown as shown
from ._problem._readers import value_of as value_of
