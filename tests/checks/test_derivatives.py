from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from tests.support.broken import Broken, drawing, first_weight, seen_by, wrong
from tests.support.problems import F64, Values
from tests.support.working import SETTINGS, D, ll_objective, split, ul_objective, working
from tune_implicit import BilevelProblem
from tune_implicit.checks.derivatives import directional_error, exact_copy, look_at_derivatives
from tune_implicit.checks.findings import Level
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.hypergradients.solvers.spectrum import random_direction


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


def between(module: nn.Module) -> BilevelProblem:
    return working(ll_model=nn.Sequential(nn.Linear(D, D), module, nn.Linear(D, 1)).to(F64))


def only_in_float32() -> BilevelProblem:
    """Return a problem in float32, with a constant of that type in its objective."""
    ones = torch.ones(D, 1)

    def single(seed: int) -> list[tuple[Tensor, Tensor]]:
        return [(x.float(), y.float()) for x, y in split(seed)]

    return working(
        ul_model=Values(log_l2=torch.full((D,), -3.0)),
        ll_model=nn.Sequential(nn.Linear(D, 1)),
        ll_objective=lambda s: ll_objective(s) + 0.01 * (s.ll_model[0].weight @ ones).square().sum(),
        train_data=single(0),
        validate_data=single(1),
        select_data=single(2),
    )


BROKEN = {
    "the gradient of sqrt at 0": Broken(
        "non-finite", partial(working, ul_objective=lambda s: ul_objective(s) + (0 * first_weight(s)).sqrt())
    ),
    "the curvature of a power at 0": Broken(
        "non-finite", partial(working, ll_objective=lambda s: ll_objective(s) + (0 * first_weight(s)).abs().pow(1.5))
    ),
    "fused attention forced": Broken("double-backward", lambda: between(FlashAttention())),
    "a module that cannot be differentiated twice": Broken("double-backward", lambda: between(nn.Hardsigmoid())),
    "ul values beside the ll weights": Broken(
        "no-implicit-term", partial(working, ll_objective=lambda s: ul_objective(s) + s.ul_model.log_l2.sum())
    ),
    "a part of the ll loss detached": Broken(
        "derivative",
        partial(
            working,
            ll_objective=lambda s: ll_objective(s) + (s.ll_model[0].weight.detach() * s.ll_model[0].weight).sum(),
        ),
    ),
    "a wrong backward": Broken(
        "derivative",
        partial(
            working, ll_objective=lambda s: mse_loss(Doubled.apply(s.ll_model(s.data)), s.target) + ll_objective(s)
        ),
    ),
    "an objective in float32 alone": Broken("not-in-float64", only_in_float32, level=Level.WARNING),
    "a generator of its own": Broken("not-repeatable", drawing, level=Level.WARNING),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_derivatives)) == {broken.finding: broken.level}


def test_right_derivatives_agree_with_differences() -> None:
    report = seen_by(look_at_derivatives, working())
    assert [finding.name for finding in report.findings] == ["derivatives"] * 3
    assert wrong(report) == {}


def test_dropout_is_drawn_alike_and_no_wrong_derivative() -> None:
    assert wrong(seen_by(look_at_derivatives, between(nn.Dropout(0.3)))) == {}


def test_the_module_that_cannot_be_differentiated_twice_is_named() -> None:
    (fault,) = seen_by(look_at_derivatives, between(FlashAttention())).faults
    assert "(in '1', FlashAttention)" in fault.message


# ---- the copy that differences are taken of


def test_the_copy_to_take_differences_of_is_in_float64() -> None:
    problem = working(ll_model=nn.Sequential(nn.Linear(D, 1)).to(F64))
    exact = exact_copy(FixedProblem.of(problem, SETTINGS))
    assert exact is not None
    assert {param.dtype for param in [*exact.ll_params(), *exact.ul_params().values()]} == {F64}


@pytest.mark.parametrize("problem", [only_in_float32, drawing])
def test_without_such_a_copy_there_is_none_even_where_no_report_is_told(problem: Callable[[], BilevelProblem]) -> None:
    assert exact_copy(FixedProblem.of(problem(), SETTINGS)) is None


# ---- differences along a direction


def cubes() -> nn.Parameter:
    """Return where the sum of cubes is taken."""
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=F64))


@pytest.mark.parametrize("factor", [1.0, 1.5, -1.0])
def test_an_error_is_relative_to_the_derivative_or_to_the_gradient(factor: float) -> None:
    param = cubes()
    right = 3 * param.detach().square()
    claimed, direction = factor * right, random_direction(right)
    error = directional_error([param], claimed, lambda: param.pow(3).sum().item(), (1e-4, 1e-5))
    scale = max((claimed @ direction).abs().item(), claimed.norm().item())
    assert error == pytest.approx(((claimed - right) @ direction).abs().item() / scale, abs=1e-7)


def test_parameters_are_moved_back() -> None:
    param = cubes()
    before = param.detach().clone()
    directional_error([param], 3 * before.square(), lambda: param.pow(3).sum().item(), (1e-2, 1e-4))
    torch.testing.assert_close(param.detach(), before, rtol=1e-14, atol=0)


def test_a_kink_within_a_step_spoils_that_step_alone() -> None:
    param = nn.Parameter(torch.full((3,), 1e-3, dtype=F64))
    right = torch.ones(3, dtype=F64)
    assert directional_error([param], right, lambda: param.abs().sum().item(), (1e-1,)) > 0.1
    assert directional_error([param], right, lambda: param.abs().sum().item(), (1e-1, 1e-6)) < 1e-6
