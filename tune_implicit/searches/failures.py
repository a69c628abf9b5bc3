"""What a search does with an exception that a trial raised."""

import traceback
from pathlib import Path

import optuna
from optuna.trial import TrialState

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.outcome import ERROR_ATTR

__all__ = ["ON_ERROR", "Failures"]

ON_ERROR = ("record", "raise")

# Where tracebacks lie, in the folder of the search.
FOLDER = "errors"

# With ``on_error="record"``: so many trials that raise, before one has completed, are a mistake in the problem.
MOST_AT_THE_START = 3


class Failures:
    """Decide whether a search goes on after a trial has raised, and keep the tracebacks.

    Parameters
    ----------
    on_error : {"record", "raise"}, optional
        By default "raise" until a trial has completed, then "record".
    folder : path
        The search's.

    Raises
    ------
    InvalidValueError
        If ``on_error`` is another.
    """

    def __init__(self, on_error: str | None, folder: Path) -> None:
        if on_error not in (None, *ON_ERROR):
            raise InvalidValueError(f"`on_error` must be one of {', '.join(ON_ERROR)}, or None, got {on_error!r}.")
        self._on_error = on_error
        self._folder = folder / FOLDER

    def may_go_on(self, study: optuna.Study) -> bool:
        """Return whether the trial is recorded as failed, and the search goes on; otherwise its error is raised."""
        if self._on_error == "raise":
            return False
        trials = study.get_trials(deepcopy=False)
        if any(trial.state is TrialState.COMPLETE for trial in trials):
            return True
        raised = sum(ERROR_ATTR in trial.user_attrs for trial in trials if trial.state is TrialState.FAIL)
        return self._on_error == "record" and raised + 1 < MOST_AT_THE_START

    def keep(self, number: int, error: BaseException) -> str:
        """Write the traceback of what a trial raised to a file, and return why the trial failed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"trial_{number}.txt"
        file.write_text("".join(traceback.format_exception(error)))
        return f"It raised {type(error).__name__}: {error} (see {FOLDER}/{file.name})"
