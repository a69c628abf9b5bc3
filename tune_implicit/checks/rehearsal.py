"""A problem in its training: whether it gets to a minimum, the Hessian there, and the price of a ul step."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.checks.effort import K_GRID, least_k
from tune_implicit.checks.findings import AGREES, CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.inspection import Inspection
from tune_implicit.errors import DivergedError
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.hypergradients.solvers.spectrum import random_direction, spectrum
from tune_implicit.hypergradients.vectors import flatten, norm_of
from tune_implicit.trials.evaluation import evaluate
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.splits import batches_of, move
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["Rehearsal"]

_TRAINING_STEPS = 1000
_LANCZOS_STEPS = 30
_BATCHES = 10
_TIMED_STEPS = 5

# What a check may take on a large model: for the least k of each solver, and for training to a minimum three times.
_EFFORT_S = 30
_RETRAINING_S = 60

# Of the gradient that training started from, and of the ll loss that a Newton step would still take off.
_TRAINED = 0.3
_LEFT = 0.05

# Of the ul loss before training, by which more than noise has raised it.
_ROSE = 0.01

# Of the largest step size: just below it the series converges fastest.
_FASTEST = 0.95

# Kinks of a ReLU network keep a right hypergradient that far from its differences.
_NEARLY = 0.1

_FAULTS = {
    Status.DIVERGED: "diverging-step",
    Status.NEGATIVE_CURVATURE: "negative-curvature",
    Status.NON_FINITE: "non-finite",
}


@dataclass
class Rehearsal:
    """What is seen of a problem when its ll model is trained.

    Parameters
    ----------
    inspected : Inspection
        Whose problem is free to be trained.
    settings : ImplicitSettings
        Of a trial.
    """

    inspected: Inspection
    settings: ImplicitSettings

    @property
    def problem(self) -> BilevelProblem:
        """The copy that is trained."""
        return self.inspected.problem

    @property
    def fixed(self) -> FixedProblem:
        """The same on its first batches."""
        return self.inspected.fixed

    @property
    def report(self) -> CheckReport:
        """What takes the findings."""
        return self.inspected.report

    def run(self) -> None:
        """Train, and look at everything, up to the first fault that nothing can follow."""
        self.training()
        self.evaluation()
        self.curvature()
        self.solver()
        self.retrained()
        self.cost()

    def training(self) -> None:
        """Train the ll model as a trial would, the ul values fixed, and look at whether it gets to a minimum."""
        settings = self.settings
        steps = min(_TRAINING_STEPS, settings.warmup_ll_steps + settings.ll_steps * settings.ul_steps)
        before = self._mean_gradient()
        trainer = BilevelTrainer(self.problem, replace(settings, ul_learning_rate=0.0))
        start = time.perf_counter()
        try:
            trainer.train_ll(steps)
        except DivergedError as error:
            self.report.stop("training-diverges", str(error))
        self.report.figures["ll_step_s"] = (time.perf_counter() - start) / max(steps, 1)
        after = self._mean_gradient()
        self.report.figures["stationarity"] = after
        ul_loss, ll_loss = self.fixed.ul_loss().item(), self.fixed.ll_loss().item()
        if not (math.isfinite(ul_loss) and math.isfinite(ll_loss)):
            self.report.stop("non-finite", f"After {steps} ll steps the ul loss is {ul_loss}, the ll loss {ll_loss}.")
        if steps and after > _TRAINED * before and self._still_to_gain() > _LEFT:
            self.report.fault(
                "not-at-minimum",
                f"After all {steps} ll steps of a trial ||df/dw|| is {after:.2g}, {after / before:.0%} of what it was "
                "before them: the hypergradient assumes 0. Take more `ll_steps` or `warmup_ll_steps`, or another "
                "`ll_learning_rate`.",
            )
        ul_before, ll_before = self.inspected.ul_loss, self.inspected.ll_loss
        if ll_loss < ll_before and ul_loss > ul_before + _ROSE * abs(ul_before):
            seen = (
                f"Training lowered the ll loss from {ll_before:.4g} to {ll_loss:.4g} and raised the ul loss from "
                f"{ul_before:.4g} to {ul_loss:.4g}."
            )
            if ul_before < 0:
                self.report.fault("wrong-sign", f"{seen} Has one of them the wrong sign? Both are minimised.")
            else:
                self.report.warn(
                    "wrong-sign",
                    f"{seen} Either the ll model overfits, which the ul values may mend, or one of them has the wrong "
                    "sign: both are minimised.",
                )
        self.report.ok(
            "training", f"{steps} ll steps: ll loss {ll_loss:.4g}, ||df/dw|| from {before:.2g} to {after:.2g}"
        )

    def evaluation(self) -> None:
        """Measure what trials are compared on, and the user's metrics."""
        problem, name = self.problem, self.problem.selected_on
        functions = {"select_loss": problem.ul_objective, **problem.metrics}
        for metric, value in evaluate(problem, name, getattr(problem, name), functions).items():
            if not math.isfinite(value):
                self.report.fault("non-finite", f"`{metric}` is {value} on `{name}`: every trial would fail.")

    def _mean_gradient(self) -> float:
        """Return the norm of the ll gradient's mean over the first batches of the training data."""
        params = self.fixed.ll_params()
        total: list[Tensor] = [torch.zeros_like(param) for param in params]
        device = params[0].device
        for count, batch in enumerate(batches_of("train_data", self.problem.train_data), start=1):
            loss = replace(self.fixed, train=move(batch, device)).ll_loss()
            gradients = grad(loss, params, materialize_grads=True)
            total = [t + (g - t) / count for t, g in zip(total, gradients, strict=True)]
            if count == _BATCHES:
                break
        return norm_of(total).item()

    def _still_to_gain(self) -> float:
        """Return what a Newton step would take off the ll loss on the first batch, as a part of it."""
        params = self.fixed.ll_params()
        gradient = flatten(grad(self.fixed.ll_loss(), params, materialize_grads=True))
        solution = Minres(50, rtol=1e-3).solve(self.fixed.second_order().hvp, gradient)
        loss = self.fixed.ll_loss().item()
        return abs((gradient @ solution.v).item()) / 2 / max(abs(loss), 1e-12)

    def curvature(self) -> None:
        """Estimate the ends of the Hessian's spectrum, and the step sizes they allow."""
        second = self.fixed.second_order()
        start = random_direction(flatten([param.detach() for param in self.fixed.ll_params()]))
        ends = spectrum(second.hvp, start, _LANCZOS_STEPS)
        self.report.figures.update(lambda_min=ends.lambda_min, lambda_max=ends.lambda_max)
        if not math.isfinite(ends.lambda_max):
            self.report.stop("non-finite", "The Hessian of `ll_objective` is not finite at the trained weights.")
        if ends.lambda_max <= 0 or -ends.lambda_min > ends.lambda_max:
            self.report.fault(
                "wrong-sign",
                f"The ll Hessian's eigenvalues lie between {ends.lambda_min:.3g} and {ends.lambda_max:.3g}: training "
                "goes towards a maximum. Has `ll_objective` the wrong sign?",
            )
            return
        largest = 2 / ends.bound
        self.report.figures["largest_step_size"] = largest
        self.report.ok(
            "curvature",
            f"eigenvalues of the ll Hessian between {ends.lambda_min:.3g} and {ends.lambda_max:.3g}; the Neumann "
            f"series needs a step size (`ll_learning_rate`) below {largest:.3g}, and is fastest near "
            f"{_FASTEST * largest:.3g}",
        )

    def solver(self) -> None:
        """Solve with the settings, and find the ``k`` that each solver needs."""
        settings = replace(self.settings, warm_start=False)
        data, target = self.fixed.train
        implicit = self.problem.implicit(**settings.of_a_solve)
        result = implicit.compute_gradients(*self.fixed.validate, train_data=data, train_target=target)
        self.problem.ul_model.zero_grad()
        told = f"{settings.solver}, k={settings.k}: {result.status.value}"
        if result.status.failed:
            self.report.fault(_FAULTS.get(result.status, "solver"), f"{told}. {result.reason}")
        else:
            self.report.ok("solver", f"{told}, relative residual {result.relative_residual:.2g}")
        self._effort()

    def _effort(self) -> None:
        """Tell the least ``k`` of each solver."""
        settings = self.settings
        step_sizes = {"neumann": settings.ll_learning_rate}
        if "largest_step_size" in self.report.figures:
            step_sizes["neumann_auto"] = _FASTEST * self.report.figures["largest_step_size"]
        ways: dict[str, dict[str, Any]] = {name: {"solver": name} for name in ("cg", "minres")}
        ways |= {name: {"solver": "neumann", "step_size": step_size} for name, step_size in step_sizes.items()}
        solvers = {
            name: {k: SolverSettings(k=k, tolerance=0.0, **way).make_solver() for k in K_GRID}
            for name, way in ways.items()
        }
        needed = least_k(self.fixed, settings.damping, solvers, time.perf_counter() + _EFFORT_S)
        self.report.figures.update({f"k_{name}": k for name, k in needed.items()})
        if not needed and not self.report.faults:
            self.report.warn(
                "effort",
                "The system is so ill-conditioned that MINRES did not solve it: every hypergradient here is a "
                "truncated one. A penalty on all ll weights, or `damping`, makes it solvable.",
            )
        if not needed:
            return
        words = {math.inf: f"not by {K_GRID[-1]}"}
        told = [f"{name} {'not measured' if math.isnan(k) else words.get(k, k)}" for name, k in needed.items()]
        self.report.ok("effort", f"k for 1% error of the implicit term, on these batches: {', '.join(told)}")

    def retrained(self) -> None:
        """Compare the hypergradient with differences of the ul loss, the ll problem solved anew."""
        if self.inspected.exact is None:
            return
        exact = replace(self.fixed.doubled(), deadline=time.perf_counter() + _RETRAINING_S)
        if not exact.train_to_minimum():
            self.report.warn(
                "not-solved",
                "L-BFGS and Newton's method found no minimum of the ll problem on its first batch, in "
                f"{_RETRAINING_S} s at most, so that the hypergradient was not compared with differences of the "
                "retrained problem. Has it a minimum?",
            )
            return
        result = exact.hypergradient()
        if result.status.failed:
            self.report.warn(
                "not-solved", f"At the minimum of the ll problem the system is {result.status.value}: {result.reason}"
            )
            return
        direction = {
            name: random_direction(param.reshape(-1), seed=1).view(param.shape)
            for name, param in exact.ul_params().items()
        }
        expected = sum((gradient * direction[name]).sum().item() for name, gradient in result.gradients.items())
        differences = [exact.retrained_difference(direction, h) for h in (1e-3, 1e-4)]
        if any(difference is None for difference in differences):
            self.report.warn("not-solved", "Beside these ul values the ll problem could not be solved again.")
            return
        scale = max(abs(expected), 0.1 * result.norm, 1e-12)
        error = min(abs(d - expected) / scale for d in differences if d is not None)
        self.report.figures["finite_difference_error"] = error
        message = f"hypergradient along a random direction {expected:.4g}, differences of the retrained problem"
        told = f"{message} {differences[-1]:.4g}"
        if error <= AGREES:
            self.report.ok("finite-differences", told)
        elif error <= _NEARLY:
            self.report.warn("finite-differences", f"{told}: kinks, or a flat ll problem")
        else:
            self.report.fault(
                "finite-differences", f"{told}: the two objectives do not describe the problem that is trained"
            )

    def cost(self) -> None:
        """Measure what one ul step costs."""
        trainer = BilevelTrainer(self.problem, replace(self.settings, warmup_ll_steps=0, ll_steps=0, on_failure="skip"))
        taken = []
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            trainer.step()
            taken.append(time.perf_counter() - start)
        ul_step, ll_step = min(taken), self.report.figures["ll_step_s"]
        self.report.figures["ul_step_s"] = ul_step
        compared = (
            f", as long as {ul_step / ll_step:.1f} ll steps"
            if self.settings.warmup_ll_steps + self.settings.ll_steps
            else ""
        )
        self.report.ok("cost", f"one ul step takes {ul_step:.3g} s{compared}")
