"""A look at a problem before a night of computing: what is broken, what is slow, and which settings suit it."""

from tune_implicit.checks.cost import look_at_cost
from tune_implicit.checks.curvature import look_at_curvature
from tune_implicit.checks.data import look_at_data
from tune_implicit.checks.derivatives import look_at_derivatives
from tune_implicit.checks.findings import CheckReport, StopCheckError
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.objectives import look_at_objectives
from tune_implicit.checks.retraining import look_at_retraining
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
    look_at_retraining,
    look_at_cost,
)


def check(problem: BilevelProblem, settings: ImplicitSettings | None = None) -> CheckReport:
    """Return what is wrong with ``problem``, and figures to choose settings by.

    Both objectives are evaluated and differentiated on the first batches, and derivatives compared with differences.
    The ll model is trained with its optimizer for as many ll steps as a trial takes, but at most 1,000. There the ends
    of the Hessian's spectrum are estimated, and the hypergradient is solved for and compared with the difference of ul
    losses along a random direction of ul values, the ll problem solved anew, in float64, at both ends. All this happens
    to copies of the two models.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are left as they were, and its objectives get copies of them in the state.
    settings : ImplicitSettings, optional
        Those of a trial; the defaults otherwise.

    Returns
    -------
    CheckReport
    """
    settings, report = settings or ImplicitSettings(), CheckReport()
    with preserved_rng():
        seed_everything(settings.seed)
        try:
            fixed = FixedProblem.of(problem, settings)
        except TuneImplicitError as error:
            report.fault("data", str(error))
            return report
        try:
            for look in LOOKS:
                look(fixed, report)
        except StopCheckError:
            report.warn("incomplete", "What comes after this fault was not looked at. Mend it, and check again.")
        except TuneImplicitError as error:
            report.fault("problem", str(error))
    return report
