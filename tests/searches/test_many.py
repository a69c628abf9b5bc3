"""Several processes on one study."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.support.toy import run, study_in
from tune_implicit import load_search
from tune_implicit.searches.leases import lease_of

WORKER = """
import sys, time
from pathlib import Path
from tests.support import toy

folder, storage, n_trials, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def problem(config):
    time.sleep(pause)
    return toy.problem(config)

toy.run(folder, n_trials, storage=storage, resume=True, problem=problem, lease_s=1.5, seed=0)
"""
ROOT = Path(__file__).parents[2]


def start(output: Path, storage: str, n_trials: int, pause: float = 0.0) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, str(output), storage, str(n_trials), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_processes_that_start_at_once_are_one_search(output: Path, kind: str) -> None:
    output.parent.mkdir(exist_ok=True)
    storage = f"sqlite:///{output.parent}/s.db" if kind == "sqlite" else str(output.parent / "s.journal")
    workers = [start(output, storage, 12) for _ in range(2)]
    for worker in workers:
        end(worker)
    trials = study_in(output, storage).trials
    # Two that ask at the same moment may begin one more.
    assert 12 <= len(trials) <= 13
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [trial.number for trial in load_search(output).trials] == [trial.number for trial in trials]
    assert max(Counter(str(trial.params) for trial in trials).values()) == 1


def test_one_that_joins_a_search_that_runs_harms_nobody(output: Path) -> None:
    storage = str(output.parent / "s.journal")
    first = start(output, storage, 8, pause=0.3)
    while not output.exists() or not Path(storage).exists() or not study_in_when_there(output, storage):
        time.sleep(0.05)
    run(output, 8, storage=storage, resume=True)
    end(first)
    trials = study_in(output, storage).trials
    assert 8 <= len(trials) <= 9
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def test_a_worker_that_was_stopped_past_its_lease_drops_its_trial(output: Path) -> None:
    storage = str(output.parent / "s.journal")
    stopped = start(output, storage, 3, pause=1.0)
    while not study_in_when_there(output, storage):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGSTOP)
    number = study_in(output, storage).trials[-1].number
    result = run(output, 3, storage=storage, resume=True, lease_s=1.5)
    assert [trial.state for trial in result.trials] == ["complete"] * 3
    taken = {trial.number: lease_of(trial).worker for trial in study_in(output, storage).trials}
    assert len(set(taken.values())) == 1
    stopped.send_signal(signal.SIGCONT)
    end(stopped)
    trials = study_in(output, storage).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    # The stopped worker has told nothing of the trial that it had.
    assert lease_of(trials[number]).worker == taken[number]


def study_in_when_there(output: Path, storage: str) -> bool:
    """Return whether the search in ``output`` has a trial by now."""
    try:
        return bool(study_in(output, storage).trials)
    except (KeyError, OSError):
        return False


def test_a_search_without_a_worker_left_goes_on_in_the_next(output: Path) -> None:
    storage = str(output.parent / "s.journal")
    killed = start(output, storage, 4, pause=0.5)
    while not study_in_when_there(output, storage):
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    result = run(output, 4, storage=storage, resume=True, seed=0)
    alone = run(output.parent / "alone" / output.name, 4, seed=0)
    assert [(t.number, t.config, t.value) for t in result.trials] == [
        (t.number, t.config, t.value) for t in alone.trials
    ]
