"""One trial from start to end: config -> problem -> trainer -> records."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tune_implicit.errors import DivergedError, InvalidTypeError, SolveError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.trials.checkpoint import read_checkpoint, write_checkpoint
from tune_implicit.trials.config import TrackedConfig
from tune_implicit.trials.evaluation import check_same_names, mean_loss, mean_over, measure
from tune_implicit.trials.memory import memory_told
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import (
    COSTS,
    COUNTERS,
    LEARNING,
    LL_RATE,
    LOSSES,
    Record,
    certificate,
    check_metric,
    finite,
    quantiles_of,
)
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.start import start_from
from tune_implicit.trials.trainer import BilevelTrainer, Step
from tune_implicit.trials.troubles import troubles_of

__all__ = [
    "TRIAL_FAILURES",
    "ProblemFactory",
    "Reporter",
    "Trial",
    "run_trial",
]

ProblemFactory = Callable[..., BilevelProblem]


class Reporter(Protocol):
    """Who hears of a trial's records: an engine's adapter."""

    def report(self, record: Record) -> None:
        """Take in the trial's latest record."""
        ...

    def should_stop(self) -> bool:
        """Return whether the trial is to end here."""
        ...


class Trial:
    """One trial: a problem made from a config, trained and measured step by step.

    Parameters
    ----------
    problem : callable(config) or callable(config, data) -> BilevelProblem
        Called once, here, after every generator has been seeded with the config's ``seed``.
    config : mapping of str to object
        Reserved settings (the fields of :class:`ImplicitSettings`) and the user's own keys.
    data : object, optional
        The second argument of ``problem``, where there is one.
    metric, mode : str, default "select_loss" and "min"
        By which entry of its records its best report is found, and whether ``"min"`` or ``"max"`` of it is best.
    initial_ul_state : mapping of str to Tensor, optional
        What the ul values start from, in place of those that the problem was made with: e.g. the ``ul_state`` of
        another trial. It is copied. A checkpoint that is loaded takes its place.

    Attributes
    ----------
    history : list of dict
        The records so far as they were measured, each with ``"ul_quantiles"``: by parameter name, the quantiles of its
        ul values.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If the config holds a setting out of range, the problem is not one, ``mode`` would take the largest loss, or
        ``initial_ul_state`` does not fit the ul model.
    torch.OutOfMemoryError
        If memory runs out as the problem is made, on whatever device.
    """

    @memory_told()
    def __init__(
        self,
        problem: ProblemFactory,
        config: Mapping[str, Any],
        data: Any = None,
        metric: str = "select_loss",
        mode: str = "min",
        initial_ul_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_metric(metric, mode)
        self.settings = ImplicitSettings.from_config(config)
        self.history: list[Record] = []
        self._metric, self._sign = metric, 1 if mode == "min" else -1
        self._start_loss: float | None = None
        self._divergence = ""  # what it diverged with after a report that is kept
        # The best report: after how many it came, its record, and copies of both models if it is the one to keep.
        self._best: dict[str, Any] | None = None
        self._config = TrackedConfig(config)
        seed_everything(self.settings.seed)
        made = problem(self._config) if data is None else problem(self._config, data)
        if not isinstance(made, BilevelProblem):
            raise InvalidTypeError(f"`problem(config)` must return a BilevelProblem, got {type(made).__name__}.")
        self.problem = made
        self._metrics = list(made.metric_names)
        if initial_ul_state is not None:
            start_from(made.ul_model, initial_ul_state)  # before the trainer: it remembers where they start
        self.trainer = BilevelTrainer(made, self.settings)

    @property
    def ended_by(self) -> str:
        """What completed the trial: the first of these that did, and an empty string while it goes on.

        ``"divergence"`` after a report; ``"steps"``, all ``ul_steps``; ``"budget"``, its ``max_gradient_evaluations``;
        ``"patience"``.
        """
        if self._divergence:
            return "divergence"
        if not self.history:
            return ""
        last, budget = self.history[-1], self.settings.max_gradient_evaluations
        if last["ul_step"] >= self.settings.ul_steps:
            return "steps"
        if budget is not None and last["gradient_evaluations"] >= budget:
            return "budget"
        reports, patience = len(self.history), self.settings.patience
        waited = reports - self._best["report"] if self._best is not None else 0
        return "patience" if 0 < patience <= waited else ""

    @property
    def completed(self) -> bool:
        """Whether the trial has come to its own end."""
        return bool(self.ended_by)

    @property
    def record(self) -> Record:
        """The last record; of a completed trial, the losses and metrics are those of the report that is kept.

        Before the first report it has no losses.
        """
        if not self.history:
            return self._learning() | self._counters() | {"ended_by": "", "troubles": ""}
        last = {name: value for name, value in self.history[-1].items() if name != "ul_quantiles"}
        if self._divergence:  # what it has cost since then
            last |= {name: getattr(self.trainer, name) for name in COSTS}
        # Anew: what has been loaded may end a trial with this one's settings.
        return last | (self._kept_losses() if self.completed else {}) | self._ending()

    @memory_told()
    def advance(self) -> Record:
        """Take the ul steps up to the next report, and return its record of flat scalars.

        Returns
        -------
        dict
            ``train_loss`` and ``validate_loss``, means over the steps taken; ``select_loss`` and the user's metrics,
            over the split that trials are compared on; the last hypergradient's certificate; counters and costs; how it
            learns. Where the trial diverges after a report, and the best one is kept, that is the record of a completed
            trial; of one that has come to its end, it is its last.

        Raises
        ------
        DivergedError
            If a loss or a metric is not finite, and there is no report to keep.
        SolveError
            If a solve failed and ``on_failure`` is ``"raise"``.
        torch.OutOfMemoryError
            If memory runs out, on whatever device.
        InvalidValueError
            On the first call, if the config has a key that no one reads.
        """
        if self.completed:
            return self.record
        if self._start_loss is None:
            self._start_loss = mean_loss(self._parts(), self.problem.selected_on, "ul_objective")
        try:
            record = self._measured()
        except DivergedError as error:
            if self._best is None or self.settings.keep != "best":
                raise
            self._divergence = str(error)
            self.history[-1] |= self._ending()
            return self.record
        self.check_config()
        self.history.append(record | {"ul_quantiles": quantiles_of(self.problem.ul_model)})
        self._keep(record)
        self.history[-1] |= self._ending()
        return record | self._ending()

    def _measured(self) -> Record:
        """Return the record of the ul steps up to the next report.

        Raises
        ------
        DivergedError
            If a loss or a metric is not finite.
        """
        count = min(self.settings.ul_steps_per_report, self.settings.ul_steps - self.trainer.ul_step)
        if count < 1:
            raise DivergedError(f"The trial diverged at ul step {self.trainer.ul_step}, and has none left to take.")
        steps = [self.trainer.step() for _ in range(count)]
        record = self._losses(steps)
        _check_finite(record, self.trainer.ul_step)
        self.trainer.see_report(record["validate_loss"])
        return record | certificate(steps[-1].hypergradient) | self._learning() | self._counters()

    def _keep(self, record: Record) -> None:
        """Take in a report that is the best one so far."""
        value = record.get(self._metric)
        if not isinstance(value, Real):
            return  # the search says that there is no such metric
        if self._best is None or self._sign * value < self._sign * self._best["record"][self._metric]:
            self._best = None  # or there would be a third copy of both models for a moment
            models = copy.deepcopy(self._models()) if self.settings.keep == "best" else None
            self._best = {"report": len(self.history), "record": record, "models": models}

    def _models(self) -> dict[str, Any]:
        """Return the state of the ul model, and of the ll model that is measured: a list where there are several."""
        several = [model.state_dict() for model in self.trainer.ll_models]
        ll_state = several if isinstance(self.problem.ll_model, list | tuple) else several[0]
        return {"ul_model": self.problem.ul_model.state_dict(), "ll_model": ll_state}

    def _kept_losses(self) -> Record:
        """Return the losses and metrics of the report that is kept, where that is not the last."""
        if self._best is None or self.settings.keep == "last":
            return {}
        return {name: self._best["record"][name] for name in (*LOSSES, *self._metrics)}

    def _ending(self) -> Record:
        """Return what the last record says of the trial as a whole."""
        last, kept = self.history[-1], self.history[-1]
        if self._best is not None and self.settings.keep == "best":
            kept = self._best["record"]
        ending = {
            "start_loss": self._start_loss,
            "last_value": last.get(self._metric),
            "kept_value": kept.get(self._metric),
            "kept_ul_step": kept["ul_step"],
            "completed": self.completed,
            "ended_by": self.ended_by,
            "divergence": self._divergence or None,
        }
        ending = finite({name: value for name, value in ending.items() if value is not None})
        return ending | {"troubles": " ".join(troubles_of(last | self._kept_losses() | ending))}

    def check_config(self) -> None:
        """Check that every key of the config is a setting, or has been read by now.

        Raises
        ------
        InvalidValueError
            If there is a key that no one reads.
        """
        self._config.check_all_read()

    def failure_record(self, reason: str) -> Record:
        """Return the last record of a trial that failed: its counters, its ``failure``, and infinity for each metric.

        Infinity stands where engines insist on a number; none of the adapters passes it on as a value.
        """
        unknown = dict.fromkeys((*LOSSES, *self._metrics, self._metric), math.inf)
        return unknown | self._learning() | self._counters() | {"failure": reason, "troubles": "failed"}

    def _losses(self, steps: list[Step]) -> Record:
        measured = mean_over(measure(part, model) for part, model in self._parts())
        names = [name for name in measured if name != "select_loss"]
        check_same_names(names, self._metrics or names)
        self._metrics = names
        validate = [step.hypergradient.ul_loss for step in steps if step.hypergradient is not None]
        train = [step.train_loss for step in steps if not math.isnan(step.train_loss)]
        return {
            "select_loss": measured.pop("select_loss"),
            "validate_loss": _mean(validate) if validate else mean_loss(self._parts(), "validate_data", "ul_objective"),
            "train_loss": _mean(train) if train else mean_loss(self._parts(), "train_data", "ll_objective"),
            **measured,
        }

    def _parts(self) -> Iterator[tuple[BilevelProblem, nn.Module]]:
        """Yield each ll problem, with the ll model that is measured."""
        yield from zip(self.problem.parts, self.trainer.ll_models, strict=True)

    def _learning(self) -> Record:
        if self.settings.ul_learning_rate == 0:
            return {}
        return finite({name: getattr(self.trainer, name) for name in LEARNING})

    def _counters(self) -> Record:
        counted = {name: getattr(self.trainer, name) for name in COUNTERS}
        counted |= finite({LL_RATE: self.trainer.ll_rate})
        return counted | {"completed": False, "selected_on": self.problem.selected_on}

    def save(self, path: Path) -> None:
        """Write the trial to the file ``path``, which holds either the whole trial or what it held before."""
        kept = self._best["models"] if self._best is not None and self.settings.keep == "best" else self._models()
        state = {
            "trainer": self.trainer.state_dict(),
            "history": self.history,
            "kept": kept,
            "best": self._best,
            "start_loss": self._start_loss,
            "divergence": self._divergence,
            "metrics": self._metrics,
            "settings": dataclasses.asdict(self.settings),
        }
        write_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Go on from the file ``path``, with this trial's own settings.

        Raises
        ------
        CheckpointError
            If the file is not one that :meth:`save` wrote, or of another problem.
        """
        state = read_checkpoint(path)
        self.trainer.load_state_dict(state["trainer"])
        self.history = state["history"]
        self._start_loss, self._best, self._metrics = state["start_loss"], state["best"], state["metrics"]
        # What another's settings have led to is not this trial's end.
        self._divergence = state["divergence"] if state["settings"] == dataclasses.asdict(self.settings) else ""
        if self.settings.keep == "best" and self._best is not None and self._best["models"] is None:
            self._best = None  # its trial kept the last report


def _check_finite(record: Record, ul_step: int) -> None:
    """Check that all of ``record`` is finite.

    Raises
    ------
    DivergedError
        If not.
    """
    for name, value in record.items():
        if not math.isfinite(value):
            way_out = " Try a smaller `ll_learning_rate` or `ul_learning_rate`." if name in LOSSES else ""
            raise DivergedError(f"`{name}` became {value} by ul step {ul_step}.{way_out}")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# What ends a trial as failed, while the search goes on. Anything else that a trial raises is a mistake to be mended.
TRIAL_FAILURES = (DivergedError, SolveError, torch.OutOfMemoryError)


def run_trial(trial: Trial, reporter: Reporter) -> Record:
    """Run ``trial`` until it is completed or ``reporter`` stops it, and return its last record."""
    while not trial.completed:
        reporter.report(trial.advance())
        if not trial.completed and reporter.should_stop():
            break
    return trial.record
