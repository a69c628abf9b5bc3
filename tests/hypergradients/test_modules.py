"""The modules people train: their Hessian-vector products against differences of the gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from tests.support.problems import F64, Values, generator, symmetric
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.solution import Status


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
}


@pytest.mark.parametrize("name", MODULES)
def test_solution_agrees_with_differences_of_the_gradient(name: str):
    """``dl*`` of a small change of ``l`` moves the ll gradient by nothing: ``H dw + (d2f / dl dw) dl = 0``.

    With ``F = c'w`` the hypergradient is ``-c' H^-1 (d2f / dl dw)``, so that ``H`` from differences checks it.
    """
    torch.manual_seed(0)
    model = MODULES[name]().to(F64)
    params = list(model.parameters())
    n = sum(param.numel() for param in params)
    x = torch.randn(3, 5, 4, generator=generator(), dtype=F64)
    if name == "Embedding":
        x = torch.randint(7, (3, 5), generator=generator())
    c, anchor = (torch.randn(n, generator=generator(seed), dtype=F64) for seed in (1, 2))
    ridge = 30 * symmetric(torch.linspace(0.5, 1, n, dtype=F64))  # makes H positive definite at any weights

    def flat() -> Tensor:
        return torch.cat([param.reshape(-1) for param in model.parameters()])

    def ll_objective(state) -> Tensor:
        w = flat()
        return state.ll_model(state.data).pow(3).mean() + w @ ridge @ w / 2 - state.ul_model.scale * (anchor @ w)

    ul_model = Values(scale=torch.ones((), dtype=F64))
    implicit = Implicit(lambda state: c @ flat(), ul_model, ll_objective, model, 0.01, 1, solver=DenseSolve())
    result = implicit.compute_gradients(None, None, train_data=x)
    assert result.status is Status.CONVERGED
    # d2f / dl dw = -anchor: the answer is c' H^-1 anchor.
    h = torch.stack([_gradient_difference(ll_objective, model, ul_model, x, index) for index in range(n)])
    expected = c @ torch.linalg.solve((h + h.T) / 2, anchor)
    torch.testing.assert_close(result.gradients["scale"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (lambda: nn.Sequential(weight_norm(nn.Linear(4, 4))), r"'0\.parametrizations\.weight' uses weight_norm"),
        (lambda: nn.Sequential(nn.EmbeddingBag(7, 4)), r"'0' uses EmbeddingBag.*Use an Embedding and a sum"),
    ],
    ids=["weight_norm", "EmbeddingBag"],
)
def test_module_without_a_right_second_derivative_is_refused(module, named: str):
    """The double backward of ``weight_norm`` is not even symmetric in torch 2.13 on a CPU."""
    model = module()
    make = partial(Implicit, lambda state: None, Values(l=torch.zeros(1)), lambda state: None, ll_learning_rate=1, k=1)
    with pytest.raises(ValueError, match=f"`ll_model`'s module {named}"):
        make(ll_model=model)
    for param in model.parameters():
        param.requires_grad_(False)
    make(ll_model=nn.Sequential(model, nn.Linear(4, 4)))


def _gradient_difference(ll_objective, model: nn.Module, ul_model: nn.Module, x: Tensor, index: int) -> Tensor:
    """Row ``index`` of the Hessian, by a central difference of the ll gradient."""
    from tune_implicit.hypergradients.state import State

    params, step = list(model.parameters()), 1e-5
    place = next(
        (param, index - start)
        for param, start in zip(params, _starts(params), strict=True)
        if start <= index < start + param.numel()
    )
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            place[0].view(-1)[place[1]] += sign * step
        loss = ll_objective(State(x, None, ul_model, model))
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]))
        with torch.no_grad():
            place[0].view(-1)[place[1]] -= sign * step
    return (gradients[0] - gradients[1]) / (2 * step)


def _starts(params: list[nn.Parameter]) -> list[int]:
    return [sum(param.numel() for param in params[:index]) for index in range(len(params))]
