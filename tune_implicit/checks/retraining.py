"""A look at the hypergradient, beside differences of the ul loss with the ll problem solved anew, in float64.

It is what a hypergradient is checked against, and too slow for anything else.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.checks.derivatives import exact_copy
from tune_implicit.checks.findings import AGREES, CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.spectrum import random_direction
from tune_implicit.hypergradients.vectors import norm_of, unflatten

__all__ = ["Retraining", "look_at_retraining"]

# L-BFGS is asked for so many rounds of so many steps.
_LBFGS_ROUNDS = 15
_LBFGS_STEPS = 20
_NEWTON_STEPS = 4
_SOLVE_STEPS = 200

# The most gradients that a Hessian-vector product takes as long as.
_HVP = 3

# Relative to the gradient that training started from: where the ll problem counts as solved.
_SOLVED = 1e-5

# Kinks of a ReLU network keep a right hypergradient that far from its differences.
_NEARLY = 0.1


def look_at_retraining(fixed: FixedProblem, report: CheckReport) -> None:
    """Compare the hypergradient with differences of the ul loss along a random direction of the ul values."""
    exact = exact_copy(fixed)
    if exact is None:
        return
    retraining = Retraining(exact)
    if not retraining.train_to_minimum():
        if not _out_of_time(fixed, report):
            report.warn(
                "not-solved",
                "L-BFGS and Newton's method found no minimum of the ll problem on its first batch, so that the "
                "hypergradient was not compared with differences of the retrained problem. Has it a minimum?",
            )
        return
    result = retraining.hypergradient()
    if result.status.failed:
        report.warn(
            "not-solved", f"At the minimum of the ll problem the system is {result.status.value}: {result.reason}"
        )
        return
    direction = {
        name: random_direction(param.reshape(-1), seed=1).view(param.shape) for name, param in exact.ul_params().items()
    }
    expected = sum((gradient * direction[name]).sum().item() for name, gradient in result.gradients.items())
    differences = [retraining.difference(direction, h) for h in (1e-3, 1e-4)]
    if any(difference is None for difference in differences):
        if not _out_of_time(fixed, report):
            report.warn("not-solved", "Beside these ul values the ll problem could not be solved again.")
        return
    scale = max(abs(expected), 0.1 * result.norm, 1e-12)
    error = min(abs(d - expected) / scale for d in differences if d is not None)
    report.figures["finite_difference_error"] = error
    told = (
        f"hypergradient along a random direction {expected:.4g}, differences of the retrained problem "
        f"{differences[-1]:.4g}"
    )
    if error <= AGREES:
        report.ok("finite-differences", told)
    elif error <= _NEARLY:
        report.warn("finite-differences", f"{told}: kinks, or a flat ll problem")
    else:
        report.fault("finite-differences", f"{told}: the two objectives do not describe the problem that is trained")


def _out_of_time(fixed: FixedProblem, report: CheckReport) -> bool:
    """Return whether it is for lack of time that the ll problem was not solved; ``report`` is told."""
    if fixed.budget.spent:
        report.no_time("Whether the hypergradient agrees with differences of the retrained problem")
    return fixed.budget.spent


@dataclass(frozen=True)
class Retraining:
    """A problem whose ll model is trained to a minimum again and again, until its budget is spent.

    Parameters
    ----------
    exact : FixedProblem
        In float64.
    """

    exact: FixedProblem

    def hypergradient(self) -> Hypergradient:
        """Return the hypergradient, solved as exactly as can be."""
        implicit = self.exact.repeatable().implicit(solver="minres", ll_learning_rate=1.0, k=_SOLVE_STEPS, rtol=1e-10)
        result = implicit.compute_mean_gradients([self.exact.validate], [self.exact.train])
        self.exact.problem.ul_model.zero_grad()
        return result

    def train_to_minimum(self) -> bool:
        """Train the ll model to a stationary point, by L-BFGS and then Newton's method; return whether it got there."""
        exact = self.exact
        params = exact.ll_params()
        start = norm_of([self._gradient()]).item()
        optimizer = torch.optim.LBFGS(
            params, max_iter=_LBFGS_STEPS, tolerance_grad=0, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            loss, gradients = exact.gradients("ll", params)
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            return loss

        for _ in range(_LBFGS_ROUNDS):
            before = exact.value("ll")
            try:
                optimizer.step(closure)
            except IndexError:  # where the loss has become NaN, torch's line search looks for a bracket that it has not
                return False
            if self.exact.budget.spent or exact.value("ll") == before:
                break
        optimizer.zero_grad()
        for _ in range(_NEWTON_STEPS):
            if self.exact.budget.spent or not self._newton_step():
                break
        return norm_of([self._gradient()]).item() <= _SOLVED * max(start, 1.0)

    def _gradient(self) -> Tensor:
        return self.exact.gradient("ll", self.exact.ll_params())

    def _newton_step(self) -> bool:
        """Take one step of Newton's method, unless it does not lower ``||df/dw||``, and return whether it did."""
        params, budget = self.exact.ll_params(), self.exact.budget
        start = budget.clock()
        gradient, w = self._gradient(), [param.detach().clone() for param in params]
        hvp_s = _HVP * (budget.clock() - start)
        before = norm_of([gradient]).item()
        if before == 0 or not math.isfinite(before):
            return False
        with self.exact.second_order() as second:
            solution = Minres(budget.affords(hvp_s, _SOLVE_STEPS), rtol=1e-8).solve(second.hvp, gradient)
        with torch.no_grad():
            for param, step in zip(params, unflatten(solution.v, params), strict=True):
                param.sub_(step)
        if not solution.status.failed and norm_of([self._gradient()]).item() < before:
            return True
        with torch.no_grad():
            for param, value in zip(params, w, strict=True):
                param.copy_(value)
        return False

    def difference(self, direction: dict[str, Tensor], h: float) -> float | None:
        """Return the central difference of the ul loss along ``direction``, the ll problem solved anew at both ends.

        The ll model is left where it was; ``None`` where it did not get to a minimum.
        """
        ll_model = self.exact.problem.ll_model
        kept = copy.deepcopy(ll_model.state_dict())
        losses = []
        for shift in (h, -h):
            self._shift(direction, shift)
            solved = self.train_to_minimum()
            losses.append(self.exact.value("ul"))
            self._shift(direction, -shift)
            ll_model.load_state_dict(kept)
            if not solved:
                return None
        return (losses[0] - losses[1]) / (2 * h)

    def _shift(self, direction: dict[str, Tensor], by: float) -> None:
        with torch.no_grad():
            for name, param in self.exact.ul_params().items():
                param.add_(direction[name], alpha=by)
