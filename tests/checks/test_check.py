"""A working problem, the ways in which it can be broken, and the name under which each is found."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tests.support.problems import F64, Values
from tests.support.toy import ul_objective
from tests.support.working import SETTINGS, D, LearningRate, N, ll_objective, split, working
from tune_implicit import BilevelProblem, ImplicitSettings, State, check
from tune_implicit.checks.findings import Level


def test_a_working_problem_passes() -> None:
    report = check(working(), SETTINGS)
    assert report.passed
    assert {finding.level for finding in report.findings} == {Level.OK}
    figures = report.figures
    assert figures["finite_difference_error"] < 1e-6
    assert figures["k_cg"] <= figures["k_neumann_auto"] <= figures["k_neumann"]
    assert figures["ll_step_s"] > 0
    assert figures["ul_step_s"] > 0


def test_figures_are_those_of_the_hessian() -> None:
    problem = working()
    ((x, _),) = problem.train_data
    ones = torch.cat([x, torch.ones(N, 1, dtype=F64)], 1)
    penalty = torch.cat([problem.ul_model.log_l2.detach().exp(), torch.zeros(1, dtype=F64)])
    values = torch.linalg.eigvalsh(2 * ones.T @ ones / N + 2 * penalty.diag())
    figures = check(problem, SETTINGS).figures
    assert figures["lambda_min"] == pytest.approx(values[0].item())
    assert figures["lambda_max"] == pytest.approx(values[-1].item())
    assert figures["largest_step_size"] == pytest.approx(2 / values[-1].item())


def test_the_problem_is_left_as_it_was() -> None:
    problem = working(ll_model=nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.1)).to(F64))
    before = copy.deepcopy([problem.ul_model.state_dict(), problem.ll_model.state_dict()])
    state = torch.get_rng_state()
    check(problem, SETTINGS)
    after = [problem.ul_model.state_dict(), problem.ll_model.state_dict()]
    assert str(before) == str(after)
    assert all(param.grad is None for model in (problem.ul_model, problem.ll_model) for param in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


# ---- broken problems


class Count(Values):
    def __init__(self) -> None:
        super().__init__(log_l2=torch.full((D,), -3.0, dtype=F64))
        self.layers = nn.Parameter(torch.tensor(3), requires_grad=False)


class FlashAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None, :, None].expand(-1, 1, -1, 8).contiguous()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, q, q).mean((1, 3))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def edits_in_place(state: State) -> Tensor:
    state.data.mul_(0.99)
    return ll_objective(state)


def edits_what_autograd_needs(state: State) -> Tensor:
    hidden = state.ll_model(state.data).exp()
    loss = hidden.square().mean()
    hidden.add_(1.0)
    return loss + ll_objective(state)


def flipped(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x, -y) for x, y in data]


def outside(problem: BilevelProblem) -> BilevelProblem:
    model = problem.ll_model
    return replace(problem, ul_objective=lambda s: mse_loss(model(s.data), s.target))


def settings(**changes: Any) -> ImplicitSettings:
    return replace(SETTINGS, **changes)


def with_l1(state: State) -> Tensor:
    return ul_objective(state) + 0.5 * state.ul_model.log_l2.exp().mean() * state.ll_model[0].weight.abs().sum()


def clamped(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What keeps weights below 0.2, where the data would have two of them at 1."""
    optimizer = torch.optim.Adam(params, lr=lr)

    def project(*_: Any) -> None:
        for param in params:
            param.data.clamp_(max=0.2)

    optimizer.register_step_post_hook(project)
    return optimizer


def leaves_eval_on(state: State) -> Tensor:
    loss = ll_objective(state)
    state.ll_model.eval()
    return loss


class CheckpointedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None, :, None].expand(-1, 1, -1, 8).contiguous()
        return checkpoint(scaled_dot_product_attention, q, q, q, use_reentrant=False).mean((1, 3))


