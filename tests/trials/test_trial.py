import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.support import toy
from tests.support.noisy import assert_same_bits, random_problem
from tests.support.problems import generator
from tune_implicit.errors import CheckpointError, DivergedError, InvalidTypeError, InvalidValueError, SolveError
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.evaluation import evaluate
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


def finish(trial: Trial) -> dict[str, Any]:
    while not trial.completed:
        record = trial.advance()
    return record


CONFIG = {"ul_steps": 5, "ul_steps_per_report": 2, "k": 2}


def test_record_has_the_documented_names_and_flat_finite_values():
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


def test_trials_are_compared_on_data_no_gradient_touches():
    trial = Trial(linear_problem, CONFIG)
    record = finish(trial)
    with torch.no_grad():
        assert record["select_loss"] == pytest.approx(mse_loss(trial.problem.ll_model(X[9:]), Y[9:]).item())


def test_without_select_data_the_validation_split_is_compared():
    trial = Trial(lambda config: linear_problem(config, {"select_data": None}), CONFIG)
    record = finish(trial)
    assert record["selected_on"] == "validate_data"
    with torch.no_grad():
        assert record["select_loss"] == pytest.approx(mse_loss(trial.problem.ll_model(X[6:9]), Y[6:9]).item())


def test_same_config_is_the_same_trial_however_often_it_reports():
    def noisy(config: dict[str, Any]) -> BilevelProblem:
        return random_problem()

    ends = []
    for every in (1, 5):
        torch.randn(every)
        trial = Trial(noisy, {**CONFIG, "ul_steps_per_report": every})
        finish(trial)
        ends.append(trial.trainer.state_dict())
    assert_same_bits(*ends)


def test_seed_decides_the_initial_weights():
    weights = [Trial(linear_problem, {"seed": seed}).problem.ll_model.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoint_file_continues_the_trial_exactly(tmp_path: Path):
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


@pytest.mark.parametrize("content", [b"", b"no archive", None, {"a": 1}])
def test_what_is_no_checkpoint(content: object, tmp_path: Path):
    path = tmp_path / "trial.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"trial\.pt"):
        read_checkpoint(path)


def test_checkpoints_run_no_code(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"trainer": Trap(), "history": []}, tmp_path / "trial.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "trial.pt")
    assert not (tmp_path / "sprung").exists()


def test_key_that_no_one_reads_is_found_after_the_first_report():
    trial = Trial(linear_problem, {**CONFIG, "ll_learning_rat": 0.1, "scale": 2.0, "width": 3})
    with pytest.raises(InvalidValueError, match=r"'ll_learning_rat' \(did you mean 'll_learning_rate'\?\), 'width'"):
        trial.advance()


def test_data_is_passed_on():
    trial = Trial(linear_problem, CONFIG, {"metrics": {"mine": lambda s: 1}})
    assert finish(trial)["mine"] == 1.0


def test_problem_must_return_a_problem():
    with pytest.raises(InvalidTypeError, match=r"`problem\(config\)` must return a BilevelProblem, got dict"):
        Trial(lambda config: {}, CONFIG)


@pytest.mark.parametrize("name", ["select_loss", "mine"])
def test_value_that_is_not_finite_ends_the_trial(name: str):
    broken = {"metrics": {"mine": lambda s: math.nan if name == "mine" else 1.0}}
    if name == "select_loss":
        broken["select_data"] = [(X[9:], Y[9:] / 0)]
    trial = Trial(linear_problem, CONFIG, broken)
    with pytest.raises(DivergedError, match=rf"`{name}` became (nan|inf) by ul step 2"):
        trial.advance()
    record = trial.failure_record("why")
    assert (record["failure"], record["completed"], record["ul_step"]) == ("why", False, 2)
    assert record["select_loss"] == record["mine"] == math.inf


def test_failed_solves_leave_no_nan_in_the_record():
    # Every ul step is skipped: the ul loss is the root of 0.
    def rooted(config: dict[str, Any]) -> BilevelProblem:
        problem = linear_problem(config)
        object.__setattr__(problem, "ul_objective", lambda s: (0 * s.ll_model(s.data)).sum().sqrt())
        return problem

    record = finish(Trial(rooted, CONFIG))
    assert (record["solver_status"], record["skipped_ul_steps"]) == ("non_finite", 5)
    assert not any(isinstance(value, float) and math.isnan(value) for value in record.values())


def test_without_ul_steps_the_losses_are_still_measured():
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


def test_reporter_hears_every_record_and_may_stop():
    for stop_at, steps in ((4, [2, 4]), (99, [2, 4, 5])):
        reporter, trial = Recorder(stop_at), Trial(linear_problem, CONFIG)
        assert run_trial(trial, reporter) == trial.record
        assert reporter.steps == steps
    assert run_trial(trial, reporter)["completed"]  # completed already: nothing more to hear
    assert reporter.steps == steps


def test_evaluation_weighs_batches_by_their_size():
    problem = linear_problem({})
    cut = [(X[:5], Y[:5]), (X[5:6], Y[5:6])]
    (whole,) = evaluate(problem, "x", [(X[:6], Y[:6])], {"loss": problem.ul_objective}).values()
    (parts,) = evaluate(problem, "x", cut, {"loss": problem.ul_objective}).values()
    assert parts == pytest.approx(whole)


def test_evaluation_leaves_no_trace():
    problem = random_problem()
    problem.ll_model[2].eval()
    before = torch.get_rng_state()
    measured = evaluate(problem, "train_data", problem.train_data, {"mode": lambda s: float(s.ll_model.training)})
    assert measured == {"mode": 0.0}
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in problem.ll_model] == [True, True, False, True, True]
    assert problem.ll_model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("value", "message"), [(torch.ones(3), r"shape \(3,\)"), (None, "got NoneType")])
