"""A trial as a file, in which damage is noticed."""

import hashlib
import io
import os
import pickle
import secrets
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tune_implicit.errors import CheckpointError

__all__ = ["CHECKPOINT_FILE", "FORMAT_VERSION", "read_checkpoint", "read_newest", "write_checkpoint"]

CHECKPOINT_FILE = "trial.pt"

# Of the file, and of the state of a trainer in it.
FORMAT_VERSION = 5

# A line before what torch saves, which ends with the checksum of that.
_BEGINNING = f"tune_implicit checkpoint {FORMAT_VERSION} sha256:"


def _header(content: bytes | memoryview) -> bytes:
    return f"{_BEGINNING}{hashlib.sha256(content).hexdigest()}\n".encode("ascii")


_HEADER_SIZE = len(_header(b""))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a trial's ``state`` to the file ``path``, which holds either the whole of it or what it held before.

    It is written to another file first, whose name is this process's own, and which is gone afterwards even where
    writing failed.

    Raises
    ------
    OSError
        If the file cannot be written, e.g. since the disk is full.
    """
    saved = io.BytesIO()
    torch.save(state, saved)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(_header(saved.getbuffer()))
            file.write(saved.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or the name might reach the disk before the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what :func:`write_checkpoint` wrote to ``path``, its tensors on the CPU; nothing in it is executed.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is not to the last bit what was written, or holds something else.
    """
    try:
        with path.open("rb") as file:
            header, content = file.read(_HEADER_SIZE), file.read()
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a trial's checkpoint: {error}") from error
    if not header.startswith(_BEGINNING.encode("ascii")):
        raise CheckpointError(
            f"{str(path)!r} is no trial's checkpoint, or is damaged: it must begin with {_BEGINNING!r}. Files from "
            "versions before 0.6 are not read: load them with the version of tune_implicit that wrote them."
        )
    if header != _header(content):
        raise CheckpointError(
            f"{str(path)!r} is damaged: its content is not what its checksum was taken of. Take the checkpoint before "
            "it, or run the trial again."
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a trial's checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"trainer", "history", "kept"} <= set(state):
        raise CheckpointError(f"{str(path)!r} must be a trial's checkpoint, got another file.")
    return state


def read_newest(paths: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Return which of a trial's checkpoints is furthest, with what it holds.

    That is the one with the most ul steps, and of those with as many the one with the most records; the first of equal
    ones. Files that do not exist are left out. One that is damaged is left out as well, with a warning.

    Parameters
    ----------
    paths : iterable of Path
        Checkpoints of one trial, in any order.

    Returns
    -------
    tuple of Path and dict, or None
        ``None`` where no file can be read.
    """
    newest = None
    for path in paths:
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error} The one before it is used, if there is one.", stacklevel=2)
            continue
        if newest is None or _progress(state) > _progress(newest[1]):
            newest = path, state
    return newest


def _progress(state: dict[str, Any]) -> tuple[int, int]:
    """Return how far a trial has come: its ul steps, and its records."""
    return state["trainer"]["counters"]["ul_step"], len(state["history"])
