"""Models, objectives and data full of randomness, and of state to be put back or resumed."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tests.support.problems import generator
from tune_implicit import BilevelProblem, State
from tune_implicit.hypergradients.rng import get_rng_state, seed_everything


class Noisy(nn.Module):
    """A network whose every forward draws random numbers and moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))
        self.layers[1].bias.requires_grad_(False)
        self.layers[3].eval()  # a mode that is not its parent's
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(())  # replaced, not written into
        return self.layers(x)


class Worlds:
    """Two noisy models, and everything about them that must not change."""

    def __init__(self) -> None:
        seed_everything(0)
        self.ul_model, self.ll_model = Noisy().double(), Noisy().double()
        for param in self.ll_model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None

    def items(self) -> dict[str, object]:
        both = {"ul": self.ul_model, "ll": self.ll_model}
        modules = [module for model in both.values() for module in model.modules()]
        params = [param for model in both.values() for param in model.parameters()]
        buffers = [buffer for model in both.values() for buffer in model.buffers()]
        ll_grads = [param.grad for param in self.ll_model.parameters()]
        state = get_rng_state()
        return {
            "parameters": [param.detach().clone() for param in params],
            "grad": [None if grad is None else grad.clone() for grad in ll_grads],
            "requires_grad": [param.requires_grad for param in params],
            "mode": [module.training for module in modules],
            "buffers": [buffer.clone() for buffer in buffers],
            "the objects": [id(value) for value in (*params, *buffers, *ll_grads)],
            "python": state["python"],
            "numpy": state["numpy"][1:],  # the first is the algorithm's name
            "cpu": state["cpu"],
        }


def noisy_objective(s: State) -> Tensor:
    s.ll_model.eval()
    s.ul_model.train(not s.ul_model.training)
    noise = random.random() + np.random.rand() + torch.randn(()).item()  # noqa: NPY002
    for model in (s.ll_model, s.ul_model):
        model(s.data)
        model.train()
    return mse_loss(s.ll_model(s.data), s.ul_model(s.data) + noise)


def raising_objective(s: State) -> Tensor:
    noisy_objective(s)
    raise ZeroDivisionError


class LogL2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.tensor(-3.0))


def random_problem(weight_decay: float = 0.0) -> BilevelProblem:
    """Everything that makes a resume hard: shuffled batches, dropout, BatchNorm, and a random loss."""
    x, y = torch.randn(60, 5, generator=generator()), torch.arange(60) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    own_generator = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True, generator=generator(1))
    return BilevelProblem(
        ul_model=LogL2(),
        ll_model=nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)),
        ul_objective=lambda s: cross_entropy(s.ll_model(s.data), s.target),
        ll_objective=lambda s: (
            cross_entropy(s.ll_model(s.data + 0.1 * torch.randn_like(s.data)), s.target)
            + s.ul_model.log_l2.exp() * s.ll_model[0].weight.square().sum()
        ),
        train_data=loader,
        validate_data=own_generator,
        select_data=[(x, y)],
        ll_optimizer=lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay),
    )


def assert_same_bits(got: object, expected: object, where: str = "state") -> None:
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key, value in expected.items():
            assert_same_bits(got[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for index, value in enumerate(expected):
            assert_same_bits(got[index], value, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where
