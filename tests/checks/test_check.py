"""A check as a whole: what it makes of a working problem, and how it ends on a broken one."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.support.broken import clamped, flipped, wrong
from tests.support.problems import F64
from tests.support.working import SETTINGS, D, LearningRate, N, ll_objective, split, working
from tune_implicit import BilevelProblem, ImplicitSettings, check
from tune_implicit.checks.findings import CheckReport, Finding, Level


def names(report: CheckReport) -> list[str]:
    return [finding.name for finding in report.findings]


def timeless(report: CheckReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.name != "cost"]


def test_a_working_problem_passes() -> None:
    report = check(working(), SETTINGS)
    assert report.passed
    assert {finding.level for finding in report.findings} == {Level.OK}


def test_things_are_looked_at_in_order() -> None:
    found = "losses ul-values derivatives training curvature solver effort finite-differences cost"
    assert list(dict.fromkeys(names(check(working(), SETTINGS)))) == found.split()


def test_the_figures_have_the_documented_names() -> None:
    figures = "lambda_min lambda_max largest_step_size k_cg k_minres k_neumann k_neumann_auto"
    figures += " stationarity finite_difference_error ll_step_s ul_step_s"
    assert set(check(working(), SETTINGS).figures) == set(figures.split())


def test_the_settings_are_by_default_those_of_a_trial() -> None:
    report = check(working())
    assert timeless(report) == timeless(check(working(), ImplicitSettings()))
    assert "500 ll steps" in str(report)


def test_the_problem_is_left_as_it_was() -> None:
    problem = working(ll_model=nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.1)).to(F64))
    before = copy.deepcopy([problem.ul_model.state_dict(), problem.ll_model.state_dict()])
    state = torch.get_rng_state()
    check(problem, SETTINGS)
    after = [problem.ul_model.state_dict(), problem.ll_model.state_dict()]
    assert str(before) == str(after)
    assert all(param.grad is None for model in (problem.ul_model, problem.ll_model) for param in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_problem_is_found_the_same_however_often_it_is_checked() -> None:
    problem = working(ll_model=nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.1)).to(F64))
    one = check(problem, SETTINGS)
    torch.rand(7)
    other = check(problem, SETTINGS)
    assert timeless(one) == timeless(other)


def test_attention_that_is_computed_again_passes() -> None:
    class CheckpointedAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x[:, None, :, None].expand(-1, 1, -1, 8).contiguous()
            return checkpoint(scaled_dot_product_attention, q, q, q, use_reentrant=False).mean((1, 3))

    model = nn.Sequential(
        nn.Linear(D, D), CheckpointedAttention(), nn.Unflatten(0, (N, 1)), nn.Linear(D, 1), nn.Flatten(0, 1)
    ).to(F64)
    report = check(working(ll_model=model), SETTINGS)
    assert not {"double-backward", "torch-error", "problem"} & {fault.name for fault in report.faults}, str(report)


# ---- how a check ends

ONLY_WARNED: dict[str, tuple[str, Callable[[], BilevelProblem]]] = {
    "no select_data": ("no-select-data", partial(working, select_data=None)),
    "the same data twice": ("same-data", partial(working, validate_data=split(0))),
    "splits swapped": ("splits-swapped", partial(working, train_data=split(1, 20), validate_data=split(0, 200))),
    "weights that are projected": ("not-smooth", partial(working, ll_optimizer=clamped)),
    "an ll model that generalises badly": ("wrong-sign", partial(working, validate_data=flipped(split(1)))),
}


@pytest.mark.parametrize("name", ONLY_WARNED)
def test_a_problem_that_is_only_warned_of_passes_to_the_end(name: str) -> None:
    expected, problem = ONLY_WARNED[name]
    report = check(problem(), SETTINGS)
    assert expected in wrong(report), str(report)
    assert report.passed, str(report)
    assert names(report)[-1] == "cost"


def test_a_fault_that_the_rest_does_not_depend_on_stops_nothing() -> None:
    report = check(working(ul_model=LearningRate()), SETTINGS)
    assert wrong(report) == {"learning-rate": Level.FAULT}
    assert names(report)[-1] == "cost"


def test_a_fault_that_stops_is_the_last_and_the_rest_is_said_to_be_missing() -> None:
    report = check(working(ll_objective=lambda s: ll_objective(s) + math.nan), SETTINGS)
    assert names(report) == ["non-finite", "incomplete"]
    assert wrong(report) == {"non-finite": Level.FAULT, "incomplete": Level.WARNING}


@pytest.mark.parametrize("name", ["train_data", "validate_data"])
def test_without_a_first_batch_there_is_nothing_to_look_at(name: str) -> None:
    report = check(working(**{name: [torch.ones(3)]}), SETTINGS)
    assert wrong(report) == {"data": Level.FAULT}
    assert report.faults[0].message.startswith(f"`{name}` must yield (data, target) pairs")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: working(metrics={"mine": lambda s: torch.ones(3)}), "`mine` must return a number, got a tensor of"),
        (
            lambda: working(ll_model=nn.Sequential(weight_norm(nn.Linear(D, 1))).to(F64)),
            "uses weight_norm, which torch",
        ),
    ],
    ids=["a metric that is no number", "a module whose second derivative is wrong"],
)
def test_what_a_trial_would_raise_is_a_fault(problem: Callable[[], BilevelProblem], message: str) -> None:
    report = check(problem(), SETTINGS)
    assert wrong(report)["problem"] is Level.FAULT
    assert message in report.faults[-1].message
