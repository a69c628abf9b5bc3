import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from tests.support import toy
from tests.support.noisy import assert_same_bits, random_problem
from tests.support.problems import Values, generator
from tests.support.working import finish
from tune_implicit.errors import CheckpointError, DivergedError, InvalidTypeError, InvalidValueError, SolveError
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.averaging import Averaging
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import LOSSES, RESERVED
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
    # No noise was asked for, and it went well.
    assert set(record) == RESERVED - {"failure", "divergence", "noise_norm"} | {"mae"}
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


# ---- which report is kept, and when a trial ends


def scripted(*scores: float) -> dict[str, Any]:
    """A metric that is measured as ``scores``, one a report."""
    script = iter(scores)
    return {"metrics": {"score": lambda s: next(script)}}


def scored(*scores: float, mode: str = "min", **config: Any) -> Trial:
    """A trial that reports at every ul step and is compared by its score."""
    config = {"ul_steps": len(scores), "ul_steps_per_report": 1, "ll_steps": 2, "k": 2, **config}
    return Trial(linear_problem, config, scripted(*scores), "score", mode)


def history_of(trial: Trial) -> list[dict[str, Any]]:
    finish(trial)
    return trial.history


def models_of(trial: Trial) -> dict[str, Any]:
    return copy.deepcopy({name: getattr(trial.problem, name).state_dict() for name in ("ul_model", "ll_model")})


def kept_models(trial: Trial, folder: Path) -> dict[str, Any]:
    trial.save(folder / "kept.pt")
    return read_checkpoint(folder / "kept.pt")["kept"]


@pytest.mark.parametrize(
    ("mode", "keep", "kept"), [("min", "best", 2), ("max", "best", 3), ("min", "last", 4), ("max", "last", 4)]
)
def test_report_that_is_kept(mode: str, keep: str, kept: int, tmp_path: Path) -> None:
    scores = [3.0, 1.0, 4.0, 2.0]
    trial = scored(*scores, mode=mode, keep=keep)
    models = []
    while not trial.completed:
        trial.advance()
        models.append(models_of(trial))
    record, of_kept = trial.record, trial.history[kept - 1]
    assert (record["kept_ul_step"], record["kept_value"], record["last_value"]) == (kept, scores[kept - 1], 2.0)
    assert {name: record[name] for name in (*LOSSES, "score")} == {name: of_kept[name] for name in (*LOSSES, "score")}
    assert (record["ul_step"], record["ended_by"], record["completed"]) == (4, "steps", True)
    assert_same_bits(kept_models(trial, tmp_path), models[kept - 1])
    assert [entry["score"] for entry in trial.history] == scores  # as they were measured


def test_kept_models_have_the_value_that_is_told(tmp_path: Path) -> None:
    trial = scored(1.0, 2.0, 3.0)
    finish(trial)
    saved = kept_models(trial, tmp_path)["ll_model"]
    told = trial.record["select_loss"]
    assert told == pytest.approx(mse_loss(X[9:] @ saved["weight"].T + saved["bias"], Y[9:]).item())
    with torch.no_grad():
        assert told != pytest.approx(mse_loss(trial.problem.ll_model(X[9:]), Y[9:]).item())


def test_while_a_trial_goes_on_its_record_is_that_of_its_last_report() -> None:
    trial = scored(1.0, 2.0, 3.0)
    trial.advance()
    record = trial.advance()
    assert record == trial.record
    assert (record["score"], record["last_value"], record["kept_value"], record["kept_ul_step"]) == (2.0, 2.0, 1.0, 1)
    assert (record["completed"], record["ended_by"]) == (False, "")


def test_equal_report_is_no_better() -> None:
    assert finish(scored(1.0, 1.0, 1.0))["kept_ul_step"] == 1


def test_patience_completes_a_trial() -> None:
    trial = scored(2.0, 1.0, 3.0, 1.0, 3.0, 0.0, patience=3)
    record = finish(trial)
    assert (record["ul_step"], record["kept_ul_step"]) == (5, 2)
    assert (record["ended_by"], record["completed"]) == ("patience", True)
    assert [entry["completed"] for entry in trial.history] == [False] * 4 + [True]
    assert trial.record["score"] == 1.0


