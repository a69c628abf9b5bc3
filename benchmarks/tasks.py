"""The tasks on which defaults are chosen and searches compared: ul values of several kinds and numbers, on real data.

Each task draws its splits and its noise anew from a seed. It takes its ul values as a mapping from a user's config: one
number by which all of a kind start, or, for a black box that searches them itself, a tensor of all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from common import fashion_mnist
from optuna.distributions import BaseDistribution, FloatDistribution
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tune_implicit import BilevelProblem, State

__all__ = ["TASKS", "Box", "Task"]

Batch = tuple[Tensor, Tensor]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Box:
    """How a black box searches the ul values of a task.

    Parameters
    ----------
    space : dict of Optuna distributions
        What it suggests.
    values : callable(config, seed) -> mapping
        The ul values that a suggestion stands for.
    """

    space: dict[str, BaseDistribution]
    values: Callable[[Values, int], Values]


@dataclass(frozen=True)
class Task:
    """A bilevel problem, with what each way of solving it needs to know.

    Parameters
    ----------
    name : str
        As in the tables.
    ll_learning_rate : float
        A good one, where no search is to find it.
    starts : tuple of two mappings
        Starting values, far from each other.
    space : dict of Optuna distributions
        Where a search lets the ul values start.
    make : callable(values, seed) -> (BilevelProblem, test batch)
        The problem.
    boxes : dict of str to Box
        By name; "fine" is that of all ul values.
    """

    name: str
    ll_learning_rate: float
    starts: tuple[Values, Values]
    space: dict[str, BaseDistribution]
    make: Callable[[Values, int], tuple[BilevelProblem, Batch]]
    boxes: dict[str, Box] = field(default_factory=dict)


class Minibatches:
    """Full batches of ``size`` rows in a new random order each pass, with the rows' numbers where ``numbered``."""

    def __init__(self, x: Tensor, y: Tensor, size: int, numbered: bool = False) -> None:
        self.x, self.y, self.size, self.numbered = x, y, size, numbered

    def __iter__(self) -> Iterator[Any]:
        for rows in torch.randperm(len(self.y)).split(self.size):
            if len(rows) == self.size:
                yield ((self.x[rows], rows) if self.numbered else self.x[rows]), self.y[rows]


def loss(state: State) -> Tensor:
    """Return the cross entropy on the state's batch."""
    return cross_entropy(state.ll_model(state.data), state.target)


