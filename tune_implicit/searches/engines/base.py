"""What :func:`tune_implicit.search` asks of both engines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tune_implicit.searches.failures import Failures
from tune_implicit.searches.queue import TrialQueue
from tune_implicit.searches.sampling import seed_of
from tune_implicit.searches.space import Space
from tune_implicit.trials.trial import ProblemFactory

__all__ = ["Engine", "Work"]


@dataclass(frozen=True)
class Work:
    """What the trials of a search are made of, and where they leave what they save.

    Parameters
    ----------
    problem, space, data, settings, metric, mode, initial_ul_state, trial_timeout_s
        As passed to :func:`tune_implicit.search`.
    folder : path
        The search's.
    seed : int
        The search's: that of a trial comes from it and from the trial's number, unless its config has one.
    failures : Failures
        What is done with an exception that a trial raises.
    saved : callable(str) -> list of path
        The files in which either engine may have saved a run of a trial.
    """

    problem: ProblemFactory
    space: Space
    data: Any
    settings: Mapping[str, Any]
    metric: str
    mode: str
    folder: Path
    seed: int
    failures: Failures
    saved: Callable[[str], list[Path]]
    initial_ul_state: Mapping[str, Tensor] | None = None
    trial_timeout_s: float | None = None

    def settings_of(self, number: int) -> dict[str, Any]:
        """Return the settings of trial ``number``, under what the space picks for it."""
        return {"seed": seed_of(self.seed, number), **self.settings}


class Engine(Protocol):
    """What runs the trials of a search."""

    def run(self, queue: TrialQueue, time_budget_s: float | None, on_trial_end: Callable[[], None]) -> None:
        """Run trials of ``queue`` until it is over, and start none after ``time_budget_s``.

        A trial that fails with numbers is recorded; what else one raises may end the run, and is raised then.
        """
        ...
