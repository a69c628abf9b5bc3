"""A look at the first ul steps of a trial, with its settings, and again with those that would mend what is wrong."""

import math
from dataclasses import dataclass, replace
from typing import Any

from tune_implicit.checks.cost import counted, estimate
from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import DivergedError
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.trials.evaluation import evaluate
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.rate import MOST_GROWTH
from tune_implicit.trials.record import COUNTERS, LEARNING, Record
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer
from tune_implicit.trials.troubles import TROUBLES, troubles_of

__all__ = ["look_at_rehearsal"]

# The most ul steps that are taken, and the part of the time for those with the settings as they are.
_STEPS = 20
_AS_THEY_ARE = 0.5

# Other settings are as good where their loss is above by no more than this part of it.
_AS_GOOD = 0.01

# The rate with which ul values that hardly move are tried, and what other rates and counts are multiplied by.
_RATE = ImplicitSettings().ul_learning_rate
_SMALLER = 0.1
_MORE = 3
_FASTER = 3.0

# By trouble, the name of the finding, and whether it makes a search worthless.
_FINDINGS = {
    "skipped": ("skipped-steps", True),
    "unmoved": ("ul-rate-too-small", True),
    "ran-away": ("ul-values-run-away", True),
    "diverged": ("trial-diverges", True),
    "worse": ("ends-worse", False),
    "lagging": ("ll-model-lags", False),
}


# What the looks before this one recommend, and the faults for which it is recommended all the same.
_MENDING = (
    ({"residual-near-one", "diverging-step", "negative-curvature", "solver"}, ("solver", "k", "step_size")),
    ({"not-at-minimum"}, ("ll_learning_rate",)),
)


@dataclass(frozen=True)
class _Rehearsal:
    """How the first ul steps of a trial went.

    Parameters
    ----------
    settings : ImplicitSettings
        Those of the trial.
    record : dict
        As of a trial that ends here, with ``ul_moved`` as it would be after all ul steps.
    moved : float
        How far the ul values moved in these steps.
    evaluation_s : float
        What a report takes.
    diverged : str
        What it diverged with.
    """

    settings: ImplicitSettings
    record: Record
    moved: float
    evaluation_s: float
    diverged: str = ""

    @property
    def steps(self) -> int:
        """The ul steps taken."""
        return int(self.record["ul_step"])

    @property
    def troubles(self) -> list[str]:
        """The names of what is wrong."""
        return troubles_of(self.record)


def look_at_rehearsal(fixed: FixedProblem, report: CheckReport) -> None:
    """Take the first ul steps of a trial, and recommend what is shown to mend its troubles."""
    settings, figures = fixed.settings, report.figures
    if settings.ul_learning_rate == 0:
        return
    if not fixed.budget.affords(figures["ul_step_s"] + settings.least_ll_steps * figures["ll_step_s"], 1):
        report.no_time("The first ul steps of a trial")
        return
    begun = fixed.budget.clock()
    own = _rehearse(fixed.within(_AS_THEY_ARE), settings, min(_STEPS, settings.ul_steps))
    took_s = fixed.budget.clock() - begun
    ll_steps = (own.record["ll_step"] - settings.warmup_ll_steps) / max(1, own.steps)
    figures.update(ll_steps_per_ul_step=ll_steps, ul_moved=own.moved, ul_moves=own.record.get("ul_moved", math.nan))
    estimate(settings, ll_steps, own.evaluation_s, report)
    report.recommend(**_kept(own, settings))
    best, mended = own, ""
    for changes in _alternatives(own, report.recommended, settings):
        other = None
        if fixed.budget.affords(took_s, 1):
            other = _rehearse(fixed, replace(settings, **changes), max(own.steps, 1))
        if other is None or (other.steps < own.steps and not other.diverged):
            report.no_time(f"The first ul steps with {_listed(changes, settings)}")
            break
        better = _is_better(other, own)
        _tell_of(other, own, changes, better, report)
        if better and (best is own or _is_better(other, best)):
            best, mended, recommended = other, _listed(changes, settings), changes
            if not best.troubles:
                break
    else:
        if best is own:
            _take_back(settings, report)
    if best is not own:
        report.recommend(**recommended)
    _tell(own, best, mended, settings, report)