def splits(x: Tensor, y: Tensor, sizes: tuple[int, ...], seed: int) -> list[Batch]:
    """Return the rows in random order, in parts of ``sizes`` and one of the rest."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = (*sizes, len(y) - sum(sizes))
    return list(zip(x[order].split(parts), y[order].split(parts), strict=True))


def number(low: float, high: float) -> FloatDistribution:
    """Return the range of a ul value."""
    return FloatDistribution(low, high)


def fine(name: str, count: int, low: float, high: float) -> Box:
    """Return the box of ``count`` ul values, each a suggestion of its own."""
    names = [f"{name}_{i}" for i in range(count)]
    return Box(
        dict.fromkeys(names, number(low, high)), lambda config, _: {name: torch.tensor([config[n] for n in names])}
    )


def shared(name: str, low: float, high: float) -> Box:
    """Return the box of a single value for all."""
    return Box({name: number(low, high)}, lambda config, _: {name: config[name]})


# ---- (a) an L2 penalty for each input feature, group of them or weight: digits, and as many features of noise


@cache
def noisy_digits() -> Batch:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-3)
    noise = torch.randn(len(x), 64, generator=torch.Generator().manual_seed(1))
    return torch.cat([x, noise], 1), torch.tensor(digits.target)


class GroupL2(nn.Module):
    """``sum exp(l) w^2`` over a weight of shape (10, 128), with ``d`` logarithms ``l``: one per group of features."""

    def __init__(self, d: int, log_l2: Any) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.zeros(d) + log_l2)

    def forward(self, w: Tensor) -> Tensor:
        log_l2 = self.log_l2
        each = log_l2.view(10, 128) if len(log_l2) == 1280 else log_l2.repeat_interleave(128 // len(log_l2))
        return (each.exp() * w.square()).sum()


def l2(d: int, values: Values, seed: int) -> tuple[BilevelProblem, Batch]:
    train, validate, select, test = splits(*noisy_digits(), (300, 300, 300), seed)
    problem = BilevelProblem(
        ul_model=GroupL2(d, values["log_l2"]),
        ll_model=nn.Linear(128, 10),
        ul_objective=loss,
        ll_objective=lambda state: loss(state) + state.ul_model(state.ll_model.weight),
        train_data=[train],
        validate_data=[validate],
        select_data=[select],
    )
    return problem, test


def l2_task(d: int) -> Task:
    boxes = {"fine": fine("log_l2", d, -10, 2), "one shared value": shared("log_l2", -10, 2)}
    if d > 16:
        groups = fine("log_l2", 16, -10, 2)
        boxes["16 groups"] = Box(
            groups.space,
            lambda config, seed: {
                "log_l2": groups.values(config, seed)["log_l2"].repeat_interleave(8).repeat(1 if d == 128 else 10)
            },
        )
    return Task(
        f"L2, d = {d:,}",
        0.03,
        ({"log_l2": -7.0}, {"log_l2": -3.0}),
        {"log_l2": number(-10, 2)},
        partial(l2, d),
        dict(list(boxes.items())[: 1 if d == 1 else None]),
    )


# ---- (b) a weight for each training sample: Fashion-MNIST, 40% of the labels wrong

N_CLEANED = 4000


@cache
def mislabelled(seed: int) -> list[Batch]:
    x, y = fashion_mnist()
    train, *others = splits(x[:16000], y[:16000], (N_CLEANED, 1000, 1000), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(N_CLEANED, generator=generator) < 0.4
    labels = (train[1] + wrong * torch.randint(1, 10, (N_CLEANED,), generator=generator)) % 10
    return [(train[0], labels), *others]


class SampleWeights(nn.Module):
    """A weight in (0, 1) for each training sample."""

    def __init__(self, logit: Any) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(N_CLEANED) + logit)

    def forward(self, rows: Tensor) -> Tensor:
        return self.logit[rows].sigmoid()


def cleaning_loss(state: State) -> Tensor:
    x, rows = state.data
    losses = cross_entropy(state.ll_model(x), state.target, reduction="none")
    return (state.ul_model(rows) * losses).mean() + 1e-4 * sum(p.square().sum() for p in state.ll_model.parameters())


def cleaning(values: Values, seed: int) -> tuple[BilevelProblem, Batch]:
    train, validate, select, test = mislabelled(seed)
    problem = BilevelProblem(
        ul_model=SampleWeights(values["logit"]),
        ll_model=nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        ul_objective=loss,
        ll_objective=cleaning_loss,
        train_data=Minibatches(*train, 256, numbered=True),
        validate_data=Minibatches(*validate, 256),
        select_data=[select],
    )
    return problem, test


by_class = fine("logit", 10, -6, 6)
CLEANING = Task(
    "cleaning",
    2e-3,
    ({"logit": 0.0}, {"logit": 2.0}),
    {"logit": number(-6, 6)},
    cleaning,
    {
        "fine": fine("logit", N_CLEANED, -6, 6),
        "one shared value": shared("logit", -6, 6),
        "by class": Box(
            by_class.space,
            lambda config, seed: {"logit": by_class.values(config, seed)["logit"][mislabelled(seed)[0][1]]},
        ),
    },
)


# ---- (c) four values: two L2 penalties, label smoothing, input noise


class Four(nn.Module):
    """The logarithms of two L2 penalties and of the deviation of input noise, and the logit of a label smoothing."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        for name in FOUR:
            self.register_parameter(name, nn.Parameter(torch.tensor(float(values[name]))))


FOUR = {
    "log_l2_in": number(-14, 1),
    "log_l2_out": number(-14, 1),
    "log_noise": number(-7, 1),
    "smoothing": number(-10, 1),
}


