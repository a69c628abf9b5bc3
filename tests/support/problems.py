"""Small bilevel problems whose hypergradients are known in closed form or by dense algebra."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.problem import BilevelProblem

F64 = torch.float64


class Values(nn.Module):
    """A model that is no more than its parameters."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


@dataclass(frozen=True)
class Case:
    """A problem at its trained ll weights, with the answer."""

    problem: BilevelProblem
    # The hypergradient by name of the ul model's parameter, in float64; empty where there is no answer.
    expected: dict[str, Tensor]
    # The pieces of `H v = b` and of `v -> (d2f / dl dw) v`, in float64.
    h: Tensor
    b: Tensor
    mixed: Callable[[Tensor], dict[str, Tensor]]

    @cached_property
    def step_size(self) -> float:
        """A step size with which the Neumann series converges, close to the fastest."""
        return 1.9 / torch.linalg.eigvalsh(self.h)[-1].item()

    def implicit(self, solver: str = "cg", k: int = 200, **arguments: object) -> Implicit:
        p = self.problem
        arguments.setdefault("ll_learning_rate", self.step_size)
        return Implicit(p.ul_objective, p.ul_model, p.ll_objective, p.ll_model, k=k, solver=solver, **arguments)

    def compute(self, solver: str = "cg", k: int = 200, **arguments: object) -> Hypergradient:
        return compute(self.implicit(solver, k, **arguments), self.problem)

    def series(self, k: int) -> dict[str, Tensor]:
        """The implicit term with the Neumann series written out: ``v = a * sum_{i<=k} (I - a H)^i b``."""
        term = self.step_size * self.b
        v = term.clone()
        for _ in range(k):
            term = term - self.step_size * (self.h @ term)
            v += term
        return {name: -value for name, value in self.mixed(v).items()}


