"""What works: a problem that a check finds nothing wrong with, and a trial that is taken to its end."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.problems import F64, Values, generator
from tune_implicit import BilevelProblem, ImplicitSettings, State
from tune_implicit.trials.record import Record
from tune_implicit.trials.trial import Trial

N, D = 60, 4

SETTINGS = ImplicitSettings(ll_learning_rate=0.05, ll_steps=10, ul_steps=30, solver="cg")


def split(seed: int, n: int = N) -> list[tuple[Tensor, Tensor]]:
    random = generator(seed)
    x = torch.randn(n, D, generator=random, dtype=F64)
    return [(x, x[:, :2].sum(1, keepdim=True) + 0.3 * torch.randn(n, 1, generator=random, dtype=F64))]


def ul_objective(state: State) -> Tensor:
    return mse_loss(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> Tensor:
    penalty = (state.ul_model.log_l2.exp() * state.ll_model[0].weight.square()).sum()
    return mse_loss(state.ll_model(state.data), state.target) + penalty


def working(**changes: Any) -> BilevelProblem:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "ul_model": Values(log_l2=torch.full((D,), -3.0, dtype=F64)),
        "ll_model": nn.Sequential(nn.Linear(D, 1)).to(F64),
        "ul_objective": ul_objective,
        "ll_objective": ll_objective,
        "train_data": split(0),
        "validate_data": split(1),
        "select_data": split(2),
    }
    return BilevelProblem(**parts | changes)


class LearningRate(Values):
    def __init__(self) -> None:
        super().__init__(log_l2=torch.full((D,), -3.0, dtype=F64), log_lr=torch.zeros((), dtype=F64))


def finish(trial: Trial) -> Record:
    """Return the last record of ``trial``."""
    while not trial.completed:
        record = trial.advance()
    return record