def _rehearse(fixed: FixedProblem, settings: ImplicitSettings, steps: int) -> _Rehearsal:
    """Take so many ul steps from the start of a trial, or as many as there is time for, and at least one."""
    problem = fixed.fresh()
    with preserved_rng():
        seed_everything(settings.seed)
        trainer = BilevelTrainer(problem, replace(settings, on_failure=counted(settings.on_failure)))
        start_loss, status, diverged = _loss(problem), "", ""
        while trainer.ul_step < steps and not (trainer.ul_step and fixed.budget.spent):
            try:
                hypergradient = trainer.step().hypergradient
            except DivergedError as error:
                diverged = str(error)
                break
            status = hypergradient.status.value if hypergradient is not None else ""
        begun = fixed.budget.clock()
        loss = _loss(problem)
        evaluation_s = fixed.budget.clock() - begun
    if not diverged and not math.isfinite(loss):
        diverged = f"The ul loss became {loss} by ul step {trainer.ul_step}."
    counters = {name: getattr(trainer, name) for name in (*COUNTERS, *LEARNING)}
    moved = trainer.ul_moved
    record = counters | {
        "ul_moved": _moves(moved, trainer, settings),
        "start_loss": start_loss,
        "select_loss": loss,
        "solver_status": status,
        "completed": True,
        "ended_by": "divergence" if diverged else "",
        "kept_ul_step": trainer.ul_step,
    }
    if not trainer.ul_step:
        del record["ul_rate"]
    return _Rehearsal(settings, record, moved, evaluation_s, diverged)


def _loss(problem: BilevelProblem) -> float:
    name = problem.selected_on
    return evaluate(problem, name, getattr(problem, name), {"loss": problem.ul_objective})["loss"]


def _moves(moved: float, trainer: BilevelTrainer, settings: ImplicitSettings) -> float:
    """Return how far the ul values move in all ul steps of a trial, if the rest goes on like those taken.

    Where they moved far already, it is what they moved: how much further they go, their optimum decides. A rate that
    adapts goes on to grow as it did.
    """
    taken = trainer.ul_step - trainer.skipped_ul_steps
    left = settings.ul_steps - trainer.ul_step
    if not taken or moved > _RATE:
        return moved
    growth = 1.0
    if settings.adapt_ul_learning_rate and trainer.ul_rate > settings.ul_learning_rate:
        growth = min(MOST_GROWTH, (trainer.ul_rate / settings.ul_learning_rate) ** (1 / max(1, trainer.ul_step - 1)))
    total, step = moved, moved / taken
    for _ in range(left):
        step *= growth
        total += step
        if total > _RATE:
            break
    return total


def _kept(own: _Rehearsal, settings: ImplicitSettings) -> dict[str, Any]:
    """Return the settings that have shown to be fine as they are."""
    troubles = set(own.troubles)
    kept: dict[str, Any] = {}
    if not troubles & {"unmoved", "ran-away", "diverged"}:
        kept["ul_learning_rate"] = settings.ul_learning_rate
    if not troubles & {"lagging", "diverged"}:
        kept["ll_steps"] = settings.ll_steps
    if own.record["fallback_ul_steps"]:
        kept["on_failure"] = settings.on_failure
    return kept


