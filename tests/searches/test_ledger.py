"""Finished trials: counted, written to the folder once, told."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.support.toy import run
from tune_implicit import Progress, SearchResult
from tune_implicit.searches.ledger import Ledger
from tune_implicit.searches.outcome import CUT_OFF
from tune_implicit.searches.results import read_trials

INTERRUPTED = {"failure": CUT_OFF.failure, "interrupted": True}
BEGAN = datetime(2026, 1, 1)


def ended(
    value: float | None = 1.0, state: TrialState = TrialState.COMPLETE, second: int = 0, **attributes: Any
) -> FrozenTrial:
    """Return a trial of `k` = 3 that began at ``second`` and took one second."""
    trial = create_trial(
        state=state, value=value, params={"k": 3}, distributions={"k": IntDistribution(1, 8)}, user_attrs=attributes
    )
    trial.datetime_start = BEGAN + timedelta(seconds=second)
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=1) if state.is_finished() else None
    return trial


def study_of(*trials: FrozenTrial, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return study


def ledger_of(
    study: optuna.Study,
    folder: Path,
    n_trials: int = 3,
    time_budget_s: float | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Ledger:
    def settings_of(number: int) -> dict[str, int]:
        return {"k": 1, "ul_steps": 6}

    return Ledger(study, folder, settings_of, n_trials, time_budget_s, on_progress, lambda trial: [])


def numbers_in(folder: Path) -> list[int]:
    """Return the trials' numbers as they stand in the list, one written twice twice."""
    return [json.loads(line)["number"] for line in (folder / "trials.jsonl").read_text().splitlines() if line]


# ---- counted


def test_what_runs_or_waits_or_was_interrupted_has_not_finished(tmp_path: Path) -> None:
    study = study_of(
        ended(),
        ended(state=TrialState.PRUNED),
        ended(None, TrialState.FAIL, failure="diverged"),
        ended(None, TrialState.FAIL, **INTERRUPTED),
        ended(None, TrialState.RUNNING),
        ended(None, TrialState.WAITING),
    )
    ledger = ledger_of(study, tmp_path, n_trials=10)
    assert ledger.missing == 7
    ledger.update()
    assert [trial.number for trial in read_trials(tmp_path)] == [0, 1, 2]


def test_fewer_trials_than_there_are_leave_none_missing(tmp_path: Path) -> None:
    assert ledger_of(study_of(*[ended()] * 4), tmp_path, n_trials=3).missing == 0


# ---- written


def test_a_trial_is_written_once(tmp_path: Path) -> None:
    study = study_of(ended())
    ledger = ledger_of(study, tmp_path)
    ledger.update()
    study.add_trial(ended())
    ledger.update()
    ledger.update()
    ledger_of(study, tmp_path).update()  # of a resumed search
    assert numbers_in(tmp_path) == [0, 1]


def test_a_trial_is_written_with_how_it_ended(tmp_path: Path) -> None:
    study = study_of(
        ended(0.5, second=10, metrics={"select_loss": 0.5}),
        ended(0.7, TrialState.PRUNED, second=12),
        ended(None, TrialState.FAIL, second=14, failure="diverged"),
    )
    ledger_of(study, tmp_path).update()
    trials = read_trials(tmp_path)
    assert [trial.state for trial in trials] == ["complete", "pruned", "failed"]
    assert [trial.value for trial in trials] == [0.5, 0.7, None]
    assert [trial.failure for trial in trials] == [None, None, "diverged"]
    assert [trial.metrics for trial in trials] == [{"select_loss": 0.5}, {}, {}]
    # Since the first trial began.
    assert [(trial.started_s, trial.ended_s) for trial in trials] == [(0, 1), (2, 3), (4, 5)]


def test_a_trials_config_is_what_the_search_picked_over_the_settings(tmp_path: Path) -> None:
    # Where a define-by-run space returned a config, that stands, and its params do not.
    ledger_of(study_of(ended(), ended(config={"layers": [1, 2]})), tmp_path).update()
    picked, returned = (trial.config for trial in read_trials(tmp_path))
    assert picked == {"k": 3, "ul_steps": 6}
    assert returned == {"k": 1, "ul_steps": 6, "layers": [1, 2]}


