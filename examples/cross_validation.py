"""Cross-validated penalties: one L2 penalty for each feature, learned over five folds at once.

Each fold has a regression of its own, all have the same penalties, and a hypergradient is the mean over the folds: what
k-fold cross-validation does for one penalty on a grid, for as many as there are. Columns of noise, of which nobody says
that they are noise, make it worth while. The same with one penalty for all features is what it is compared with.
"""

from typing import Any

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tune_implicit import BilevelProblem, SearchResult, State, search

FOLDS = 5
N_TRAIN, N_NOISE = 300, 60

space = {"log_l2": FloatDistribution(-4.0, -1.0), "ul_learning_rate": FloatDistribution(0.03, 0.3, log=True)}
settings = {"ll_learning_rate": 0.03, "ul_steps": 60, "solver": "cg", "k": 10}


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the diabetes data, standardized, with columns of noise: rows for the folds, and rows for the test."""
    rng = np.random.default_rng(0)
    x, y = load_diabetes(return_X_y=True)
    x = np.hstack([x, rng.standard_normal((len(x), N_NOISE))])
    rows = rng.permutation(len(x))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    x, y = torch.tensor(x[rows], dtype=torch.float32), torch.tensor(y[rows], dtype=torch.float32)
    return {"train": (x[:N_TRAIN], y[:N_TRAIN]), "test": (x[N_TRAIN:], y[N_TRAIN:])}


class Penalties(nn.Module):
    """The logarithms of the penalties, so that any step leaves them positive: one for each feature, or one in all."""

    def __init__(self, n: int, log_l2: float) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.full((n,), log_l2))


def ul_objective(state: State) -> Tensor:
    return mse_loss(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> Tensor:
    return ul_objective(state) + (state.ul_model.log_l2.exp() * state.ll_model.weight.square()).sum()


def folds(x: Tensor, y: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Return rows to train on, to take ul steps on and to compare trials on, a list of folds of each."""
    parts = torch.arange(len(x)) % FOLDS
    held_out = [(parts == fold).nonzero().squeeze(1) for fold in range(FOLDS)]
    train = [(parts != fold).nonzero().squeeze(1) for fold in range(FOLDS)]
    validate, select = [rows[::2] for rows in held_out], [rows[1::2] for rows in held_out]
    return [[[(x[rows], y[rows])] for rows in split] for split in (train, validate, select)]


def problem(config: dict[str, Any], splits: dict[str, Any]) -> BilevelProblem:
    """Return the problem of one trial; ``config["penalties"]`` says how many, ``config["log_l2"]`` where they start."""
    train, validate, select = folds(*splits["train"])
    n = splits["train"][0].shape[1]
    return BilevelProblem(
        ul_model=Penalties(config["penalties"], config["log_l2"]),
        ll_model=[nn.Linear(n, 1) for _ in range(FOLDS)],
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=train,
        validate_data=validate,
        select_data=select,
    )


def test_loss(log_l2: Tensor, splits: dict[str, Any]) -> float:
    """Return the loss on test data of the regression on all rows of the folds, in closed form."""
    x, y = splits["train"]
    ones = torch.ones(len(x), 1)
    x, penalties = torch.hstack([x, ones]), torch.cat([log_l2.exp().expand(x.shape[1]), torch.zeros(1)])
    weights = torch.linalg.solve(x.T @ x / len(x) + penalties.diag(), x.T @ y / len(x))
    x, y = splits["test"]
    return mse_loss(torch.hstack([x, torch.ones(len(x), 1)]) @ weights, y).item()


def main(n_trials: int = 3) -> dict[str, float]:
    splits = data()
    losses = {}
    for name, penalties in {"one penalty": 1, "one per feature": splits["train"][0].shape[1]}.items():
        result: SearchResult = search(
            problem,
            space,
            data=splits,
            settings=settings | {"penalties": penalties},
            backend="optuna",
            n_trials=n_trials,
            seed=0,
        )
        losses[name] = test_loss(result.best.ul_state["log_l2"], splits)
        print(f"{name}: loss on held-out folds {result.best.value:.3f}, on test data {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
