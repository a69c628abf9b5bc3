from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.support.problems import F64, Case, generator, loss_of, quadratic, ridge
from tune_implicit.hypergradients.products import MeanSecondOrder, SecondOrder


def vector(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


def second_order(case: Case) -> tuple[SecondOrder, list[Tensor]]:
    problem = case.problem
    return SecondOrder(loss_of(problem, "ll"), list(problem.ll_model.parameters())), list(problem.ul_model.parameters())


@pytest.mark.parametrize("make", [quadratic, lambda: ridge(60, 20)], ids=["quadratic", "ridge"])
def test_products_match_the_dense_matrices(make) -> None:
    case = make()
    second, ul_params = second_order(case)
    v = vector(len(case.b))
    torch.testing.assert_close(second.hvp(v), case.h @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.hvp(2 * v), case.h @ (2 * v), rtol=1e-12, atol=1e-12)
    assert second.hvps == 2
    assert second.stationarity < 1e-12  # the case is at its trained weights
    torch.testing.assert_close(second.mixed_vjp(v, ul_params)[0], case.mixed(v).popitem()[1], rtol=1e-12, atol=1e-12)


def test_the_last_product_frees_the_graph() -> None:
    second, ul_params = second_order(ridge(60, 20))
    second.mixed_vjp(vector(20), ul_params)
    with pytest.raises(RuntimeError, match="second time"):
        second.hvp(vector(20))


def test_unused_and_linear_parameters_have_zero_derivatives() -> None:
    used, linear, unused, ul, unused_ul = (nn.Parameter(vector(2, seed)) for seed in range(5))
    second = SecondOrder((used.square() * ul).sum() + linear.sum(), [linear, used, unused])
    zero, one, v = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), vector(6)
    torch.testing.assert_close(second.stationarity, torch.cat([one, 2 * ul * used, zero]).norm().detach())
    torch.testing.assert_close(second.hvp(v), torch.cat([zero, 2 * ul * v[2:4], zero]).detach())
    mixed, none = second.mixed_vjp(v, [ul, unused_ul])
    torch.testing.assert_close(mixed, (2 * used * v[2:4]).detach())
    assert none is None


def test_a_linear_loss_has_no_second_derivative() -> None:
    w, ul = nn.Parameter(vector(3)), nn.Parameter(vector(3, 1))
    second = SecondOrder((2 * w).sum() + ul.sum(), [w])
    assert torch.equal(second.hvp(vector(3)), torch.zeros(3, dtype=F64))
    assert second.mixed_vjp(vector(3), [ul]) == (None,)


def test_every_product_is_with_one_dropout_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).to(F64)
    second = SecondOrder(model(vector(12).view(3, 4)).square().sum(), list(model.parameters()))
    v = vector(sum(param.numel() for param in model.parameters()))
    first = second.hvp(v)
    torch.rand(10)
    assert torch.equal(second.hvp(v), first)


def test_memory_layout_does_not_matter() -> None:
    data = vector(2 * 3 * 5 * 5).view(2, 3, 5, 5)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).to(F64)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).to(F64)
    other.load_state_dict(plain.state_dict())
    other.to(memory_format=torch.channels_last)
    got, expected = (
        SecondOrder(model(images).square().sum(), list(model.parameters()))
        for model, images in ((other, data.to(memory_format=torch.channels_last)), (plain, data))
    )
    v = vector(sum(param.numel() for param in plain.parameters()))
    torch.testing.assert_close(got.stationarity, expected.stationarity)
    torch.testing.assert_close(got.hvp(v), expected.hvp(v))


# ---- the mean over batches


def parts(model: nn.Module, ul: Tensor, n: int = 3) -> list[Callable[[], Tensor]]:
    def loss(seed: int) -> Tensor:
        return (ul.exp() * model(vector(12, seed).view(3, 4)).square()).mean()

    return [partial(loss, seed) for seed in range(n)]


@pytest.mark.parametrize("retain", [False, True])
def test_products_are_those_of_the_mean_loss(retain: bool) -> None:
    model, ul = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(F64), nn.Parameter(vector(1))
    params = list(model.parameters())
    losses = parts(model, ul)
    got = MeanSecondOrder(losses, params, retain)
    expected = SecondOrder(torch.stack([loss() for loss in losses]).mean(), params)
    v = vector(sum(param.numel() for param in params))
    for _ in range(2):
        torch.testing.assert_close(got.hvp(v), expected.hvp(v))
    assert got.hvps == 2 * 3
    torch.testing.assert_close(got.stationarity, expected.stationarity)
    torch.testing.assert_close(got.mixed_vjp(v, [ul]), expected.mixed_vjp(v, [ul]))
    assert len(got.losses) == 3


def test_without_graphs_kept_each_batch_is_computed_once_a_product() -> None:
    w, calls = nn.Parameter(vector(2)), []

    def loss(index: int) -> Tensor:
        calls.append(index)
        return (index + 1) * w.pow(3).sum()

    second = MeanSecondOrder([lambda: loss(0), lambda: loss(1)], [w], retain=False)
    second.hvp(vector(2))
    assert calls == [0, 1, 0, 1]


def test_what_only_one_batch_uses_is_used() -> None:
    one, other, none, ul = (nn.Parameter(vector(1, seed)) for seed in range(4))
    second = MeanSecondOrder([lambda: ul * one.square(), lambda: other.square()], [one, other, none], retain=True)
    assert second.unused == [2]
    torch.testing.assert_close(second.hvp(torch.ones(3, dtype=F64)), torch.tensor([ul.item(), 1, 0], dtype=F64))
    torch.testing.assert_close(second.mixed_vjp(torch.ones(3, dtype=F64), [ul])[0], one.detach())
