import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.broken import Again
from tests.support.noisy import assert_same_bits
from tests.support.problems import F64, Case, Values, quadratic
from tests.support.working import SETTINGS, D, ll_objective, split, working
from tune_implicit import BilevelProblem, State
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import DerivativeError
from tune_implicit.hypergradients.rng import get_rng_state


def fixed_of(problem: BilevelProblem) -> FixedProblem:
    return FixedProblem.of(problem, SETTINGS)


@pytest.fixture
def case() -> Case:
    return quadratic()


# ---- what is fixed


def test_a_ul_objective_that_validates_leaves_the_loss_repeatable() -> None:
    def ul_objective(state: State) -> Tensor:
        state.ll_model.eval()
        loss = mse_loss(state.ll_model(state.data), state.target)
        state.ll_model.train()
        return loss

    model = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(F64)
    fixed = fixed_of(working(ll_model=model, ul_objective=ul_objective))
    assert [(fixed.value("ll"), fixed.value("ul")) for _ in range(2)] == [(fixed.value("ll"), fixed.value("ul"))] * 2


def test_its_models_are_copies_and_its_batches_the_first_of_each_split() -> None:
    train, validate, later = split(0), split(1), split(2)
    problem = working(train_data=train + later, validate_data=validate + later)
    fixed = fixed_of(problem)
    assert (fixed.train, fixed.validate) == (train[0], validate[0])
    for model in ("ul_model", "ll_model"):
        one, other = getattr(fixed.problem, model), getattr(problem, model)
        assert one is not other
        assert str(one.state_dict()) == str(other.state_dict())


def test_its_batches_are_on_the_device_of_its_models() -> None:
    fixed = fixed_of(working(ul_model=Values(log_l2=torch.zeros(D)).to("meta"), ll_model=nn.Linear(D, 1).to("meta")))
    assert {tensor.device.type for tensor in (*fixed.train, *fixed.validate)} == {"meta"}


def test_a_split_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="`validate_data` must hold at least one batch, got none"):
        fixed_of(working(validate_data=Again(0)))


def test_only_what_is_trained_is_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(D, 2), nn.Linear(2, 1)).to(F64)
    model[0].requires_grad_(False)
    fixed = fixed_of(working(ll_model=model))
    assert [param.shape for param in fixed.ll_params()] == [(1, 2), (1,)]
    assert list(fixed.ul_params()) == ["log_l2"]


# ---- losses and their derivatives


def test_a_loss_is_that_of_its_level_on_its_batch_or_on_another(case: Case) -> None:
    fixed = fixed_of(case.problem)
    models = fixed.problem.ul_model, fixed.problem.ll_model
    for level, batch in (("ul", fixed.validate), ("ll", fixed.train)):
        objective = getattr(case.problem, f"{level}_objective")
        assert fixed.value(level) == objective(State(*batch, *models)).item()
        other = (2 * batch[0], batch[1])
        assert fixed.value(level, other) == objective(State(*other, *models)).item()


def test_derivatives_are_those_of_linear_algebra(case: Case) -> None:
    fixed = fixed_of(case.problem)
    torch.testing.assert_close(fixed.gradient("ul", fixed.ll_params()), case.b)
    v = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=F64)
    with fixed.second_order() as second:
        torch.testing.assert_close(second.hvp(v), case.h @ v)
        (mixed,) = second.mixed_vjp(v, list(fixed.ul_params().values()))
    torch.testing.assert_close(mixed, case.mixed(v)["ul"])


def test_a_parameter_that_a_loss_does_not_use_has_no_gradient_and_zeros_in_a_flat_one(case: Case) -> None:
    fixed = fixed_of(case.problem)
    params = [*fixed.ll_params(), nn.Parameter(torch.ones(2, dtype=F64))]
    loss, (used, unused) = fixed.gradients("ul", params)
    assert unused is None
    assert not loss.requires_grad
    assert torch.equal(fixed.gradient("ul", params), torch.cat([used, torch.zeros(2, dtype=F64)]))


