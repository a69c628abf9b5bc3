"""``search`` as a whole, on Optuna; what holds on both engines is in ``engines/test_contract.py``."""

import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler

from tests.support import toy
from tests.support.toy import Interrupting, PruneAt, run, study_in
from tune_implicit import InvalidTypeError, InvalidValueError, Progress, StorageError, load_search


def test_a_search_runs_its_trials_and_stays_in_its_folder(output: Path) -> None:
    seen: list[Progress] = []
    result = run(output, on_progress=seen.append)
    assert [trial.state for trial in result.trials] == ["complete"] * 3
    assert [(p.finished, p.n_trials) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1].best == result.best.value == min(trial.value for trial in result.trials)
    assert seen[-1].remaining_s == 0
    assert all(p.elapsed_s >= 0 and p.remaining_s is not None for p in seen)
    assert not result.interrupted
    assert load_search(output) == result
    assert result.trials[0].config == {**toy.SETTINGS, **study_in(output).trials[0].params}
    assert all(trial.started_s <= trial.ended_s for trial in result.trials)


def test_settings_hold_in_every_trial(output: Path) -> None:
    result = run(output, settings={**toy.SETTINGS, "ul_steps": 2})
    assert {trial.metrics["ul_step"] for trial in result.trials} == {2}


UNSEEDED = {name: value for name, value in toy.SETTINGS.items() if name != "seed"}


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    one, other, third = (run(tmp_path / str(i), seed=seed, settings=UNSEEDED) for i, seed in enumerate((0, 0, 1)))
    assert [(trial.config, trial.value) for trial in one.trials] == [(t.config, t.value) for t in other.trials]
    assert len({trial.config["seed"] for trial in (*one.trials, *third.trials)}) == 6
    assert one.trials[0].config["k"] != third.trials[0].config["k"] or one.best.value != third.best.value


def test_a_seed_in_the_settings_stands(output: Path) -> None:
    assert run(output, 1, seed=3, settings={**toy.SETTINGS, "seed": 5}).trials[0].config["seed"] == 5


def test_mode_max_takes_the_largest(output: Path) -> None:
    seen: list[Progress] = []
    result = run(output, metric="error", mode="max", on_progress=seen.append)
    assert result.best.value == max(trial.metrics["error"] for trial in result.trials) == seen[-1].best


def test_more_trials_on_resume(output: Path) -> None:
    first = run(output, 2, seed=0)
    more = run(output, 4, resume=True, seed=0)
    assert more.trials[:2] == first.trials
    assert [trial.number for trial in more.trials] == [0, 1, 2, 3]
    # The seed does not propose the first trials once more.
    assert len({trial.config["ll_learning_rate"] for trial in more.trials}) == 4


def test_a_search_that_is_done_runs_nothing_on_resume(output: Path) -> None:
    first = run(output)
    factory = Interrupting(at=1)
    assert run(output, resume=True, problem=factory).trials == first.trials
    assert factory.calls == 0


def test_resume_of_nothing_begins(output: Path) -> None:
    assert len(run(output, 2, resume=True).trials) == 2


def test_a_seed_of_the_settings_is_that_of_every_trial(output: Path) -> None:
    assert {trial.config["seed"] for trial in run(output, seed=1, settings=toy.SETTINGS | {"seed": 7}).trials} == {7}


def test_the_seed_of_a_search_is_kept(output: Path) -> None:
    run(output, 1)
    seed = study_in(output).user_attrs["seed"]
    run(output, 2, resume=True)
    assert study_in(output).user_attrs["seed"] == seed


def test_a_mistake_after_a_trial_completed_is_recorded(output: Path) -> None:
    result = run(output, problem=Interrupting(2, toy.MistakeError))
    assert [trial.state for trial in result.trials] == ["complete", "failed", "complete"]
    assert result.trials[1].failure == "It raised MistakeError: pressed (see errors/trial_1.txt)"
    assert "MistakeError" in (output / "errors" / "trial_1.txt").read_text()


def test_three_mistakes_at_the_start_are_raised_even_where_they_are_recorded(output: Path) -> None:
    with pytest.raises(toy.MistakeError):
        run(output, 9, space=toy.faulty("mistake"), on_error="record")
    assert [trial.state for trial in load_search(output).trials] == ["failed"] * 2


