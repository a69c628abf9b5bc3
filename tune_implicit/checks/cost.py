"""A look at what a ul step costs."""

import math
from dataclasses import replace

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["counted", "estimate", "look_at_cost"]

_TIMED_STEPS = 5


def look_at_cost(fixed: FixedProblem, report: CheckReport) -> None:
    """Measure what one ul step costs, in seconds and in ll steps."""
    settings, clock = fixed.settings, fixed.budget.clock
    report.figures["ul_values"] = sum(param.numel() for param in fixed.ul_params().values())
    report.figures["ll_parameters"] = sum(param.numel() for param in fixed.ll_params())
    changed = replace(settings, warmup_ll_steps=0, ll_steps=0, on_failure=counted(settings.on_failure))
    trainer = BilevelTrainer(fixed.copied(), changed)
    taken: list[float] = []
    while len(taken) < _TIMED_STEPS and not (taken and fixed.budget.spent):
        start = clock()
        trainer.step()
        taken.append(clock() - start)
    ul_step, ll_step = min(taken), report.figures["ll_step_s"]
    report.figures["ul_step_s"] = ul_step
    in_ll_steps = (
        f", as long as {ul_step / ll_step:.1f} ll steps" if settings.warmup_ll_steps + settings.least_ll_steps else ""
    )
    estimate(settings, settings.least_ll_steps, 0.0, report)
    report.ok("cost", f"one ul step takes {ul_step:.3g} s{in_ll_steps}")


def counted(policy: str) -> str:
    """Return the ``on_failure`` with which a failed solve is counted where it would end the trial."""
    return policy if policy == "fallback" else "skip"


def estimate(settings: ImplicitSettings, ll_steps: float, evaluation_s: float, report: CheckReport) -> None:
    """Estimate how long a trial takes at most, with so many ll steps before each ul step.

    Parameters
    ----------
    settings : ImplicitSettings
        Those of the trial.
    ll_steps : float
        The ll steps before each ul step, on average.
    evaluation_s : float
        The seconds that a report takes.
    report : CheckReport
        Has the seconds that an ll step and a ul step take, and gets ``trial_s``.
    """
    ul_step_s = report.figures["ul_step_s"] if settings.ul_learning_rate else 0.0
    ll_steps_s = (settings.warmup_ll_steps + settings.ul_steps * ll_steps) * report.figures["ll_step_s"]
    reports = math.ceil(settings.ul_steps / settings.ul_steps_per_report)
    report.figures["trial_s"] = ll_steps_s + settings.ul_steps * ul_step_s + reports * evaluation_s
