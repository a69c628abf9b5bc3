"""How ``H v = b`` is solved: the only room that knows solvers by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.arguments import NON_NEGATIVE, POSITIVE, Rule, at_least, check_fields, one_of, ruled
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.fallback import Damped, Fallback
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.hypergradients.solvers.quasi_newton import QuasiNewton
from tune_implicit.hypergradients.solvers.solution import Solver

__all__ = ["SOLVERS", "STEP_SIZE", "SolverSettings", "relevant"]

SOLVERS = ("cg", "minres", "neumann", "dense")

_SOLVER: Rule = (
    f"one of {', '.join(SOLVERS)}, or an object with `solve(hvp, b, v0=None)`",
    lambda value: not isinstance(value, str) or value in SOLVERS,
)
STEP_SIZE: Rule = (
    f'{POSITIVE[0]}, or "auto"',
    lambda value: value in (None, "auto") or (isinstance(value, float) and POSITIVE[1](value)),
)


def relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a solve without what is for another solver than the one they name."""
    return {**settings} if settings["solver"] == "cg" else {**settings, "preconditioner_memory": 0}


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How the system ``H v = b`` of a hypergradient is solved.

    Parameters
    ----------
    solver : {"neumann", "cg", "minres", "dense"} or Solver, default "neumann"
        A solver object brings its own step size, k and tolerances, and those given here are not used.
    ll_learning_rate : float, default 0.01
        Step size of the Neumann series, and of the scaled identity that ``fallback`` ends with; it must be below
        ``2 / lambda_max(H)``. Other solvers do not use it.
    k : int, default 20
        Most iterations of a solve.
    tolerance : float, default 1e-10
        A solve has converged once ``||b - H v||`` is below it.
    rtol : float, default 0
        A solve has converged once ``||b - H v||`` is below ``rtol * ||b||``.
    step_size : float or "auto", optional
        The step size of the Neumann series, in place of ``ll_learning_rate``. ``"auto"`` is 1.8 over a bound on
        ``lambda_max``, which takes 10 hvps in the first solve and one in each after it.
    damping : float, default 0
        Added to the diagonal of ``H``, which moves the answer and makes an indefinite ``H`` definite.
    stop : {"tolerance", "noise"}, default "tolerance"
        With ``"noise"`` a solve has also converged once its residual is below the standard error of ``dF/dw``, which
        the two halves of the validation batch tell, for one gradient more: the hypergradient is then as exact as the
        batch. That the training batch is a sample too is not counted, so that it takes rather too many steps than too
        few. Of several validation batches their spread tells, at no cost.
    warm_start : bool, default False
        Start each solve along the last answer, for one hvp more than from zero.
    preconditioner_memory : int, default 0
        Pairs of ``(n,)`` vectors that CG keeps from earlier solves, to precondition the next. It gains where ``H``
        changes slowly, on full or large training batches; on small ones it may cost more than it saves.
    fallback : bool, default False
        Where the solver fails, try MINRES, then CG on a damped system, then ``ll_learning_rate`` times the identity,
        each from where the one before it failed.
    verify : bool, default False
        Compute the residual anew after each solve, for one hvp; a solver that reported a smaller one has failed.
    retain_graphs : bool, default True
        Whether all of several training batches keep their graphs for the solve. Otherwise each is built anew for each
        product, in the memory of one and for a gradient more.

    Raises
    ------
    InvalidTypeError
        If a setting is of the wrong type.
    InvalidValueError
        If settings are out of range, or ask of a solver object what only a named solver does; one error tells all that
        are out of range.
    """

    solver: str | Solver = ruled(_SOLVER, "neumann")
    ll_learning_rate: float = ruled(POSITIVE, 1e-2)
    k: int = ruled(at_least(0), 20)
    tolerance: float = ruled(at_least(0), 1e-10)
    rtol: float = ruled(at_least(0), 0.0)
    step_size: float | str | None = ruled(STEP_SIZE, None)
    damping: float = ruled(NON_NEGATIVE, 0.0)
    stop: str = ruled(one_of(("tolerance", "noise")), "tolerance")
    warm_start: bool = False
    preconditioner_memory: int = ruled(at_least(0), 0)
    fallback: bool = False
    verify: bool = False
    retain_graphs: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stop == "noise" and not isinstance(self.solver, str):
            raise InvalidValueError(
                f'`stop="noise"` sets the tolerance of a solver given by its name, got {self.solver!r}, which has its '
                "own."
            )
        if self.preconditioner_memory and self.solver != "cg":
            raise InvalidValueError(
                f'`preconditioner_memory` is for `solver="cg"`, got {self.solver!r}. Pass 0, or that solver.'
            )

    @property
    def solver_name(self) -> str:
        """The solver's name; of an object, that of its class."""
        return self.solver if isinstance(self.solver, str) else type(self.solver).__name__

    @property
    def estimates_step_size(self) -> bool:
        """Whether the step size of the series is to be estimated from ``H``."""
        return self.solver == "neumann" and self.step_size == "auto"

    @property
    def given_step_size(self) -> float:
        """The step size of the series where it is not estimated."""
        return self.step_size if isinstance(self.step_size, float) else self.ll_learning_rate

    def stops_at(self, b_norm: float, noise: float = 0.0) -> float:
        """Return the residual norm below which a solve has converged; a solver object has one of its own: infinity."""
        own = isinstance(self.solver, str)
        return max(self.tolerance, self.rtol * b_norm, noise) if own else math.inf

    def preconditioner(self) -> QuasiNewton | None:
        """Return an empty preconditioner, where there is to be one."""
        wanted = self.preconditioner_memory and self.solver == "cg"
        return QuasiNewton(self.preconditioner_memory) if wanted else None

    def make_solver(
        self, step_size: float | None = None, noise: float = 0.0, preconditioner: QuasiNewton | None = None
    ) -> Solver:
        """Return the solver, and those that follow where it fails.

        Parameters
        ----------
        step_size : float, optional
            The step size of the series, in place of :attr:`given_step_size`.
        noise : float, default 0
            A residual norm below which to solve no further.
        preconditioner : QuasiNewton, optional
            What CG is preconditioned with.
        """
        step_size = self.given_step_size if step_size is None else step_size
        k, tolerance, rtol = self.k, max(self.tolerance, noise), self.rtol
        solver: Solver
        match self.solver:
            case "cg":
                solver = ConjugateGradient(k, tolerance, rtol, preconditioner)
            case "minres":
                solver = Minres(k, tolerance, rtol)
            case "neumann":
                solver = NeumannSeries(step_size, k, tolerance, rtol)
            case "dense":
                solver = DenseSolve(tolerance=tolerance, rtol=rtol)
            case _:
                assert not isinstance(self.solver, str), "its name was checked"
                solver = self.solver
        if not self.fallback:
            return solver
        chain = {
            self.solver_name: solver,
            "minres": Minres(k, tolerance, rtol),
            "damped": Damped(ConjugateGradient(k, tolerance, rtol)),
            "identity": NeumannSeries(step_size, 0),
        }
        return Fallback(chain)
