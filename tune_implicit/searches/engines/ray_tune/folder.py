"""Where a search on Ray Tune leaves its trials. It loads no Ray, so that a resumed search finds them on any engine."""

from optuna.trial import FrozenTrial

from tune_implicit.searches.outcome import RAY_TRIAL_ATTR
from tune_implicit.trials.checkpoint import CHECKPOINT_FILE

__all__ = ["FOLDER", "saved_at"]

# Tune's own folder, in that of the search.
FOLDER = "ray"


def saved_at(trial: FrozenTrial) -> str | None:
    """Return the pattern of the file that a trial was saved to, below the search's folder; ``None`` for another's."""
    trial_id = trial.user_attrs.get(RAY_TRIAL_ATTR)
    return None if trial_id is None else f"{FOLDER}/*_{trial_id}_*/checkpoint_*/{CHECKPOINT_FILE}"
