"""A look at a problem before a night of computing: what is broken, what is slow, and which settings suit it."""

from tune_implicit.checks.budget import Budget
from tune_implicit.checks.cost import look_at_cost
from tune_implicit.checks.curvature import look_at_curvature
from tune_implicit.checks.data import look_at_data
from tune_implicit.checks.derivatives import look_at_derivatives
from tune_implicit.checks.findings import CheckReport, StopCheckError
from tune_implicit.checks.fixed import FixedProblem, raised_by
from tune_implicit.checks.objectives import look_at_objectives, raised
from tune_implicit.checks.rehearsal import look_at_rehearsal
from tune_implicit.checks.retraining import look_at_retraining
from tune_implicit.checks.solves import look_at_solves
from tune_implicit.checks.training import look_at_training
from tune_implicit.errors import TuneImplicitError
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings

__all__ = ["check"]

# In this order: each may rely on what those before it have not stopped at, and from the fourth on the ll model is
# trained.
LOOKS = (
    look_at_data,
    look_at_objectives,
    look_at_derivatives,
    look_at_training,
    look_at_curvature,
    look_at_cost,
    look_at_solves,
    look_at_rehearsal,
    look_at_retraining,
)

# The seconds that all looks may take, and the part of what is left that one of them may. The first two are taken in any
# case; the others are called so where there was no time for them.
_BUDGET_S = 22.0
_SHARES = {
    look_at_data: 0.1,
    look_at_derivatives: 0.15,
    look_at_training: 0.3,
    look_at_curvature: 0.25,
    look_at_cost: 0.1,
    look_at_solves: 0.35,
    look_at_rehearsal: 0.8,
}
_CALLED = {
    look_at_derivatives: "The derivatives of both objectives",
    look_at_training: "Training",
    look_at_curvature: "The Hessian where training ends",
    look_at_cost: "What a ul step costs",
    look_at_solves: "Solves one after another",
    look_at_rehearsal: "The first ul steps of a trial",
    look_at_retraining: "Whether the hypergradient agrees with differences of the retrained problem",
}


def check(problem: BilevelProblem, settings: ImplicitSettings | None = None, thorough: bool = False) -> CheckReport:
    """Return what is wrong with ``problem``, figures to choose settings by, and the settings that follow from them.

    The values of all splits are looked at, both objectives are evaluated and differentiated on the first batches, and
    derivatives compared with differences. The ll model is trained with its optimizer for as many ll steps as a trial
    surely takes, but at most 1,000, and with other learning rates where it diverges or hardly moves. There the ends of
    the Hessian's spectrum are estimated, and solves with these and with other settings compared, as they follow each
    other in a trial. The first ul steps of a trial are taken, and once more with the settings that are recommended.
    Last, the hypergradient is compared with the difference of ul losses along a random direction of ul values, the ll
    problem solved anew, in float64, at both ends. All this happens to copies of the two models.

    It takes half a minute at most, unless single evaluations of an objective take seconds. What there was no time for
    is said so, and on a large model depends on how fast the machine is.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are left as they were, and its objectives get copies of them in the state.
    settings : ImplicitSettings, optional
        Those of a trial; the defaults otherwise.
    thorough : bool, default False
        Whether to take as long as it takes.

    Returns
    -------
    CheckReport
    """
    return check_within(Budget() if thorough else Budget.of(_BUDGET_S), problem, settings or ImplicitSettings())


def check_within(budget: Budget, problem: BilevelProblem, settings: ImplicitSettings) -> CheckReport:
    """Return the report of :func:`check`, for which there is the time of ``budget``."""
    report = CheckReport()
    with preserved_rng():
        seed_everything(settings.seed)
        try:
            fixed = FixedProblem.of(problem.parts[0], settings, budget)
        except TuneImplicitError as error:
            report.fault("data", str(error))
            return report
        if len(problem.parts) > 1:
            report.ok("ll-problems", f"the first of {len(problem.parts)} ll models was looked at, with its splits")
        try:
            _look(fixed, report)
        except StopCheckError:
            report.warn("incomplete", "What comes after this fault was not looked at. Mend it, and check again.")
        except TuneImplicitError as error:
            report.fault("problem", str(error))
        except Exception as error:
            name = raised_by(error)
            if name is None:
                raise
            report.fault("objective-raised", f"`{name}`, which had run before, {raised(error)}")
    return report


def _look(fixed: FixedProblem, report: CheckReport) -> None:
    """Take all looks, each in its part of the time that is left.

    Raises
    ------
    StopCheckError
        If there is a fault after which nothing else can be looked at.
    """
    for look in LOOKS:
        if fixed.budget.spent and look in _CALLED:
            report.no_time(_CALLED[look])
        else:
            look(fixed.within(_SHARES.get(look, 1.0)), report)
