"""Solvers of ``H v = b``, given only the product ``v -> H v``: one file per method."""

from tune_implicit.solvers.base import Hvp, Solution, Solver, Status
from tune_implicit.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.solvers.dense import DenseSolve
from tune_implicit.solvers.neumann import NeumannSeries

__all__ = ["ConjugateGradient", "DenseSolve", "Hvp", "NeumannSeries", "Solution", "Solver", "Status"]
