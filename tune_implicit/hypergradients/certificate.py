"""A hypergradient with its certificate: how exact it is, and why where it failed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.solvers.solution import Attempt, Solution, Status
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["Hypergradient", "certified"]


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative of the ul loss in the ul values, with its certificate.

    Parameters
    ----------
    gradients : dict of str to Tensor
        By name of the ul model's parameter, in its shape and dtype. Empty where the status is a failure.
    status : Status
        How the solve of ``H v = dF/dw`` ended; ``NON_FINITE`` also where a loss or the gradient itself is not finite.
    residual_norm, relative_residual : float
        ``||dF/dw - H v||``, and the same over ``||dF/dw||``: 0 is exact, 1 no better than no implicit term. For a
        truncated Neumann series it is the norm of its last term, which bounds it where the series converges, and NaN
        where ``k = 0``; ``verify`` measures it.
    solver_steps, hvps : int
        Iterations of the solver, and the Hessian-vector products taken in all.
    lambda_min, lambda_max : float
        The smallest and the largest curvature that the solve met, between the extreme eigenvalues of ``H``; NaN where
        it measured none.
    damping : float
        What was added to the diagonal of ``H``. All that is said of the solve is then said of that matrix.
    noise_norm : float
        With ``stop="noise"``, the standard error of ``dF/dw`` on the validation batch, as a norm; else NaN.
    attempts : tuple of Attempt
        Of a solver with a fallback: each solver tried, and how it ended.
    v : Tensor, shape (n,)
        The inverse-HVP, over the ll parameters in their order.
    stationarity : float
        ``||df/dw||`` on the batch; the hypergradient's formula assumes 0.
    norm : float
        Of the hypergradient over all ul values; NaN where the status is a failure.
    ul_loss, ll_loss : float
        ``F`` and ``f`` at the point.
    """

    gradients: dict[str, Tensor]
    status: Status
    residual_norm: float
    relative_residual: float
    solver_steps: int
    hvps: int
    lambda_min: float
    lambda_max: float
    damping: float
    noise_norm: float
    attempts: tuple[Attempt, ...]
    v: Tensor
    stationarity: float
    norm: float
    ul_loss: float
    ll_loss: float

    @property
    def reason(self) -> str:
        """Why the solve failed and what to do about it, in a sentence or two; empty where it did not."""
        match self.status:
            case Status.DIVERGED if math.isnan(self.lambda_max):
                return "The solution is worse than none. Take another solver, or a smaller step size."
            case Status.DIVERGED:
                return (
                    f"The largest eigenvalue of the Hessian is at least {self.lambda_max:.3g}, so that the step size "
                    f"must be below {2 / self.lambda_max:.3g}. "
                    'Take a smaller `ll_learning_rate`, `step_size="auto"`, or `solver="cg"`.'
                )
            case Status.NEGATIVE_CURVATURE:
                return (
                    "The Hessian has a direction of negative or no curvature: the ll model is not at a minimum, or has "
                    'a flat direction. Train it longer, add `damping`, or take `solver="minres"`.'
                )
            case Status.NON_FINITE:
                return f"A loss or a derivative is not finite: ul loss {self.ul_loss:g}, ll loss {self.ll_loss:g}."
            case Status.UNVERIFIED:
                return "The residual computed anew is larger than the one that the solver reported."
        return ""


def certified(
    gradients: dict[str, Tensor],
    solution: Solution,
    second: SecondOrder,
    b: Tensor,
    noise: float,
    ul_loss: Loss,
    ll_loss: Loss,
) -> Hypergradient:
    """Return the hypergradient with its certificate; its numbers leave the device together."""
    norms = [norm_of([b]), second.stationarity, norm_of(list(gradients.values()))]
    b_norm, stationarity, norm, ul_value, ll_value = torch.stack([*norms, ul_loss.value, ll_loss.value]).tolist()
    status = solution.status
    if not (status.failed or all(map(math.isfinite, (stationarity, norm, ul_value, ll_value)))):
        status = Status.NON_FINITE
    return Hypergradient(
        gradients={} if status.failed else gradients,
        status=status,
        residual_norm=solution.residual_norm,
        relative_residual=solution.residual_norm / b_norm if b_norm else 0.0,
        solver_steps=solution.steps,
        hvps=second.hvps,
        lambda_min=solution.lambda_min,
        lambda_max=solution.lambda_max,
        damping=solution.damping,
        noise_norm=noise,
        attempts=solution.attempts,
        v=solution.v,
        stationarity=stationarity,
        norm=math.nan if status.failed else norm,
        ul_loss=ul_value,
        ll_loss=ll_value,
    )
