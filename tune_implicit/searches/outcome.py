"""What a trial writes into its study, and what that says of its end."""

import json
import math
from numbers import Real
from typing import Any

import optuna

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.results import number_or_text
from tune_implicit.trials.record import Record

__all__ = [
    "CHECKPOINT_ATTR",
    "CONFIG_ATTR",
    "FAILURE_ATTR",
    "INTERRUPTED",
    "METRICS_ATTR",
    "RAY_TRIAL_ATTR",
    "failure_of",
    "write_config",
    "write_outcome",
]

# The user attributes of a trial in its study: its last record; why it failed; its config, where that is not its params;
# the artifact, or the trial of Ray's, that holds its checkpoint.
METRICS_ATTR = "metrics"
FAILURE_ATTR = "failure"
CONFIG_ATTR = "config"
CHECKPOINT_ATTR = "checkpoint"
RAY_TRIAL_ATTR = "ray_trial_id"

# How the failure begins of a trial that neither ended nor was ended by a decision about it: a resumed search runs it
# again.
INTERRUPTED = "The search ended before the trial did."


def write_config(trial: optuna.Trial, config: dict[str, Any]) -> None:
    """Write the config of a trial into its study where it is not its params, in what JSON can hold."""
    if config != trial.params:
        trial.set_user_attr(CONFIG_ATTR, json.loads(json.dumps(config, default=number_or_text)))


def failure_of(record: Record, metric: str) -> str | None:
    """Return why a trial that ended with ``record`` has no value to compare, or ``None`` where it has.

    Raises
    ------
    InvalidValueError
        If the record has no such number.
    """
    if failure := record.get("failure"):
        return str(failure)
    reported = [name for name, value in record.items() if not isinstance(value, bool) and isinstance(value, Real)]
    if metric not in reported:
        raise InvalidValueError(
            f"`metric` {metric!r} is reported by no one as a number. The trial reports {', '.join(sorted(reported))}."
        )
    return None if math.isfinite(record[metric]) else f"`{metric}` became {record[metric]}."


def write_outcome(trial: optuna.Trial, record: Record, failure: str | None) -> None:
    """Write a trial's last record, and why it failed if it did, into its study, before the trial is told.

    What JSON cannot hold, such as an engine's own objects and numbers that are not finite, is left out.
    """
    plain = {
        name: value
        for name, value in record.items()
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }
    trial.set_user_attr(METRICS_ATTR, plain)
    if failure is not None:
        trial.set_user_attr(FAILURE_ATTR, failure)