def _alternatives(own: _Rehearsal, recommended: dict[str, Any], settings: ImplicitSettings) -> list[dict[str, Any]]:
    """Return what to try: what was recommended so far, with what may mend the troubles; none where nothing differs."""
    changes, troubles = dict(recommended), own.troubles
    if own.record["skipped_ul_steps"]:
        changes["on_failure"] = "fallback"
    if "unmoved" in troubles:
        changes |= {"ul_learning_rate": max(_RATE, settings.ul_learning_rate), "adapt_ul_learning_rate": True}
    if {"ran-away", "diverged"} & set(troubles):
        # One that adapts would get to where it diverged, only later.
        changes |= {
            "ul_learning_rate": min(_RATE, _SMALLER * settings.ul_learning_rate),
            "adapt_ul_learning_rate": False,
        }
    tried = [changes]
    if "lagging" in troubles:
        most = settings.max_ll_steps if settings.ll_steps == "auto" else int(settings.ll_steps)
        longer = {"ll_steps": "auto", "max_ll_steps": max(settings.max_ll_steps, _MORE * most)}
        faster = {"ll_learning_rate": float(f"{_FASTER * settings.ll_learning_rate:.2g}")}
        tried = [changes | longer] + [changes | faster] * (changes.get("ll_learning_rate") == settings.ll_learning_rate)
    return [changes for changes in tried if any(getattr(settings, name) != value for name, value in changes.items())]


def _is_better(other: _Rehearsal, own: _Rehearsal) -> bool:
    """Return whether other settings have no other trouble, and fewer of them or a loss that is as good."""
    before, after = own.record["select_loss"], other.record["select_loss"]
    as_good = not math.isfinite(before) or after <= before + _AS_GOOD * abs(before)
    return set(other.troubles) <= set(own.troubles) and (as_good or set(other.troubles) != set(own.troubles))


def _tell_of(other: _Rehearsal, own: _Rehearsal, changes: dict[str, Any], better: bool, report: CheckReport) -> None:
    """Tell how the same ul steps went with other settings."""
    report.ok(
        "recommended",
        f"{other.steps} ul steps with {_listed(changes, own.settings)}: the loss that trials are compared on is "
        f"{other.record['select_loss']:.4g}, and {own.record['select_loss']:.4g} with the settings as they are"
        + ("" if better else ", which therefore stay"),
    )


def _take_back(settings: ImplicitSettings, report: CheckReport) -> None:
    """Take back what has shown to do no better than the settings as they are, and does not mend a fault."""
    faults = {fault.name for fault in report.faults}
    for mending, names in _MENDING:
        if not faults & mending:
            report.recommend(**{name: getattr(settings, name) for name in names if name in report.recommended})


def _listed(changes: dict[str, Any], settings: ImplicitSettings) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in changes.items() if getattr(settings, name) != value)


def _tell(own: _Rehearsal, best: _Rehearsal, mended: str, settings: ImplicitSettings, report: CheckReport) -> None:
    """Tell each trouble, with the settings that have shown to mend it, if the best attempt was without it."""
    for trouble in own.troubles:
        name, is_fault = _FINDINGS.get(trouble, (trouble, False))
        shown = "" if trouble in best.troubles else f" It did not happen with {mended}."
        (report.fault if is_fault else report.warn)(name, _sentence(trouble, own, settings) + shown)
    if own.record["skipped_ul_steps"] and "skipped" not in own.troubles:
        report.warn("skipped-steps", TROUBLES["skipped"].sentence(own.record))
    if not own.troubles:
        report.ok(
            "ul-steps",
            f"{own.steps} ul steps moved the ul values by {own.moved:.2g} (root mean square), with "
            f"{report.figures['ll_steps_per_ul_step']:.0f} ll steps before each",
        )


def _sentence(trouble: str, own: _Rehearsal, settings: ImplicitSettings) -> str:
    if trouble == "unmoved":
        adapts = "" if settings.adapt_ul_learning_rate else " Take adapt_ul_learning_rate=True, or"
        return (
            f"In {settings.ul_steps} ul steps the ul values would move by {own.record['ul_moved']:.1g} (root mean "
            f"square), as {own.steps} moved them by {own.moved:.1g} at a rate of "
            f"{own.record['ul_rate']:.1g}:{adapts or ' take'} a larger `ul_learning_rate`, or more `ul_steps`."
        )
    if trouble == "diverged":
        return (
            f"{own.diverged} That was after {own.steps} ul steps: take a smaller `ul_learning_rate` or "
            "`ll_learning_rate`, or bound the ul values by `project`."
        )
    return f"In the first {own.steps} ul steps: {TROUBLES[trouble].sentence(own.record)}"
