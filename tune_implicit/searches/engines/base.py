"""What :func:`tune_implicit.search` asks of both engines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna

from tune_implicit.searches.space import Space
from tune_implicit.trials.trial import ProblemFactory

__all__ = ["Engine", "Work"]


@dataclass(frozen=True)
class Work:
    """What the trials of a search are made of, and where they leave what they save.

    Parameters
    ----------
    problem, space, data, settings, metric, mode
        As passed to :func:`tune_implicit.search`.
    folder : path
        The search's.
    """

    problem: ProblemFactory
    space: Space
    data: Any
    settings: Mapping[str, Any]
    metric: str
    mode: str
    folder: Path


class Engine(Protocol):
    """What runs the trials of a search."""

    def run(
        self, study: optuna.Study, n_trials: int, time_budget_s: float | None, on_trial_end: Callable[[], None]
    ) -> None:
        """Run ``n_trials`` trials more in ``study``, and start none after ``time_budget_s``.

        A trial that fails with numbers is recorded; what else one raises ends the run and is raised.
        """
        ...
