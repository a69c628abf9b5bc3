"""Solvers made of solvers: one on a damped system, and one that goes on to the next where the first fails."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.solvers.arithmetic import decided_by, norm
from tune_implicit.hypergradients.solvers.solution import Attempt, Hvp, Solution, Solver, Status
from tune_implicit.hypergradients.solvers.spectrum import random_direction, spectrum

__all__ = ["Damped", "Fallback"]

# With as many products the smallest Ritz value of a network's Hessian is within some percent of its eigenvalue.
_LANCZOS_STEPS = 10

# What the smallest eigenvalue is lifted to, in units of the largest.
_LIFTED = 0.01

# A truncated answer with a residual of more than so many times that of ``v = 0`` is doubtful: on a positive-definite
# system CG's may be, but more often it has stepped along a direction whose curvature is about to turn negative.
_DOUBTFUL = 2.0


@dataclass(frozen=True)
class Damped:
    """Solve ``(H + d I) v = b``, with the least damping ``d`` that makes it positive definite by a margin.

    ``d`` lifts the smallest Ritz value after 10 Lanczos steps, doubled where it is negative, to 1% of the largest.

    Parameters
    ----------
    solver : Solver
        What solves the damped system; the residual norm it reports is that of this system.
    """

    solver: Solver

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) and its ``damping``, with the status of the damped system's solve."""
        _, known = decided_by(b)
        if known is not None:
            return known
        ends = spectrum(hvp, random_direction(b), _LANCZOS_STEPS)
        if not math.isfinite(ends.lambda_max):
            return self.solver.solve(hvp, b, v0)
        lowest = min(2 * ends.lambda_min, ends.lambda_min)
        damping = max(0.0, _LIFTED * max(ends.lambda_max, -ends.lambda_min) - lowest)
        return replace(self.solver.solve(lambda v: hvp(v) + damping * v, b, v0), damping=damping)


@dataclass(frozen=True)
class Fallback:
    """Try solvers in turn, until one gives an answer.

    Each starts from where the one before it failed. A truncated answer with a residual of more than twice that of
    ``v = 0`` is kept only where no solver after it has a good one. A system that is not finite is not tried again: no
    solver could make it so.

    Parameters
    ----------
    solvers : mapping of str to Solver
        By the names under which the solution's ``attempts`` list them.

    Raises
    ------
    InvalidValueError
        If there are none.
    """

    solvers: Mapping[str, Solver]

    def __post_init__(self) -> None:
        if not self.solvers:
            raise InvalidValueError("`solvers` must hold at least one solver, got none.")

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return the first good answer, the least doubtful one, or the last failure, of shape (n,).

        All ``attempts`` are told, that of what is returned as the last.
        """
        attempts: list[Attempt] = []
        doubtful: list[tuple[Solution, Attempt]] = []
        for name, solver in self.solvers.items():
            solution = solver.solve(hvp, b, v0)
            attempts.append(Attempt(name, solution.status, solution.steps))
            if solution.status is Status.NON_FINITE:
                break
            if solution.answers:
                if solution.status is not Status.MAX_STEPS or solution.residual_norm <= _DOUBTFUL * norm(b).item():
                    return replace(solution, attempts=tuple(attempts))
                doubtful.append((solution, attempts[-1]))
            elif solution.v.any() and solution.v.isfinite().all():
                v0 = solution.v
        if doubtful:
            solution, attempt = min(doubtful, key=lambda candidate: candidate[0].residual_norm)
            attempts.remove(attempt)
            attempts.append(attempt)
        return replace(solution, attempts=tuple(attempts))
