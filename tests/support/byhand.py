"""A small regression in float64 that is trained by a trainer and, beside it, by a loop written out."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tests.support.problems import F64, Values, generator
from tune_implicit import BilevelProblem, BilevelTrainer, ImplicitSettings, State
from tune_implicit.hypergradients.rng import seed_everything

Pair = tuple[Tensor, Tensor]

# One ll step and no ul step: what is compared with a loop by hand.
PLAIN = ImplicitSettings(ll_steps=1, ul_steps=10, ul_learning_rate=0.0, ll_learning_rate=0.05, patience=0)


def pairs(seed: int, sizes: Iterable[int] = (8, 8, 8)) -> list[Pair]:
    random = generator(seed)
    x = torch.randn(sum(sizes), 3, generator=random, dtype=F64)
    y = x[:, :1] * x[:, 1:2] + 0.5 * x[:, 2:] + 0.1 * torch.randn(len(x), 1, generator=random, dtype=F64)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def net(bias: bool = True, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    seed_everything(seed)
    layers = [nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 1, bias=bias)]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else [])).to(F64)


def shuffled(batch_size: int = 8) -> DataLoader:
    ((x, y),) = pairs(0, (24,))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def ul_objective(state: State) -> Tensor:
    return mse_loss(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> Tensor:
    weights = [state.ll_model[0].weight, state.ll_model[2].weight]
    penalty = sum(log_l2.exp() * w.square().sum() for log_l2, w in zip(state.ul_model.log_l2, weights, strict=True))
    return mse_loss(state.ll_model(state.data), state.target) + penalty


def regression(**changes: Any) -> BilevelProblem:
    parts: dict[str, Any] = {
        "ul_model": Values(log_l2=torch.tensor([-4.0, -3.0], dtype=F64)),
        "ll_model": net(),
        "ul_objective": ul_objective,
        "ll_objective": ll_objective,
        "train_data": pairs(0),
        "validate_data": pairs(1, (8,)),
        "select_data": pairs(2, (8,)),
    }
    return BilevelProblem(**parts | changes)


def trained(problem: BilevelProblem, settings: ImplicitSettings, steps: int) -> tuple[BilevelTrainer, list[float]]:
    """A trainer after ``steps`` of its steps, and the loss of each."""
    seed_everything(1)
    trainer = BilevelTrainer(problem, settings)
    return trainer, [trainer.step().train_loss for _ in range(steps)]


def loss_and_gradient(problem: BilevelProblem, optimizer: torch.optim.Optimizer, batch: Pair) -> Tensor:
    """The ll loss of a batch, whose gradient is then in ``.grad``."""
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = problem.ll_objective(State(*batch, problem.ul_model, problem.ll_model))
        loss.backward()
    return loss.detach()


def cycled(batches: list[Pair], steps: int) -> list[Pair]:
    return [batches[step % len(batches)] for step in range(steps)]


def by_hand(
    problem: BilevelProblem,
    optimizer: torch.optim.Optimizer,
    steps: int,
    clip: float | None = None,
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """Take ``steps`` ll steps over a list of batches, and return the loss of each."""
    losses = []
    for batch in cycled(problem.train_data, steps):

        def backward(batch: Pair = batch) -> Tensor:
            loss = loss_and_gradient(problem, optimizer, batch)
            if clip is not None:
                nn.utils.clip_grad_norm_(problem.ll_model.parameters(), clip)
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            losses.append(float(optimizer.step(backward)))
        else:
            losses.append(backward().item())
            optimizer.step()
        after()
    return losses


def optimizer_of(trainer: BilevelTrainer) -> torch.optim.Optimizer:
    return trainer.levels[0]._scheduled.optimizer
