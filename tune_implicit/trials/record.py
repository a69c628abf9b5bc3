"""What a trial reports: flat scalars by name. A name that stands here is taken."""

import math
from typing import Any

from tune_implicit.hypergradients.certificate import Hypergradient

__all__ = ["COUNTERS", "LOSSES", "RESERVED", "Record", "certificate"]

Record = dict[str, Any]

LOSSES = ("select_loss", "validate_loss", "train_loss")

# What is told of the last hypergradient, by the names of its attributes.
CERTIFICATE = {
    "hypergradient_norm": "norm",
    "residual_norm": "residual_norm",
    "relative_residual": "relative_residual",
    "stationarity": "stationarity",
    "relative_stationarity": "relative_stationarity",
    "lambda_min": "lambda_min",
    "lambda_max": "lambda_max",
    "damping": "damping",
    "noise_norm": "noise_norm",
    "solver_steps": "solver_steps",
    "solver_status": "status",
    "solver_used": "solver",
}

# What a trainer counts, by the names of its attributes.
COUNTERS = ("ul_step", "ll_step", "skipped_ul_steps", "fallback_ul_steps", "hvps", "gradient_evaluations")

STATE = ("completed", "selected_on", "failure")

RESERVED = frozenset({*LOSSES, *CERTIFICATE, *COUNTERS, *STATE})


def certificate(hypergradient: Hypergradient | None) -> Record:
    """Return the metrics of the last hypergradient; what a failed solve leaves without a finite value is left out."""
    if hypergradient is None:
        return {}
    values = {name: getattr(hypergradient, attribute) for name, attribute in CERTIFICATE.items()}
    values["solver_status"] = hypergradient.status.value
    return {name: value for name, value in values.items() if isinstance(value, str) or math.isfinite(value)}
