"""Projection-based training of neural networks, for Equinox and Flax models as they are.

Every public name is here, or in `losses`, `sets`, `solvers`, `rules`, `datasets` and `flax`. Importing the package
takes little longer than importing JAX, Equinox and Optax: `flax` is imported when it is first used.
"""

import importlib as _importlib
from importlib import metadata as _metadata
from types import ModuleType as _ModuleType

from . import datasets as datasets
from . import losses as losses
from . import readers as readers
from . import rules as rules
from . import sets as sets
from . import solvers as solvers
from ._control_flow._builtin import BUILTIN as _BUILTIN
from ._errors import CheckpointError as CheckpointError
from ._errors import ConstraintError as ConstraintError
from ._errors import EvaluationError as EvaluationError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TrainingInterrupted as TrainingInterrupted
from ._errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from ._metric import Metric as Metric
from ._problem._constraints import apply_constraints as apply_constraints
from ._problem._make import feasibility_problem as feasibility_problem
from ._problem._problem import FeasibilityProblem as FeasibilityProblem
from ._problem._published import as_published as as_published
from ._problem._state import State as State
from ._problem._state import combine as combine
from ._program._custom import custom_loss as custom_loss
from ._program._custom import custom_projection as custom_projection
from ._program._threshold import threshold as threshold
from ._training._checkpoint import TrainingState as TrainingState
from ._training._displacement import filter_displacement as filter_displacement
from ._training._displacement import filter_value_and_displacement as filter_value_and_displacement
from ._training._evaluation import on_host as on_host
from ._training._optimizer import default_optimizer as default_optimizer
from ._training._projection import projection as projection
from ._training._train import TrainResult as TrainResult
from ._training._train import train as train
from ._training._watch import EarlyStopping as EarlyStopping
from ._training._watch import Report as Report
from .rules._registry import RULES as _RULES
from .rules._registry import register_projection as register_projection
from .rules._registry import unregister_projection as unregister_projection
from .solvers import AbstractSolver as AbstractSolver
from .solvers import AlternatingProjections as AlternatingProjections
from .solvers import AlternatingReflections as AlternatingReflections
from .solvers import CyclicDouglasRachford as CyclicDouglasRachford
from .solvers import CyclicProjections as CyclicProjections
from .solvers import DifferenceMap as DifferenceMap
from .solvers import DouglasRachford as DouglasRachford
from .solvers import RelaxedReflectReflect as RelaxedReflectReflect
from .solvers._solve import RESULTS as RESULTS
from .solvers._solve import Solution as Solution
from .solvers._solve import solve as solve

try:
    __version__ = _metadata.version("eqxproj")
except _metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0+unknown"

_RULES.maps[1].update(_BUILTIN)


def __getattr__(name: str) -> _ModuleType:
    """Imports `eqxproj.flax` when it is first used, since Flax is optional and slow to import."""
    if name == "flax":
        return _importlib.import_module(".flax", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "flax"})
