"""A hypergradient: the value, what vouches for it, and why it failed where it did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.products import SecondDerivatives
from tune_implicit.hypergradients.solvers.solution import Attempt, Solution, Status
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["Hypergradient", "certified", "mean_of"]

# A relative stationarity above which the ll weights are surely at no smooth minimum. Where nearly all of it is on
# weights that are exactly 0, any that is more than rounding says so.
_STATIONARY = 1e-3
_ROUNDING = 1e-9
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative of the ul loss in the ul values, with its certificate.

    Parameters
    ----------
    gradients : dict of str to Tensor
        By name of the ul model's parameter, in its shape and dtype. Empty where the status is a failure.
    direct : dict of str to Tensor
        That part of it which does not go through the ll weights, of the ul values that the ul objective itself uses.
    solution : Solution
        The solution of ``H v = dF/dw``, with :attr:`damping` added to the diagonal of ``H``; its fields are attributes
        here as well.
    solver : str
        The name of the solver that answered.
    b_norm : float
        ``||dF/dw||``.
    hvps : int
        Hessian-vector products taken in all.
    noise_norm : float
        With ``stop="noise"``, the standard error of ``dF/dw`` on the validation batch, as a norm; else NaN.
    stationarity, stationarity_at_zeros : float
        ``||df/dw||`` on the batch, for which the hypergradient's formula takes 0; and that part of it which is on
        weights that are exactly 0, where a penalty or a constraint has put them unless they have never been trained.
    ll_norm : float
        ``||w||``.
    norm : float
        The norm of the hypergradient over all ul values; NaN where the status is a failure.
    ul_loss, ll_loss : float
        ``F`` and ``f`` at the point.
    """

    gradients: dict[str, Tensor]
    direct: dict[str, Tensor]
    solution: Solution
    solver: str
    b_norm: float
    hvps: int
    noise_norm: float
    stationarity: float
    stationarity_at_zeros: float
    ll_norm: float
    norm: float
    ul_loss: float
    ll_loss: float

    @property
    def v(self) -> Tensor:
        """The inverse-HVP of shape (n,), over the ll parameters in their order."""
        return self.solution.v

    @property
    def status(self) -> Status:
        """How the solve ended; ``NON_FINITE`` also where a loss or the gradient itself is not finite."""
        return self.solution.status

    @property
    def answers(self) -> bool:
        """Whether it can be used: no failure, and a ``v`` that is not zero unless that is the solution."""
        return self.solution.answers

    @property
    def residual_norm(self) -> float:
        """``||dF/dw - H v||``, or the most that it can be.

        For a truncated Neumann series it is the norm of its last term, which bounds it where the series converges, and
        NaN where ``k = 0``; ``verify`` measures it.
        """
        return self.solution.residual_norm

    @property
    def relative_residual(self) -> float:
        """The residual norm over ``||dF/dw||``: 0 is exact. A truncated solve by CG may start above 1."""
        return self.residual_norm / self.b_norm if self.b_norm else 0.0

    @property
    def relative_stationarity(self) -> float:
        """``||df/dw|| / (lambda_max ||w||)``, with the largest curvature that the solve met; NaN where it met none.

        It is the part of their length by which the ll weights have at least to move to get to a stationary point.
        Where further training does not make it small, the ll problem has a kink or a constraint at its solution, as L1
        penalties and projections do: the formula, which takes it to be smooth there, does not hold.
        """
        scale = abs(self.lambda_max) * self.ll_norm
        return self.stationarity / scale if scale else (math.inf if self.stationarity else 0.0)

    @property
    def solver_steps(self) -> int:
        """Iterations of the solver."""
        return self.solution.steps

    @property
    def lambda_min(self) -> float:
        """The smallest curvature that the solve met, no less than the smallest eigenvalue of ``H``; NaN for none."""
        return self.solution.lambda_min

    @property
    def lambda_max(self) -> float:
        """The largest curvature that the solve met, no more than the largest eigenvalue of ``H``; NaN for none."""
        return self.solution.lambda_max

    @property
    def damping(self) -> float:
        """What was added to the diagonal of ``H``."""
        return self.solution.damping

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The solvers that one with a fallback has tried, and how each ended."""
        return self.solution.attempts

    @property
    def reason(self) -> str:
        """Why the solve failed and what to do about it, in a sentence or two; empty where it did not."""
        if not self.status.failed:
            return ""
        seen = ""
        if self.status is Status.DIVERGED and math.isfinite(self.lambda_max):
            seen = (
                f" The largest eigenvalue of the Hessian is at least {self.lambda_max:.3g}: a step size must be below "
                f"{2 / self.lambda_max:.3g}."
            )
        if self.status is Status.NON_FINITE:
            seen = f" The ul loss is {self.ul_loss:g}, the ll loss {self.ll_loss:g}."
        return self.status.explanation + seen

    @property
    def caveat(self) -> str:
        """What to know of an answer before it is trusted, in a sentence or two; empty where there is nothing."""
        if self.status.failed:
            return ""
        told = "" if self.status is Status.CONVERGED else self.status.explanation
        at_zeros = self.stationarity_at_zeros > _NEARLY_ALL * self.stationarity
        if self.relative_stationarity > (_ROUNDING if at_zeros else _STATIONARY):
            where = ", nearly all of it on weights that are exactly 0" if at_zeros else ""
            told += (
                f" ||df/dw|| is {self.stationarity:.3g}{where}, and the formula takes it to be 0: train the ll model "
                "longer, or, where that does not help, smooth the kink or the constraint at its solution."
            )
        return told.strip()


def certified(
    gradients: dict[str, Tensor],
    direct: dict[str, Tensor],
    solution: Solution,
    solver: str,
    second: SecondDerivatives,
    b: Tensor,
    ll_norm: float,
    noise: float,
    losses: tuple[Sequence[Loss], Sequence[Loss]],
) -> Hypergradient:
    """Return the hypergradient with its certificate; its numbers leave the device together."""
    stationary = second.stationarity, second.stationarity_at_zeros
    means = (torch.stack([loss.value for loss in of_level]).mean() for of_level in losses)
    scalars = [norm_of([b]), *stationary, norm_of(list(gradients.values())), *means]
    b_norm, stationarity, at_zeros, norm, ul_loss, ll_loss = torch.stack(scalars).tolist()
    if not (solution.status.failed or all(map(math.isfinite, (stationarity, norm, ul_loss, ll_loss)))):
        solution = replace(solution, status=Status.NON_FINITE)
    failed = solution.status.failed
    return Hypergradient(
        gradients={} if failed else gradients,
        direct={} if failed else direct,
        solution=solution,
        solver=solution.attempts[-1].solver if solution.attempts else solver,
        b_norm=b_norm,
        hvps=second.hvps,
        noise_norm=noise,
        stationarity=stationarity,
        stationarity_at_zeros=at_zeros,
        ll_norm=ll_norm,
        norm=math.nan if failed else norm,
        ul_loss=ul_loss,
        ll_loss=ll_loss,
    )


def mean_of(each: Sequence[Hypergradient]) -> Hypergradient:
    """Return the mean hypergradient of several ll problems, with the certificate of the one that is solved worst.

    Where one is no answer, the mean is none either, and its certificate is that of the first such one.

    Parameters
    ----------
    each : sequence of Hypergradient
        In the same ul values, one or more.
    """
    if len(each) == 1:
        return each[0]
    failed = next((one for one in each if not one.answers), None)
    worst = failed or max(each, key=lambda one: one.relative_residual)
    gradients = {} if failed else _mean([one.gradients for one in each])
    return replace(
        worst,
        gradients=gradients,
        direct={} if failed else _mean([one.direct for one in each]),
        hvps=sum(one.hvps for one in each),
        norm=math.nan if failed else norm_of(list(gradients.values())).item(),
        ul_loss=math.fsum(one.ul_loss for one in each) / len(each),
        ll_loss=math.fsum(one.ll_loss for one in each) / len(each),
    )


def _mean(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means by name, a name that is missing counting as zero."""
    names = {name: None for one in each for name in one}
    return {name: torch.stack([one[name] for one in each if name in one]).sum(0) / len(each) for name in names}
