"""What a trial reports: flat scalars by name. A name that stands here is taken."""

import math
from typing import Any

from torch import nn

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.state import named_trainable

__all__ = [
    "COSTS",
    "COUNTERS",
    "LEARNING",
    "LOSSES",
    "RESERVED",
    "Record",
    "certificate",
    "check_metric",
    "finite",
    "quantiles_of",
]

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
COUNTERS = (
    "ul_step",
    "ll_step",
    "skipped_ul_steps",
    "fallback_ul_steps",
    "lagging_ul_steps",
    "hvps",
    "gradient_evaluations",
)

# Those that tell of its work.
COSTS = ("ll_step", "hvps", "gradient_evaluations")

# The learning rate that the ll optimizer has come to.
LL_RATE = "ll_rate"

# How a trainer learns, by the names of its attributes.
LEARNING = ("ul_rate", "ul_moved", "ul_scale", "ll_lag")

STATE = (
    "start_loss",
    "kept_value",
    "kept_ul_step",
    "last_value",
    "completed",
    "ended_by",
    "divergence",
    "selected_on",
    "troubles",
    "failure",
)

RESERVED = frozenset({*LOSSES, *CERTIFICATE, *COUNTERS, *LEARNING, *STATE, LL_RATE})

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
QUANTILE_SAMPLE = 10_000


def certificate(hypergradient: Hypergradient | None) -> Record:
    """Return the metrics of the last hypergradient; what a failed solve leaves without a finite value is left out."""
    if hypergradient is None:
        return {}
    values = {name: getattr(hypergradient, attribute) for name, attribute in CERTIFICATE.items()}
    return finite(values | {"solver_status": hypergradient.status.value})


def finite(values: Record) -> Record:
    """Return ``values`` without the numbers that are not finite: no engine is told of them."""
    return {name: value for name, value in values.items() if isinstance(value, str) or math.isfinite(value)}


def quantiles_of(ul_model: nn.Module) -> dict[str, list[float]]:
    """Return the quantiles of the ul values, by parameter name."""
    quantiles = {}
    for name, param in named_trainable(ul_model).items():
        values = param.detach().reshape(-1)
        # An evenly spaced sample shows the spread of millions as well as a sort of all of them.
        values = values[:: max(1, len(values) // QUANTILE_SAMPLE)].double().sort().values
        ranks = [round(quantile * (len(values) - 1)) for quantile in QUANTILES]
        quantiles[name] = values[ranks].tolist()
    return quantiles


def check_metric(metric: str, mode: str) -> None:
    """Check that trials can be compared by ``metric``, of which ``mode`` is best.

    Raises
    ------
    InvalidValueError
        If ``mode`` is neither ``"min"`` nor ``"max"``, or it would take the largest loss for the best.
    """
    if mode not in ("min", "max"):
        raise InvalidValueError(f'`mode` must be "min" or "max", got {mode!r}.')
    if mode == "max" and metric in LOSSES:
        raise InvalidValueError(
            f"`metric` {metric!r} is a loss, of which the least is best, but trials would be compared by the largest: "
            'take mode="min" (direction="minimize"), or a metric of the problem\'s own (`metrics` of BilevelProblem).'
        )
