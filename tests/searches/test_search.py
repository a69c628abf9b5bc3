"""``search``, mostly on Optuna; what Ray does with it is in ``adapters/test_ray_tune.py``."""

import json
import math
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
from tests.support.toy import PruneAt, run
from tune_implicit import (
    CheckpointError,
    InvalidTypeError,
    InvalidValueError,
    NoCompletedTrialError,
    Progress,
    StorageError,
    load_search,
)
from tune_implicit.searches.outcome import CUT_OFF
from tune_implicit.searches.study import open_storage


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "found"


def study_in(output: Path, storage: Any = None) -> optuna.Study:
    return optuna.load_study(storage=open_storage(storage or str(output / "study.journal")), study_name=output.name)


class Interrupting:
    """A factory whose n-th call presses Ctrl-C, or raises another error."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.calls, self.configs = at, error, 0, []

    def __call__(self, config: Any, data: Any = None) -> Any:
        self.calls += 1
        self.configs.append(dict(config))
        if self.calls == self.at:
            raise self.error("pressed")
        return toy.problem(config)


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


def test_the_best_ul_values_load_into_the_model(output: Path) -> None:
    result = run(output)
    problem = toy.problem(result.best.config)
    problem.ul_model.load_state_dict(result.best.ul_state)
    problem.ll_model.load_state_dict(result.best.ll_state)
    assert result.best.history[-1]["select_loss"] == result.best.value
    assert result.best.history[-1]["ul_quantiles"]["log_l2"][0] == problem.ul_model.log_l2.item()
    assert problem.ul_model.log_l2.item() != -3.0


def test_settings_hold_in_every_trial(output: Path) -> None:
    result = run(output, settings={**toy.SETTINGS, "ul_steps": 2})
    assert {trial.metrics["ul_step"] for trial in result.trials} == {2}


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    one, other, third = (run(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert [(trial.config, trial.value) for trial in one.trials] == [(t.config, t.value) for t in other.trials]
    assert {trial.config["seed"] for trial in third.trials} == {1}
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


def test_an_output_already_used_is_an_error(output: Path) -> None:
    run(output, 1)
    with pytest.raises(InvalidValueError, match=r"already holds a search.*--resume"):
        run(output)


def test_ctrl_c_keeps_what_finished_and_resume_runs_the_interrupted_again(output: Path) -> None:
    factory = Interrupting(at=2)
    result = run(output, 4, problem=factory)
    assert result.interrupted
    assert [trial.number for trial in result.trials] == [0]
    assert load_search(output).interrupted
    assert [trial.state for trial in study_in(output).trials] == [TrialState.COMPLETE, TrialState.FAIL]
    resumed = run(output, 4, resume=True, problem=factory)
    assert not resumed.interrupted
    assert [trial.number for trial in resumed.trials] == [0, 2, 3, 4]
    assert factory.configs[2] == factory.configs[1]


def test_a_trial_interrupted_twice_is_queued_once_each_time(output: Path) -> None:
    factory = Interrupting(at=1)
    for at in (1, 2, 3):
        factory.at = at
        assert run(output, 1, resume=True, problem=factory).interrupted
    assert len(run(output, 1, resume=True, problem=factory).trials) == 1
    assert all(config == factory.configs[0] for config in factory.configs)
    assert factory.calls == 4


@pytest.mark.parametrize("storage", [None, "sqlite:///{}/s.db"])
def test_a_trial_left_running_by_a_kill_runs_again(output: Path, storage: str | None) -> None:
    storage = storage and storage.format(output.parent)
    run(output, 1, storage=storage)
    killed = study_in(output, storage).ask(toy.SPACE)  # no one will ever tell how it ended
    resumed = run(output, 2, resume=True, storage=storage)
    assert [trial.number for trial in resumed.trials] == [0, 2]
    assert {key: resumed.trials[1].config[key] for key in killed.params} == killed.params
    trial = study_in(output, storage).trials[1]
    assert (trial.state, trial.user_attrs["failure"]) == (TrialState.FAIL, CUT_OFF.failure)


def test_an_interrupted_trial_that_the_space_no_longer_has_is_not_run_again(output: Path) -> None:
    run(output, 1, problem=Interrupting(at=1), space={**toy.SPACE, "k": IntDistribution(100, 101)})
    result = run(output, 2, resume=True)
    assert [trial.state for trial in result.trials] == ["complete"] * 2
    assert all(trial.config["k"] <= 8 for trial in result.trials)


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
        run(output, problem=Interrupting(2, toy.MistakeError))
    with pytest.raises(InvalidValueError, match="already holds a search"):
        run(output)
    resumed = run(output, resume=True)
    assert [trial.state for trial in resumed.trials] == ["complete"] * 3
    assert resumed.trials[0].number == 0


def test_nothing_is_left_running_however_a_search_ends(output: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(output, on_progress=lambda progress: 1 / 0)
    assert TrialState.RUNNING not in {trial.state for trial in study_in(output).trials}


def test_failed_trials_count_and_keep_their_reason(output: Path) -> None:
    result = run(output, 6, space=toy.faulty("none", "nan"), sampler=optuna.samplers.RandomSampler(seed=0))
    assert len(result.trials) == 6
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    for trial in failed:
        assert trial.value is None
        assert "became nan" in trial.failure
        assert trial.config["fault"] == "nan"
    assert result.best.state == "complete"


def test_no_completed_trial_has_no_best(output: Path) -> None:
    result = run(output, 2, space=toy.faulty("nan"))
    with pytest.raises(
        NoCompletedTrialError, match=r"None of 2 finished trials completed\. Trial 0: The ll loss became"
    ):
        result.best  # noqa: B018
    assert not result.interrupted


def test_pruned_trials_are_told_and_are_never_the_best(output: Path) -> None:
    result = run(output, 2, pruner=PruneAt(2))
    assert [trial.state for trial in result.trials] == ["pruned"] * 2
    assert all(trial.value == trial.metrics["select_loss"] for trial in result.trials)
    with pytest.raises(NoCompletedTrialError, match="Let the pruner or scheduler leave some to their last ul step"):
        result.best  # noqa: B018


def test_a_time_budget_starts_no_trial_later(output: Path) -> None:
    seen: list[Progress] = []
    result = run(output, 100_000, time_budget_s=0.5, on_progress=seen.append)
    assert 0 < len(result.trials) < 100_000
    assert not result.interrupted  # it ended as it was asked to
    assert all(p.remaining_s <= 0.5 for p in seen)


def test_notes_are_in_the_folder(output: Path) -> None:
    result = run(output, 1).annotate(title="with ul steps").annotate(test_accuracy=0.5)
    assert result.summary.notes == {"title": "with ul steps", "test_accuracy": 0.5}
    assert load_search(output) == result


def test_a_line_cut_short_by_a_kill_spoils_no_other(output: Path) -> None:
    first = run(output, 2)
    path = output / "trials.jsonl"
    path.write_text(path.read_text()[:-40])
    assert [trial.number for trial in load_search(output).trials] == [0]
    assert run(output, 3, resume=True).trials[:2] == first.trials


def test_a_lost_list_is_written_anew_from_the_study(output: Path) -> None:
    first = run(output)
    (output / "trials.jsonl").unlink()
    assert run(output, resume=True).trials == first.trials


def test_a_lost_checkpoint_is_told(output: Path) -> None:
    result = run(output, 1)
    result.best.checkpoint.unlink()
    with pytest.raises(CheckpointError, match="Trial 0 has no checkpoint"):
        load_search(output).best.ul_state  # noqa: B018


@pytest.mark.parametrize("content", [None, "{", "[]", '{"backend": "ray"}'])
def test_a_folder_without_a_finished_search_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "search.json").write_text(content)
    with pytest.raises(InvalidValueError, match="holds no finished search"):
        load_search(tmp_path)


def test_the_study_can_be_anywhere(output: Path) -> None:
    storage = InMemoryStorage()
    run(output, 2, storage=storage)
    assert len(optuna.load_study(storage=storage, study_name="found").trials) == 2
    assert len(run(output, 3, storage=storage, resume=True).trials) == 3


def test_another_storage_for_the_same_folder_is_an_error(output: Path) -> None:
    run(output, 1)
    for resume in (False, True):
        with pytest.raises(InvalidValueError, match="a search that is not in this `storage`"):
            run(output, storage=InMemoryStorage(), resume=resume)


def test_two_folders_of_one_name_in_one_storage_are_an_error(tmp_path: Path) -> None:
    storage = InMemoryStorage()
    run(tmp_path / "a" / "found", 1, storage=storage)
    with pytest.raises(InvalidValueError, match="or `storage` one of the name 'found'"):
        run(tmp_path / "b" / "found", 1, storage=storage)


@pytest.mark.parametrize("changes", [{"mode": "max"}, {"metric": "error"}])
def test_a_resumed_search_compares_as_it_did(output: Path, changes: dict[str, str]) -> None:
    run(output, 1)
    with pytest.raises(InvalidValueError, match="Pass the same `metric` and `mode`, or another folder"):
        run(output, 2, resume=True, **changes)


def test_a_resumed_search_has_the_same_settings(output: Path) -> None:
    run(output, n_trials=1)
    with pytest.raises(InvalidValueError, match=r"holds other `settings`: k, ul_steps would change, from \[None, 6\]"):
        run(output, resume=True, settings=toy.SETTINGS | {"ul_steps": 8, "k": 2})
    assert len(run(output, resume=True, settings=toy.SETTINGS | {"seed": 3}).trials) == 3


def test_a_resumed_search_has_the_same_choices(output: Path) -> None:
    run(output, 1, space=toy.faulty("none", "nan"))
    with pytest.raises(InvalidValueError, match=r"Optuna does not mix the two\. Pass the same, or another folder"):
        run(output, 2, resume=True, space=toy.faulty("none"))
    # What Optuna can mix may change.
    assert len(run(output, 2, resume=True, space={"k": IntDistribution(1, 99)}).trials) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "dask"}, InvalidValueError, "`backend` must be one of ray, optuna, got 'dask'"),
        ({"n_trials": 0}, InvalidValueError, "`n_trials` must be 1 or more, got 0"),
        ({"time_budget_s": 0}, InvalidValueError, "`time_budget_s` must be positive"),
        ({"time_budget_s": math.nan}, InvalidValueError, "`time_budget_s` must be positive"),
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


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValueError, match="must be a folder that can be written to"):
        run(tmp_path / "file")


def test_a_search_writes_nothing_to_the_terminal(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    run(output, 6, space=toy.faulty("none", "nan"))
    with pytest.raises(toy.MistakeError):
        run(output.with_name("other"), space=toy.faulty("mistake"))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_the_global_random_state_is_left_as_it_was(output: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    run(output, 1, seed=7)
    assert torch.equal(torch.rand(2), expected)


def test_the_file_of_a_finished_trial_is_valid_json(output: Path) -> None:
    run(output, 2)
    rows = [json.loads(line) for line in (output / "trials.jsonl").read_text().splitlines() if line]
    assert [row["number"] for row in rows] == [0, 1]


def test_seconds_add_up_over_calls(tmp_path: Path) -> None:
    first = run(output=tmp_path / "found", n_trials=1)
    second = run(output=tmp_path / "found", n_trials=1, resume=True)
    assert second.summary.seconds > first.summary.seconds


def test_a_missing_select_data_is_told_once(output: Path) -> None:
    with pytest.warns(UserWarning, match=r"Without `select_data`.*Hold out a third split") as told:
        run(output, problem=toy.two_splits)
    assert len(told) == 1


@pytest.mark.parametrize("setting", [lambda x: x, float("nan")], ids=["function", "NaN"])
def test_a_setting_without_a_value_to_compare_is_no_other_search(output: Path, setting: Any) -> None:
    def problem(config: Any, data: Any = None) -> Any:
        return toy.problem({"activation": config["activation"]})

    settings = toy.SETTINGS | {"activation": setting}
    run(output, n_trials=1, problem=problem, settings=settings)
    assert len(run(output, n_trials=2, problem=problem, settings=settings, resume=True).trials) == 2
