"""Iterative projection algorithms."""

from ._base import AbstractSolver as AbstractSolver
from ._cyclic import CyclicDouglasRachford as CyclicDouglasRachford
from ._cyclic import CyclicProjections as CyclicProjections
from ._two_color import AlternatingProjections as AlternatingProjections
from ._two_color import AlternatingReflections as AlternatingReflections
from ._two_color import DifferenceMap as DifferenceMap
from ._two_color import DouglasRachford as DouglasRachford
from ._two_color import RelaxedReflectReflect as RelaxedReflectReflect
