"""``plain_pytorch.py`` turned hybrid: one weight per training sample, learned by hypergradients as the network trains.

What trains the network stays: batches, optimizer, schedule, clipping, average. ``problem`` puts these together
as the loop of ``train`` does, which is here for comparison; with the ul steps switched off, both take the same steps,
bit for bit. Only the loader differs: it also yields which samples are in a batch.
"""

import copy
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from tune_implicit import Averaging, BilevelProblem, SearchResult, State, search

N_TRAIN, N_VALIDATE = 800, 600
WRONG = 0.4
BATCH_SIZE, EPOCHS, PATIENCE = 200, 100, 20
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, DECAY = 3e-3, 1e-2, 1.0, 0.98


class Trained(NamedTuple):
    """What training leaves: the state dict that was best on validation data, both models, and a line for each step."""

    best: dict[str, Tensor]
    model: nn.Module
    average: AveragedModel
    log: list[tuple[float, float]]


def data() -> dict[str, Any]:
    """Return the digits in three splits, the wrong labels in that for training."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    wrong = torch.tensor(rng.random(N_TRAIN) < WRONG)
    y[:N_TRAIN][wrong] = (y[:N_TRAIN][wrong] + torch.tensor(rng.integers(1, 10, int(wrong.sum())))) % 10
    sizes = (N_TRAIN, N_VALIDATE, len(y) - N_TRAIN - N_VALIDATE)
    return dict(zip(("train", "validate", "test"), zip(x.split(sizes), y.split(sizes), strict=True), strict=True))


def batches(splits: dict[str, Any]) -> DataLoader:
    return DataLoader(TensorDataset(*splits["train"], torch.arange(N_TRAIN)), BATCH_SIZE, shuffle=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Return a linear warm-up over a tenth of the steps, and a cosine to zero over the others."""
    warmup = max(1, steps // 10)
    return LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))),
    )


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy."""
    model.eval()
    logits = model(x)
    model.train()
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def train(splits: dict[str, Any], seed: int = 0) -> Trained:
    """Train until the validation loss of the averaged weights has not improved for ``PATIENCE`` epochs."""
    torch.manual_seed(seed)
    model = network()
    loader = batches(splits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = schedule(optimizer, EPOCHS * len(loader))
    average = averaged(model)
    log, lowest, waited = [], math.inf, 0
    for _ in range(EPOCHS):
        for x, y, _ in loader:
            loss = cross_entropy(model(x), y, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            log.append((loss.item(), optimizer.param_groups[0]["lr"]))
        validate_loss, _ = evaluate(average.module, *splits["validate"])
        waited += 1
        if validate_loss < lowest:
            best, lowest, waited = copy.deepcopy(average.module.state_dict()), validate_loss, 0
        if waited == PATIENCE:
            break
    return Trained(best, model, average, log)


class SampleWeights(nn.Module):
    """One weight in (0, 2) per training sample, all of them 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(N_TRAIN))

    def forward(self, index: Tensor) -> Tensor:
        """Return the weights of the samples ``index``."""
        return 2 * self.logits[index].sigmoid()


def ul_objective(state: State) -> Tensor:
    return cross_entropy(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> Tensor:
    x, y, index = state.batch
    return (state.ul_model(index) * cross_entropy(state.ll_model(x), y, reduction="none")).mean()


def problem(config: dict[str, Any], splits: dict[str, Any]) -> BilevelProblem:
    """Return the problem of one trial, which ``config`` need not tell anything."""
    x, y = splits["validate"]
    return BilevelProblem(
        ul_model=SampleWeights(),
        ll_model=network(),
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=batches(splits),
        validate_data=[(x[::2], y[::2])],  # for ul steps
        select_data=[(x[1::2], y[1::2])],  # for early stopping, and for comparing trials
        ll_optimizer=partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY),
        ll_scheduler=schedule,
        ll_average=Averaging(model=averaged),
    )


settings = {
    "ll_steps": 2,
    "ul_steps": EPOCHS * N_TRAIN // BATCH_SIZE // 2,  # as many ll steps as the plain script takes at most
    "ul_steps_per_report": N_TRAIN // BATCH_SIZE // 2,  # after each epoch
    "patience": PATIENCE,
    "adapt_ul_learning_rate": False,  # minibatches and dropout make the hypergradients noisy
    "max_ll_gradient_norm": MAX_NORM,
}

space = {
    "ll_learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
    "ul_learning_rate": FloatDistribution(3e-2, 3e-1, log=True),
    "k": IntDistribution(3, 10, log=True),
}


def main(n_trials: int = 4) -> SearchResult:
    splits = data()
    model = network()
    model.load_state_dict(train(splits).best)
    loss, accuracy = evaluate(model, *splits["test"])
    print(f"plain: test loss {loss:.3f}, test accuracy {accuracy:.3f}")
    result = search(problem, space, data=splits, settings=settings, backend="optuna", n_trials=n_trials, seed=0)
    model.load_state_dict(result.best.ll_state)
    loss, accuracy = evaluate(model, *splits["test"])
    print(f"hybrid: test loss {loss:.3f}, test accuracy {accuracy:.3f}")
    return result


if __name__ == "__main__":
    main()
