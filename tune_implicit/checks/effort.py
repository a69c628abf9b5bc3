"""How many iterations a solver needs on a problem."""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.solution import Solver, Status
from tune_implicit.hypergradients.vectors import flatten, norm_of

__all__ = ["K_GRID", "least_k"]

K_GRID = (1, 2, 4, 8, 16, 32, 64, 128)
_ERROR = 0.01


def least_k(
    fixed: FixedProblem, damping: float, solvers: Mapping[str, Mapping[int, Solver]], deadline: float = math.inf
) -> dict[str, float]:
    """Return by name the least ``k`` of ``K_GRID`` with which the implicit term is within 1% of MINRES's.

    Parameters
    ----------
    fixed : FixedProblem
        At trained ll weights.
    damping : float
        Added to the diagonal of the Hessian.
    solvers : mapping of str to mapping of int to Solver
        By name and ``k``.
    deadline : float
        When to give up, on the clock of ``time.perf_counter``.

    Returns
    -------
    dict of str to float
        Infinity where none does, NaN where there was no time to find out; empty where there is nothing to compare with,
        as MINRES did not get there either.
    """
    ll_params, ul_params = fixed.ll_params(), list(fixed.ul_params().values())
    b = flatten(grad(fixed.ul_loss(), ll_params, materialize_grads=True, allow_unused=True))
    second = fixed.second_order()

    def hvp(v: Tensor) -> Tensor:
        return torch.add(second.hvp(v), v, alpha=damping)

    def implicit_term(v: Tensor) -> Tensor:
        terms = fixed.second_order().mixed_vjp(v, ul_params)
        return flatten([torch.zeros_like(value) if t is None else t for t, value in zip(terms, ul_params, strict=True)])

    reference = Minres(4 * K_GRID[-1], rtol=_ERROR**2).solve(hvp, b)
    expected = implicit_term(reference.v)
    allowed = _ERROR * norm_of([expected]).item()
    if reference.status is not Status.CONVERGED or allowed == 0:
        return {}

    def first_exact(by_k: Mapping[int, Solver]) -> float:
        for k, solver in by_k.items():
            if time.perf_counter() > deadline:
                return math.nan
            solution = solver.solve(hvp, b)
            if solution.status.failed:
                break
            if norm_of([implicit_term(solution.v) - expected]).item() <= allowed:
                return k
        return math.inf

    return {name: first_exact(by_k) for name, by_k in solvers.items()}
