import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.support import toy
from tests.support.noisy import assert_same_bits, random_problem
from tests.support.problems import Values, generator
from tests.support.working import finish
from tune_implicit.errors import CheckpointError, DivergedError, InvalidTypeError, InvalidValueError, SolveError
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import RESERVED
from tune_implicit.trials.trial import Trial, run_trial

X, Y = torch.randn(12, 3, generator=generator()), torch.randn(12, 1, generator=generator(1))


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.zeros(3))


def linear_problem(config: dict[str, Any], data: Any = None) -> BilevelProblem:
    splits = {"train_data": [(X[:6], Y[:6])], "validate_data": [(X[6:9], Y[6:9])], "select_data": [(X[9:], Y[9:])]}
    return BilevelProblem(
        ul_model=Weight(),
        ll_model=nn.Linear(3, 1),
        ul_objective=lambda s: mse_loss(s.ll_model(s.data), s.target),
        ll_objective=lambda s: (
            config.get("scale", 1.0) * mse_loss(s.ll_model(s.data), s.target)
            + (s.ul_model.log_l2.exp() * s.ll_model.weight.square()).sum()
        ),
        **{**splits, **(data or {})},
    )


CONFIG = {"ul_steps": 5, "ul_steps_per_report": 2, "k": 2}


def test_record_has_the_documented_names_and_flat_finite_values() -> None:
    trial = Trial(lambda config: linear_problem(config, {"metrics": {"mae": lambda s: 0.5}}), CONFIG)
    record = finish(trial)
    # The series meets no smallest curvature, and no noise was asked for.
    assert set(record) == RESERVED - {"failure", "lambda_min", "noise_norm"} | {"mae"}
    assert all(isinstance(value, str) or math.isfinite(value) for value in record.values())
    assert json.loads(json.dumps(trial.history)) == trial.history
    assert [entry["ul_step"] for entry in trial.history] == [2, 4, 5]
    assert [entry["completed"] for entry in trial.history] == [False, False, True]
    low, *_, high = trial.history[-1]["ul_quantiles"]["log_l2"]
    ul_values = trial.problem.ul_model.log_l2
    assert (low, high) == (ul_values.min().item(), ul_values.max().item())


def test_trials_are_compared_on_data_no_gradient_touches() -> None:
    trial = Trial(linear_problem, CONFIG)
    record = finish(trial)
    with torch.no_grad():
        assert record["select_loss"] == pytest.approx(mse_loss(trial.problem.ll_model(X[9:]), Y[9:]).item())


def test_without_select_data_the_validation_split_is_compared() -> None:
    trial = Trial(lambda config: linear_problem(config, {"select_data": None}), CONFIG)
    record = finish(trial)
    assert record["selected_on"] == "validate_data"
    with torch.no_grad():
        assert record["select_loss"] == pytest.approx(mse_loss(trial.problem.ll_model(X[6:9]), Y[6:9]).item())


def test_same_config_is_the_same_trial_however_often_it_reports() -> None:
    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return random_problem()

    ends = []
    for every in (1, 5):
        torch.randn(every)
        trial = Trial(noisy, {**CONFIG, "ul_steps_per_report": every})
        finish(trial)
        ends.append(trial.trainer.state_dict())
    assert_same_bits(*ends)


def test_seed_decides_the_initial_weights() -> None:
    weights = [Trial(linear_problem, {"seed": seed}).problem.ll_model.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_quantiles_of_many_ul_values_are_those_of_an_even_sample() -> None:
    def many(config: dict[str, Any]) -> BilevelProblem:
        ul_model = Values(log_l2=torch.zeros(3), many=torch.arange(30_001.0))
        return replace(linear_problem(config), ul_model=ul_model)

    trial = Trial(many, {**CONFIG, "ul_learning_rate": 0.0})
    trial.advance()
    told = trial.history[-1]["ul_quantiles"]["many"]
    assert told == pytest.approx([part * 30_000 for part in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)], abs=3)


def test_checkpoint_file_continues_the_trial_exactly(tmp_path: Path) -> None:
    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return random_problem()

    trial, path = Trial(noisy, CONFIG), tmp_path / "trial.pt"
    trial.advance()
    trial.save(path)
    finish(trial)
    resumed = Trial(noisy, CONFIG)
    resumed.load(path)
    assert resumed.record["ul_step"] == 2
    finish(resumed)
    assert_same_bits(resumed.trainer.state_dict(), trial.trainer.state_dict())
    assert resumed.history == trial.history
    assert [entry.name for entry in tmp_path.iterdir()] == ["trial.pt"]