@pytest.mark.parametrize("level", ["ul", "ll"])
def test_the_objective_that_cannot_be_differentiated_is_named(level: str) -> None:
    def without(state: State) -> Tensor:
        return ll_objective(state) + torch.special.zeta(2 + state.ll_model[0].bias, torch.full((1,), 2.0)).sum()

    fixed = fixed_of(working(**{f"{level}_objective": without}))
    with pytest.raises(DerivativeError, match=f"cannot differentiate zeta.*which `{level}_objective` needs"):
        fixed.gradient(level, fixed.ll_params())


def test_a_missing_second_derivative_is_named_with_its_module() -> None:
    fixed = fixed_of(working(ll_model=nn.Sequential(nn.Linear(D, 1), nn.Hardsigmoid()).to(F64)))
    fixed.gradient("ll", fixed.ll_params())
    with (
        pytest.raises(DerivativeError, match=r"which `ll_objective` needs \(in '1', Hardsigmoid\)"),
        fixed.second_order() as second,
    ):
        second.hvp(torch.ones(D + 1, dtype=F64))


def test_derivatives_are_taken_where_the_caller_takes_none(case: Case) -> None:
    with torch.no_grad():
        assert fixed_of(case.problem).loss("ll").requires_grad


# ---- what is the same at every call


def noisy(state: State) -> Tensor:
    """Return a loss that draws, and that leaves a mode changed."""
    loss = ll_objective(state) * (1 + random.random() * torch.rand(()).item())
    state.ll_model.eval()
    return loss


@pytest.fixture
def drawing() -> FixedProblem:
    model = nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.5)).to(F64)
    return fixed_of(working(ll_model=model, ll_objective=noisy))


def test_what_objectives_draw_is_the_same_at_every_call(drawing: FixedProblem) -> None:
    losses = set()
    for _ in range(3):
        torch.rand(7)
        losses.add(drawing.value("ll"))
    assert len(losses) == 1


def test_another_draw_is_another_loss_and_again_the_same(drawing: FixedProblem) -> None:
    first, *others = (replace(drawing, draw=draw).value("ll") for draw in (1, 2, 1))
    assert others[0] != first == others[1]


def test_modes_and_the_random_state_are_left_as_they_were(drawing: FixedProblem) -> None:
    before = get_rng_state()
    drawing.loss("ll")
    assert_same_bits(get_rng_state(), before)
    assert all(module.training for module in drawing.problem.ll_model.modules())


def test_its_problem_can_be_made_to_draw_the_same_for_others(drawing: FixedProblem) -> None:
    problem = replace(drawing, draw=3).repeatable()
    state = State(*drawing.train, problem.ul_model, problem.ll_model.eval())
    assert problem.ll_objective(state).item() == problem.ll_objective(state).item()
    assert problem.ll_model is drawing.problem.ll_model


# ---- in float64


def test_doubled_it_is_a_copy_in_float64_and_integers_are_left() -> None:
    data = [(torch.randn(6, D), torch.arange(6))]
    problem = working(
        ul_model=Values(log_l2=torch.zeros(D)),
        ll_model=nn.Sequential(nn.Linear(D, 1)),
        ul_objective=lambda s: mse_loss(s.ll_model(s.data)[:, 0], s.target.to(s.data.dtype)),
        train_data=data,
        validate_data=data,
        select_data=data,
    )
    fixed = fixed_of(problem)
    exact = fixed.doubled()
    assert [tensor.dtype for tensor in (*exact.train, *exact.validate)] == [F64, torch.int64] * 2
    assert exact.loss("ul").dtype is F64
    assert exact.value("ul") == pytest.approx(fixed.value("ul"), rel=1e-5)
    assert {param.dtype for param in [*fixed.ll_params(), *fixed.ul_params().values()]} == {torch.float32}