def four_loss(state: State) -> Tensor:
    ul, (first, _, last) = state.ul_model, state.ll_model
    log_p = state.ll_model(state.data + ul.log_noise.exp() * torch.randn_like(state.data)).log_softmax(1)
    smoothing = ul.smoothing.sigmoid()
    right = log_p.gather(1, state.target[:, None])[:, 0]
    penalty = ul.log_l2_in.exp() * first.weight.square().sum() + ul.log_l2_out.exp() * last.weight.square().sum()
    return penalty - ((1 - smoothing) * right + smoothing * log_p.mean(1)).mean()


def four(
    load: Callable[[], Any], sizes: tuple[int, int, int], values: Values, seed: int
) -> tuple[BilevelProblem, Batch]:
    loaded = load()
    x = torch.tensor((loaded.data - loaded.data.mean(0)) / loaded.data.std(0), dtype=torch.float32)
    y = torch.tensor(loaded.target)
    train, validate, select, test = splits(x, y, sizes, seed)
    problem = BilevelProblem(
        ul_model=Four(values),
        ll_model=nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, int(y.max()) + 1)),
        ul_objective=loss,
        ll_objective=four_loss,
        train_data=[train],
        validate_data=[validate],
        select_data=[select],
    )
    return problem, test


def four_task(name: str, load: Callable[[], Any], sizes: tuple[int, int, int]) -> Task:
    return Task(
        name,
        0.01,
        (dict(zip(FOUR, (-7, -7, -3, -4), strict=True)), dict(zip(FOUR, (-3, -3, -1, -1), strict=True))),
        FOUR,
        partial(four, load, sizes),
        {"fine": Box(FOUR, lambda config, _: {name: config[name] for name in FOUR})},
    )


# ---- (d) digits distilled into 10 images


@cache
def digits() -> Batch:
    loaded = load_digits()
    return torch.tensor(loaded.data / 16, dtype=torch.float32), torch.tensor(loaded.target)


class Images(nn.Module):
    """One image per class: random around 0.3 times the ``spread``, or as given."""

    def __init__(self, values: Values, seed: int) -> None:
        super().__init__()
        images = values.get("images")
        if images is None:
            spread = values["spread"]
            images = spread * (0.6 + torch.randn(10, 64, generator=torch.Generator().manual_seed(seed + 5))) / 2
        self.images = nn.Parameter(images.reshape(10, 64).clone())


def distilled_loss(state: State) -> Tensor:
    decay = sum(p.square().sum() for p in state.ll_model.parameters())
    return cross_entropy(state.ll_model(state.ul_model.images), state.target) + 1e-3 * decay


def distillation(values: Values, seed: int) -> tuple[BilevelProblem, Batch]:
    validate, select, test = splits(*digits(), (600, 600), seed)
    problem = BilevelProblem(
        ul_model=Images(values, seed),
        ll_model=nn.Linear(64, 10),
        ul_objective=loss,
        ll_objective=distilled_loss,
        train_data=[(torch.zeros(10), torch.arange(10))],
        validate_data=[validate],
        select_data=[select],
    )
    return problem, test


def class_means(scale: Any, offset: float, seed: int) -> Values:
    """Return the mean image of each class in the validation data, scaled by class or by one scale, and shifted."""
    x, y = splits(*digits(), (600, 600), seed)[0]
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return {"images": torch.as_tensor(scale).reshape(-1, 1) * means + offset}


scales = fine("scale", 10, 0, 10)
SHIFTED = {"offset": number(-5, 1)}
DISTILLATION = Task(
    "distillation",
    0.03,
    ({"spread": 0.0}, {"spread": 1.0}),
    {"spread": number(0, 2)},
    distillation,
    {
        "fine": fine("images", 640, -3, 3),
        "one shared value": Box(
            {"scale": number(0, 10)} | SHIFTED,
            lambda config, seed: class_means(config["scale"], config["offset"], seed),
        ),
        "by class": Box(
            scales.space | SHIFTED,
            lambda config, seed: class_means(scales.values(config, seed)["scale"], config["offset"], seed),
        ),
    },
)

TASKS = {
    task.name: task
    for task in (
        *(l2_task(d) for d in (1, 4, 16, 128, 1280)),
        CLEANING,
        four_task("breast cancer", load_breast_cancer, (80, 160, 160)),
        four_task("wine", load_wine, (40, 45, 45)),
        DISTILLATION,
    )
}