def test_metric_must_be_a_number(value: object, message: str):
    with pytest.raises(InvalidTypeError, match=f"`mine` must return a number, .*{message}"):
        evaluate(linear_problem({}), "x", [(X, Y)], {"mine": lambda s: value})


# ---- what the record says of the solve


def test_record_tells_how_the_solve_went():
    trial = Trial(linear_problem, {**CONFIG, "solver": "cg", "k": 20, "damping": 0.1, "stop": "noise", "ll_steps": 50})
    record = finish(trial)
    assert record["damping"] == 0.1
    assert record["noise_norm"] > 0
    assert (record["solver_used"], record["solver_status"]) == ("cg", "converged")
    assert (record["fallback_ul_steps"], record["skipped_ul_steps"]) == (0, 0)
    assert record["residual_norm"] < record["noise_norm"]
    assert not any(isinstance(value, float) and math.isnan(value) for value in record.values())


def test_record_tells_the_curvatures_that_the_solve_met():
    trial = Trial(linear_problem, {**CONFIG, "solver": "cg", "k": 20})
    record = finish(trial)
    w, log_l2 = X[:6], trial.problem.ul_model.log_l2.detach()
    ones = torch.cat([w, torch.ones(6, 1)], 1)
    # The ul values have moved since the solve, by less than a learning rate.
    h = 2 * ones.T @ ones / 6 + torch.cat([2 * log_l2.exp(), torch.zeros(1)]).diag()
    values = torch.linalg.eigvalsh(h)
    assert 0.9 * values[0] < record["lambda_min"] < record["lambda_max"] < 1.1 * values[-1]


@pytest.mark.parametrize("on_failure", ["skip", "fallback"])
@pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "dense"])
def test_record_of_a_saddle_has_no_nan(solver: str, on_failure: str):
    config = {**CONFIG, "solver": solver, "k": 20, "on_failure": on_failure, "fault": "indefinite", "ll_steps": 0}
    record = finish(Trial(toy.problem, config))
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in record.values())
    failing = solver in ("cg", "neumann")
    assert record["solver_used"] == ("minres" if failing and on_failure == "fallback" else solver)
    assert record["fallback_ul_steps"] == (5 if failing and on_failure == "fallback" else 0)
    assert record["skipped_ul_steps"] == (5 if failing and on_failure == "skip" else 0)


def test_counters_of_a_stopped_trial_are_in_its_failure_record():
    stop = {"on_failure": "stop", "failures_to_stop": 2}
    trial = Trial(toy.problem, {**CONFIG, **stop, "solver": "cg", "fault": "indefinite", "ll_steps": 0})
    with pytest.raises(SolveError, match="failed solve 2 in a row"):
        trial.advance()
    record = trial.failure_record("why")
    assert (record["skipped_ul_steps"], record["fallback_ul_steps"], record["failure"]) == (2, 0, "why")


@pytest.mark.parametrize("step_size", ["auto", 0.05])
def test_checkpoint_continues_with_a_warm_solver(step_size: object, tmp_path: Path):
    config = {**CONFIG, "step_size": step_size, "verify": True}
    trial, resumed, path = Trial(linear_problem, config), Trial(linear_problem, config), tmp_path / "trial.pt"
    trial.advance()
    trial.save(path)
    resumed.load(path)
    assert finish(resumed) == finish(trial)
    assert_same_bits(resumed.trainer.state_dict(), trial.trainer.state_dict())