def test_checkpoint_of_another_problem_is_refused(tmp_path: Path) -> None:
    trial, other = Trial(linear_problem, CONFIG), Trial(toy.problem, CONFIG)
    trial.save(tmp_path / "trial.pt")
    with pytest.raises(CheckpointError, match="does not fit this problem"):
        other.load(tmp_path / "trial.pt")


def test_key_that_no_one_reads_is_found_after_the_first_report() -> None:
    trial = Trial(linear_problem, {**CONFIG, "ll_learning_rat": 0.1, "scale": 2.0, "width": 3})
    with pytest.raises(InvalidValueError, match=r"'ll_learning_rat' \(did you mean 'll_learning_rate'\?\), 'width'"):
        trial.advance()


def test_data_is_passed_on() -> None:
    trial = Trial(linear_problem, CONFIG, {"metrics": {"mine": lambda s: 1}})
    assert finish(trial)["mine"] == 1.0


def test_problem_must_return_a_problem() -> None:
    with pytest.raises(InvalidTypeError, match=r"`problem\(config\)` must return a BilevelProblem, got dict"):
        Trial(lambda config: {}, CONFIG)


@pytest.mark.parametrize("name", ["select_loss", "mine"])
def test_value_that_is_not_finite_ends_the_trial(name: str) -> None:
    broken = {"metrics": {"mine": lambda s: math.nan if name == "mine" else 1.0}}
    if name == "select_loss":
        broken["select_data"] = [(X[9:], Y[9:] / 0)]
    trial = Trial(linear_problem, CONFIG, broken)
    with pytest.raises(DivergedError, match=rf"`{name}` became (nan|inf) by ul step 2"):
        trial.advance()
    record = trial.failure_record("why")
    assert (record["failure"], record["completed"], record["ul_step"]) == ("why", False, 2)
    assert record["select_loss"] == record["mine"] == math.inf


def test_failed_solves_leave_no_nan_in_the_record() -> None:
    # Every ul step is skipped: the ul loss is the root of 0.
    def rooted(config: dict[str, Any]) -> BilevelProblem:
        problem = linear_problem(config)
        object.__setattr__(problem, "ul_objective", lambda s: (0 * s.ll_model(s.data)).sum().sqrt())
        return problem

    record = finish(Trial(rooted, CONFIG))
    assert (record["solver_status"], record["skipped_ul_steps"]) == ("non_finite", 5)
    assert not any(isinstance(value, float) and math.isnan(value) for value in record.values())


def test_without_ul_steps_the_losses_are_still_measured() -> None:
    record = finish(Trial(linear_problem, {**CONFIG, "ul_learning_rate": 0.0}))
    assert record["validate_loss"] > 0
    assert "hypergradient_norm" not in record
    record = finish(Trial(linear_problem, {**CONFIG, "ll_steps": 0}))
    assert record["train_loss"] > 0


class Recorder:
    def __init__(self, stop_at: int) -> None:
        self.steps: list[int] = []
        self.stop_at = stop_at

    def report(self, record: dict[str, Any]) -> None:
        self.steps.append(record["ul_step"])

    def should_stop(self) -> bool:
        return self.steps[-1] >= self.stop_at


def test_reporter_hears_every_record_and_may_stop() -> None:
    for stop_at, steps in ((4, [2, 4]), (99, [2, 4, 5])):
        reporter, trial = Recorder(stop_at), Trial(linear_problem, CONFIG)
        assert run_trial(trial, reporter) == trial.record
        assert reporter.steps == steps
    assert run_trial(trial, reporter)["completed"]  # completed already: nothing more to hear
    assert reporter.steps == steps


def test_counters_of_a_stopped_trial_are_in_its_failure_record() -> None:
    stop = {"on_failure": "stop", "failures_to_stop": 2}
    trial = Trial(toy.problem, {**CONFIG, **stop, "solver": "cg", "fault": "indefinite", "ll_steps": 0})
    with pytest.raises(SolveError, match="failed solve 2 in a row"):
        trial.advance()
    record = trial.failure_record("why")
    assert (record["skipped_ul_steps"], record["fallback_ul_steps"], record["failure"]) == (2, 0, "why")


@pytest.mark.parametrize("step_size", ["auto", 0.05])
def test_checkpoint_continues_with_a_warm_solver(step_size: object, tmp_path: Path) -> None:
    config = {**CONFIG, "step_size": step_size, "verify": True}
    trial, resumed, path = Trial(linear_problem, config), Trial(linear_problem, config), tmp_path / "trial.pt"
    trial.advance()
    trial.save(path)
    resumed.load(path)
    assert finish(resumed) == finish(trial)
    assert_same_bits(resumed.trainer.state_dict(), trial.trainer.state_dict())