def test_patience_is_counted_from_the_best_report() -> None:
    assert finish(scored(5.0, 6.0, 4.0, 5.0, 3.0, 4.0, patience=2))["ended_by"] == "steps"
    record = finish(scored(5.0, 6.0, 7.0, 8.0, patience=2, keep="last"))
    assert (record["ul_step"], record["kept_ul_step"], record["ended_by"]) == (3, 3, "patience")


def test_patience_of_zero_never_ends_a_trial() -> None:
    record = finish(scored(*range(1, 13), patience=0))
    assert (record["ul_step"], record["ended_by"]) == (12, "steps")


def test_budget_completes_a_trial_at_its_first_report_that_has_cost_as_much() -> None:
    costs = [entry["gradient_evaluations"] for entry in history_of(scored(4.0, 1.0, 3.0, 2.0))]
    for budget, reports in [(1, 1), (costs[0], 1), (costs[0] + 1, 2), (costs[2], 3)]:
        trial = scored(4.0, 1.0, 3.0, 2.0, max_gradient_evaluations=budget)
        record = finish(trial)
        assert (record["ended_by"], record["completed"], record["ul_step"]) == ("budget", True, reports)
        assert [entry["completed"] for entry in trial.history] == [False] * (reports - 1) + [True]
        assert record["gradient_evaluations"] == costs[reports - 1]
        assert record["kept_ul_step"] == min(2, reports)
        assert trial.advance() == trial.record


def test_budget_is_one_end_among_others() -> None:
    costs = [entry["gradient_evaluations"] for entry in history_of(scored(1.0, 2.0, 3.0))]
    for settings, ended_by in [
        ({}, "steps"),
        ({"max_gradient_evaluations": costs[2]}, "steps"),
        ({"max_gradient_evaluations": costs[2] + 1}, "steps"),
        ({"max_gradient_evaluations": costs[1], "patience": 1}, "budget"),
        ({"max_gradient_evaluations": costs[2], "patience": 1}, "patience"),
    ]:
        assert finish(scored(1.0, 2.0, 3.0, **settings))["ended_by"] == ended_by
    diverged = finish(scored(1.0, math.nan, max_gradient_evaluations=costs[0] + 1))
    assert diverged["ended_by"] == "divergence"


def test_trial_with_a_budget_resumes_in_the_same_bits(tmp_path: Path) -> None:
    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return random_problem()

    config = {"ul_steps": 20, "ul_steps_per_report": 2, "min_ll_steps": 2, "max_ll_steps": 4, "k": 2}
    trial, resumed = (Trial(noisy, config | {"max_gradient_evaluations": 70}) for _ in range(2))
    trial.advance()
    trial.save(tmp_path / "trial.pt")
    record = finish(trial)
    expected = copy.deepcopy(trial.trainer.state_dict())
    resumed.load(tmp_path / "trial.pt")
    assert finish(resumed) == record
    assert (record["ended_by"], 2 < record["ul_step"] < 20) == ("budget", True)
    assert resumed.history == trial.history
    assert_same_bits(resumed.trainer.state_dict(), expected)
    # With more of a budget it goes on, and what another trial has cost counts.
    for budget, completed in [(10_000, False), (1, True)]:
        heir = Trial(noisy, config | {"max_gradient_evaluations": budget})
        trial.save(tmp_path / "trial.pt")
        heir.load(tmp_path / "trial.pt")
        assert heir.completed is completed


def test_trial_that_diverges_after_a_report_keeps_the_best_one(tmp_path: Path) -> None:
    trial = scored(1.0, 2.0, math.nan, 3.0)
    trial.advance()
    models = models_of(trial)
    record = finish(trial)
    assert (record["ended_by"], record["completed"]) == ("divergence", True)
    assert "diverged" in record["troubles"].split()
    assert (record["score"], record["kept_value"], record["kept_ul_step"]) == (1.0, 1.0, 1)
    assert record == trial.record
    assert all(isinstance(value, str) or math.isfinite(value) for value in record.values())
    assert_same_bits(kept_models(trial, tmp_path), models)
    # It is completed for the same trial loaded, while another may do better from there.
    trial.save(tmp_path / "trial.pt")
    loaded = scored(1.0, 2.0, math.nan, 3.0)
    loaded.load(tmp_path / "trial.pt")
    assert loaded.record == loaded.advance() == record
    heir = scored(*[3.0] * 9)
    heir.load(tmp_path / "trial.pt")
    assert not heir.completed
    assert heir.advance()["ul_step"] == 4


