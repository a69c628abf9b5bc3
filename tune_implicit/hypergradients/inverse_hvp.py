"""Solves of ``H v = b`` along a trajectory of ul steps, each of which starts with what those before have learned."""

import math
import numbers
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.arguments import check_number
from tune_implicit.hypergradients.settings import make_solver
from tune_implicit.hypergradients.solvers.arithmetic import check_stopping, norm
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Solver, Status
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
    solver : {"neumann", "cg", "minres", "dense"} or Solver
        An object brings its own step size, k and tolerances, and those given here are not used.
    ll_learning_rate : float
        Step size of the Neumann series, and of the identity that ``fallback`` ends with.
    k : int
        Most iterations of a solve.
    tolerance, rtol : float
        A solve stops once ``||b - H v||`` is below ``tolerance``, or below ``rtol * ||b||``.
    step_size : float or "auto", optional
        Of the Neumann series, in place of ``ll_learning_rate``. ``"auto"`` is 1.8 over a bound on ``lambda_max``, which
        takes 10 hvps in the first solve and one in each after it.
    damping : float
        ``d``, where the system to be solved is ``(H + d I) v = b``.
    warm_start : bool
        Whether to start along the last answer, for one hvp more than from zero.
    preconditioner_memory : int
        Pairs of vectors that the preconditioner of CG keeps; 0 is none. It gains where ``H`` changes slowly, on full or
        large training batches; on small ones it may cost more than it saves.
    fallback : bool
        Whether to go on with MINRES, a damped system and the identity scaled where the solver fails.
    verify : bool
        Whether to compute the residual anew after each solve, for one hvp.

    Raises
    ------
    InvalidTypeError
        If an argument is of the wrong kind.
    InvalidValueError
        If one is out of range, or asks of a solver object what only a named solver does.
    """

    def __init__(
        self,
        solver: str | Solver,
        ll_learning_rate: float,
        k: int,
        tolerance: float = 1e-10,
        *,
        rtol: float = 0.0,
        step_size: float | str | None = None,
        damping: float = 0.0,
        warm_start: bool = False,
        preconditioner_memory: int = 0,
        fallback: bool = False,
        verify: bool = False,
    ) -> None:
        _check_positive("ll_learning_rate", ll_learning_rate)
        if isinstance(step_size, str) and step_size != "auto":
            raise InvalidTypeError(f'`step_size` must be a number or "auto", got {step_size!r}.')
        if step_size is not None and not isinstance(step_size, str):
            _check_positive("step_size", step_size)
        check_stopping(k, tolerance, rtol)
        check_number("damping", damping)
        if not 0 <= damping < math.inf:
            raise InvalidValueError(f"`damping` must be 0 or more and finite, got {damping}.")
        for name, value in (("warm_start", warm_start), ("fallback", fallback), ("verify", verify)):
            if not isinstance(value, bool | np.bool_):
                raise InvalidTypeError(f"`{name}` must be True or False, got {value!r}.")
        check_number("preconditioner_memory", preconditioner_memory, numbers.Integral)
        if preconditioner_memory < 0:
            raise InvalidValueError(f"`preconditioner_memory` must be 0 or more, got {preconditioner_memory}.")
        if preconditioner_memory and solver != "cg":
            raise InvalidValueError(
                f'`preconditioner_memory` is for `solver="cg"`, got {solver!r}. Pass 0, or that solver.'
            )
        self._solver, self._k, self._tolerance, self._rtol = solver, k, tolerance, rtol
        self._auto = step_size == "auto" and solver == "neumann"
        self._step_size = ll_learning_rate if step_size is None or isinstance(step_size, str) else float(step_size)
        self._damping, self._warm_start = damping, warm_start
        self._fallback, self._verify = fallback, verify
        self._preconditioner = QuasiNewton(preconditioner_memory) if preconditioner_memory else None
        self._v: Tensor | None = None  # of the last answer
        self._top: Tensor | None = None  # eigenvector of the largest eigenvalue, nearly
        self._make_solver(self._step_size, 0.0)  # so that a wrong argument is told now

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
            Of whose precision products are, where that is less than the precision of ``b``: the residual is then
            measured, as a solver's own knows nothing of the digits that products do not have.

        Returns
        -------
        Solution
            Its residual is that of the damped system.
        """
        damped = _shifted(hvp, self._damping)
        v0 = self._v if self._warm_start and _fits(self._v, b) else None
        auto = self._auto and bool(b.any())
        step_size = self._safe_step(damped, b) if auto else self._step_size
        solution = self._make_solver(step_size, noise).solve(damped, b, v0)
        first = solution.attempts[0].status if solution.attempts else solution.status
        if auto and first is Status.DIVERGED:
            self._top = None  # it has moved on, or was hardly in the direction that Lanczos started from
            solution = self._make_solver(self._safe_step(damped, b, seed=1), noise).solve(damped, b)
        solution = replace(solution, damping=self._damping + solution.damping)
        epsilon = torch.finfo(products or b.dtype).eps
        if (self._verify or epsilon > torch.finfo(b.dtype).eps) and not solution.status.failed:
            solution = _verified(solution, _shifted(hvp, solution.damping), b, epsilon)
        self._v = solution.v if self._warm_start and not solution.status.failed else None
        if solution.status.failed and self._preconditioner is not None:
            self._preconditioner.clear()
        return solution

    def _make_solver(self, step_size: float, noise: float) -> Solver:
        tolerance = max(self._tolerance, noise)
        return make_solver(
            self._solver, step_size, self._k, tolerance, self._rtol, self._preconditioner, self._fallback
        )

    def _safe_step(self, hvp: Hvp, b: Tensor, seed: int = 0) -> float:
        """Return the largest step size with which the series surely converges, nearly."""
        if self._top is not None and _fits(self._top, b):
            ends = track(hvp, self._top)
        else:
            ends = spectrum(hvp, random_direction(b, seed), _LANCZOS_STEPS)
        self._top = ends.top if ends.bound > 0 else None
        # Where the curvature is not positive, or not finite, any step size ends as a status that says so.
        return _SAFE / ends.bound if 0 < ends.bound < math.inf else self._step_size

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered: the last ``v``, an eigenvector and the preconditioner's pairs, or ``None``."""
        preconditioner = None if self._preconditioner is None else self._preconditioner.state_dict()
        return {"v": self._v, "top": self._top, "preconditioner": preconditioner}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with ``state``, moved to ``device``. What does not fit the next system is not used."""
        self._v, self._top = (None if state[name] is None else state[name].to(device) for name in ("v", "top"))
        if self._preconditioner is not None:
            self._preconditioner.load_state_dict(state["preconditioner"] or {}, device)


def _check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise InvalidValueError(f"`{name}` must be positive and finite, got {value}.")


def _fits(v: Tensor | None, b: Tensor) -> bool:
    return v is not None and v.shape == b.shape and v.dtype == b.dtype and v.device == b.device


def _shifted(hvp: Hvp, damping: float) -> Hvp:
    """Return ``v -> (H + d I) v``."""
    return hvp if damping == 0 else lambda v: torch.add(hvp(v), v, alpha=damping)


def _verified(solution: Solution, hvp: Hvp, b: Tensor, epsilon: float) -> Solution:
    """Return ``solution`` with its residual computed anew, as a failure where that is not the one reported.

    A smaller one is no failure: a solver may report a bound, or NaN for nothing. Nor is ``v`` an answer where the
    residual is larger than that of ``v = 0``.
    """
    image = hvp(solution.v)
    residual, b_norm = norm(b - image).item(), norm(b).item()
    rounding = _ROUNDINGS * epsilon * (norm(image).item() + b_norm)
    status = solution.status
    if not math.isfinite(residual):
        status = Status.NON_FINITE
    elif residual > 2 * solution.residual_norm + rounding:
        status = Status.UNVERIFIED
    elif residual > b_norm + rounding:
        status = Status.DIVERGED
    return replace(solution, residual_norm=residual, status=status)
