"""What a trial reports: flat scalars by name."""

import math
from typing import Any

from tune_implicit.hypergradients.certificate import Hypergradient

__all__ = ["RESERVED_METRICS", "Record", "certificate"]

Record = dict[str, Any]

# The names under which a trial reports its own numbers.
RESERVED_METRICS = frozenset(
    {
        "select_loss",
        "validate_loss",
        "train_loss",
        "hypergradient_norm",
        "residual_norm",
        "relative_residual",
        "stationarity",
        "lambda_min",
        "lambda_max",
        "damping",
        "noise_norm",
        "solver_steps",
        "solver_status",
        "solver_used",
        "skipped_ul_steps",
        "fallback_ul_steps",
        "hvps",
        "gradient_evaluations",
        "ul_step",
        "ll_step",
        "completed",
        "selected_on",
        "failure",
    }
)


def certificate(hypergradient: Hypergradient | None, solver: str) -> Record:
    """Return the metrics of the last hypergradient; what a failed solve leaves without a finite value is left out."""
    if hypergradient is None:
        return {}
    numbers = {
        "hypergradient_norm": hypergradient.norm,
        "residual_norm": hypergradient.residual_norm,
        "relative_residual": hypergradient.relative_residual,
        "stationarity": hypergradient.stationarity,
        "lambda_min": hypergradient.lambda_min,
        "lambda_max": hypergradient.lambda_max,
        "damping": hypergradient.damping,
        "noise_norm": hypergradient.noise_norm,
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)} | {
        "solver_steps": hypergradient.solver_steps,
        "solver_status": hypergradient.status.value,
        "solver_used": hypergradient.attempts[-1].solver if hypergradient.attempts else solver,
    }
