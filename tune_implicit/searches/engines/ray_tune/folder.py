"""Where a search on Ray Tune leaves its trials. It loads no Ray, so that a resumed search finds them on any engine."""

from pathlib import Path

from tune_implicit.trials.checkpoint import CHECKPOINT_FILE

__all__ = ["FOLDER", "pattern_of", "saved", "timeouts_in"]

# Tune's own folder, in that of the search.
FOLDER = "ray"


def pattern_of(trial_id: str) -> str:
    """Return the pattern of the files that one of Ray's trials is saved to, below the search's folder."""
    return f"{FOLDER}/*_{trial_id}_*/checkpoint_*/{CHECKPOINT_FILE}"


def saved(folder: Path, trial_id: str) -> list[Path]:
    """Return the files that one of Ray's trials was saved to, the oldest first."""
    return sorted(folder.glob(pattern_of(trial_id)))


def timeouts_in(folder: Path) -> Path:
    """Return where a search in ``folder`` notes the trials that took too long, each by a file of its name."""
    return folder.absolute() / "timeouts"