def compute(implicit: Implicit, problem: BilevelProblem) -> Hypergradient:
    """The hypergradient on the first batch of each split."""
    (validate, *_), (train, *_) = problem.validate_data, problem.train_data
    return implicit.compute_gradients(*validate, train_data=train[0], train_target=train[1])


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = torch.cat([(got[name].to(F64) - value).reshape(-1) for name, value in expected.items()])
    return (difference.norm() / torch.cat([value.reshape(-1) for value in expected.values()]).norm()).item()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=F64))[0]


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues."""
    q = orthogonal(len(eigenvalues), len(eigenvalues), seed)
    h = (q * eigenvalues) @ q.T
    return (h + h.T) / 2


# ---- the zoo


def quadratic(eigenvalues: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0), kernel_of_ul: int = 0, seed: int = 0) -> Case:
    """``f = w'Hw/2 - w'(Bl + c)`` and ``F = |w - t|^2/2 + |l|^2``, which has a direct term.

    The last ``kernel_of_ul`` eigenvectors of ``H`` do not enter ``F``.
    """
    n = len(eigenvalues)
    values = torch.tensor(eigenvalues, dtype=F64)
    h, q = symmetric(values, seed), orthogonal(n, n, seed)
    random = generator(seed + 1)
    coupling, c, t, ul = (torch.randn(*shape, generator=random, dtype=F64) for shape in ((n, 3), (n,), (n,), (3,)))
    seen = q[:, : n - kernel_of_ul] @ q[:, : n - kernel_of_ul].T
    inverse = torch.linalg.pinv(h, rtol=1e-10)
    w = inverse @ (coupling @ ul + c)
    problem = BilevelProblem(
        ul_model=Values(ul=ul),
        ll_model=Values(w=w),
        ul_objective=lambda s: (s.data @ (s.ll_model.w - s.target)).square().sum() / 2 + s.ul_model.ul.square().sum(),
        ll_objective=lambda s: s.ll_model.w @ (s.data @ s.ll_model.w / 2 - coupling @ s.ul_model.ul - s.target),
        train_data=[(h, c)],
        validate_data=[(seen, t)],
        select_data=[(seen, t)],
    )
    b = seen @ (w - t)
    return Case(problem, {"ul": 2 * ul + coupling.T @ inverse @ b}, h, b, lambda v: {"ul": -coupling.T @ v})


def singular() -> Case:
    """``H`` has a kernel that ``F`` does not see: there is an answer, and only one."""
    return quadratic((0.5, 1.0, 2.0, 0.0), kernel_of_ul=1)


def indefinite() -> Case:
    """The ll weights are at a saddle, which training never reaches: there is no answer."""
    return replace(quadratic((0.5, 1.0, 2.0, -0.3)), expected={})


@cache
def _ridge_data(n: int, d: int, condition: float) -> tuple[Tensor, ...]:
    random = generator(1)
    scales = torch.logspace(0, -np.log10(condition) / 2, d, dtype=F64)
    x = n**0.5 * orthogonal(n, d, 2) * scales @ orthogonal(d, d, 3).T
    x_validate, truth = (torch.randn(*shape, generator=random, dtype=F64) for shape in ((n // 2, d), (d,)))
    y, y_validate = (
        data @ truth + 0.5 * torch.randn(len(data), generator=random, dtype=F64) for data in (x, x_validate)
    )
    log_l2 = torch.randn(d, generator=random, dtype=F64) - 7
    return x, y, x_validate, y_validate, log_l2


def ridge(n: int = 2000, d: int = 500, condition: float = 85.0, dtype: torch.dtype = F64) -> Case:
    """Ridge regression with a log-L2 value for each weight; with the L2 its condition is about 80."""
    x, y, x_validate, y_validate, log_l2 = (tensor.to(dtype) for tensor in _ridge_data(n, d, condition))
    problem = BilevelProblem(
        ul_model=Values(log_l2=log_l2),
        ll_model=Values(w=torch.zeros(d, dtype=dtype)),
        ul_objective=lambda s: (s.data @ s.ll_model.w - s.target).square().mean() / 2,
        ll_objective=lambda s: (
            (s.data @ s.ll_model.w - s.target).square().mean() / 2
            + (s.ul_model.log_l2.exp() * s.ll_model.w.square()).sum() / 2
        ),
        train_data=[(x, y)],
        validate_data=[(x_validate, y_validate)],
        select_data=[(x_validate, y_validate)],
    )
    # What follows is float64, on the data as `dtype` holds them.
    x, y, x_validate, y_validate, log_l2 = (t.to(F64) for t in (x, y, x_validate, y_validate, log_l2))
    h = x.T @ x / n + log_l2.exp().diag()
    w = torch.linalg.solve(h, x.T @ y / n)
    problem.ll_model.w.data.copy_(w)
    b = x_validate.T @ (x_validate @ w - y_validate) / len(y_validate)

    def mixed(v: Tensor) -> dict[str, Tensor]:
        return {"log_l2": log_l2.exp() * w * v}

    return Case(problem, {"log_l2": -mixed(torch.linalg.solve(h, b))["log_l2"]}, h, b, mixed)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn: pixels in [0, 1] of shape (n, 64), and classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=generator(0))
    return torch.from_numpy(x)[order] / 16, torch.from_numpy(y)[order]


@cache
def _trained_logistic(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-L2 values, the trained weights, both of shape (10, 64), and the Hessian there, by Newton's method."""
    x, y = (tensor[:n] for tensor in digits())
    log_l2 = torch.randn(10, 64, generator=generator(4), dtype=F64) / 2 - 4
    w = torch.zeros(10, 64, dtype=F64)
    one_hot = nn.functional.one_hot(y, 10).to(F64)
    for _ in range(30):
        p = (x @ w.T).softmax(1)
        gradient = ((p - one_hot).T @ x / n + log_l2.exp() * w).reshape(-1)
        # d2f / dw_ia dw_jb = mean of (p_i [i = j] - p_i p_j) x_a x_b
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        h = torch.einsum("nij,na,nb->iajb", inner, x, x).reshape(640, 640) / n + log_l2.exp().reshape(-1).diag()
        if gradient.norm() < 1e-13:
            return log_l2, w, h
        w = w - torch.linalg.solve(h, gradient).view(10, 64)
    raise AssertionError("Newton's method converges on a strongly convex problem.")


def logistic(dtype: torch.dtype = F64, n: int = 300) -> Case:
    """Multinomial logistic regression on the digits, with a log-L2 value for each of its 640 weights."""
    log_l2, w, h = _trained_logistic(n)
    x, y = digits()
    x, x_validate, y, y_validate = x[:n].to(dtype), x[n : 2 * n].to(dtype), y[:n], y[n : 2 * n]
    model = nn.Linear(64, 10, bias=False, dtype=dtype)
    model.weight.data.copy_(w)
    problem = BilevelProblem(
        ul_model=Values(log_l2=log_l2.to(dtype)),
        ll_model=model,
        ul_objective=lambda s: cross_entropy(s.ll_model(s.data), s.target),
        ll_objective=lambda s: (
            cross_entropy(s.ll_model(s.data), s.target)
            + (s.ul_model.log_l2.exp() * s.ll_model.weight.square()).sum() / 2
        ),
        train_data=[(x, y)],
        validate_data=[(x_validate, y_validate)],
        select_data=[(x_validate, y_validate)],
    )
    p = (x_validate.to(F64) @ w.T).softmax(1) - nn.functional.one_hot(y_validate, 10).to(F64)
    b = (p.T @ x_validate.to(F64) / n).reshape(-1)

    def mixed(v: Tensor) -> dict[str, Tensor]:
        return {"log_l2": log_l2.exp() * w * v.view(10, 64)}

    return Case(problem, {"log_l2": -mixed(torch.linalg.solve(h, b))["log_l2"]}, h, b, mixed)


