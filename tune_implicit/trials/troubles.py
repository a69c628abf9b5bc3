"""What a trial's last record says of whether it learned."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from tune_implicit.errors import LearningWarning
from tune_implicit.trials.record import Record

__all__ = ["TROUBLES", "TroubleTeller", "sentences", "troubles_of"]

# Parts of the ul steps that may be skipped, or taken while the ll model lags behind.
_SKIPPED = 0.2
_LAGGING = 0.8

# Ul values that move by less than the one part of their scale hardly move, and by more than the other run away. Their
# scale is the root of the mean square with which they started: at most 1 for the one, at least 1 for the other.
_HARDLY = 1e-3
_AWAY = 30.0


@dataclass(frozen=True)
class Trouble:
    """One way in which a trial does not learn.

    Parameters
    ----------
    found : callable(record) -> bool
        Whether a trial whose last record is ``record`` has it.
    sentence : callable(record) -> str
        What was seen, and the setting to change.
    at_end : bool
        Whether only a completed trial can have it: one that has just begun has not moved far, either.
    """

    found: Callable[[Record], bool]
    sentence: Callable[[Record], str]
    at_end: bool = False


TROUBLES = {
    "failed": Trouble(
        lambda record: "failure" in record,
        lambda record: f"The trial failed: {record['failure']}",
    ),
    "skipped": Trouble(
        lambda record: record["skipped_ul_steps"] > _SKIPPED * record["ul_step"],
        lambda record: (
            f"{record['skipped_ul_steps']} of {record['ul_step']} ul steps were skipped, as their solves failed (the "
            f"last ended as {record.get('solver_status')}): "
            + (
                "bound the ul values by `project`, or take a smaller `ul_learning_rate`."
                if record.get("solver_status") == "non_finite"
                else 'take on_failure="fallback", solver="minres", or `damping`.'
            )
        ),
    ),
    "unmoved": Trouble(
        lambda record: _moved(record) < _HARDLY * min(1.0, _scale(record)) and _taken(record) > 0,
        lambda record: (
            f"The ul values hardly moved, by {record['ul_moved']:.1g} (root mean square) in {record['ul_step']} ul "
            f"steps, at a rate of {record['ul_rate']:.1g} in the end: take a larger `ul_learning_rate`, or "
            + ("a larger `max_gradient_evaluations`." if _ran_short(record) else "more `ul_steps`.")
        ),
        at_end=True,
    ),
    "ran-away": Trouble(
        lambda record: "ul_rate" in record and _moved(record) > _AWAY * max(1.0, _scale(record)),
        lambda record: (
            f"The ul values ran away, by {_moved(record):.3g} (root mean square), at a rate of "
            f"{record['ul_rate']:.1g} in the end: take a smaller `ul_learning_rate`, adapt_ul_learning_rate=False, or "
            "bound them by `project`."
        ),
    ),
    "worse": Trouble(
        lambda record: record.get("start_loss") is not None and record["select_loss"] > record["start_loss"],
        lambda record: (
            f"The trial ended worse than it began: its select_loss is {record['select_loss']:.4g}, and was "
            f"{record['start_loss']:.4g} before the first step. "
            + (
                "Its budget ended it: take a larger `max_gradient_evaluations`. Or take"
                if _ran_short(record)
                else "Take"
            )
            + " a smaller `ll_learning_rate` or `ul_learning_rate`, and run `tune-implicit check`."
        ),
        at_end=True,
    ),
    "diverged": Trouble(
        lambda record: record.get("ended_by") == "divergence",
        lambda record: (
            f"The trial diverged, and its report of ul step {record['kept_ul_step']} is kept. {record['divergence']}"
        ),
    ),
    "lagging": Trouble(
        lambda record: record["lagging_ul_steps"] > _LAGGING * record["ul_step"],
        lambda record: (
            f"Before {record['lagging_ul_steps']} of {record['ul_step']} ul steps the ll model had not followed the "
            "one before: hypergradients assume that it has. Take a larger `ll_learning_rate`, or more `max_ll_steps` "
            "(`ll_steps`)."
        ),
    ),
}


def _moved(record: Record) -> float:
    """Return how far the ul values have moved; infinitely far where that is no number, as no record holds it then."""
    return float(record.get("ul_moved", math.inf))


def _scale(record: Record) -> float:
    """Return how large the ul values were at first, 1 where they were all zero."""
    return float(record.get("ul_scale", 1.0)) or 1.0


def _taken(record: Record) -> int:
    """Return how many ul steps were not skipped."""
    return int(record["ul_step"]) - int(record["skipped_ul_steps"])


def _ran_short(record: Record) -> bool:
    """Return whether a trial ended by its budget, before its last ul step: it may only have had too few of them."""
    return bool(record.get("ended_by") == "budget")


def troubles_of(record: Record) -> list[str]:
    """Return the names of the troubles of a trial whose last record is ``record``."""
    completed = record["completed"]
    return [name for name, trouble in TROUBLES.items() if (completed or not trouble.at_end) and trouble.found(record)]


def sentences(record: Record) -> dict[str, str]:
    """Return what a trial's last record says of its troubles, by their names; none for a trial that learned."""
    return {name: TROUBLES[name].sentence(record) for name in record.get("troubles", "").split() if name in TROUBLES}


class TroubleTeller:
    """Warn of the troubles of trials as they end, of each kind once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, record: Record, trial: str = "A trial") -> None:
        """Warn of what is new in ``record``, the last one of ``trial``."""
        for name, sentence in sentences(record).items():
            if name not in self._told:
                self._told.add(name)
                warnings.warn(f"{trial} did not learn as it should ({name}). {sentence}", LearningWarning, stacklevel=3)
