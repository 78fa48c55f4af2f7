"""Iterative projection algorithms, and the parts that one of your own is made of.

`onto` projects a state onto all constraints of one color, `reflect` reflects it there, and `eqxproj.combine` makes
affine combinations of states. An algorithm derives from `AbstractSolver` and defines `step` with them.
"""

from ._base import AbstractSolver as AbstractSolver
from ._base import onto as onto
from ._base import reflect as reflect
from ._cyclic import CyclicDouglasRachford as CyclicDouglasRachford
from ._cyclic import CyclicProjections as CyclicProjections
from ._two_color import AlternatingProjections as AlternatingProjections
from ._two_color import AlternatingReflections as AlternatingReflections
from ._two_color import DifferenceMap as DifferenceMap
from ._two_color import DouglasRachford as DouglasRachford
from ._two_color import RelaxedReflectReflect as RelaxedReflectReflect
