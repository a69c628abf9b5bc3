"""Learning rates for the ll model, tried side by side."""

import math
from dataclasses import replace
from itertools import islice

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import DivergedError
from tune_implicit.hypergradients.batches import moved
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.splits import batches_of
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["look_for_rate", "told_rate", "train"]

# ll steps between two looks at the clock.
_CHUNK = 10

# What the rate is multiplied by, the likelier first; and the ll steps for which each is tried, most and least.
_FACTORS = (10.0, 0.1, 3.0, 0.3, 100.0, 0.01, 0.001)
_STEPS = 300
_LEAST_STEPS = 20

# Batches over which the ll loss is averaged.
_BATCHES = 10

# A rate is clearly better where it lowers the ll loss by more than so many times what the one in use does.
_CLEARLY = 1.25

# Of rates that lower it as far but for this part, the one in the middle is taken: beside the largest is one that
# diverges, and beside the smallest one that is too slow.
_AS_FAR = 0.02


def train(fixed: FixedProblem, problem: BilevelProblem, settings: ImplicitSettings, steps: int) -> int:
    """Train the ll model of ``problem`` in place, the ul values fixed; return for how many ll steps there was time.

    Raises
    ------
    DivergedError
        If the ll loss is no longer finite.
    """
    trainer = BilevelTrainer(problem, replace(settings, ul_learning_rate=0.0))
    while trainer.ll_step < steps and not (trainer.ll_step and fixed.budget.spent):
        trainer.train_ll(min(_CHUNK, steps - trainer.ll_step))
    return trainer.ll_step


def look_for_rate(fixed: FixedProblem, steps: int, report: CheckReport) -> None:
    """Train from the start with other rates, and recommend one that lowers the ll loss most.

    The one in use is recommended where none is clearly better, and nothing where there was no time to compare.

    Parameters
    ----------
    fixed : FixedProblem
        Its models are left alone.
    steps : int
        The ll steps that a trial takes; each rate is tried for fewer.
    report : CheckReport
        Gets the recommendation.
    """
    own = fixed.settings.ll_learning_rate
    start = _mean_loss(fixed, fixed.fresh())
    each = fixed.within(1 / 2)
    begun = fixed.budget.clock()
    steps, lowered = _lowered(each, own, min(steps, _STEPS), start)
    took_s = fixed.budget.clock() - begun
    if steps < _LEAST_STEPS:
        return
    tried = {own: lowered}
    for factor in _FACTORS:
        if fixed.budget.affords(took_s, 1):
            tried[own * factor] = _lowered(fixed, own * factor, steps, start)[1]
    most = max(tried.values())
    if len(tried) > 1 and math.isfinite(most):
        far = sorted(rate for rate, by in tried.items() if by >= most - _AS_FAR * abs(most))
        best = far[(len(far) - 1) // 2]
        report.recommend(ll_learning_rate=float(f"{best:.2g}") if most > max(_CLEARLY * lowered, 0.0) else own)


def _lowered(fixed: FixedProblem, rate: float, steps: int, start: float) -> tuple[int, float]:
    """Return the ll steps taken, and by how much they lower the ll loss: by minus infinity where it diverges."""
    problem = fixed.fresh()
    try:
        taken = train(fixed, problem, replace(fixed.settings, ll_learning_rate=rate), steps)
    except DivergedError:
        return steps, -math.inf
    lowered = start - _mean_loss(fixed, problem)
    return taken, lowered if math.isfinite(lowered) else -math.inf


def _mean_loss(fixed: FixedProblem, problem: BilevelProblem) -> float:
    """Return the mean ll loss over the first batches of the training data."""
    other = replace(fixed, problem=problem)
    device = fixed.ll_params()[0].device
    batches = islice(batches_of("train_data", problem.train_data), _BATCHES)
    losses = [other.value("ll", moved(batch, device)) for batch in batches]
    return math.fsum(losses) / len(losses)


def told_rate(fixed: FixedProblem, report: CheckReport) -> str:
    """Return the end of a message: the rate that does better, if one was found."""
    rate, own = report.recommended.get("ll_learning_rate"), fixed.settings.ll_learning_rate
    return "" if rate in (None, own) else f" With ll_learning_rate={rate:g}, training goes clearly further."