def test_a_trial_that_hangs_is_ended(output: Path) -> None:
    def hanging(config: Any) -> Any:
        if not (output / "hung").exists():
            (output / "hung").touch()
            time.sleep(60)
        return toy.problem(config)

    result = run(output, 2, problem=hanging, trial_timeout_s=3.0)
    assert [trial.state for trial in result.trials] == ["failed", "complete"]
    assert result.trials[0].failure == "The trial took longer than `trial_timeout_s`, 3 s, and was ended."


def test_trials_start_from_learned_ul_values(tmp_path: Path) -> None:
    learned = run(tmp_path / "a", 1).best.ul_state
    still = toy.SETTINGS | {"ul_learning_rate": 0.0}
    begun = run(tmp_path / "b", 1, initial_ul_state=learned, settings=still).best.ul_state
    assert torch.equal(begun["log_l2"], learned["log_l2"])


def test_a_mistake_is_raised_and_the_next_call_begins_afresh(tmp_path: Path) -> None:
    space = {**toy.SPACE, "ul_learning_rat": IntDistribution(1, 2)}
    with pytest.raises(InvalidValueError, match="did you mean 'ul_learning_rate'"):
        run(tmp_path / "s", space=space, seed=0)
    mended = run(tmp_path / "s", seed=0)
    assert [trial.number for trial in mended.trials] == [0, 1, 2]
    never_wrong = run(tmp_path / "other", seed=0)
    assert [trial.value for trial in mended.trials] == [trial.value for trial in never_wrong.trials]


def test_a_mistake_after_trials_finished_keeps_them(output: Path) -> None:
    with pytest.raises(toy.MistakeError):
        run(output, problem=Interrupting(2, toy.MistakeError), on_error="raise")
    with pytest.raises(InvalidValueError, match="already holds a search"):
        run(output)
    resumed = run(output, resume=True)
    assert [trial.state for trial in resumed.trials] == ["complete"] * 3
    assert resumed.trials[0].number == 0


def test_nothing_is_left_running_however_a_search_ends(output: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(output, on_progress=lambda progress: 1 / 0)
    assert TrialState.RUNNING not in {trial.state for trial in study_in(output).trials}


def test_a_time_budget_starts_no_trial_later(output: Path) -> None:
    seen: list[Progress] = []
    result = run(output, 100_000, time_budget_s=0.5, on_progress=seen.append)
    assert 0 < len(result.trials) < 100_000
    assert not result.interrupted  # it ended as it was asked to
    assert all(p.remaining_s <= 0.5 for p in seen)


def test_the_study_can_be_anywhere(output: Path) -> None:
    storage = InMemoryStorage()
    run(output, 2, storage=storage)
    assert len(optuna.load_study(storage=storage, study_name="found").trials) == 2
    assert len(run(output, 3, storage=storage, resume=True).trials) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "dask"}, InvalidValueError, "`backend` must be one of ray, optuna, got 'dask'"),
        ({"n_trials": 0}, InvalidValueError, "`n_trials` must be 1 or more, got 0"),
        ({"time_budget_s": 0}, InvalidValueError, "`time_budget_s` must be positive"),
        ({"time_budget_s": math.nan}, InvalidValueError, "`time_budget_s` must be positive"),
        ({"cpus_per_trial": 0}, InvalidValueError, "`cpus_per_trial` and `gpus_per_trial` must be .* got 0 and 0"),
        ({"gpus_per_trial": -1}, InvalidValueError, "got 1 and -1"),
        ({"backend": "ray", "pruner": PruneAt(2)}, InvalidValueError, "Ray Tune stops trials by a `scheduler`"),
        ({"scheduler": ASHAScheduler()}, InvalidValueError, "Optuna stops trials by a `pruner`"),
        ({"mode": "best"}, InvalidValueError, '`mode` must be "min" or "max"'),
        ({"space": {}}, InvalidValueError, "must name at least one setting"),
        ({"space": 3}, InvalidTypeError, "must be a dict of Optuna distributions or a callable"),
        ({"storage": "sqlite:////no/folder/s.db"}, StorageError, "cannot be opened"),
        ({"metric": "accuracy"}, InvalidValueError, "'accuracy' is reported by no one"),
        (
            {"settings": {"k": -1, "ul_steps": 0}, "space": {"rtol": IntDistribution(1, 2)}},
            InvalidValueError,
            "`k`.*`ul_steps`",
        ),
        ({"problem": lambda config: None}, InvalidTypeError, "must return a BilevelProblem, got NoneType"),
    ],
)
def test_a_wrong_argument_is_told(output: Path, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(output, **arguments)


def test_the_global_random_state_is_left_as_it_was(output: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    run(output, 1, seed=7)
    assert torch.equal(torch.rand(2), expected)