def test_ll_loss_that_diverges_after_a_report_ends_the_trial_as_well() -> None:
    growing = {"ll_optimizer": torch.optim.SGD}
    trial = Trial(linear_problem, {**CONFIG, "ul_steps": 40, "ll_learning_rate": 1.5, "ll_steps": 10}, growing)
    record = finish(trial)
    assert record["ended_by"] == "divergence"
    assert record["ul_step"] < 40
    assert math.isfinite(record["select_loss"])


@pytest.mark.parametrize(("keep", "scores"), [("last", [1.0, math.nan]), ("best", [math.nan]), ("last", [math.inf])])
def test_divergence_with_no_report_to_keep_is_raised(keep: str, scores: list[float]) -> None:
    trial = scored(*scores, keep=keep)
    with pytest.raises(DivergedError, match=rf"`score` became (nan|inf) by ul step {len(scores)}"):
        finish(trial)


@pytest.mark.parametrize(("keep", "scores"), [("best", [math.nan]), ("last", [1.0, math.nan])])
def test_divergence_at_the_last_ul_step_completes_nothing(keep: str, scores: list[float], tmp_path: Path) -> None:
    trial = scored(*scores, keep=keep, ul_steps=len(scores))
    with pytest.raises(DivergedError):
        finish(trial)
    assert (trial.completed, trial.ended_by) == (False, "")
    trial.save(tmp_path / "trial.pt")
    loaded = scored(*scores, keep=keep, ul_steps=len(scores))
    loaded.load(tmp_path / "trial.pt")
    assert not loaded.completed
    with pytest.raises(DivergedError, match=f"diverged at ul step {len(scores)}, and has none left to take"):
        loaded.advance()


def test_history_tells_the_same_troubles_as_the_record() -> None:
    for scores in [(1.0, 0.5, 9.0), (1.0, 0.5, math.nan)]:
        trial = scored(*scores, ul_steps=3)
        record = finish(trial)
        assert {trial.history[-1][name] == record[name] for name in ("troubles", "completed", "ended_by")} == {True}


def test_metric_that_no_one_reports_keeps_the_last_report() -> None:
    trial = Trial(linear_problem, {**CONFIG, "patience": 1}, metric="accuracy")
    record = finish(trial)
    assert (record["kept_ul_step"], record["ended_by"]) == (5, "steps")
    assert "kept_value" not in record


def test_start_loss_is_measured_before_the_first_step() -> None:
    trial = Trial(linear_problem, CONFIG)
    with torch.no_grad():
        start = mse_loss(trial.problem.ll_model(X[9:]), Y[9:]).item()
    assert [trial.advance()["start_loss"] for _ in range(3)] == pytest.approx([start] * 3)


def test_start_loss_that_is_not_finite_is_left_out() -> None:
    calls = iter(range(99))

    def ul_objective(state: State) -> torch.Tensor:
        loss = mse_loss(state.ll_model(state.data), state.target)
        return loss / 0 if next(calls) == 0 else loss

    record = finish(Trial(lambda config: replace(linear_problem(config), ul_objective=ul_objective), CONFIG))
    assert "start_loss" not in record
    assert record["completed"]


# ---- loaded


def test_loaded_trial_keeps_what_was_best(tmp_path: Path) -> None:
    scores = [3.0, 1.0, 2.0, 4.0]
    trial, resumed = scored(*scores), scored(*scores[2:], ul_steps=4)
    for _ in range(2):
        trial.advance()
    trial.save(tmp_path / "trial.pt")
    resumed.load(tmp_path / "trial.pt")
    assert resumed.record == trial.record
    # Training goes on from one random state, so that one of the two has to wait.
    expected = finish(trial), kept_models(trial, tmp_path), trial.trainer.state_dict()
    assert expected[0]["kept_ul_step"] == 2
    assert_same_bits((finish(resumed), kept_models(resumed, tmp_path), resumed.trainer.state_dict()), expected)
    assert resumed.record == trial.record
    assert resumed.history == trial.history


