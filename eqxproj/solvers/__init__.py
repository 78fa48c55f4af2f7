"""Iterative projection algorithms."""

from ._solver import AbstractSolver as AbstractSolver
from .cyclic import CyclicDouglasRachford as CyclicDouglasRachford
from .cyclic import CyclicProjections as CyclicProjections
from .two_color import AlternatingProjections as AlternatingProjections
from .two_color import AlternatingReflections as AlternatingReflections
from .two_color import DifferenceMap as DifferenceMap
from .two_color import DouglasRachford as DouglasRachford
from .two_color import RelaxedReflectReflect as RelaxedReflectReflect
