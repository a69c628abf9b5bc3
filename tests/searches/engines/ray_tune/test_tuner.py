"""``search`` on Ray Tune: what no other engine does; the rest is in ``engines/test_contract.py``."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError

from tests.support import toy
from tests.support.toy import InTurn, run, study_in
from tune_implicit import ImplicitOptunaSearch, LearningWarning
from tune_implicit.searches.engines.base import Work
from tune_implicit.searches.engines.ray_tune import tuner
from tune_implicit.searches.failures import Failures
from tune_implicit.searches.leases import Leases
from tune_implicit.searches.queue import TrialQueue

pytestmark = pytest.mark.usefixtures("ray_session")


def test_search_goes_on_after_a_trial_whose_worker_dies_each_time(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that dies once is started again, one that dies twice no more.
    monkeypatch.setattr(tuner, "MAX_WORKER_FAILURES", 1)

    def problem(config: Any) -> Any:
        deaths = output / f"{config['fault']} deaths"
        if config["fault"] == "death" or (config["fault"] == "one death" and not deaths.exists()):
            with deaths.open("a") as file:
                file.write("+")
            os._exit(1)
        return toy.problem(config)

    space = {"fault": CategoricalDistribution(["death", "one death", "none"])}
    found = run(output, 3, backend="ray", problem=problem, space=space, sampler=InTurn())
    assert [trial.state for trial in found.trials] == ["failed", "complete", "complete"]
    assert not found.interrupted
    assert "lost its worker" in found.trials[0].failure
    assert (output / "death deaths").read_text() == "++"
    assert found.trials[1].value == found.trials[2].value


def test_trials_that_run_when_the_time_is_over_are_put_back(output: Path) -> None:
    endless = toy.SETTINGS | {"ul_steps": 10**9}
    found = run(output, 2, backend="ray", settings=endless, time_budget_s=3)
    assert not found.interrupted  # it ended as it was asked to
    assert found.trials == []
    trials = study_in(output).trials
    assert trials
    assert {trial.state for trial in trials} == {TrialState.WAITING}


def test_a_trial_that_hangs_is_ended_with_its_worker(output: Path) -> None:
    def problem(config: Any) -> Any:
        if config["fault"] == "hang":
            time.sleep(600)
        return toy.problem(config)

    space = {"fault": CategoricalDistribution(["hang", "none"])}
    found = run(output, 2, backend="ray", problem=problem, space=space, sampler=InTurn(), trial_timeout_s=3.0)
    assert [trial.state for trial in found.trials] == ["failed", "complete"]
    assert found.trials[0].failure == "The trial took longer than `trial_timeout_s`, 3 s, and was ended."


def raised_with(error: Exception, output: Path, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """Return what a run raises whose watcher has seen ``error``."""

    def seen(self: Any, searcher: Any, watcher: Any, *arguments: Any) -> Any:
        return SimpleNamespace(fit=lambda: setattr(watcher, "error", error))

    monkeypatch.setattr(tuner.RayEngine, "_tuner", seen)
    failures, study = Failures(None, output), optuna.create_study(study_name="s")
    work = Work(toy.problem, toy.SPACE, None, toy.SETTINGS, "select_loss", "min", output, 0, failures, lambda run: [])
    with Leases(study) as leases, pytest.raises(Exception, match="wrong") as caught:
        tuner.RayEngine(work).run(TrialQueue(study, 1, leases), None, lambda: None)
    return caught.value


def test_what_a_trial_raised_is_raised_and_comes_from_the_workers_traceback(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = toy.MistakeError("the factory is wrong")
    remote = RayTaskError("train", "Traceback ...", mistake, pid=1, ip="127.0.0.1")
    raised = raised_with(remote, output, monkeypatch)
    assert (raised, raised.__cause__) == (mistake, remote)


def test_what_keeps_a_worker_from_beginning_is_raised(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = toy.MistakeError("the path is wrong")
    remote = RayTaskError("__init__", f"Traceback ...\n{mistake}", mistake, pid=1, ip="127.0.0.1")
    died = ActorDiedError(remote)
    assert raised_with(died, output, monkeypatch) is died


def test_a_listener_of_this_process_is_not_pickled_with_the_trials() -> None:
    lock = threading.Lock()
    watcher = tuner._Watcher(lambda: lock.locked(), ImplicitOptunaSearch(toy.SPACE))
    with pytest.raises(TypeError, match="cannot pickle"):
        cloudpickle.dumps(lock)
    copy = cloudpickle.loads(cloudpickle.dumps(watcher))
    copy.on_trial_complete(1, [], SimpleNamespace(last_result={"selected_on": "validate_data"}))
    failed = SimpleNamespace(last_result={"troubles": "failed", "failure": "The ll loss became nan."})
    with pytest.warns(LearningWarning, match="The ll loss became nan"):
        copy.on_trial_complete(1, [], failed)
