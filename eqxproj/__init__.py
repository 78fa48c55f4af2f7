"""Projection-based training of neural networks, for Equinox and Flax models as they are."""

from . import datasets as datasets
from . import losses as losses
from . import sets as sets
from ._control_flow._builtin import BUILTIN as _BUILTIN
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TrainingInterrupted as TrainingInterrupted
from ._errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from ._metric import Metric as Metric
from ._problem._make import feasibility_problem as feasibility_problem
from ._problem._problem import FeasibilityProblem as FeasibilityProblem
from ._problem._published import as_published as as_published
from ._program._custom import custom_projection as custom_projection
from ._training._displacement import filter_displacement as filter_displacement
from ._training._displacement import filter_value_and_displacement as filter_value_and_displacement
from ._training._projection import projection as projection
from ._training._train import TrainResult as TrainResult
from ._training._train import train as train
from .rules._registry import RULES as _RULES
from .rules._registry import register_projection as register_projection
from .solvers import AbstractSolver as AbstractSolver
from .solvers import AlternatingProjections as AlternatingProjections
from .solvers import AlternatingReflections as AlternatingReflections
from .solvers import CyclicDouglasRachford as CyclicDouglasRachford
from .solvers import CyclicProjections as CyclicProjections
from .solvers import DifferenceMap as DifferenceMap
from .solvers import DouglasRachford as DouglasRachford
from .solvers import RelaxedReflectReflect as RelaxedReflectReflect
from .solvers._solve import Solution as Solution
from .solvers._solve import solve as solve

_RULES.update(_BUILTIN)
