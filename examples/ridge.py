"""A learned L2 penalty for each weight of a ridge regression, against the closed form.

Run it with ``python examples/ridge.py``. It checks one hypergradient, then learns 30 penalties at once: 10 features
matter and 20 are noise, which no single penalty can tell apart.
"""

import torch
from torch import Tensor, nn

from tune_implicit import BilevelProblem, BilevelTrainer, Implicit, ImplicitSettings, State

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
N, N_VALIDATE, D = 40, 200, 30
TRUTH = torch.cat([torch.randn(10), torch.zeros(20)])
X, X_VALIDATE = torch.randn(N, D), torch.randn(N_VALIDATE, D)
Y, Y_VALIDATE = X @ TRUTH + torch.randn(N), X_VALIDATE @ TRUTH + torch.randn(N_VALIDATE)


class Penalties(nn.Module):
    """The logarithms of the penalties, so that any step leaves them positive."""

    def __init__(self) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.full((D,), -2.0))


def ul_objective(state: State) -> Tensor:
    return (state.ll_model(state.data).squeeze(1) - state.target).square().mean() / 2


def ll_objective(state: State) -> Tensor:
    penalty = (state.ul_model.log_l2.exp() * state.ll_model.weight.square()).sum() / 2
    return ul_objective(state) + penalty


def solve(log_l2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact weights for these penalties, and the Hessian of the ll objective."""
    hessian = X.T @ X / N + log_l2.exp().diag()
    return torch.linalg.solve(hessian, X.T @ Y / N), hessian


def closed_form(log_l2: Tensor) -> Tensor:
    """Return the hypergradient: minus ``exp(log_l2) * w`` times the inverse Hessian times ``dF/dw``."""
    w, hessian = solve(log_l2)
    return -log_l2.exp() * w * torch.linalg.solve(hessian, X_VALIDATE.T @ (X_VALIDATE @ w - Y_VALIDATE) / N_VALIDATE)


def validation_loss(log_l2: Tensor) -> float:
    return float((X_VALIDATE @ solve(log_l2)[0] - Y_VALIDATE).square().mean() / 2)


def distance(log_l2: Tensor) -> float:
    return float((solve(log_l2)[0] - TRUTH).norm())


def main() -> None:
    ul_model, ll_model = Penalties(), nn.Linear(D, 1, bias=False)
    start = ul_model.log_l2.detach().clone()
    ll_model.weight.data[0] = solve(start)[0]
    implicit = Implicit(ul_objective, ul_model, ll_objective, ll_model, ll_learning_rate=0.1, k=50, solver="cg")
    result = implicit.compute_gradients(X_VALIDATE, Y_VALIDATE, train_data=X, train_target=Y)
    exact = closed_form(start)
    error = float((result.gradients["log_l2"] - exact).norm() / exact.norm())
    print(f"hypergradient: {result.status.value} after {result.hvps} hvps, relative error {error:.1e}")

    problem = BilevelProblem(
        ul_model=ul_model,
        ll_model=ll_model,
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=[(X, Y)],
        validate_data=[(X_VALIDATE, Y_VALIDATE)],
    )
    settings = ImplicitSettings(solver="cg", k=20, ll_steps=20, ll_learning_rate=0.02, ul_learning_rate=0.1)
    trainer = BilevelTrainer(problem, settings)
    for _ in range(200):
        trainer.step()
    shared = min((torch.full((D,), float(value)) for value in torch.linspace(-8, 4, 121)), key=validation_loss)
    learned = ul_model.log_l2.detach()
    for name, log_l2 in (("best shared penalty", shared), (f"{D} learned penalties", learned)):
        print(f"{name}: validation loss {validation_loss(log_l2):.3f}, distance to the truth {distance(log_l2):.3f}")


if __name__ == "__main__":
    main()
