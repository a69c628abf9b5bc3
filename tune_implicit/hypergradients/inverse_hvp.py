"""Solves of ``H v = b`` along a trajectory of ul steps, each of which starts with what those before have learned."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.arithmetic import dot, length
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status
from tune_implicit.hypergradients.solvers.spectrum import random_direction, spectrum, track

__all__ = ["InverseHvp"]

# As many products find the largest eigenvalue to within some percent, and a bound on it.
_LANCZOS_STEPS = 10

# The step size in units of 1 / bound. The series converges below 2 / lambda_max, and the bound may be 10% too low.
_SAFE = 1.8

# Roundings of ||H v|| and ||b|| by which the residual of a long series may drift from one computed anew.
_ROUNDINGS = 100


class InverseHvp:
    """Solve ``H v = b`` for the ``H`` and ``b`` of one ul step after another.

    Parameters
    ----------
    settings : SolverSettings
        How each is solved.
    """

    def __init__(self, settings: SolverSettings) -> None:
        self._settings = settings
        self._preconditioner = settings.preconditioner()
        self._v: Tensor | None = None  # of the last answer
        self._top: Tensor | None = None  # eigenvector of the largest eigenvalue, nearly

    def solve(self, hvp: Hvp, b: Tensor, noise: float = 0.0, products: torch.dtype | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its certificate, and remember it.

        Parameters
        ----------
        hvp : callable
            ``v -> H v`` on ``(n,)`` tensors.
        b : Tensor, shape (n,)
            The right-hand side, of a floating dtype.
        noise : float, default 0
            A residual norm below which to solve no further.
        products : dtype, optional
            The dtype that ``hvp`` computes in, where it is coarser than that of ``b``: the residual is then measured,
            as a solver's own knows nothing of the digits that products do not have.

        Returns
        -------
        Solution
            Its residual is that of the damped system.
        """
        settings = self._settings
        damped = _shifted(hvp, settings.damping)
        v0 = self._v if settings.warm_start and _fits(self._v, b) else None
        auto = settings.estimates_step_size and bool(b.any())
        step_size = self._safe_step(damped, b) if auto else None
        solution = settings.make_solver(step_size, noise, self._preconditioner).solve(damped, b, v0)
        first = solution.attempts[0].status if solution.attempts else solution.status
        if auto and first is Status.DIVERGED:
            self._top = None  # it has moved on, or was hardly in the direction that Lanczos started from
            solution = settings.make_solver(self._safe_step(damped, b, seed=1), noise).solve(damped, b)
        if first.failed and self._preconditioner is not None and self._preconditioner.fits(b):
            # It may be what failed: along its directions a small eigenvalue may be all rounding.
            self._preconditioner.clear()
            solution = settings.make_solver(None, noise, self._preconditioner).solve(damped, b, v0)
        solution = replace(solution, damping=settings.damping + solution.damping)
        epsilon = torch.finfo(products or b.dtype).eps
        if (settings.verify or epsilon > torch.finfo(b.dtype).eps) and not solution.status.failed:
            stop = settings.stops_at(length(b), noise)
            solution = _verified(solution, _shifted(hvp, solution.damping), b, epsilon, stop)
        self._v = solution.v if settings.warm_start and not solution.status.failed else None
        if solution.status.failed and self._preconditioner is not None:
            self._preconditioner.clear()
        return solution

    def _safe_step(self, hvp: Hvp, b: Tensor, seed: int = 0) -> float:
        """Return the largest step size with which the series surely converges, nearly."""
        if self._top is not None and _fits(self._top, b):
            ends = track(hvp, self._top)
        else:
            ends = spectrum(hvp, random_direction(b, seed), _LANCZOS_STEPS)
        self._top = ends.top if ends.bound > 0 else None
        # Where the curvature is not positive, or not finite, any step size ends as a status that says so.
        return _SAFE / ends.bound if 0 < ends.bound < math.inf else self._settings.given_step_size

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered: the last ``v``, an eigenvector and the preconditioner's pairs, or ``None``."""
        preconditioner = None if self._preconditioner is None else self._preconditioner.state_dict()
        return {"v": self._v, "top": self._top, "preconditioner": preconditioner}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with ``state``, moved to ``device``. What does not fit the next system is not used."""
        self._v, self._top = (None if state[name] is None else state[name].to(device) for name in ("v", "top"))
        if self._preconditioner is not None:
            self._preconditioner.load_state_dict(state["preconditioner"] or {}, device)


def _fits(v: Tensor | None, b: Tensor) -> bool:
    return v is not None and v.shape == b.shape and v.dtype == b.dtype and v.device == b.device


def _shifted(hvp: Hvp, damping: float) -> Hvp:
    """Return ``v -> (H + d I) v``."""
    return hvp if damping == 0 else lambda v: torch.add(hvp(v), v, alpha=damping)


def _verified(solution: Solution, hvp: Hvp, b: Tensor, epsilon: float, stop: float) -> Solution:
    """Return ``solution`` with its residual computed anew, as a failure where that is not the one reported.

    A smaller one is no failure: a solver may report a bound, or NaN for nothing. Nor is ``v`` an answer where it is
    worse than ``v = 0``, in its residual and in the energy ``v' H v / 2 - b' v``.
    """
    v, image = solution.v, hvp(solution.v)
    r = b - image
    residual, b_norm, image_norm, size = (length(vector) for vector in (r, b, image, v))
    met = [abs(value) for value in (solution.lambda_min, solution.lambda_max) if math.isfinite(value)]
    rounding = epsilon * max(met, default=image_norm / size if size else 0.0) * size
    allowed = 2 * solution.residual_norm + rounding + _ROUNDINGS * epsilon * (image_norm + b_norm)
    if residual > allowed:
        # It may be all rounding, which is along the largest eigenvectors even where the solver met none of them.
        rounding = max(rounding, epsilon * length(hvp(r)) / residual * size)
    status = solution.status
    if not math.isfinite(residual):
        status = Status.NON_FINITE
    elif residual > allowed + 2 * rounding:
        status = Status.UNVERIFIED
    elif residual > b_norm + rounding and dot(v, image).item() > 2 * dot(b, v).item() + 2 * rounding * size:
        status = Status.DIVERGED
    elif status is Status.CONVERGED and residual + rounding >= stop:
        status = Status.STAGNATED
    return replace(solution, residual_norm=residual + rounding, status=status)
