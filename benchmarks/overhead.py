"""What a trial of ours costs beside an empty one: writes into the storage, and CPU milliseconds.

    python benchmarks/overhead.py [--trials 10] [--output FILE]

Both are told the same params and report as often; the empty trial reports and returns 0. The trial of ours is the toy
of the tests, its own training taken off: that is measured by a plain loop over `Trial`.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import torch
from common import Page, machine
from optuna.artifacts import FileSystemArtifactStore

from tests.support import toy
from tune_implicit import ImplicitObjective
from tune_implicit.searches import patience
from tune_implicit.searches.sampling import NumberedTPESampler
from tune_implicit.searches.study import open_storage
from tune_implicit.trials.trial import Trial

WRITES = ("create_new_trial", "set_trial_param", "set_trial_state_values", "set_trial_intermediate_value")
ATTRIBUTES = ("set_trial_user_attr", "set_trial_system_attr")
REPORTS = 3
TURNS = 5
NOTES = (
    "`benchmarks/overhead.py`, {machine}; medians of {turns} turns of {trials} trials.",
    "Each trial has two params and three reports, and takes less than a lease's third, after which each third costs a",
    "write more. *Empty* is Optuna's own ask, report and tell. *search* is `tune_implicit.search` on Optuna;",
    "*ImplicitObjective* writes each metric as an attribute of its own as well. CPU ms are those beyond the training",
    "itself, measured in the same turn.",
)


class Counting:
    """Count the writes that a storage gets."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._ask = patience._Patient._ask

    def __enter__(self) -> "Counting":
        counts, ask = self.counts, self._ask

        def counted(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            counts[name] += name in (*WRITES, *ATTRIBUTES)
            return ask(self, name, *args, **kwargs)

        patience._Patient._ask = counted
        return self

    def __exit__(self, *error: object) -> None:
        patience._Patient._ask = self._ask


def empty(folder: Path, storage: str, trials: int) -> None:
    opened = patience.patient(open_storage(storage))
    study = optuna.create_study(storage=opened, study_name="empty", sampler=NumberedTPESampler(0))
    for _ in range(trials):
        trial = study.ask(toy.SPACE)
        for step in range(REPORTS):
            trial.report(0.0, step)
            trial.should_prune()
        study.tell(trial, 0.0)


def searched(folder: Path, storage: str, trials: int) -> None:
    toy.run(folder / "searched", trials, storage=storage, seed=0)


def objective(folder: Path, storage: str, trials: int) -> None:
    opened = patience.patient(open_storage(storage))
    study = optuna.create_study(storage=opened, study_name="objective", sampler=NumberedTPESampler(0))
    (folder / "saved").mkdir()
    store = FileSystemArtifactStore(folder / "saved")
    study.optimize(ImplicitObjective(toy.problem, toy.SPACE, settings=toy.SETTINGS, artifact_store=store), trials)


def training(trials: int) -> float:
    """Return the CPU milliseconds of a trial that reports to no one."""
    start = time.process_time()
    for _ in range(trials):
        trial = Trial(toy.problem, toy.SETTINGS | toy.PARAMS)
        while not trial.completed:
            trial.advance()
    return (time.process_time() - start) / trials * 1e3


def cost(run: Any, kind: str, trials: int) -> tuple[float, float]:
    """Return the writes of a trial, and its CPU milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage = f"sqlite:///{folder}/s.db" if kind == "SQLite" else str(folder / "s.journal")
        run(folder, storage, 1)  # what is done once
    with tempfile.TemporaryDirectory() as name, Counting() as counting:
        folder = Path(name)
        storage = f"sqlite:///{folder}/s.db" if kind == "SQLite" else str(folder / "s.journal")
        start = time.process_time()
        run(folder, storage, trials)
        return sum(counting.counts.values()) / trials, (time.process_time() - start) / trials * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    runs = {"empty": empty, "search": searched, "ImplicitObjective": objective}
    rows = []
    for kind in ("journal", "SQLite"):
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(TURNS):
            trained = training(arguments.trials)
            for name, run in runs.items():
                writes, ms = cost(run, kind, arguments.trials)
                costs[name].append((writes, ms if name == "empty" else ms - trained))
        for name, each in costs.items():
            writes, ms = (statistics.median(values) for values in zip(*each, strict=True))
            rows.append((kind, name, f"{writes:.1f}", f"{ms:.0f}"))
    page = Page()
    page.tell(*(note.format(machine=machine(), trials=arguments.trials, turns=TURNS) for note in NOTES), "")
    page.head("storage", "trial", "writes", "CPU ms")
    for row in rows:
        page.row(*row)
    if arguments.output is not None:
        page.write(arguments.output)


if __name__ == "__main__":
    main()
