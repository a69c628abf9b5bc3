import math

import pytest
import torch
from torch import Tensor, nn

from tests.support.noisy import Worlds, noisy_objective
from tests.support.problems import F64, Case, generator, ridge
from tests.support.systems import ITERATIVE
from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.noise import standard_error
from tune_implicit.hypergradients.solvers.solution import Status

# ---- the standard error


def noise_of(case: Case) -> float:
    """Half the distance between ``dF/dw`` on the two halves of the validation batch."""
    x, y = case.problem.validate_data[0]
    w, middle = case.problem.ll_model.w, len(x) // 2
    one, other = (x[part].T @ (x[part] @ w - y[part]) / len(y[part]) for part in (slice(middle), slice(middle, None)))
    return ((one - other).norm() / 2).item()


def test_it_is_half_the_difference_of_the_two_halves_gradients() -> None:
    case = ridge(122, 20)
    w = case.problem.ll_model.w

    def loss(batch: Batch) -> Tensor:
        x, y = batch
        return (x @ w - y).square().mean() / 2

    assert standard_error(loss, case.problem.validate_data[0], [w]) == pytest.approx(noise_of(case), rel=1e-12)


def test_a_loss_that_its_examples_do_not_move_has_no_error() -> None:
    w, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    assert standard_error(lambda batch: w.square().sum(), (torch.ones(4), None), [w, unused]) == 0


def test_it_estimates_the_error_of_a_mean() -> None:
    # Over many batches its root mean square is the standard deviation of the batch's mean gradient, here 1 / sqrt(n).
    n, w = 50, nn.Parameter(torch.zeros(1, dtype=F64))
    batches = torch.randn(2000, n, generator=generator(), dtype=F64)
    errors = torch.tensor([standard_error(lambda half: (half[0] * w).mean(), (x, None), [w]) for x in batches])
    assert errors.square().mean().sqrt().item() == pytest.approx(n**-0.5, rel=0.1)


# ---- what a solve does with it


@pytest.mark.parametrize("examples", [120, 122])  # the halves of 61 differ
@pytest.mark.parametrize("solver", ITERATIVE)
def test_noise_stops_the_solver_where_the_batch_is_no_more_exact(solver: str, examples: int) -> None:
    case = ridge(examples, 20)
    case.problem.ll_model.w.data.mul_(3)  # far from the data, so that the gradient stands out of its noise
    result, exact = case.compute(solver, k=2000, stop="noise"), case.compute(solver, k=2000)
    assert result.noise_norm == pytest.approx(noise_of(case), rel=1e-12)
    assert math.isnan(exact.noise_norm)
    assert result.status is Status.CONVERGED
    assert 0 < result.solver_steps < exact.solver_steps
    assert result.residual_norm < result.noise_norm
    before = case.compute(solver, k=result.solver_steps - 1)
    assert before.residual_norm >= result.noise_norm


def test_noise_below_the_tolerance_does_not_loosen_it() -> None:
    case = ridge(120, 20)
    assert case.compute(stop="noise", tolerance=1e3).solver_steps == 0


def implicit_of(worlds: Worlds, **arguments: object) -> Implicit:
    return Implicit(noisy_objective, worlds.ul_model, noisy_objective, worlds.ll_model, 0.1, **arguments)


@pytest.mark.parametrize(
    "item", ["parameters", "grad", "requires_grad", "mode", "buffers", "the objects", "python", "numpy", "cpu"]
)
def test_halving_the_batch_leaves_the_models_as_they_were(item: str) -> None:
    worlds, data = Worlds(), torch.randn(8, 3, generator=generator(), dtype=F64)
    one = implicit_of(worlds, k=3, solver="cg", stop="noise")
    before = worlds.items()[item]
    result = one.compute_gradients(data, None, train_data=data)
    assert result.noise_norm > 0
    torch.testing.assert_close(worlds.items()[item], before, rtol=0, atol=0)


def test_halving_the_batch_does_not_change_the_hypergradient() -> None:
    """The random numbers of both objectives are those drawn without it."""
    results = []
    for stop in ("tolerance", "noise"):
        worlds, data = Worlds(), torch.randn(8, 3, generator=generator(), dtype=F64)
        one = implicit_of(worlds, k=0, stop=stop)  # which stops nowhere
        results.append(one.compute_gradients(data, None, train_data=data).gradients)
    torch.testing.assert_close(*results, rtol=0, atol=0)
