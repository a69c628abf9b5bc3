"""What a trial writes into its study, and what that says of its end."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.results import number_or_text
from tune_implicit.trials.record import Record
from tune_implicit.trials.troubles import sentences

__all__ = [
    "CHECKPOINT_ATTR",
    "CONFIG_ATTR",
    "CUT_OFF",
    "ERROR_ATTR",
    "FAILURE_ATTR",
    "METRICS_ATTR",
    "RAY_TRIAL_ATTR",
    "TROUBLES_ATTR",
    "Outcome",
    "failure_of",
    "is_interrupted",
    "outcome_of",
    "was_raised",
    "write_config",
    "write_failure",
    "write_outcome",
]

# The user attributes of a trial in its study: its last record; what it says of how the trial did not learn; why it
# failed, and the type of the exception if it raised one; whether it was cut off; its config, where that is not its
# params; the artifact that holds its checkpoint; and of versions before 0.6, the trial of Ray's that does.
METRICS_ATTR = "metrics"
TROUBLES_ATTR = "troubles"
FAILURE_ATTR = "failure"
ERROR_ATTR = "raised"
INTERRUPTED_ATTR = "interrupted"
CONFIG_ATTR = "config"
CHECKPOINT_ATTR = "checkpoint"
RAY_TRIAL_ATTR = "ray_trial_id"

# Of how many ul parameters the quantiles become columns.
MOST_UL_COLUMNS = 10


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Parameters
    ----------
    state : TrialState
        COMPLETE, PRUNED or FAIL.
    failure : str, optional
        Why it failed.
    error : str, optional
        The type of the exception, where it raised one.
    interrupted : bool
        Whether it neither ended nor was ended by a decision about it: a resumed search runs it again.
    """

    state: TrialState
    failure: str | None = None
    error: str | None = None
    interrupted: bool = False


CUT_OFF = Outcome(TrialState.FAIL, "The search ended before the trial did.", interrupted=True)


def outcome_of(record: Record, metric: str) -> Outcome:
    """Return how a trial ended that ran to its last record, or to a decision to stop it there.

    Raises
    ------
    InvalidValueError
        If the record has no such number as ``metric``.
    """
    if failure := failure_of(record, metric):
        return Outcome(TrialState.FAIL, failure)
    return Outcome(TrialState.COMPLETE if record.get("completed", True) else TrialState.PRUNED)


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


def write_config(trial: optuna.Trial, config: dict[str, Any]) -> None:
    """Write the config of a trial into its study where it is not its params, in what JSON can hold."""
    if config != trial.params:
        trial.set_user_attr(CONFIG_ATTR, json.loads(json.dumps(config, default=number_or_text)))


def write_outcome(
    trial: optuna.Trial,
    record: Record,
    outcome: Outcome,
    *,
    flat: bool = False,
    ul_quantiles: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write a trial's last record and how it ended into its study, before the trial is told.

    What JSON cannot hold, such as an engine's own objects and numbers that are not finite, is left out.

    Parameters
    ----------
    trial : optuna.Trial
        Whose study it is.
    record : dict
        Its last.
    outcome : Outcome
        How it ended.
    flat : bool, default False
        Whether each entry becomes an attribute of its own as well, which dashboards and ``trials_dataframe`` show as
        rows and columns; it costs a write each.
    ul_quantiles : mapping, optional
        By parameter name, the quantiles 0, .05, .25, .5, .75, .95 and 1 of its ul values; where ``flat``.
    """
    plain = {
        name: value
        for name, value in record.items()
        if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }
    trial.set_user_attr(METRICS_ATTR, plain)
    if flat:
        taken = {METRICS_ATTR, TROUBLES_ATTR, FAILURE_ATTR, ERROR_ATTR, INTERRUPTED_ATTR, CONFIG_ATTR, CHECKPOINT_ATTR}
        columns = {name: value for name, value in plain.items() if name not in taken}
        for name, quantiles in list((ul_quantiles or {}).items())[:MOST_UL_COLUMNS]:
            low, median, high = quantiles[0], quantiles[len(quantiles) // 2], quantiles[-1]
            columns |= {f"ul {name} least": low, f"ul {name} median": median, f"ul {name} largest": high}
        for name, value in columns.items():
            trial.set_user_attr(name, value)
    if troubles := sentences(plain):
        trial.set_user_attr(TROUBLES_ATTR, troubles)
    write_failure(trial, outcome)


def write_failure(trial: optuna.Trial, outcome: Outcome) -> None:
    """Write why a trial failed into its study, where it did, in place of what an earlier run of it said."""
    said = trial.user_attrs
    if outcome.failure is not None or said.get(FAILURE_ATTR) is not None:
        trial.set_user_attr(FAILURE_ATTR, outcome.failure)
    if outcome.error is not None or said.get(ERROR_ATTR) is not None:
        trial.set_user_attr(ERROR_ATTR, outcome.error)
    if outcome.interrupted or said.get(INTERRUPTED_ATTR):
        trial.set_user_attr(INTERRUPTED_ATTR, outcome.interrupted)


def was_raised(trial: FrozenTrial) -> bool:
    """Return whether a trial waits that has ended a search by what it raised."""
    return trial.state is TrialState.WAITING and bool(trial.user_attrs.get(ERROR_ATTR))


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was cut off; studies of version 0.2 say so by how the failure begins."""
    said = str(trial.user_attrs.get(FAILURE_ATTR)).startswith(str(CUT_OFF.failure))
    return trial.state is TrialState.FAIL and bool(trial.user_attrs.get(INTERRUPTED_ATTR, said))