BROKEN: dict[str, tuple[str, Callable[[], BilevelProblem], ImplicitSettings]] = {
    "a Neumann step above 2 / lambda_max": (
        "diverging-step",
        working,
        settings(solver="neumann", step_size=5.0),
    ),
    "ll training diverges": (
        "training-diverges",
        lambda: working(ll_optimizer=torch.optim.SGD),
        settings(ll_learning_rate=5.0),
    ),
    "a ul value that nothing uses": (
        "unused-ul-value",
        lambda: working(ul_model=Values(log_l2=torch.zeros(D, dtype=F64), spare=torch.zeros(2, dtype=F64))),
        SETTINGS,
    ),
    "a learning rate as ul value": ("learning-rate", lambda: working(ul_model=LearningRate()), SETTINGS),
    "a ul value behind .item()": (
        "unused-ul-value",
        lambda: working(
            ul_model=Values(log_l2=torch.zeros((), dtype=F64)),
            ll_objective=lambda s: ul_objective(s) + s.ul_model.log_l2.exp().item() * s.ll_model[0].weight.norm(),
        ),
        SETTINGS,
    ),
    "an objective that is no scalar": (
        "non-scalar",
        lambda: working(ul_objective=lambda s: mse_loss(s.ll_model(s.data), s.target, reduction="none")),
        SETTINGS,
    ),
    "an objective that returns a number": ("not-a-loss", lambda: working(ul_objective=lambda s: 1.0), SETTINGS),
    "objectives swapped": (
        "objectives-swapped",
        lambda: working(ul_objective=ll_objective, ll_objective=ul_objective),
        SETTINGS,
    ),
    "splits swapped": (
        "splits-swapped",
        lambda: working(train_data=split(1, 20), validate_data=split(0, 200)),
        SETTINGS,
    ),
    "a detached ul loss": (
        "detached",
        lambda: working(
            ul_objective=lambda s: mse_loss(s.ll_model(s.data).detach(), s.target) + s.ul_model.log_l2.sum()
        ),
        SETTINGS,
    ),
    "a ll loss under no_grad": ("detached", lambda: working(ll_objective=torch.no_grad()(ll_objective)), SETTINGS),
    "a model from outside the state": ("detached", lambda: outside(working()), SETTINGS),
    "a part of the ll loss detached": (
        "derivative",
        lambda: working(
            ll_objective=lambda s: ll_objective(s) + (s.ll_model[0].weight.detach() * s.ll_model[0].weight).sum()
        ),
        SETTINGS,
    ),
    "a wrong backward": (
        "derivative",
        lambda: working(ll_objective=lambda s: mse_loss(Doubled.apply(s.ll_model(s.data)), s.target) + ll_objective(s)),
        SETTINGS,
    ),
    "data edited in place": ("in-place", lambda: working(ll_objective=edits_in_place), SETTINGS),
    "activations edited in place": ("in-place", lambda: working(ll_objective=edits_what_autograd_needs), SETTINGS),
    "fused attention forced": (
        "double-backward",
        lambda: working(
            ll_model=nn.Sequential(nn.Linear(D, D), FlashAttention(), nn.Linear(D, 1)).to(F64),
        ),
        SETTINGS,
    ),
    "the gradient of sqrt at 0": (
        "non-finite",
        lambda: working(ul_objective=lambda s: ul_objective(s) + (0 * s.ll_model[0].weight).sum().sqrt()),
        SETTINGS,
    ),
    "a loss that is NaN": ("non-finite", lambda: working(ll_objective=lambda s: ll_objective(s) + math.nan), SETTINGS),
    "integer parameters": ("integer-parameter", lambda: working(ul_model=Count()), SETTINGS),
    "ll not at a minimum": (
        "not-at-minimum",
        lambda: working(ll_optimizer=torch.optim.SGD),
        settings(ll_steps=1, ul_steps=5, ll_learning_rate=1e-4),
    ),
    "ll loss of the wrong sign": (
        "wrong-sign",
        lambda: working(ll_objective=lambda s: s.ul_model.log_l2.exp().sum() - ll_objective(s)),
        settings(ll_steps=1, ul_steps=10),
    ),
    "ul loss of the wrong sign": ("wrong-sign", lambda: working(ul_objective=lambda s: -ul_objective(s)), SETTINGS),
    "a penalty of the wrong sign": (
        "negative-curvature",
        lambda: working(ll_objective=lambda s: 21 * ul_objective(s) - 20 * ll_objective(s)),
        settings(ll_steps=1),
    ),
    "a metric that is NaN": ("non-finite", lambda: working(metrics={"mine": lambda s: math.nan}), SETTINGS),
    "an ll model that generalises badly": (
        "wrong-sign",
        lambda: working(ll_objective=lambda s: ll_objective(s) + 1e-9 * s.data.sum(), validate_data=flipped(split(1))),
        SETTINGS,
    ),
    "an L1 penalty": (
        "not-smooth",
        lambda: working(ll_objective=with_l1, ul_model=Values(log_l2=torch.zeros(D, dtype=F64))),
        settings(ll_steps=20),
    ),
    "weights that are projected": ("not-smooth", lambda: working(ll_optimizer=clamped), SETTINGS),
    "an objective that leaves evaluation mode on": (
        "mode-leak",
        lambda: working(ll_model=nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.1)).to(F64), ll_objective=leaves_eval_on),
        SETTINGS,
    ),
    "a module that cannot be differentiated twice": (
        "double-backward",
        lambda: working(ll_model=nn.Sequential(nn.Linear(D, D), nn.Hardsigmoid(), nn.Linear(D, 1)).to(F64)),
        SETTINGS,
    ),
    "no select_data": ("no-select-data", lambda: working(select_data=None), SETTINGS),
    "the same data twice": ("same-data", lambda: working(validate_data=split(0)), SETTINGS),
}


ONLY_WARNED = (
    "weights that are projected",
    "splits swapped",
    "an ll model that generalises badly",
    "no select_data",
    "the same data twice",
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_problem_is_found_by_name(name: str) -> None:
    expected, problem, chosen = BROKEN[name]
    report = check(problem(), chosen)
    assert expected in [finding.name for finding in report.findings if finding.level is not Level.OK], str(report)
    assert report.passed == (name in ONLY_WARNED), str(report)


def test_attention_that_is_computed_again_passes() -> None:
    model = nn.Sequential(
        nn.Linear(D, D), CheckpointedAttention(), nn.Unflatten(0, (N, 1)), nn.Linear(D, 1), nn.Flatten(0, 1)
    ).to(F64)
    report = check(working(ll_model=model), SETTINGS)
    assert not {"double-backward", "torch-error", "problem"} & {fault.name for fault in report.faults}, str(report)


def test_the_module_that_cannot_be_differentiated_twice_is_named() -> None:
    _, problem, chosen = BROKEN["fused attention forced"]
    (fault,) = check(problem(), chosen).faults
    assert "(in '1', FlashAttention)" in fault.message


# ---- the report


def test_the_report_as_text_and_as_json() -> None:
    report = check(working(select_data=None, ul_model=LearningRate()), SETTINGS)
    lines = str(report).splitlines()
    assert lines[-1] == "1 fault, 1 to be read"
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("FAULT   learning-rate ") for line in lines)
    told = json.loads(report.to_json())
    assert told["passed"] is False
    assert {"name", "level", "message"} == set(told["findings"][0])
    assert told["figures"]["lambda_max"] > 0