def tiny_mlp(seed: int = 0) -> BilevelProblem:
    """A smooth network of 26 weights; a log-L2 value per layer and a weight per class. Train it with :func:`train`."""
    random = generator(seed)
    x, x_validate = (torch.randn(40, 3, generator=random, dtype=F64) for _ in range(2))
    y, y_validate = ((data[:, 0] * data[:, 1] + 0.3 * data[:, 2] > 0).long() for data in (x, x_validate))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(F64)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=random, dtype=F64))

    def ll_objective(s: State) -> Tensor:
        l2 = sum(
            log_l2.exp() * param.square().sum()
            for log_l2, layer in zip(s.ul_model.log_l2, (s.ll_model[0], s.ll_model[2]), strict=True)
            for param in layer.parameters()
        )
        weights = s.ul_model.class_log_weights.exp()[s.target]
        return (weights * cross_entropy(s.ll_model(s.data), s.target, reduction="none")).mean() + l2

    return BilevelProblem(
        ul_model=Values(
            log_l2=torch.tensor([-4.0, -3.5], dtype=F64), class_log_weights=torch.tensor([0.2, -0.1], dtype=F64)
        ),
        ll_model=model,
        ul_objective=lambda s: cross_entropy(s.ll_model(s.data), s.target),
        ll_objective=ll_objective,
        train_data=[(x, y)],
        validate_data=[(x_validate, y_validate)],
        select_data=[(x_validate, y_validate)],
    )


# ---- training to the end, and what follows from it


def loss_of(problem: BilevelProblem, level: str) -> Tensor:
    """The loss of ``level``, ``"ul"`` or ``"ll"``, on the first batch of its split."""
    (batch, *_) = problem.validate_data if level == "ul" else problem.train_data
    return getattr(problem, f"{level}_objective")(State(*batch, problem.ul_model, problem.ll_model))


def train(problem: BilevelProblem, tolerance: float = 1e-12) -> None:
    """Train the ll model to stationarity, by L-BFGS and, close to it, Newton's method with the dense Hessian."""
    params = list(problem.ll_model.parameters())
    for _ in range(20):
        gradients = torch.autograd.grad(loss_of(problem, "ll"), params, create_graph=True)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        if gradient.norm() < tolerance:
            return
        if gradient.norm() > 1e-2:
            _lbfgs(problem, params)
            continue
        rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in gradient]
        h = torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])
        step = torch.linalg.solve(h, gradient.detach())
        with torch.no_grad():
            for param, piece in zip(params, step.split([param.numel() for param in params]), strict=True):
                param -= piece.view(param.shape)
    raise AssertionError(f"The ll model did not train: gradient {gradient.norm():.1e}.")


def _lbfgs(problem: BilevelProblem, params: list[nn.Parameter]) -> None:
    optimizer = torch.optim.LBFGS(params, max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        for param, gradient in zip(params, torch.autograd.grad(loss_of(problem, "ll"), params), strict=True):
            param.grad = gradient
        return loss_of(problem, "ll").detach()

    optimizer.step(closure)
    optimizer.zero_grad()


def retrained_differences(problem: BilevelProblem, h: float = 1e-4) -> dict[str, Tensor]:
    """The hypergradient by central differences of the ul loss, the ll model trained to the end for each value."""

    def ul_loss_at(value: Tensor, index: int, shifted: float) -> float:
        before = value.view(-1)[index].item()
        value.view(-1)[index] = shifted
        train(problem)
        loss = loss_of(problem, "ul").item()
        value.view(-1)[index] = before
        return loss

    differences = {}
    for name, param in problem.ul_model.named_parameters():
        differences[name] = torch.empty_like(param.data)
        for index, value in enumerate(param.data.reshape(-1).tolist()):
            high, low = (ul_loss_at(param.data, index, value + shift) for shift in (h, -h))
            differences[name].view(-1)[index] = (high - low) / (2 * h)
    train(problem)
    return differences
