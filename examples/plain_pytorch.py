"""A training script as people write them: digits, 40% of whose training labels are wrong, and nobody says which.

Shuffled minibatches, AdamW, linear warm-up and cosine, clipped gradients, an average of the weights, early stopping.
``from_pytorch.py`` is the same script turned hybrid: compare the two with ``diff``.
"""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

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
    return DataLoader(TensorDataset(*splits["train"]), BATCH_SIZE, shuffle=True)


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
        for x, y in loader:
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


def main() -> None:
    splits = data()
    model = network()
    model.load_state_dict(train(splits).best)
    loss, accuracy = evaluate(model, *splits["test"])
    print(f"plain: test loss {loss:.3f}, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
