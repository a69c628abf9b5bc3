"""The modules people train: their Hessian-vector products against differences of the gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from tests.support.problems import F64, Values, generator, symmetric
from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.hypergradients.state import State
from tune_implicit.hypergradients.vectors import flatten


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*self.project(x).unsqueeze(1).chunk(3, dim=-1)).squeeze(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Normed(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v / v.norm(dim=1, keepdim=True)


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class ReLU6Sigmoid(nn.Module):
    """What ``nn.Hardsigmoid`` computes, from what torch can differentiate twice."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


class InvertedResidual(nn.Module):
    """A block of MobileNetV3, of stride 1: expand, depthwise, squeeze and excite, project, add."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(5, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.Hardswish()
        )
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), gate)
        self.project = nn.Sequential(nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        image = x.view(-1, 5, 2, 2)
        wide = self.depthwise(self.expand(image))
        return (image + self.project(self.excite(wide) * wide)).flatten(2)


MODULES = {
    "attention": Attention,
    "transformer layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu"),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "checkpointing": Checkpointed,
    "tied weights": Tied,
    "parametrization": lambda: nn.Sequential(register_parametrization(nn.Linear(4, 4), "weight", Normed()), nn.Tanh()),
    "BatchNorm": BatchNorm,
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "Embedding": lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh()),
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.GELU()),
    "inverted residual": lambda: InvertedResidual(ReLU6Sigmoid()),
}


class Posed:
    """A module with a ridge that keeps its Hessian from being singular at any weights, and ``F`` linear in them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make().to(F64)
        self.params = list(self.model.parameters())
        self.n = sum(param.numel() for param in self.params)
        self.c, self.anchor = (torch.randn(self.n, generator=generator(seed), dtype=F64) for seed in (1, 2))
        self.ridge = 30 * symmetric(torch.linspace(0.5, 1, self.n, dtype=F64))
        self.ul_model = Values(scale=torch.ones((), dtype=F64))

    def ll_objective(self, state: State) -> Tensor:
        w = flatten(self.params)
        loss = state.ll_model(state.data).pow(3).mean() + w @ self.ridge @ w / 2
        return loss - state.ul_model.scale * (self.anchor @ w)

    def hypergradient(self, x: Tensor) -> Hypergradient:
        implicit = Implicit(
            lambda state: self.c @ flatten(self.params),
            self.ul_model,
            self.ll_objective,
            self.model,
            ll_learning_rate=0.01,
            k=1,
            solver=DenseSolve(),
        )
        return implicit.compute_gradients(None, None, train_data=x)

    def hessian(self, x: Tensor, step: float = 1e-5) -> Tensor:
        """By central differences of the ll gradient."""

        def gradient_at(param: nn.Parameter, index: int, shift: float) -> Tensor:
            param.data.view(-1)[index] += shift
            loss = self.ll_objective(State(x, None, self.ul_model, self.model))
            gradient = flatten(torch.autograd.grad(loss, self.params))
            param.data.view(-1)[index] -= shift
            return gradient

        rows = [
            (gradient_at(param, index, step) - gradient_at(param, index, -step)) / (2 * step)
            for param in self.params
            for index in range(param.numel())
        ]
        h = torch.stack(rows)
        return (h + h.T) / 2


@pytest.mark.parametrize("name", MODULES)
def test_solution_agrees_with_differences_of_the_gradient(name: str) -> None:
    """``dl*`` of a small change of ``l`` moves the ll gradient by nothing: ``H dw + (d2f / dl dw) dl = 0``.

    With ``F = c'w`` the hypergradient is ``-c' H^-1 (d2f / dl dw)``, so that ``H`` from differences checks it.
    """
    posed = Posed(MODULES[name])
    x = torch.randn(3, 5, 4, generator=generator(), dtype=F64)
    if name == "Embedding":
        x = torch.randint(7, (3, 5), generator=generator())
    result = posed.hypergradient(x)
    assert result.status is Status.CONVERGED
    # d2f / dl dw = -anchor: the answer is c' H^-1 anchor.
    expected = posed.c @ torch.linalg.solve(posed.hessian(x), posed.anchor)
    torch.testing.assert_close(result.gradients["scale"], expected, rtol=1e-6, atol=1e-9)


def test_a_gate_without_a_second_derivative_is_named_in_its_block() -> None:
    """Every MobileNetV3 has it; with :class:`ReLU6Sigmoid` in its place the block is right, as above."""
    posed = Posed(lambda: InvertedResidual(nn.Hardsigmoid()))
    with pytest.raises(
        InvalidValueError,
        match=r"hardsigmoid\w* twice, which `ll_objective` needs \(in 'excite\.4', Hardsigmoid\): write nn\.ReLU6",
    ):
        posed.hypergradient(torch.randn(3, 5, 4, generator=generator(), dtype=F64))
