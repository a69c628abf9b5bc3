"""A Tuner restored from its folder, if that is whole: from another, Ray Tune would begin something else."""

import json
import pickletools
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from ray import tune

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.engines.ray_tune.borrowed import files_in, filesystem_of

__all__ = ["restore_tuner"]

Read = Callable[[str], bytes]

TUNER = "tuner.pkl"
# What Tune writes of each session, as KIND-TIME.json or KIND-TIME.pkl. A searcher's file is in a format of its own.
TRIALS = "experiment_state"
GENERATOR = "search_gen_state"
SEARCHER = "searcher-state"
PICKLED = (GENERATOR, "basic-variant-state", "callback-states")
KINDS = (TRIALS, SEARCHER, *PICKLED)

ANEW = (
    "Start a new Tuner instead, in another folder, with the `storage` and `study_name` that its ImplicitOptunaSearch "
    "had: the trials that have finished there count."
)


def restore_tuner(path: str | Path, trainable: Any, **arguments: Any) -> tune.Tuner:
    """Return ``tune.Tuner.restore(path, trainable, **arguments)``, once the folder ``path`` is found to be whole.

    A driver that is killed as Tune writes there may leave a file that is empty or cut off. Tune would log one line of
    that, and run a single trial without ``param_space``.

    Parameters
    ----------
    path : path or URI
        The experiment's folder: ``storage_path`` / ``name`` of its ``RunConfig``.
    trainable : Trainable
        As that of the Tuner that is restored.
    **arguments
        As of ``tune.Tuner.restore``: ``resume_unfinished``, ``resume_errored``, ``restart_errored``, ``param_space``,
        ``storage_filesystem``.

    Returns
    -------
    tune.Tuner

    Raises
    ------
    InvalidValueError
        If ``path`` holds no Tuner, or what it holds is damaged. It says which files to delete, where those of an
        earlier session are whole.

    Examples
    --------
    >>> tuner = restore_tuner("results/ray", tune.with_parameters(ImplicitTrainable, problem=problem))
    >>> tuner.fit()
    """
    if "://" not in str(path) and arguments.get("storage_filesystem") is None:
        path = Path(path).expanduser().absolute()  # Tune takes no other
    filesystem, folder = filesystem_of(str(path), arguments.get("storage_filesystem"))

    def read(name: str) -> bytes:
        with filesystem.open_input_stream(str(PurePosixPath(folder, name))) as file:
            content: bytes = file.read()
            return content

    names = files_in(filesystem, folder)
    if TUNER not in names or _pickle_damage(read(TUNER)):
        what = "holds no tuner.pkl" if TUNER not in names else "holds a tuner.pkl that is damaged"
        raise InvalidValueError(
            f"`path` must be the folder of a Tuner, `storage_path` / `name` of its RunConfig, got {str(path)!r}, which "
            f"{what}. Correct it. If it is right: {ANEW}"
        )
    states = [name for name in names if _kind(name)]
    if damage := _damage(states, read):
        raise InvalidValueError(
            f"`path` must hold the whole state of its Tuner, got {str(path)!r}, where {damage}: its driver was "
            f"killed as that was written, or before. {_way_out(states, read)}"
        )
    return tune.Tuner.restore(str(path), trainable, **arguments)


def _kind(name: str) -> str | None:
    """Return of what kind a file is by its name, ``None`` if it is none of Tune's states."""
    return next((kind for kind in KINDS if name.startswith(f"{kind}-")), None)


def _session(name: str) -> str:
    """Return when the session began that has written a file, as Tune names it."""
    return PurePosixPath(name).stem.removeprefix(f"{_kind(name)}-")


def _damage(names: Collection[str], read: Read) -> str:
    """Return what is wrong with what Tune would load, the newest of each kind; empty where nothing is."""
    newest = {kind: max(name for name in names if _kind(name) == kind) for kind in {_kind(name) for name in names}}
    if TRIALS not in newest:
        return f"there is no {TRIALS} file"
    if GENERATOR in newest and SEARCHER not in newest:
        return f"there is no {SEARCHER} file"
    for kind, name in newest.items():
        content = read(name)
        damage = "is empty" if not content else ""
        if not damage and kind == TRIALS:
            damage = _trials_damage(content)
        elif not damage and kind in PICKLED:
            damage = _pickle_damage(content)
        if damage:
            return f"{name} {damage}"
    return ""


def _trials_damage(content: bytes) -> str:
    try:
        state = json.loads(content)
    except ValueError:
        return "is cut off"
    if not isinstance(state, dict) or not {"trial_data", "runner_data"} <= set(state):
        return "holds something else"
    return "" if state["trial_data"] else "holds no trial yet"


def _pickle_damage(content: bytes) -> str:
    """Return what is wrong with a pickle, by reading through it; nothing in it is executed."""
    try:
        for _ in pickletools.genops(content):
            pass
    except ValueError:
        return "is cut off"
    return ""


def _way_out(names: Collection[str], read: Read) -> str:
    """Return what to do about damage: go back to the newest session whose files are whole, or begin anew."""
    for session in sorted({_session(name) for name in names}, reverse=True)[1:]:
        before = [name for name in names if _session(name) <= session]
        if not _damage(before, read):
            newer = ", ".join(sorted(set(names).difference(before)))
            return (
                f"The state of {session} is whole: delete {newer}, and call this again. Trials that were begun since "
                "then are run anew."
            )
    return ANEW
