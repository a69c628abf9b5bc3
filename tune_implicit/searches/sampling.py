"""Draws that depend on the search's seed and a trial's number alone, and so not on who draws, nor on how often."""

import hashlib
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial

__all__ = ["NumberedTPESampler", "seed_of"]


def seed_of(seed: int, *what: object) -> int:
    """Return a seed below 2**31 for one use, such as one trial, of a search whose seed is ``seed``."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**31


class NumberedTPESampler(BaseSampler):
    """Optuna's TPE, seeded anew for each trial, by the search's seed and the trial's number.

    A search that was cut off proposes on what it would have proposed, and workers on one study do not propose the
    same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def _of(self, trial: FrozenTrial, *what: object) -> TPESampler:
        return TPESampler(seed=seed_of(self._seed, trial.number, *what))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what TPE draws jointly."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a joint draw for ``trial``."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a draw of one param for ``trial``."""
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)
