"""What a search leaves in its folder, and how it is read again."""

import dataclasses
import json
import numbers
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tune_implicit.errors import CheckpointError, InvalidValueError, NoCompletedTrialError
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.record import Record
from tune_implicit.trials.troubles import sentences

__all__ = [
    "SearchResult",
    "Summary",
    "TrialResult",
    "TrialsFile",
    "earlier_seconds",
    "load_search",
    "number_or_text",
    "read_trials",
]

SUMMARY_FILE = "search.json"
TRIALS_FILE = "trials.jsonl"


@dataclass(frozen=True)
class TrialResult:
    """One finished trial.

    Parameters
    ----------
    number : int
        In its study.
    state : {"complete", "pruned", "failed"}
        How it ended.
    value : float, optional
        The search's metric: of a completed trial that of the report it keeps, of a pruned one that of its last;
        ``None`` where it failed.
    config : dict
        What its problem was made from.
    metrics : dict
        Its last record.
    failure : str, optional
        Why it failed.
    started_s, ended_s : float
        Seconds since the start of the search's first trial.
    checkpoint : path, optional
        The file it was saved to.
    """

    number: int
    state: str
    value: float | None
    config: dict[str, Any]
    metrics: Record
    failure: str | None
    started_s: float
    ended_s: float
    checkpoint: Path | None

    @property
    def ul_state(self) -> dict[str, Tensor]:
        """The learned ul values of its best report (``keep="last"``: of its last), for ``ul_model.load_state_dict``."""
        ul_state: dict[str, Tensor] = self._saved()["kept"]["ul_model"]
        return ul_state

    @property
    def ll_state(self) -> Any:
        """The trained ll model of that report, for ``ll_model.load_state_dict``; a list of them for several models."""
        return self._saved()["kept"]["ll_model"]

    @property
    def history(self) -> list[Record]:
        """Its records, each with ``"ul_quantiles"``."""
        history: list[Record] = self._saved()["history"]
        return history

    @property
    def troubles(self) -> dict[str, str]:
        """In what it did not learn as it should have: by name, what was seen and the setting to change."""
        return sentences(self.metrics)

    def _saved(self) -> dict[str, Any]:
        if self.checkpoint is None:
            raise CheckpointError(
                f"Trial {self.number} has no checkpoint: it ended as {self.state} before it was saved."
            )
        return read_checkpoint(self.checkpoint)


@dataclass(frozen=True)
class Summary:
    """A search in a few words.

    Parameters
    ----------
    backend, metric, mode : str
        As passed to :func:`tune_implicit.search`.
    n_trials : int
        Trials asked for.
    seconds : float
        It took, in all its calls.
    interrupted : bool
        Whether it ended before ``n_trials`` trials and before its time budget.
    notes : dict
        What was added with :meth:`SearchResult.annotate`.
    """

    backend: str
    metric: str
    mode: str
    n_trials: int
    seconds: float
    interrupted: bool
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """A search that ended.

    Parameters
    ----------
    output : path
        The folder it wrote to.
    summary : Summary
        What was asked for and how it went.
    trials : list of TrialResult
        Those that finished, by number.
    """

    output: Path
    summary: Summary
    trials: list[TrialResult]

    @property
    def best(self) -> TrialResult:
        """The completed trial with the best value.

        Raises
        ------
        NoCompletedTrialError
            If no trial completed.
        """
        completed = [trial for trial in self.trials if trial.state == "complete"]
        if not completed:
            reasons = [f" Trial {trial.number}: {trial.failure}" for trial in self.trials if trial.failure][:1]
            if any(trial.state == "pruned" for trial in self.trials):
                reasons.append(" Let the pruner or scheduler leave some to their last ul step, as `max_t` may not.")
            raise NoCompletedTrialError(f"None of {len(self.trials)} finished trials completed." + "".join(reasons))
        sign = 1 if self.summary.mode == "min" else -1
        return min(completed, key=lambda trial: sign * (trial.value or 0.0))

    @property
    def interrupted(self) -> bool:
        """Whether the search ended before its trials and its time budget did."""
        return self.summary.interrupted

    @property
    def troubles(self) -> dict[str, list[int]]:
        """The numbers of the trials that did not learn as they should have, by the name of what was wrong."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.troubles)
        return {name: [trial.number for trial in self.trials if name in trial.troubles] for name in names}

    def annotate(self, **notes: Any) -> "SearchResult":
        """Return the result with ``notes`` added, such as a test score, in its folder and so in its report as well."""
        summary = dataclasses.replace(self.summary, notes={**self.summary.notes, **notes})
        return self.write(self.output, summary)

    @classmethod
    def write(cls, output: Path, summary: Summary) -> "SearchResult":
        """Write ``summary`` into the folder ``output``, and return what the folder then holds."""
        partial = output / f"{SUMMARY_FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(summary), indent=2))
        partial.replace(output / SUMMARY_FILE)
        return cls(output, summary, read_trials(output))


def load_search(output: str | Path) -> SearchResult:
    """Return the search in the folder ``output``.

    Raises
    ------
    InvalidValueError
        If the folder holds none.
    """
    folder = Path(output)
    try:
        summary = Summary(**json.loads((folder / SUMMARY_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidValueError(f"`output` {str(folder)!r} holds no finished search: {error}") from error
    return SearchResult(folder, summary, read_trials(folder))


def earlier_seconds(folder: Path) -> float:
    """Return how long the calls took that the folder's search has had so far."""
    try:
        return load_search(folder).summary.seconds
    except InvalidValueError:
        return 0.0


class TrialsFile:
    """The list of finished trials in a search's folder, one JSON object a line, which several workers may add to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TRIALS_FILE
        self._read = 0  # bytes
        self._numbers: set[int] = set()

    def numbers(self) -> set[int]:
        """Return the numbers of the trials in it."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read += len(whole)
            self._numbers |= {row["number"] for row in _rows(whole.decode())}
        return self._numbers

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add finished trials.

        Parameters
        ----------
        rows : iterable of dict
            The fields of :class:`TrialResult`; ``checkpoint`` is a list of patterns below the folder, since an engine
            may write the file later.
        """
        with self._path.open("a") as file:
            for row in rows:
                # It starts with a line break so that a line cut short by a kill spoils no other.
                file.write("\n" + json.dumps(row, default=number_or_text) + "\n")
                self._numbers.add(row["number"])


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # empty, or cut short
            continue


def number_or_text(value: object) -> int | float | str:
    """Return ``value``, which JSON does not know, as a number if it is one, such as NumPy's, or as text."""
    match value:
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
    return str(value)


def read_trials(folder: Path) -> list[TrialResult]:
    """Return the folder's list of finished trials, by number."""
    path = folder / TRIALS_FILE
    trials = {}
    for row in _rows(path.read_text() if path.exists() else ""):
        patterns = [row["checkpoint"]] if isinstance(row["checkpoint"], str) else row["checkpoint"] or []
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        trials[row["number"]] = TrialResult(**{**row, "checkpoint": files[-1] if files else None})
    return [trials[number] for number in sorted(trials)]
