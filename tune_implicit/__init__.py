"""Hybrid hyperparameter search: implicit hypergradients inside the trials of Ray Tune and Optuna."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tune_implicit.checks.check import check
from tune_implicit.checks.findings import CheckReport
from tune_implicit.errors import (
    CheckpointError,
    DerivativeError,
    DetachedError,
    DivergedError,
    InvalidTypeError,
    InvalidValueError,
    LearningWarning,
    NoCompletedTrialError,
    SolveError,
    StorageError,
    TuneImplicitError,
)
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.fallback import Damped, Fallback
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Attempt, Solution, Solver, Status
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.averaging import Averaging
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer

if TYPE_CHECKING:
    from tune_implicit.searches.engines.optuna_study.artifacts import load_ul_state
    from tune_implicit.searches.engines.optuna_study.objective import ImplicitObjective
    from tune_implicit.searches.engines.ray_tune.restore import restore_tuner
    from tune_implicit.searches.engines.ray_tune.searcher import ImplicitOptunaSearch
    from tune_implicit.searches.engines.ray_tune.trainable import ImplicitTrainable
    from tune_implicit.searches.ledger import Progress
    from tune_implicit.searches.report import write_report
    from tune_implicit.searches.results import SearchResult, TrialResult, load_search
    from tune_implicit.searches.search import search
    from tune_implicit.searches.space import recommended_space
    from tune_implicit.searches.study import requeue

__all__ = [
    "Attempt",
    "Averaging",
    "BilevelProblem",
    "BilevelTrainer",
    "CheckReport",
    "CheckpointError",
    "ConjugateGradient",
    "Damped",
    "DenseSolve",
    "DerivativeError",
    "DetachedError",
    "DivergedError",
    "Fallback",
    "Hypergradient",
    "Implicit",
    "ImplicitObjective",
    "ImplicitOptunaSearch",
    "ImplicitSettings",
    "ImplicitTrainable",
    "InvalidTypeError",
    "InvalidValueError",
    "LearningWarning",
    "Minres",
    "NeumannSeries",
    "NoCompletedTrialError",
    "Progress",
    "QuasiNewton",
    "SearchResult",
    "Solution",
    "SolveError",
    "Solver",
    "SolverSettings",
    "State",
    "Status",
    "StorageError",
    "TrialResult",
    "TuneImplicitError",
    "check",
    "load_search",
    "load_ul_state",
    "recommended_space",
    "requeue",
    "restore_tuner",
    "search",
    "write_report",
]

# Loaded when first asked for: the engines, and what rests on them, take seconds to import.
_LAZY = {
    "ImplicitObjective": "tune_implicit.searches.engines.optuna_study.objective",
    "ImplicitOptunaSearch": "tune_implicit.searches.engines.ray_tune.searcher",
    "ImplicitTrainable": "tune_implicit.searches.engines.ray_tune.trainable",
    "Progress": "tune_implicit.searches.ledger",
    "SearchResult": "tune_implicit.searches.results",
    "TrialResult": "tune_implicit.searches.results",
    "load_search": "tune_implicit.searches.results",
    "load_ul_state": "tune_implicit.searches.engines.optuna_study.artifacts",
    "recommended_space": "tune_implicit.searches.space",
    "requeue": "tune_implicit.searches.study",
    "restore_tuner": "tune_implicit.searches.engines.ray_tune.restore",
    "search": "tune_implicit.searches.search",
    "write_report": "tune_implicit.searches.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