def test_a_trial_is_written_with_where_its_engine_saved_it(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "a").touch()
    study = study_of(ended(checkpoint="a"), ended())

    def saved_at(trial: FrozenTrial) -> list[str]:
        return [f"saved/{trial.user_attrs['checkpoint']}"] if trial.user_attrs else []

    Ledger(study, tmp_path, lambda number: {}, 2, None, None, saved_at).update()
    assert [trial.checkpoint for trial in read_trials(tmp_path)] == [tmp_path / "saved" / "a", None]


def test_a_lost_list_is_written_anew_from_the_study(output: Path) -> None:
    first = run(output)
    (output / "trials.jsonl").unlink()
    assert run(output, resume=True).trials == first.trials


# ---- told


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1.0), ("maximize", 3.0)])
def test_the_best_is_that_of_the_completed_by_the_studys_direction(tmp_path: Path, direction: str, best: float) -> None:
    told: list[Progress] = []
    trials = [ended(2.0), ended(1.0), ended(3.0), ended(0.5, TrialState.PRUNED), ended(3.5, TrialState.PRUNED)]
    ledger_of(study_of(*trials, direction=direction), tmp_path, on_progress=told.append).update()
    assert [(progress.finished, progress.best) for progress in told] == [(5, best)]


def test_there_is_no_best_before_a_trial_completed(tmp_path: Path) -> None:
    told: list[Progress] = []
    study = study_of(ended(None, TrialState.FAIL), ended(1.0, TrialState.PRUNED))
    ledger_of(study, tmp_path, on_progress=told.append).update()
    assert told[0].best is None


def test_how_the_finished_trials_learned_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    metrics = {"ul_step": 10, "skipped_ul_steps": 5, "fallback_ul_steps": 1, "troubles": "skipped lagging"}
    trials = [
        ended(metrics=metrics),
        ended(state=TrialState.PRUNED, metrics={"ul_step": 30, "skipped_ul_steps": 0, "troubles": ""}),
        ended(None, TrialState.FAIL, metrics={"ul_step": 10, "skipped_ul_steps": 0, "troubles": "failed"}),
        ended(),  # of version 0.2, which told nothing of it
    ]
    ledger_of(study_of(*trials), tmp_path, on_progress=told.append).update()
    assert [(progress.skipped, progress.fallback, progress.troubled) for progress in told] == [(5 / 50, 1 / 50, 2)]


def test_nothing_new_is_not_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    ledger = ledger_of(study_of(), tmp_path, on_progress=told.append)
    ledger.update()
    assert not told


def test_the_estimate_of_a_resumed_search_rests_on_what_it_has_done_itself(tmp_path: Path) -> None:
    told: list[Progress] = []
    study = study_of(ended())
    ledger = ledger_of(study, tmp_path, n_trials=2, on_progress=told.append)
    ledger.update()  # the trial of an earlier call, whose list was lost
    study.add_trial(ended())
    ledger.update()
    assert [(progress.finished, progress.n_trials, progress.remaining_s) for progress in told] == [
        (1, 2, None),
        (2, 2, 0.0),
    ]


def test_no_more_time_is_left_than_the_budget_has(tmp_path: Path) -> None:
    told: list[Progress] = []
    study = study_of()
    ledger = ledger_of(study, tmp_path, n_trials=10**9, time_budget_s=1e-9, on_progress=told.append)
    study.add_trial(ended())
    ledger.update()
    assert told[0].remaining_s == 0


# ---- summed up


@pytest.mark.parametrize(
    ("n_trials", "time_budget_s", "interrupted"),
    [(1, None, False), (2, None, True), (2, 1e9, True), (2, 1e-9, False)],
)
def test_a_search_was_interrupted_that_has_neither_all_trials_nor_used_its_time(
    tmp_path: Path, n_trials: int, time_budget_s: float | None, interrupted: bool
) -> None:
    summary = ledger_of(study_of(ended()), tmp_path, n_trials, time_budget_s).summary("optuna", "select_loss", "min")
    assert (summary.backend, summary.metric, summary.mode, summary.n_trials) == (
        "optuna",
        "select_loss",
        "min",
        n_trials,
    )
    assert summary.interrupted is interrupted


def test_seconds_add_up_over_calls(output: Path) -> None:
    first = run(output, 1)
    SearchResult.write(output, replace(first.summary, seconds=1000.0))
    assert run(output, 2, resume=True).summary.seconds > 1000.0
