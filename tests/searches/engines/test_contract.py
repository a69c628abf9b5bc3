"""What both engines promise."""

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler

from tests.support import toy
from tests.support.toy import InTurn, run, study_in
from tune_implicit import (
    ImplicitObjective,
    ImplicitOptunaSearch,
    InvalidTypeError,
    InvalidValueError,
    LearningWarning,
    Progress,
    SearchResult,
    load_search,
)

OTHER = {"optuna": "ray", "ray": "optuna"}
# The trials of the search that most tests look at, by number. The one that is stopped learns fastest.
FAULTS = ("none", "nan", "stopped", "indefinite")
RATES = (0.01, 0.02, 0.2, 0.03)
NONE, NAN, STOPPED, INDEFINITE = range(4)


class StopOnOptuna(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.params["fault"] == "stopped"


class StopOnRay(FIFOScheduler):
    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        return self.STOP if trial.config["fault"] == "stopped" else self.CONTINUE


def in_turn(**choices: Any) -> dict[str, Any]:
    """Return the arguments of a search whose trials have one of the ``choices`` after the other, one at a time."""
    space = {name: CategoricalDistribution(values) for name, values in choices.items()}
    return {"space": space, "sampler": InTurn(), "max_concurrent_trials": 1}


class Searched(NamedTuple):
    result: SearchResult
    told: list[Progress]

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those in the study."""
        return study_in(self.result.output).trials


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Searched]:
    """Search on a backend, once."""

    @cache
    def search_on(backend: str) -> Searched:
        told: list[Progress] = []
        stop = {"pruner": StopOnOptuna()} if backend == "optuna" else {"scheduler": StopOnRay()}
        arguments = in_turn(fault=FAULTS, ll_learning_rate=RATES) | stop | {"on_progress": told.append}
        with pytest.warns(LearningWarning):
            return Searched(run(tmp_path_factory.mktemp(backend) / "found", 4, backend=backend, **arguments), told)

    return search_on


@pytest.fixture
def found(searched: Callable[[str], Searched], backend: str) -> Searched:
    return searched(backend)


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is written to the terminal, and what writes there is as it was."""
    before = optuna.logging.get_verbosity()
    with caplog.at_level(logging.WARNING):
        yield
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert optuna.logging.get_verbosity() == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C does what it does in a process that a terminal started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressing:
    """A factory that presses Ctrl-C, for the process that made it, in a trial whose fault is that."""

    def __init__(self) -> None:
        self.searching = os.getpid()

    def __call__(self, config: Any, data: Any = None) -> Any:
        if config["fault"] == "pressed":
            os.kill(self.searching, signal.SIGINT)
        return toy.problem(config)


def proposed(backend: str, space: Any) -> tuple[dict[str, Any], FrozenTrial]:
    """Return the config that a trial gets from ``space``, settings apart, and the trial in its study."""
    if backend == "ray":
        searcher = ImplicitOptunaSearch(space)
        return searcher.suggest("a"), searcher.study.trials[0]
    seen = {}

    def problem(config: Any) -> Any:
        seen.update(config)
        return toy.problem(config)

    study = optuna.create_study()
    study.optimize(ImplicitObjective(problem, space, settings=toy.SETTINGS), n_trials=1)
    return {name: value for name, value in seen.items() if name not in toy.SETTINGS}, study.trials[0]


class TestEngine:
    # ---- a search's trials

    def test_a_trial_completes_with_its_value_and_metrics(self, found: Searched) -> None:
        trial, told = found.trials[NONE], found.result.trials[NONE]
        metrics = trial.user_attrs["metrics"]
        assert (trial.state.name, told.state) == ("COMPLETE", "complete")
        assert trial.value == told.value == metrics["select_loss"]
        assert metrics["completed"] is True
        assert {"validate_loss", "error", "hvps", "solver_status", "gradient_evaluations"} <= set(metrics)
        assert told.metrics == metrics
        assert told.config == toy.SETTINGS | {"fault": "none", "ll_learning_rate": 0.01}
        assert not {"failure", "config"} & set(trial.user_attrs)  # its params are its config

    def test_every_record_is_reported_at_its_ul_step(self, found: Searched) -> None:
        trial = found.trials[NONE]
        assert list(trial.intermediate_values) == [2, 4, 5]
        assert trial.intermediate_values[5] == trial.value

    def test_a_trial_that_diverges_keeps_its_reason_and_the_search_goes_on(self, found: Searched) -> None:
        trial, told = found.trials[NAN], found.result.trials[NAN]
        assert (trial.state.name, told.state, told.value) == ("FAIL", "failed", None)
        assert told.failure == trial.user_attrs["failure"]
        assert "The ll loss became nan" in told.failure
        assert [trial.number for trial in found.result.trials] == [0, 1, 2, 3]
        assert not found.result.interrupted

    def test_a_stopped_trial_is_pruned_at_its_last_value_and_never_the_best(self, found: Searched) -> None:
        trial, told = found.trials[STOPPED], found.result.trials[STOPPED]
        assert (trial.state.name, told.state) == ("PRUNED", "pruned")
        assert trial.intermediate_values == {2: told.value}
        assert trial.value == told.value == told.metrics["select_loss"]
        assert told.metrics["ul_step"] == 2
        assert told.failure is None
        assert told.value < found.result.best.value
        assert found.result.best.number == NONE

    def test_no_number_in_a_study_is_nan(self, found: Searched) -> None:
        numbers = [value for trial in found.trials for value in trial.user_attrs["metrics"].values()]
        numbers += [value for trial in found.trials for value in trial.intermediate_values.values()]
        numbers += [trial.value for trial in found.trials if trial.state.name != "FAIL"]
        assert len(numbers) > 50
        assert all(math.isfinite(number) for number in numbers if not isinstance(number, str))

    def test_progress_is_told_after_each_trial(self, found: Searched) -> None:
        assert [(told.finished, told.n_trials) for told in found.told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert {told.best for told in found.told} == {found.result.trials[NONE].value}

    def test_every_trial_is_saved_in_the_searchs_folder_and_the_best_loads(self, found: Searched) -> None:
        assert all(trial.checkpoint.is_relative_to(found.result.output) for trial in found.result.trials)
        best = load_search(found.result.output).best
        problem = toy.problem(best.config)
        problem.ul_model.load_state_dict(best.ul_state)
        problem.ll_model.load_state_dict(best.ll_state)
        assert best.history[-1]["select_loss"] == best.value
        assert best.history[-1]["ul_quantiles"]["log_l2"][0] == problem.ul_model.log_l2.min().item() != -3.0

    # ---- its end

    @pytest.mark.usefixtures("silence")
    def test_a_mistake_of_the_users_ends_the_search_and_is_raised_as_it_is(self, backend: str, output: Path) -> None:
        with pytest.raises(toy.MistakeError) as caught:
            run(output, 4, backend=backend, space=toy.faulty("mistake at once"))
        assert str(caught.value) == "the factory is wrong"  # no remote traceback
        assert {trial.state.name for trial in study_in(output).trials} == {"WAITING"}
        # Nothing finished, so that the next call may begin afresh, if Optuna can mix what the two vary.
        with pytest.raises(InvalidValueError, match="or another folder, or delete this one"):
            run(output, 2, space=toy.faulty("none"))
        assert [trial.number for trial in run(output, 2, space=toy.SPACE).trials] == [0, 1]

    @pytest.mark.usefixtures("ray_session", "silence", "ctrl_c")
    def test_a_search_that_ctrl_c_ended_goes_on_upon_the_other_engine(self, backend: str, output: Path) -> None:
        # Many reports, so that the pressed trial does not end before its search does.
        longer = {"ul_steps": 40, "ll_steps": 20, "ll_learning_rate": 0.1, "patience": 0}
        arguments = in_turn(fault=("none", "pressed")) | {"settings": toy.SETTINGS | longer}
        first = run(output, 3, backend=backend, problem=Pressing(), **arguments)
        assert [trial.number for trial in first.trials] == [0]
        assert first.interrupted
        assert load_search(output).interrupted
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        trials = study_in(output).trials
        assert [trial.state.name for trial in trials] == ["COMPLETE", "WAITING"]

        resumed = run(output, 3, backend=OTHER[backend], resume=True, **arguments)
        assert resumed.trials[:1] == first.trials
        assert [trial.number for trial in resumed.trials] == [0, 1, 2]
        assert not resumed.interrupted
        assert resumed.trials[1].config["fault"] == "pressed"
        # Each of them is still found where its own engine saved it.
        assert [len(trial.history) for trial in resumed.trials] == [20, 20, 20]

    @pytest.mark.usefixtures("silence")
    def test_a_missing_select_data_is_told_once(self, backend: str, output: Path) -> None:
        # Ray's workers say it too, but a search keeps their output off the terminal.
        with pytest.warns(UserWarning, match=r"Without `select_data`.*Hold out a third split") as told:
            run(output, 2, backend=backend, problem=toy.two_splits, **in_turn(k=(1, 3)))
        assert len(told) == 1

    # ---- define-by-run spaces

    @pytest.mark.usefixtures("quiet")
    def test_a_define_by_run_space_returns_the_whole_config(self, backend: str) -> None:
        def space(trial: optuna.Trial) -> dict[str, Any]:
            return {"ll_learning_rate": 10 ** trial.suggest_float("exponent", -3, -1), "k": np.int64(4)}

        config, trial = proposed(backend, space)
        assert set(trial.params) == {"exponent"}
        # NumPy's numbers, which JSON does not know, stay numbers.
        assert trial.user_attrs["config"] == config == {"ll_learning_rate": 10 ** trial.params["exponent"], "k": 4}

    @pytest.mark.usefixtures("quiet")
    def test_a_define_by_run_space_that_returns_nothing_means_its_params(self, backend: str) -> None:
        config, trial = proposed(backend, lambda trial: trial.suggest_int("k", 1, 4) and None)
        assert config == trial.params
        assert set(config) == {"k"}
        assert "config" not in trial.user_attrs

    @pytest.mark.usefixtures("quiet")
    def test_a_define_by_run_space_that_returns_something_else_is_an_error(self, backend: str) -> None:
        with pytest.raises(InvalidTypeError, match=r"`space\(trial\)` must return the config as a dict"):
            proposed(backend, lambda trial: trial.suggest_int("k", 1, 4))


@pytest.mark.usefixtures("ray_session")
def test_the_same_trials_have_the_same_bits_on_both_engines(searched: Callable[[str], Searched]) -> None:
    on_optuna, on_ray = searched("optuna"), searched("ray")
    for one, other in zip(on_optuna.result.trials, on_ray.result.trials, strict=True):
        for name in ("number", "state", "value", "config", "metrics", "failure"):
            assert getattr(one, name) == getattr(other, name)
    for one, other in zip(on_optuna.trials, on_ray.trials, strict=True):
        assert one.intermediate_values == other.intermediate_values
