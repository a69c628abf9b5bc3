"""A look at solves one after another, as a trial takes them, with the settings and with others beside them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tune_implicit.checks.cost import counted
from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import DivergedError
from tune_implicit.hypergradients.batches import moved
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.hypergradients.vectors import flatten
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.splits import BatchStream
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["look_at_solves"]

# ul steps after which solves are compared: with a warm start each begins where the one before it ended.
_ROUNDS = 4
_K_GRID = (5, 10, 20, 2)

# The error of a hypergradient that is good enough, and what counts as no better: so many times the least error.
_CLOSE = 0.1
_NO_BETTER = 1.5

# A residual so near to that of no solve at all: the series is then little more than a multiple of dF/dw.
_NEAR_ONE = 0.9

# The part of the time for all rounds, and the most steps of what they are compared with.
_IN_ROUNDS = 0.6
_REFERENCE_STEPS = 300
_REFERENCE_RESIDUAL = 0.05
_WORTH = 40


@dataclass
class _Way:
    """One way to solve, and how it did in the latest round."""

    settings: dict[str, Any]
    implicit: Implicit
    rounds: int = 0
    answers: bool = True
    residual: float = math.nan
    error: float = math.nan
    gradient: Tensor | None = None

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        off = "" if math.isnan(self.error) else f", error {self.error:.0%}"
        return f"{given}: residual {self.residual:.2g}{off}" if self.answers else f"{given}: failed"

    @property
    def badness(self) -> float:
        """The error where it is known, else the residual."""
        if not self.answers:
            return math.inf
        return self.residual if math.isnan(self.error) else self.error


def look_at_solves(fixed: FixedProblem, report: CheckReport) -> None:
    """Compare hypergradients after some ul steps; recommend the solver, and the least ``k``, that is good enough."""
    settings = fixed.settings
    if settings.ul_learning_rate == 0:
        return
    round_s = 2 * report.figures["ul_step_s"] + settings.least_ll_steps * report.figures["ll_step_s"]
    if not fixed.budget.affords(round_s, 1):
        report.no_time("Solves one after another")
        return
    problem = fixed.copied()
    ways = _ways(settings, problem)
    reference = _in_rounds(fixed, problem, ways, report)
    own, *_ = ways
    if not own.rounds:
        return  # training diverges as soon as the ul values move, which the first ul steps of a trial will tell
    compared = [way for way in ways if way.rounds == own.rounds]
    for way in compared:
        if reference is not None and way.gradient is not None:
            scale = torch.linalg.vector_norm(reference).item()
            way.error = torch.linalg.vector_norm(way.gradient - reference).item() / scale if scale else 0.0
    report.figures["relative_residual"] = own.residual
    if not math.isnan(own.error):
        report.figures["hypergradient_error"] = own.error
    best = _choice(own, compared)
    if best is not None:
        report.recommend(**best.settings)
    _tell(own, best, report)


def _ways(settings: ImplicitSettings, problem: BilevelProblem) -> list[_Way]:
    """Return the settings' own way to solve, and others."""
    own: dict[str, Any] = {"solver": settings.solver, "k": settings.k}
    series = {"step_size": settings.step_size if settings.step_size is not None else settings.ll_learning_rate}
    tried = [own | (series if settings.solver == "neumann" else {})]
    tried += [{"solver": "minres", "k": k} for k in _K_GRID]
    if settings.solver == "cg":
        tried += [{"solver": "cg", "k": k} for k in _K_GRID]
    if settings.solver == "neumann":
        tried += [{"solver": "neumann", "k": k, "step_size": "auto"} for k in _K_GRID[:3]]
    distinct = [way for i, way in enumerate(tried) if way not in tried[:i]]
    return [
        _Way(way, problem.implicit(**replace(settings, **way).of_a_solve | {"fallback": False})) for way in distinct
    ]


def _in_rounds(fixed: FixedProblem, problem: BilevelProblem, ways: list[_Way], report: CheckReport) -> Tensor | None:
    """Take ul steps, and solve in each way after each; return the hypergradient after the last, ``None`` if unknown."""
    settings = fixed.settings
    trainer = BilevelTrainer(problem, replace(settings, warmup_ll_steps=0, on_failure=counted(settings.on_failure)))
    streams = BatchStream("validate_data", problem.validate_data), BatchStream("train_data", problem.train_data)
    budget = fixed.budget.part(_IN_ROUNDS)
    for _ in range(_ROUNDS):
        try:
            trainer.step()
        except DivergedError:
            return None
        device = fixed.ll_params()[0].device
        validate, train = (moved(stream.next(), device) for stream in streams)
        for way in ways:
            if budget.spent and way is not ways[0]:
                break
            result = _solved(problem, way.implicit, (validate, train), way.rounds)
            way.rounds, way.answers, way.residual = way.rounds + 1, result.answers, result.relative_residual
            way.gradient = _flat(result)
        if budget.spent:
            break
    steps = fixed.budget.affords(report.figures["hvp_s"], _REFERENCE_STEPS)
    if steps < _WORTH:
        return None
    exact = problem.implicit(solver="minres", ll_learning_rate=1.0, k=steps, rtol=1e-3, damping=settings.damping)
    result = _solved(problem, exact, (validate, train), ways[0].rounds - 1)
    known = result.status is Status.CONVERGED or result.relative_residual < _REFERENCE_RESIDUAL
    return _flat(result) if known else None


def _solved(problem: BilevelProblem, implicit: Implicit, batches: tuple[Any, Any], seed: int) -> Hypergradient:
    """Return a hypergradient on a validation and a training batch, whose objectives draw the same for each way."""
    validate, train = batches
    with preserved_rng():
        seed_everything(seed)
        result = implicit.compute_mean_gradients([validate], [train])
    problem.ul_model.zero_grad()
    return result


def _flat(result: Hypergradient) -> Tensor | None:
    return flatten(list(result.gradients.values())).double() if result.gradients else None


def _choice(own: _Way, ways: list[_Way]) -> _Way | None:
    """Return the way to take: with the own solver where one is good enough, else with another; the least ``k`` of it.

    Where none is good enough it is the first that is not clearly worse than the best.
    """
    answering = [way for way in ways if way.answers]
    if not answering:
        return None
    by_k = sorted(answering, key=lambda way: (way.settings["solver"] != own.settings["solver"], way.settings["k"]))
    close = [way for way in by_k if way.badness <= _CLOSE]
    if close:
        return own if own in close and own.settings["k"] <= close[0].settings["k"] else close[0]
    least = min(way.badness for way in answering)
    good = [way for way in by_k if way.badness <= _NO_BETTER * least]
    return own if own in good else min(good, key=lambda way: way.settings["k"])


def _tell(own: _Way, best: _Way | None, report: CheckReport) -> None:
    told = f"after {own.rounds} ul steps, {own}"
    better = ""
    if best is not None and best is not own:
        better = f" {best} would {'do as well' if own.badness <= _CLOSE else 'be better'}."
    if own.settings["solver"] == "neumann" and own.answers and not own.residual <= _NEAR_ONE:
        mend = better or ' Take a larger `k`, step_size="auto", or solver="minres".'
        report.fault(
            "residual-near-one",
            f"{told}: the series is hardly more than its first term, as if nothing had been solved.{mend}",
        )
    else:
        (report.ok if own.answers else report.warn)("solves", told + (f".{better}" if better else ""))
