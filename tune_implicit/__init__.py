"""Hybrid hyperparameter search: implicit hypergradients inside the trials of Ray Tune and Optuna."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tune_implicit.checkup import check
from tune_implicit.errors import (
    CheckpointError,
    DivergedError,
    InvalidTypeError,
    InvalidValueError,
    NoCompletedTrialError,
    SolveError,
    StorageError,
    TuneImplicitError,
)
from tune_implicit.findings import CheckReport
from tune_implicit.hypergradient import Hypergradient, Implicit
from tune_implicit.problem import BilevelProblem, State
from tune_implicit.settings import ImplicitSettings
from tune_implicit.solvers import (
    Attempt,
    ConjugateGradient,
    Damped,
    DenseSolve,
    Fallback,
    Minres,
    NeumannSeries,
    QuasiNewton,
    Solution,
    Solver,
    Status,
)
from tune_implicit.trainer import BilevelTrainer

if TYPE_CHECKING:
    from tune_implicit.adapters.optuna_study import ImplicitObjective
    from tune_implicit.adapters.ray_tune.searcher import ImplicitOptunaSearch
    from tune_implicit.adapters.ray_tune.trainable import ImplicitTrainable
    from tune_implicit.ledger import Progress
    from tune_implicit.report import write_report
    from tune_implicit.results import SearchResult, TrialResult, load_search
    from tune_implicit.run import search

__all__ = [
    "Attempt",
    "BilevelProblem",
    "BilevelTrainer",
    "CheckReport",
    "CheckpointError",
    "ConjugateGradient",
    "Damped",
    "DenseSolve",
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
    "Minres",
    "NeumannSeries",
    "NoCompletedTrialError",
    "Progress",
    "QuasiNewton",
    "SearchResult",
    "Solution",
    "SolveError",
    "Solver",
    "State",
    "Status",
    "StorageError",
    "TrialResult",
    "TuneImplicitError",
    "check",
    "load_search",
    "search",
    "write_report",
]

# Loaded when first asked for: the engines, and what rests on them, take seconds to import.
_LAZY = {
    "ImplicitObjective": "tune_implicit.adapters.optuna_study",
    "ImplicitOptunaSearch": "tune_implicit.adapters.ray_tune.searcher",
    "ImplicitTrainable": "tune_implicit.adapters.ray_tune.trainable",
    "Progress": "tune_implicit.ledger",
    "SearchResult": "tune_implicit.results",
    "TrialResult": "tune_implicit.results",
    "load_search": "tune_implicit.results",
    "search": "tune_implicit.run",
    "write_report": "tune_implicit.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
