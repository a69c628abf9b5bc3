"""A look at what a ul step costs."""

import time
from dataclasses import replace

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["look_at_cost"]

_TIMED_STEPS = 5


def look_at_cost(fixed: FixedProblem, report: CheckReport) -> None:
    """Measure what one ul step costs, in seconds and in ll steps."""
    settings = fixed.settings
    trainer = BilevelTrainer(fixed.problem, replace(settings, warmup_ll_steps=0, ll_steps=0, on_failure="skip"))
    taken = []
    for _ in range(_TIMED_STEPS):
        start = time.perf_counter()
        trainer.step()
        taken.append(time.perf_counter() - start)
    ul_step, ll_step = min(taken), report.figures["ll_step_s"]
    report.figures["ul_step_s"] = ul_step
    in_ll_steps = (
        f", as long as {ul_step / ll_step:.1f} ll steps" if settings.warmup_ll_steps + settings.ll_steps else ""
    )
    report.ok("cost", f"one ul step takes {ul_step:.3g} s{in_ll_steps}")
