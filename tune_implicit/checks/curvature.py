"""A look at the Hessian where training ends: its eigenvalues, the solve with the settings, and what solvers need."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.solution import Solver, Status
from tune_implicit.hypergradients.solvers.spectrum import random_direction, spectrum
from tune_implicit.hypergradients.vectors import flatten, norm_of

__all__ = ["look_at_curvature"]

_LANCZOS_STEPS = 30

# The part of the largest step size with which the series converges fastest.
_FASTEST = 0.95

_FAULTS = {
    Status.DIVERGED: "diverging-step",
    Status.NEGATIVE_CURVATURE: "negative-curvature",
    Status.NON_FINITE: "non-finite",
}

# The k that are tried, and the error asked for.
_K_GRID = (1, 2, 4, 8, 16, 32, 64, 128)
_ERROR = 0.01

# What they are compared with may take so many steps of MINRES, and this part of the time.
_REFERENCE_STEPS = 4 * _K_GRID[-1]
_REFERENCE = 0.4

# With fewer steps it is not worth trying.
_WORTH = 64


def look_at_curvature(fixed: FixedProblem, report: CheckReport) -> None:
    """Look at the spectrum, solve with the settings, and find the ``k`` that each solver needs."""
    _spectrum(fixed, report)
    _solve(fixed, report)
    _effort(fixed, report)


def _spectrum(fixed: FixedProblem, report: CheckReport) -> None:
    """Estimate the ends of the Hessian's spectrum, and the step sizes they allow."""
    start = random_direction(flatten([param.detach() for param in fixed.ll_params()]))
    steps = min(_LANCZOS_STEPS, len(start))
    begun = fixed.budget.clock()
    with fixed.second_order() as second:
        ends = spectrum(second.hvp, start, steps)
    report.figures["hvp_s"] = (fixed.budget.clock() - begun) / steps
    report.figures.update(lambda_min=ends.lambda_min, lambda_max=ends.lambda_max)
    if not math.isfinite(ends.lambda_max):
        report.stop("non-finite", "The Hessian of `ll_objective` is not finite at the trained weights.")
    if ends.lambda_max <= 0 or -ends.lambda_min > ends.lambda_max:
        report.fault(
            "wrong-sign",
            f"The ll Hessian's eigenvalues lie between {ends.lambda_min:.3g} and {ends.lambda_max:.3g}: training "
            "goes towards a maximum. Has `ll_objective` the wrong sign?",
        )
        return
    largest = 2 / ends.bound
    report.figures["largest_step_size"] = largest
    report.ok(
        "curvature",
        f"eigenvalues of the ll Hessian between {ends.lambda_min:.3g} and {ends.lambda_max:.3g}; the Neumann series "
        f"needs a step size (`ll_learning_rate`) below {largest:.3g}, and is fastest near {_FASTEST * largest:.3g}",
    )


def _solve(fixed: FixedProblem, report: CheckReport) -> None:
    """Solve once with the settings, and once more with what they fall back on where that fails."""
    settings = fixed.settings
    result = _solved(fixed, fallback=False)
    told = f"{settings.solver}, k={settings.k}: {result.status.value}"
    if not result.status.failed:
        report.ok("solver", f"{told}, relative residual {result.relative_residual:.2g}")
        return
    name, told = _FAULTS.get(result.status, "solver"), f"{told}. {result.reason}"
    if settings.fallback and result.status is Status.NEGATIVE_CURVATURE:
        second = _solved(fixed, fallback=True)
        if second.answers:
            report.warn(name, f'{told} Here on_failure="fallback" answers, with {second.solver}.')
            return
    report.fault(name, told)


def _solved(fixed: FixedProblem, fallback: bool) -> Hypergradient:
    changes = {"warm_start": False, "fallback": fallback}
    implicit = fixed.problem.implicit(**fixed.settings.of_a_solve | changes)
    result = implicit.compute_mean_gradients([fixed.validate], [fixed.train])
    fixed.problem.ul_model.zero_grad()
    return result


def _effort(fixed: FixedProblem, report: CheckReport) -> None:
    """Tell the least ``k`` of each solver."""
    ways: dict[str, dict[str, Any]] = {name: {"solver": name} for name in ("cg", "minres")}
    ways["neumann"] = {"solver": "neumann", "step_size": fixed.settings.ll_learning_rate}
    if "largest_step_size" in report.figures:
        ways["neumann_auto"] = {"solver": "neumann", "step_size": _FASTEST * report.figures["largest_step_size"]}
    solvers = {
        name: {k: SolverSettings(k=k, tolerance=0.0, **way).make_solver() for k in _K_GRID}
        for name, way in ways.items()
    }
    steps = fixed.within(_REFERENCE).budget.affords(report.figures["hvp_s"], _REFERENCE_STEPS)
    needed = _least_k(fixed, solvers, steps) if steps >= _WORTH else {}
    report.figures.update({f"k_{name}": k for name, k in needed.items()})
    if not needed and steps < _REFERENCE_STEPS:
        report.no_time("The `k` for 1% error of the implicit term")
    elif not needed and not report.faults:
        report.warn(
            "effort",
            "The system is so ill-conditioned that MINRES did not solve it: every hypergradient here is a truncated "
            "one. A penalty on all ll weights, or `damping`, makes it solvable.",
        )
    if needed:
        words = {math.inf: f"not by {_K_GRID[-1]}"}
        told = [f"{name} {'not measured' if math.isnan(k) else words.get(k, k)}" for name, k in needed.items()]
        report.ok("effort", f"k for 1% error of the implicit term, on these batches: {', '.join(told)}")


def _least_k(fixed: FixedProblem, solvers: Mapping[str, Mapping[int, Solver]], steps: int) -> dict[str, float]:
    """Return by name the least ``k`` with which the implicit term is within 1% of that of so many steps of MINRES.

    It is infinity where none is, NaN where there was no time to find out; the dict is empty where there is nothing to
    compare with, as MINRES did not get there either.
    """
    damping = fixed.settings.damping
    ll_params, ul_params = fixed.ll_params(), list(fixed.ul_params().values())
    b = fixed.gradient("ul", ll_params)

    def implicit_term(v: Tensor) -> Tensor:
        with fixed.second_order() as other:
            terms = other.mixed_vjp(v, ul_params)
        return flatten([torch.zeros_like(value) if t is None else t for t, value in zip(terms, ul_params, strict=True)])

    with fixed.second_order() as second:

        def hvp(v: Tensor) -> Tensor:
            return torch.add(second.hvp(v), v, alpha=damping)

        reference = Minres(steps, rtol=_ERROR**2).solve(hvp, b)
        expected = implicit_term(reference.v)
        allowed = _ERROR * norm_of([expected]).item()
        if reference.status is not Status.CONVERGED or allowed == 0:
            return {}

        def first_exact(by_k: Mapping[int, Solver]) -> float:
            for k, solver in by_k.items():
                if fixed.budget.spent:
                    return math.nan
                solution = solver.solve(hvp, b)
                if solution.status.failed:
                    break
                if norm_of([implicit_term(solution.v) - expected]).item() <= allowed:
                    return k
            return math.inf

        return {name: first_exact(by_k) for name, by_k in solvers.items()}
