"""A trial as a file."""

import pickle
from pathlib import Path
from typing import Any

import torch

from tune_implicit.errors import CheckpointError

__all__ = ["CHECKPOINT_FILE", "read_checkpoint", "write_checkpoint"]

CHECKPOINT_FILE = "trial.pt"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a trial's ``state`` to the file ``path``, which holds either the whole of it or what it held before."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what :func:`write_checkpoint` wrote to ``path``, its tensors on the CPU; nothing in it is executed.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a trial's checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"trainer", "history", "kept"} <= set(state):
        raise CheckpointError(f"{str(path)!r} must be a trial's checkpoint, got another file.")
    return state
