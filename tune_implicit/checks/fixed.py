"""One bilevel problem on one fixed batch a level, in float64: its ll minimum, and differences of the retrained problem.

It is what a hypergradient is checked against, and too slow for anything else.
"""

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import grad

from tune_implicit.hypergradients.borrowed import map_tensors
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.guards.losses import scalar_loss
from tune_implicit.hypergradients.guards.twice import twice_differentiable_kernels
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.state import Batch, Objective, State, named_trainable
from tune_implicit.hypergradients.vectors import flatten, unflatten
from tune_implicit.trials.problem import BilevelProblem

__all__ = ["FixedProblem"]

# L-BFGS is asked for so many rounds of so many steps.
_LBFGS_ROUNDS = 15
_LBFGS_STEPS = 20
_NEWTON_STEPS = 4
_SOLVE_STEPS = 200

# Relative to the gradient that training started from: where the ll problem counts as solved.
_SOLVED = 1e-5


@dataclass
class FixedProblem:
    """A copy of a problem on one batch a level, without randomness.

    Parameters
    ----------
    problem : BilevelProblem
        Of which only models and objectives are used.
    train, validate : (data, target)
        The batches.
    deadline : float
        When to give up training to a minimum, on the clock of ``time.perf_counter``.
    """

    problem: BilevelProblem
    train: Batch
    validate: Batch
    deadline: float = math.inf

    def doubled(self) -> "FixedProblem":
        """Return a copy in float64."""
        models = {name: copy.deepcopy(getattr(self.problem, name)).double() for name in ("ul_model", "ll_model")}

        def double(batch: Batch) -> Batch:
            doubled: Batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
            return doubled

        return FixedProblem(replace(self.problem, **models), double(self.train), double(self.validate))

    def ll_params(self) -> list[nn.Parameter]:
        """Return the ll parameters."""
        return list(named_trainable(self.problem.ll_model).values())

    def ul_params(self) -> dict[str, nn.Parameter]:
        """Return the ul values, by name."""
        return named_trainable(self.problem.ul_model)

    def ul_loss(self) -> Tensor:
        """Return the ul loss on the validation batch."""
        return self._loss("ul_objective", self.validate)

    def ll_loss(self) -> Tensor:
        """Return the ll loss on the training batch."""
        return self._loss("ll_objective", self.train)

    def _loss(self, name: str, batch: Batch) -> Tensor:
        objective = _repeatable(getattr(self.problem, name))
        with torch.enable_grad(), twice_differentiable_kernels(self.problem.ll_model):
            return scalar_loss(name, objective(State(*batch, self.problem.ul_model, self.problem.ll_model)))

    def second_order(self) -> SecondOrder:
        """Return the ll loss, ready to be differentiated twice."""
        return SecondOrder(self.ll_loss(), self.ll_params())

    def stationarity(self) -> float:
        """Return ``||df/dw||``."""
        return self.second_order().stationarity.item()

    def hypergradient(self) -> Hypergradient:
        """Return the hypergradient, solved as exactly as can be, without adding to ``.grad``."""
        kept = {name: param.grad for name, param in self.ul_params().items()}
        repeatable = replace(
            self.problem,
            ul_objective=_repeatable(self.problem.ul_objective),
            ll_objective=_repeatable(self.problem.ll_objective),
        )
        implicit = repeatable.implicit(solver="minres", ll_learning_rate=1.0, k=_SOLVE_STEPS, rtol=1e-10)
        result = implicit.compute_gradients(*self.validate, train_data=self.train[0], train_target=self.train[1])
        for name, param in self.ul_params().items():
            param.grad = kept[name]
        return result

    def train_to_minimum(self) -> bool:
        """Train the ll model to a stationary point, by L-BFGS and then Newton's method; return whether it got there."""
        params = self.ll_params()
        start = self.stationarity()
        optimizer = torch.optim.LBFGS(
            params, max_iter=_LBFGS_STEPS, tolerance_grad=0, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            loss = self.ll_loss()
            for param, gradient in zip(params, grad(loss, params, materialize_grads=True), strict=True):
                param.grad = gradient
            return loss.detach()

        for _ in range(_LBFGS_ROUNDS):
            before = self.ll_loss().item()
            optimizer.step(closure)
            if time.perf_counter() > self.deadline or self.ll_loss().item() == before:
                break
        optimizer.zero_grad()
        for _ in range(_NEWTON_STEPS):
            if time.perf_counter() > self.deadline or not self._newton_step():
                break
        return self.stationarity() <= _SOLVED * max(start, 1.0)

    def _newton_step(self) -> bool:
        """Take one step of Newton's method, unless it does not lower ``||df/dw||``, and return whether it did."""
        params = self.ll_params()
        second = self.second_order()
        before, w = second.stationarity.item(), [param.detach().clone() for param in params]
        if before == 0 or not math.isfinite(before):
            return False
        gradient = flatten(grad(self.ll_loss(), params, materialize_grads=True))
        solution = Minres(_SOLVE_STEPS, rtol=1e-8).solve(second.hvp, gradient)
        with torch.no_grad():
            for param, step in zip(params, unflatten(solution.v, params), strict=True):
                param.sub_(step)
        if not solution.status.failed and self.stationarity() < before:
            return True
        with torch.no_grad():
            for param, value in zip(params, w, strict=True):
                param.copy_(value)
        return False

    def retrained_difference(self, direction: dict[str, Tensor], h: float) -> float | None:
        """Return the central difference of the ul loss along ``direction``, the ll problem solved anew at both ends.

        The ll model is left where it was; ``None`` where it did not get to a minimum.
        """
        kept = copy.deepcopy(self.problem.ll_model.state_dict())
        losses = []
        for shift in (h, -h):
            self._shift(direction, shift)
            solved = self.train_to_minimum()
            losses.append(self.ul_loss().item())
            self._shift(direction, -shift)
            self.problem.ll_model.load_state_dict(kept)
            if not solved:
                return None
        return (losses[0] - losses[1]) / (2 * h)

    def _shift(self, direction: dict[str, Tensor], by: float) -> None:
        with torch.no_grad():
            for name, param in self.ul_params().items():
                param.add_(direction[name], alpha=by)


def _repeatable(objective: Objective) -> Objective:
    """Return ``objective`` with the same random draws at every call."""

    def repeated(state: State) -> Tensor:
        with preserved_rng():
            seed_everything(0)
            return objective(state)

    return repeated
