"""The names we borrow of Ray are there. None of them needs a Ray that runs."""

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from ray import tune
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.search.optuna import OptunaSearch

from tests.support.toy import MistakeError
from tune_implicit.searches.engines.ray_tune.borrowed import (
    REPEAT,
    RESULT_KEYS,
    SAVE_NOW,
    completed_trials,
    files_in,
    filesystem_of,
    is_client,
    raised_by,
    study_of,
    trials_of,
)


class Tiny(tune.Trainable):
    def step(self) -> dict[str, Any]:
        return {"loss": 0.5, "timesteps_this_iter": 1, "episodes_this_iter": 1}


@pytest.mark.filterwarnings("ignore:This API is deprecated:DeprecationWarning")  # Ray 2.52's own loggers
def test_all_that_tune_adds_to_a_result_is_known() -> None:
    tiny = Tiny({"k": 3})
    tiny.train()
    result = tiny.train()
    tiny.stop()
    assert len(result) > 10
    assert set(result) - RESULT_KEYS == {"loss", "timesteps_this_iter", "episodes_this_iter"}


def test_what_tune_is_asked_and_asks_by_name() -> None:
    assert (REPEAT, SAVE_NOW) == ("__trial_index__", "should_checkpoint")
    assert SAVE_NOW in RESULT_KEYS


def test_this_process_is_no_client() -> None:
    assert not is_client()


@pytest.mark.parametrize("begin", ["", "file://"])
def test_files_are_found_by_path_and_uri(tmp_path: Path, begin: str) -> None:
    (tmp_path / "one").write_bytes(b"held")
    (tmp_path / "two").mkdir()
    filesystem, folder = filesystem_of(f"{begin}{tmp_path}")
    assert sorted(files_in(filesystem, folder)) == ["one", "two"]
    with filesystem.open_input_stream(f"{folder}/one") as file:
        assert file.read() == b"held"
    assert files_in(filesystem, f"{folder}/three") == []
    assert filesystem_of("any/path", filesystem) == (filesystem, "any/path")


def test_a_searchers_study_and_trials_are_there() -> None:
    searcher = OptunaSearch({"k": IntDistribution(1, 8)}, metric="loss", mode="min")
    assert (trials_of(searcher), completed_trials(searcher)) == ({}, set())
    config = searcher.suggest("a")
    (trial,) = study_of(searcher).trials
    assert trial.params == trials_of(searcher)["a"].params == config
    assert trial.state is TrialState.RUNNING
    assert completed_trials(searcher) == set()
    searcher.on_trial_complete("a", {"loss": 0.5})
    assert completed_trials(searcher) == {"a"}
    assert study_of(searcher).trials[0].value == 0.5


def test_a_searcher_leaves_alone_a_trial_marked_as_completed() -> None:
    searcher = OptunaSearch({"k": IntDistribution(1, 8)}, metric="loss", mode="min")
    searcher.suggest("a")
    completed_trials(searcher).add("a")
    searcher.on_trial_complete("a", {"loss": 0.5})
    assert study_of(searcher).trials[0].state is TrialState.RUNNING


# ---- what a trial raised


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayTrial:
    """A trial of Tune's whose folder is there."""
    monkeypatch.setattr(RayTrial, "local_path", str(tmp_path))
    return RayTrial("Tiny", stub=True)


def task_error() -> RayTaskError:
    error = MistakeError("the factory is wrong")
    return RayTaskError("train", f"Traceback ...\nMistakeError: {error}", error, pid=1, ip="127.0.0.1")


def test_a_trial_without_an_error_has_raised_nothing(trial: RayTrial) -> None:
    assert raised_by(trial) is None


def test_what_a_trial_raised_is_read_with_its_cause(trial: RayTrial) -> None:
    trial.handle_error(task_error())
    error = raised_by(trial)
    assert isinstance(error, RayTaskError)
    assert isinstance(error.cause, MistakeError)
    assert str(error.cause) == "the factory is wrong"


@pytest.mark.parametrize("error", [RayActorError(), ActorDiedError()], ids=["lost", "died"])
def test_a_worker_that_died_has_raised_nothing(trial: RayTrial, error: Exception) -> None:
    trial.handle_error(error)
    assert Path(trial.pickled_error_file).exists()
    assert raised_by(trial) is None


def test_a_worker_that_cannot_even_begin_has_raised_why(trial: RayTrial) -> None:
    trial.handle_error(ActorDiedError(task_error()))
    assert "the factory is wrong" in str(raised_by(trial))
