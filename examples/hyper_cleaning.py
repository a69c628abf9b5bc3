"""Data hyper-cleaning: learn one weight per training sample when 40% of the labels are wrong.

The ul model holds 800 weights, which hypergradients of the loss on clean validation data move. The search picks the
settings around it: where the weights start, solver, k, learning rates, width. The same search with the ul steps
switched off shows their worth.

Run both with ``make demo`` or ``python examples/hyper_cleaning.py``. The search alone, from the command line:
``tune-implicit run examples/hyper_cleaning.py``.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from tune_implicit import (
    BilevelProblem,
    Progress,
    SearchResult,
    State,
    TrialResult,
    recommended_space,
    search,
    write_report,
)

N_TRAIN, N_VALIDATE, N_SELECT = 800, 300, 300
FLIPPED = 0.4
WEIGHT_DECAY = 1e-3

space = recommended_space() | {
    "logit": FloatDistribution(-2.0, 2.0),
    "width": CategoricalDistribution([32, 64, 128]),
}


def data() -> dict[str, Any]:
    """Return the digits in four splits, 40% of the training labels flipped to another class, and which are clean."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    clean = torch.tensor(rng.random(N_TRAIN) >= FLIPPED)
    y[:N_TRAIN][~clean] = (y[:N_TRAIN][~clean] + torch.tensor(rng.integers(1, 10, int((~clean).sum())))) % 10
    names = ("train", "validate", "select", "test")
    sizes = (N_TRAIN, N_VALIDATE, N_SELECT, len(y) - N_TRAIN - N_VALIDATE - N_SELECT)
    splits = dict(zip(names, zip(x.split(sizes), y.split(sizes), strict=True), strict=True))
    return {**splits, "clean": clean}


class SampleWeights(nn.Module):
    """One weight in (0, 1) per training sample, all the same at first."""

    def __init__(self, n: int, logit: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((n,), logit))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Return the weights of the samples ``index``."""
        return self.logits[index].sigmoid()


def ul_objective(state: State) -> torch.Tensor:
    return cross_entropy(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> torch.Tensor:
    x, index = state.data
    losses = cross_entropy(state.ll_model(x), state.target, reduction="none")
    decay = sum(param.square().sum() for param in state.ll_model.parameters())
    return (state.ul_model(index) * losses).mean() + WEIGHT_DECAY * decay


def accuracy(state: State) -> torch.Tensor:
    return (state.ll_model(state.data).argmax(1) == state.target).float().mean()


def problem(config: dict[str, Any], data: dict[str, Any]) -> BilevelProblem:
    """Return the problem of one trial."""
    (x, y), width = data["train"], config["width"]
    return BilevelProblem(
        ul_model=SampleWeights(len(y), config["logit"]),
        ll_model=nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)),
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=[((x, torch.arange(len(y))), y)],
        validate_data=[data["validate"]],
        select_data=[data["select"]],
        metrics={"select_accuracy": accuracy},
    )


def test_scores(trial: TrialResult, arrays: dict[str, Any]) -> dict[str, float]:
    """Return a finished trial's accuracy on test data, and how well its weights tell clean labels from flipped ones."""
    solved = problem(trial.config, arrays)
    solved.ll_model.load_state_dict(trial.ll_state)
    x, y = arrays["test"]
    with torch.no_grad():
        scores = {"test_accuracy": float(accuracy(State(x, y, solved.ul_model, solved.ll_model)))}
    logits = trial.ul_state["logits"]
    if logits.std() > 0:
        scores["clean_label_auc"] = float(roc_auc_score(arrays["clean"], logits))
    return scores


def run(name: str, arguments: argparse.Namespace, arrays: dict[str, Any], **changes: Any) -> SearchResult:
    """Run one search of the comparison and add its best trial's test scores."""

    def show(progress: Progress) -> None:
        print(
            f"\r{name}: {progress.finished}/{progress.n_trials} trials, {progress.elapsed_s:.0f} s", end="", flush=True
        )

    result = search(
        problem,
        {key: value for key, value in space.items() if key not in changes},
        data=arrays,
        settings=changes,
        backend=arguments.backend,
        n_trials=arguments.trials,
        output=arguments.output / name.replace(" ", "_"),
        resume=True,  # a second run shows what the first found
        seed=0,
        on_progress=show,
    )
    print()
    return result.annotate(title=name, **test_scores(result.best, arrays))


def plot(results: list[SearchResult], arrays: dict[str, Any], path: Path) -> None:
    """Draw the best trial of each search over its steps, and the learned weights of clean and of flipped labels."""
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    losses, weights = figure.subplots(1, 2)
    for result in results:
        history = result.best.history
        losses.plot(
            [record["ll_step"] for record in history],
            [record["select_loss"] for record in history],
            label=f"{result.summary.notes['title']}: test accuracy {result.summary.notes['test_accuracy']:.3f}",
        )
    losses.set(xlabel="training step of the best trial", ylabel="loss on held-out data", ylim=(0, None))
    losses.legend(frameon=False)
    learned = results[0].best.ul_state["logits"].sigmoid()
    clean = arrays["clean"]
    weights.hist([learned[clean].numpy(), learned[~clean].numpy()], bins=20, label=["clean labels", "flipped labels"])
    weights.set(xlabel="learned weight of a training sample", ylabel="samples")
    weights.legend(frameon=False, loc="upper center")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="of each search")
    parser.add_argument("--backend", default="ray", choices=["ray", "optuna"])
    parser.add_argument("--output", type=Path, default=Path("tune_implicit_results/hyper_cleaning"))
    arguments = parser.parse_args()
    arrays = data()
    results = [
        run("hybrid search", arguments, arrays),
        run("without ul steps", arguments, arrays, ul_learning_rate=0.0),
    ]
    for result in results:
        notes = result.summary.notes
        auc = (
            f", area under the ROC curve of the weights {notes['clean_label_auc']:.3f}"
            if "clean_label_auc" in notes
            else ""
        )
        print(f"{notes['title']:>16}: test accuracy {notes['test_accuracy']:.3f}{auc}")
    plot(results, arrays, arguments.output / "hyper_cleaning.png")
    print(f"Report: {write_report(arguments.output)}")


if __name__ == "__main__":
    main()
