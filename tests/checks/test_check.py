"""A check as a whole: what it makes of a working problem, and how it ends on a broken one."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.support.broken import Again, clamped, flipped, wrong
from tests.support.problems import F64
from tests.support.working import SETTINGS, D, LearningRate, N, ll_objective, split, ul_objective, working
from tune_implicit import BilevelProblem, ImplicitSettings, State, check
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.check import _CALLED, check_within
from tune_implicit.checks.findings import CheckReport, Finding, Level
from tune_implicit.hypergradients.state import Objective


def names(report: CheckReport) -> list[str]:
    return [finding.name for finding in report.findings]


def timeless(report: CheckReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.name != "cost"]


def test_a_working_problem_passes() -> None:
    report = check(working(), SETTINGS)
    assert report.passed
    assert {finding.level for finding in report.findings} == {Level.OK}


def test_things_are_looked_at_in_order() -> None:
    found = "losses ul-values derivatives training curvature solver effort cost solves recommended ul-steps"
    expected = [*found.split(), "finite-differences"]
    assert list(dict.fromkeys(names(check(working(), SETTINGS)))) == expected


def test_the_figures_have_the_documented_names() -> None:
    figures = "lambda_min lambda_max largest_step_size k_cg k_minres k_neumann k_neumann_auto stationarity"
    figures += " finite_difference_error ul_values ll_parameters ll_step_s ul_step_s hvp_s trial_s relative_residual"
    figures += " hypergradient_error ll_steps_per_ul_step ul_moved ul_moves"
    assert set(check(working(), SETTINGS).figures) == set(figures.split())
    assert all(name in (CheckReport.__doc__ or "") for name in figures.split())


def test_the_settings_are_by_default_those_of_a_trial() -> None:
    report = check(working())
    assert timeless(report) == timeless(check(working(), ImplicitSettings()))
    assert "1000 ll steps" in str(report)


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
    assert "cost" in names(report)


def test_a_fault_that_the_rest_does_not_depend_on_stops_nothing() -> None:
    report = check(working(ul_model=LearningRate()), SETTINGS)
    assert wrong(report) == {"learning-rate": Level.FAULT}
    assert "cost" in names(report)


def test_a_fault_that_stops_is_the_last_and_the_rest_is_said_to_be_missing() -> None:
    report = check(working(ll_objective=lambda s: ll_objective(s) + math.nan), SETTINGS)
    assert names(report) == ["non-finite", "incomplete"]
    assert wrong(report) == {"non-finite": Level.FAULT, "incomplete": Level.WARNING}


@pytest.mark.parametrize("name", ["train_data", "validate_data"])
def test_without_a_first_batch_there_is_nothing_to_look_at(name: str) -> None:
    report = check(working(**{name: Again(0)}), SETTINGS)
    assert wrong(report) == {"data": Level.FAULT}
    assert report.faults[0].message.startswith(f"`{name}` must hold at least one batch, got none")


# ---- what is blamed


def raises(state: State) -> Tensor:
    raise KeyError("no such key")


def of_shape(state: State) -> Tensor:
    return mse_loss(state.ll_model(state.data), state.target, reduction="none")


def cut_off(state: State) -> Tensor:
    return mse_loss(state.ll_model(state.data).detach(), state.target)


def of_other_data(state: State) -> Tensor:
    return (state.ll_model(state.data) @ torch.ones(3, 1, dtype=F64)).sum()


def not_a_number(objective: Objective) -> Objective:
    return lambda state: objective(state) * math.nan


RIGHT = {"ul": ul_objective, "ll": ll_objective}
BLAMED: dict[str, tuple[str, Callable[[Objective], Objective]]] = {
    "NaN": ("non-finite", not_a_number),
    "raises": ("objective-raised", lambda objective: raises),
    "raises a RuntimeError": ("torch-error", lambda objective: of_other_data),
    "no scalar": ("non-scalar", lambda objective: of_shape),
    "detached": ("detached", lambda objective: cut_off),
    "no tensor": ("not-a-loss", lambda objective: lambda state: 1.0),
}


@pytest.mark.parametrize("level", ["ul", "ll"])
@pytest.mark.parametrize("kind", BLAMED)
def test_the_objective_that_is_wrong_is_blamed_and_not_the_other(kind: str, level: str) -> None:
    name, spoil = BLAMED[kind]
    report = check(working(**{f"{level}_objective": spoil(RIGHT[level])}), SETTINGS)
    (fault,) = report.faults
    assert fault.name == name
    other = {"ul": "ll", "ll": "ul"}[level]
    assert f"`{level}_objective`" in fault.message
    assert f"{other}_objective" not in fault.message


@pytest.mark.parametrize("level", ["ul", "ll"])
@pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError])
def test_an_objective_that_raises_later_is_blamed_as_well(level: str, error: type[Exception]) -> None:
    right, calls = RIGHT[level], []

    def objective(state: State) -> Tensor:
        calls.append(1)
        if len(calls) > {"ul": 40, "ll": 150}[level]:
            raise error("no more")
        return right(state)

    report = check(working(**{f"{level}_objective": objective}), SETTINGS)
    (fault,) = report.faults
    assert fault.name == "objective-raised"
    assert f"`{level}_objective`, which had run before, raised {error.__name__} (in line " in fault.message
    assert "no more" in fault.message


def test_what_no_objective_raised_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a slip of our own")

    monkeypatch.setattr("tune_implicit.checks.training.measure", broken)
    with pytest.raises(KeyError, match="a slip of our own"):
        check(working(), SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1], ids=["data", "target"])
@pytest.mark.parametrize(("name", "seed"), [("train_data", 0), ("validate_data", 1), ("select_data", 2)])
def test_values_that_are_no_numbers_are_found_before_an_objective_is_blamed(
    name: str, seed: int, part: int, value: float
) -> None:
    batches = [*split(seed), *split(seed + 10)]
    batches[1][part][3, 0] = batches[1][part][7, 0] = value
    report = check(working(**{name: batches}), SETTINGS)
    (fault,) = report.faults
    assert fault.name == "nan-in-data"
    kind, width = "NaN" if math.isnan(value) else "infinite", (D, 1)[part]
    where = f"The {('data', 'target')[part]} of `{name}` holds 2 that are {kind}, of {2 * N * width} values"
    assert fault.message.startswith(f"{where}, first in batch 2. ")


# ---- the time it takes


def test_what_there_was_no_time_for_is_said_so() -> None:
    report = check_within(Budget(0.0), working(), SETTINGS)
    missing = {finding.message.split(":")[0] for finding in report.findings if finding.name == "no-time"}
    assert set(_CALLED.values()) <= missing
    assert report.passed
    assert report.recommended == {}
    assert report.details.endswith("recommended settings: {}")
    assert "How long a trial takes was not measured." in report.summary


def test_at_whatever_time_it_ends_nothing_is_left_out_silently() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    full = set(names(check(working(), SETTINGS)))
    for seconds in (0.05, 0.1, 0.2, 0.4):
        now[0] = 0.0
        report = check_within(Budget.of(seconds, clock), working(), SETTINGS)
        assert report.passed, str(report)
        assert set(names(report)) >= full or "no-time" in names(report)


def test_a_thorough_check_has_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_implicit.checks.check._BUDGET_S", 0.0)
    assert "no-time" in names(check(working(), SETTINGS))
    assert timeless(check(working(), SETTINGS, thorough=True)) == timeless(check_within(Budget(), working(), SETTINGS))


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
