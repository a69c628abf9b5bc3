"""A trial in an artifact store: saved in turns while it runs, and linked to its study at its end."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import TrialState
from torch import Tensor

from tune_implicit.errors import CheckpointError, NoCompletedTrialError
from tune_implicit.searches.borrowed import storage_of, stored
from tune_implicit.searches.outcome import CHECKPOINT_ATTR
from tune_implicit.trials.checkpoint import CHECKPOINT_FILE, read_checkpoint, read_newest
from tune_implicit.trials.trial import Trial

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

__all__ = ["ArtifactSaves", "load_ul_state", "turns_of"]

MIME_TYPE = "application/octet-stream"


def turns_of(run: str) -> list[str]:
    """Return the two artifacts that take turns while a run of a trial lasts."""
    return [f"{run}.{turn}" for turn in (0, 1)]


class ArtifactSaves:
    """What is saved of one trial.

    While it runs, two artifacts take turns, so that one is whole while the other is written; neither is linked to the
    study, since a link cannot be taken back. At its end one is, and these two go.

    Parameters
    ----------
    store : optuna.artifacts store, optional
        Without one nothing is saved.
    optuna_trial : optuna.Trial
        Whose artifacts they are.
    runs : iterable of str
        The names under which the trial has been saved, the newest last.
    """

    def __init__(self, store: "ArtifactStore | None", optuna_trial: optuna.Trial, runs: Iterable[str]) -> None:
        self._store = store
        self._optuna_trial = optuna_trial
        self._runs = list(runs)
        self._next = 0
        # The artifact that the trial is linked to.
        self.linked: str | None = None

    def load(self, trial: Trial, others: Iterable[Path] = ()) -> None:
        """Let ``trial`` go on from the newest save that is whole, or from one of ``others``, files of another engine.

        A damaged save is told by a warning.
        """
        with self._fetched() as files:
            if newest := read_newest([*files.values(), *others]):
                path, _ = newest
                trial.load(path)
                self._next = 1 if path == files.get(turns_of(self._runs[-1])[0]) else 0

    def save(self, trial: Trial) -> None:
        """Save a trial that runs; the save before stays until this one is written."""
        if self._store is not None and self._kept(self._write_turn, trial):
            self._next = 1 - self._next

    def finish(self, trial: Trial) -> None:
        """Save a trial that has ended, for good."""
        if self._store is not None and self._kept(self._upload, trial):
            self._remove_turns()

    def _kept(self, write: Callable[[Path], None], trial: Trial) -> bool:
        """Return whether ``write`` has saved ``trial``; where it fails, say so: what the trial has come to goes on."""
        try:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / CHECKPOINT_FILE
                trial.save(path)
                write(path)
        except Exception as error:  # noqa: BLE001 - a store is the user's own, and raises what it likes
            warnings.warn(
                f"Trial {self._optuna_trial.number} could not be saved: {type(error).__name__}: {error}. It goes on, "
                "and its value is kept, but its ul values and ll model are those of the save before, if there is one. "
                f"Free room on the disk of the artifact store and of {tempfile.gettempdir()!r}, or see to the store.",
                stacklevel=2,
            )
            return False
        return True

    def _write_turn(self, path: Path) -> None:
        assert self._store is not None, "nothing is saved without a store"
        with path.open("rb") as file:
            self._store.write(turns_of(self._runs[-1])[self._next], file)

    def _upload(self, path: Path) -> None:
        assert self._store is not None, "nothing is saved without a store"
        self.linked = upload_artifact(
            artifact_store=self._store, file_path=str(path), study_or_trial=self._optuna_trial, mimetype=MIME_TYPE
        )

    def _linked(self) -> list[str]:
        trial = self._optuna_trial
        study = getattr(trial, "study", None)
        named = [trial.user_attrs[CHECKPOINT_ATTR]] if CHECKPOINT_ATTR in trial.user_attrs else []
        if study is None:
            return named
        links = get_all_artifact_meta(stored(study, trial), storage=storage_of(study))
        return [link.artifact_id for link in links] + named

    @contextmanager
    def _fetched(self) -> Iterator[dict[str, Path]]:
        """Bring each artifact of the trial that is there to a file of its own."""
        with tempfile.TemporaryDirectory() as directory:
            files: dict[str, Path] = {}
            names = [turn for run in self._runs for turn in turns_of(run)]
            for name in [*names, *self._linked()]:
                if self._store is None:
                    break
                path = Path(directory) / f"{len(files)}.pt"
                # A store that cannot be read is an error, and no reason to begin anew.
                with suppress(ArtifactNotFound):
                    download_artifact(artifact_store=self._store, file_path=str(path), artifact_id=name)
                    files[name] = path
            yield files

    def _remove_turns(self) -> None:
        assert self._store is not None, "nothing is saved without a store"
        for turn in (turn for run in self._runs for turn in turns_of(run)):
            with suppress(ArtifactNotFound, OSError):
                self._store.remove(turn)


def load_ul_state(study: optuna.Study, artifact_store: "ArtifactStore | str | Path") -> dict[str, Tensor]:
    """Return the learned ul values of the best trial of ``study``, for ``initial_ul_state`` or ``load_state_dict``.

    Parameters
    ----------
    study : optuna.Study
        Of :class:`ImplicitObjective`, or of a search on Optuna; of several objectives, the first of its best trials.
    artifact_store : optuna.artifacts store, or path
        What the trials were saved to, or its folder, which may be reached from another machine.

    Raises
    ------
    NoCompletedTrialError
        If no trial completed.
    CheckpointError
        If the best trial's save is not in the store.
    """
    store = FileSystemArtifactStore(artifact_store) if isinstance(artifact_store, str | Path) else artifact_store
    completed = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if not completed:
        raise NoCompletedTrialError(f"No trial of the study {study.study_name!r} completed, and so none is the best.")
    best = study.best_trials[0]
    links = [link.artifact_id for link in get_all_artifact_meta(best, storage=storage_of(study))]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / CHECKPOINT_FILE
        try:
            download_artifact(artifact_store=store, file_path=str(path), artifact_id=links[-1])
        except (IndexError, ArtifactNotFound, OSError) as error:
            raise CheckpointError(
                f"The save of the best trial, {best.number}, is not in `artifact_store`. Pass the store that "
                "trials were saved to; of a search it is the folder `artifacts` in its output."
            ) from error
        ul_state: dict[str, Tensor] = read_checkpoint(path)["kept"]["ul_model"]
    return ul_state
