"""Solvers of ``H v = b``, given only the product ``v -> H v``: one file per method."""

from tune_implicit.solvers.base import Attempt, Hvp, Solution, Solver, Status
from tune_implicit.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.solvers.dense import DenseSolve
from tune_implicit.solvers.fallback import Damped, Fallback
from tune_implicit.solvers.minres import Minres
from tune_implicit.solvers.neumann import NeumannSeries
from tune_implicit.solvers.quasi_newton import QuasiNewton

__all__ = [
    "Attempt",
    "ConjugateGradient",
    "Damped",
    "DenseSolve",
    "Fallback",
    "Hvp",
    "Minres",
    "NeumannSeries",
    "QuasiNewton",
    "Solution",
    "Solver",
    "Status",
]
