"""How ``H v = b`` is solved: the only room that knows solvers by name."""

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.solvers.arithmetic import check_stopping
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.fallback import Damped, Fallback
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Solver

__all__ = ["SOLVERS", "STOPS", "make_solver"]

SOLVERS = ("cg", "minres", "neumann", "dense")
STOPS = ("tolerance", "noise")


def make_solver(
    solver: str | Solver,
    step_size: float,
    k: int,
    tolerance: float,
    rtol: float,
    preconditioner: QuasiNewton | None = None,
    fallback: bool = False,
) -> Solver:
    """Return the solver of a name, or ``solver`` itself where it is an object, which brings its own ``k``.

    With ``fallback``, where it fails, MINRES is tried, then CG on a damped system, then the identity scaled.

    Raises
    ------
    InvalidValueError
        If the name is none of ``SOLVERS``, or an argument of the solver is out of range.
    InvalidTypeError
        If ``solver`` is neither a name nor an object with ``solve``.
    """
    check_stopping(k, tolerance, rtol)
    made: Solver
    match solver:
        case "cg":
            made = ConjugateGradient(k, tolerance, rtol, preconditioner)
        case "minres":
            made = Minres(k, tolerance, rtol)
        case "neumann":
            made = NeumannSeries(step_size, k, tolerance, rtol)
        case "dense":
            made = DenseSolve()
        case str():
            raise InvalidValueError(f"`solver` must be one of {', '.join(SOLVERS)}, or an object, got {solver!r}.")
        case _:
            if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
                raise InvalidTypeError(
                    f"`solver` must be one of {', '.join(SOLVERS)}, or an object with `solve(hvp, b, v0=None)`, "
                    f"got {solver!r}."
                )
            made = solver
    if not fallback:
        return made
    name = solver if isinstance(solver, str) else type(solver).__name__
    chain = {
        name: made,
        "minres": Minres(k, tolerance, rtol),
        "damped": Damped(ConjugateGradient(k, tolerance, rtol)),
        "identity": NeumannSeries(step_size, 0),
    }
    return Fallback(chain)