def test_loaded_trial_goes_on_waiting(tmp_path: Path) -> None:
    trial = scored(1.0, 2.0, 3.0, ul_steps=9, patience=3)
    for _ in range(3):
        trial.advance()
    trial.save(tmp_path / "trial.pt")
    resumed = scored(4.0, 5.0, ul_steps=9, patience=3)
    resumed.load(tmp_path / "trial.pt")
    assert (finish(resumed)["ul_step"], resumed.ended_by) == (4, "patience")


def test_trial_that_learns_all_by_itself_resumes_in_the_same_bits(tmp_path: Path) -> None:
    """The adaptive rate, as many ll steps as it takes, several batches, the best report: all as by default."""

    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return random_problem()

    config = {"ul_steps": 7, "ul_steps_per_report": 2, "ul_batches": 2, "ul_learning_rate": 0.1, "min_ll_steps": 2}
    trial, resumed = Trial(noisy, config), Trial(noisy, config)
    for _ in range(2):
        trial.advance()
    trial.save(tmp_path / "trial.pt")
    finish(trial)
    expected = copy.deepcopy(trial.trainer.state_dict())
    resumed.load(tmp_path / "trial.pt")
    finish(resumed)
    assert_same_bits(resumed.trainer.state_dict(), expected)
    assert resumed.history == trial.history
    assert resumed.record == trial.record
    assert_same_bits(kept_models(resumed, tmp_path), kept_models(trial, tmp_path))


def test_checkpoint_of_another_trial_goes_on_under_ones_own_settings(tmp_path: Path) -> None:
    """As population-based training does."""
    donor = scored(3.0, 1.0, 2.0, 2.0, ul_learning_rate=0.01, ul_steps=9)
    own = scored(0.5, 5.0, ul_learning_rate=0.2, ul_steps=6, ll_learning_rate=0.003, patience=4)
    for _ in range(4):
        donor.advance()
    donor.save(tmp_path / "trial.pt")
    own.load(tmp_path / "trial.pt")
    factor = donor.trainer.ul_rate / 0.01
    assert own.trainer.ul_rate == pytest.approx(0.2 * factor)
    assert own.record["start_loss"] == donor.record["start_loss"]
    record = own.advance()
    assert (record["kept_ul_step"], record["kept_value"]) == (5, 0.5)
    assert finish(own)["ended_by"] == "steps"
    assert own.trainer.ul_step == 6


@pytest.mark.parametrize(("of_donor", "of_own"), [("last", "best"), ("best", "last")])
def test_checkpoint_of_a_trial_that_keeps_another_report(of_donor: str, of_own: str, tmp_path: Path) -> None:
    donor = scored(1.0, 2.0, keep=of_donor, ul_steps=4)
    for _ in range(2):
        donor.advance()
    donor.save(tmp_path / "trial.pt")
    own = scored(3.0, 4.0, keep=of_own, ul_steps=4)
    own.load(tmp_path / "trial.pt")
    models = []
    while not own.completed:
        own.advance()
        models.append(models_of(own))
    record = own.record
    # Of the donor's reports there are no models to be kept, so that the best is one of its own.
    kept = {"best": (3, 3.0), "last": (4, 4.0)}[of_own]
    assert (record["kept_ul_step"], record["kept_value"]) == kept
    assert_same_bits(kept_models(own, tmp_path), models[kept[0] - 3])


@pytest.mark.parametrize("metric", LOSSES)
def test_trials_are_never_compared_by_the_largest_loss(metric: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"`metric` '{metric}' is a loss, of which the least is best"):
        Trial(linear_problem, CONFIG, metric=metric, mode="max")


def test_mode_is_min_or_max() -> None:
    with pytest.raises(InvalidValueError, match=r'`mode` must be "min" or "max", got \'best\''):
        Trial(linear_problem, CONFIG, mode="best")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_penalties_of_features_that_are_noise_do_not_grow_until_the_trial_diverges(seed: int) -> None:
    """Their best value is infinite, and what a step towards it promises is hardly anything."""
    x = torch.randn(3, 40, 20, generator=generator(seed))
    y = x[..., :3].sum(-1, keepdim=True) + torch.randn(3, 40, 1, generator=generator(seed + 9))

    def ridge(config: dict[str, Any]) -> BilevelProblem:
        splits = {name: [(x[i], y[i])] for i, name in enumerate(("train_data", "validate_data", "select_data"))}
        models = {"ul_model": Values(log_l2=torch.full((20,), -3.0)), "ll_model": nn.Linear(20, 1)}
        return replace(linear_problem({}, splits), **models)

    record = finish(Trial(ridge, {"ll_learning_rate": 0.05, "patience": 0}))
    assert record["ended_by"] == "steps"
    assert record["troubles"] == ""
    assert record["kept_value"] < 0.9 * record["start_loss"]


