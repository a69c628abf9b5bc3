"""One L2 penalty per feature of a breast-cancer classifier, learned by hypergradients within each trial.

The search picks where they start, the solver, its effort and the learning rates: on Optuna in ``optuna_study.py``, on
Ray Tune in ``ray_tuner.py``, or from the command line: ``tune-implicit run examples/breast_cancer.py``.
"""

from typing import Any

import torch
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tune_implicit import BilevelProblem, State, recommended_space

space = recommended_space() | {"log_l2": FloatDistribution(-8.0, -2.0)}


class Penalties(nn.Module):
    """The logarithms of the penalties, so that any step leaves them positive."""

    def __init__(self, n: int, log_l2: float) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.full((n,), log_l2))


def ul_objective(state: State) -> Tensor:
    return binary_cross_entropy_with_logits(state.ll_model(state.data).squeeze(1), state.target)


def ll_objective(state: State) -> Tensor:
    return ul_objective(state) + (state.ul_model.log_l2.exp() * state.ll_model.weight.square()).sum()


def accuracy(state: State) -> Tensor:
    return ((state.ll_model(state.data).squeeze(1) > 0) == state.target.bool()).float().mean()


def problem(config: dict[str, Any]) -> BilevelProblem:
    """Return the problem of one trial; ``config["log_l2"]`` is where its ul values start."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    y = torch.tensor(y, dtype=torch.float32)
    # Few rows to train on, so that the penalties matter.
    train, validate, select = ((x[rows], y[rows]) for rows in (slice(0, 80), slice(80, 320), slice(320, None)))
    return BilevelProblem(
        ul_model=Penalties(x.shape[1], config["log_l2"]),
        ll_model=nn.Linear(x.shape[1], 1),
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=[train],
        validate_data=[validate],
        select_data=[select],
        metrics={"accuracy": accuracy},
    )
