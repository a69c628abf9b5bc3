"""A look at a problem before a night of computing: what is broken, what is slow, and which settings suit it."""

import copy
from dataclasses import replace

from tune_implicit.checks.findings import CheckReport, StopCheckError
from tune_implicit.checks.inspection import Inspection
from tune_implicit.checks.rehearsal import Rehearsal
from tune_implicit.errors import TuneImplicitError
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings

__all__ = ["check"]


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
    settings = settings or ImplicitSettings()
    report = CheckReport()
    models = {name: copy.deepcopy(getattr(problem, name)) for name in ("ul_model", "ll_model")}
    with preserved_rng():
        seed_everything(settings.seed)
        inspection = Inspection(replace(problem, **models), report)
        try:
            inspection.run()
            Rehearsal(inspection, settings).run()
        except TuneImplicitError as error:
            report.fault("problem", str(error))
        except StopCheckError:
            report.warn("incomplete", "What comes after this fault was not looked at. Mend it, and check again.")
    return report