def test_trial_that_has_come_to_its_end_advances_no_more() -> None:
    trial = scored(1.0, 2.0)
    finish(trial)
    assert trial.advance() == trial.record
    assert len(trial.history) == 2


def test_donor_past_ones_own_end_completes_the_trial(tmp_path: Path) -> None:
    """As may be met by population-based training over `ul_steps`."""
    donor = scored(3.0, 1.0, 2.0, 4.0)
    for _ in range(3):
        donor.advance()
    donor.save(tmp_path / "trial.pt")
    heir = scored(9.0, 9.0)
    heir.load(tmp_path / "trial.pt")
    record = heir.advance()
    assert (record["ended_by"], record["score"], record["troubles"]) == ("steps", 1.0, "")
    assert record["ul_step"] == 3


OF_A_DONOR: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "a schedule for ul_steps": ({"ll_scheduler": lambda o, steps: OneCycleLR(o, 0.1, total_steps=steps)}, {}),
    "an average": ({"ll_average": Averaging(model=partial(AveragedModel, use_buffers=True))}, {}),
    "keep": ({}, {"keep": "last"}),
    "patience": ({}, {"patience": 1}),
    "no ul steps": ({}, {"ul_learning_rate": 0.0}),
}


@pytest.mark.parametrize("reports", [2, 4, 5])
@pytest.mark.parametrize(("parts", "settings"), OF_A_DONOR.values(), ids=OF_A_DONOR)
def test_donor_with_more_ul_steps_leaves_a_completed_trial_with_its_record(
    parts: dict[str, Any], settings: dict[str, Any], reports: int, tmp_path: Path
) -> None:
    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return replace(random_problem(), **parts)

    config = {"ll_steps": 2, "k": 2, "ul_steps_per_report": 1, "patience": 0, **settings}
    donor, heir = Trial(noisy, config | {"ul_steps": 5}), Trial(noisy, config | {"ul_steps": 2})
    for _ in range(reports):
        donor.advance()
    donor.save(tmp_path / "donor.pt")
    heir.load(tmp_path / "donor.pt")
    record = heir.record
    assert (heir.completed, record["completed"], record["ended_by"]) == (True, True, "steps")
    assert record["ul_step"] == donor.history[-1]["ul_step"]
    assert set(record) >= {*LOSSES, "kept_value", "last_value", "troubles"}
    assert all(isinstance(value, str) or math.isfinite(value) for value in record.values())
    assert heir.advance() == record
    assert heir.history == donor.history
    heir.save(tmp_path / "heir.pt")
    assert_same_bits(read_checkpoint(tmp_path / "heir.pt")["kept"], read_checkpoint(tmp_path / "donor.pt")["kept"])


def test_donor_that_never_reported_is_no_end_and_has_a_record(tmp_path: Path) -> None:
    donor, heir = scored(1.0, 2.0, 3.0), scored(1.0)
    for _ in range(2):
        donor.trainer.step()
    donor.save(tmp_path / "trial.pt")
    heir.load(tmp_path / "trial.pt")
    assert (heir.completed, heir.record["completed"], heir.record["ended_by"]) == (False, False, "")
    assert heir.record["ul_step"] == 2
    with pytest.raises(DivergedError, match="has none left to take"):
        heir.advance()


def test_record_before_the_first_report_has_counters_and_no_losses() -> None:
    record = Trial(linear_problem, CONFIG).record
    assert (record["ul_step"], record["gradient_evaluations"], record["completed"]) == (0, 0, False)
    assert (record["ended_by"], record["troubles"]) == ("", "")
    assert not {*LOSSES} & set(record)
    assert set(record) <= RESERVED


def test_what_a_trial_diverged_with_is_told() -> None:
    record = finish(scored(1.0, math.nan))
    assert record["divergence"] == "`score` became nan by ul step 2."
    assert (record["ul_step"], record["ll_step"], record["kept_ul_step"]) == (1, 4, 1)  # its work up to there counts
