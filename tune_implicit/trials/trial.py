"""One trial from start to end: config -> problem -> trainer -> records."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tune_implicit.errors import DivergedError, InvalidTypeError, SolveError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.hypergradients.state import named_trainable
from tune_implicit.trials.checkpoint import read_checkpoint, write_checkpoint
from tune_implicit.trials.config import TrackedConfig
from tune_implicit.trials.evaluation import evaluate
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import COUNTERS, LOSSES, Record, certificate
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer, Step

__all__ = [
    "TRIAL_FAILURES",
    "ProblemFactory",
    "Reporter",
    "Trial",
    "run_trial",
]

ProblemFactory = Callable[..., BilevelProblem]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
QUANTILE_SAMPLE = 10_000


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

    Attributes
    ----------
    history : list of dict
        The records so far, each with ``"ul_quantiles"``: by parameter name, the quantiles of its ul values.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If the config holds a setting out of range, or the problem is not one.
    """

    def __init__(self, problem: ProblemFactory, config: Mapping[str, Any], data: Any = None) -> None:
        self.settings = ImplicitSettings.from_config(config)
        self.history: list[Record] = []
        self._config = TrackedConfig(config)
        seed_everything(self.settings.seed)
        made = problem(self._config) if data is None else problem(self._config, data)
        if not isinstance(made, BilevelProblem):
            raise InvalidTypeError(f"`problem(config)` must return a BilevelProblem, got {type(made).__name__}.")
        self.problem = made
        self.trainer = BilevelTrainer(made, self.settings)

    @property
    def completed(self) -> bool:
        """Whether all ul steps are taken."""
        return self.trainer.ul_step >= self.settings.ul_steps

    @property
    def record(self) -> Record:
        """The last record."""
        return {name: value for name, value in self.history[-1].items() if name != "ul_quantiles"}

    def advance(self) -> Record:
        """Take the ul steps up to the next report, and return its record of flat scalars.

        Returns
        -------
        dict
            ``train_loss`` and ``validate_loss``, means over the steps taken; ``select_loss`` and the user's metrics,
            over the split that trials are compared on; the last hypergradient's certificate; counters and costs.

        Raises
        ------
        DivergedError
            If a loss or a metric is not finite.
        SolveError
            If a solve failed and ``on_failure`` is ``"raise"``.
        InvalidValueError
            On the first call, if the config has a key that no one reads.
        """
        count = min(self.settings.ul_steps_per_report, self.settings.ul_steps - self.trainer.ul_step)
        steps = [self.trainer.step() for _ in range(count)]
        record = self._losses(steps)
        for name, value in record.items():
            if not math.isfinite(value):
                raise DivergedError(f"`{name}` became {value} by ul step {self.trainer.ul_step}.")
        record |= certificate(steps[-1].hypergradient) | self._counters()
        self.check_config()
        self.history.append(record | {"ul_quantiles": self._ul_quantiles()})
        return record

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
        unknown = dict.fromkeys((*LOSSES, *self.problem.metrics), math.inf)
        return unknown | self._counters() | {"failure": reason}

    def _losses(self, steps: list[Step]) -> Record:
        problem, name = self.problem, self.problem.selected_on
        selected = evaluate(
            problem, name, getattr(problem, name), {"select_loss": problem.ul_objective, **problem.metrics}
        )
        validate = [step.hypergradient.ul_loss for step in steps if step.hypergradient is not None]
        if not validate:
            whole = evaluate(problem, "validate_data", problem.validate_data, {"loss": problem.ul_objective})
            validate = [whole["loss"]]
        train = [step.train_loss for step in steps if self.settings.ll_steps] or [
            evaluate(problem, "train_data", problem.train_data, {"loss": problem.ll_objective})["loss"]
        ]
        return {
            "select_loss": selected["select_loss"],
            "validate_loss": math.fsum(validate) / len(validate),
            "train_loss": math.fsum(train) / len(train),
            **{metric: selected[metric] for metric in problem.metrics},
        }

    def _counters(self) -> Record:
        trainer = self.trainer
        return {name: getattr(trainer, name) for name in COUNTERS} | {
            "completed": self.completed,
            "selected_on": self.problem.selected_on,
        }

    def _ul_quantiles(self) -> dict[str, list[float]]:
        quantiles = {}
        for name, param in named_trainable(self.problem.ul_model).items():
            values = param.detach().reshape(-1)
            # An evenly spaced sample shows the spread of millions as well as a sort of all of them.
            values = values[:: max(1, len(values) // QUANTILE_SAMPLE)].double().sort().values
            ranks = [round(quantile * (len(values) - 1)) for quantile in QUANTILES]
            quantiles[name] = values[ranks].tolist()
        return quantiles

    def save(self, path: Path) -> None:
        """Write the trial to the file ``path``, which holds either the whole trial or what it held before."""
        write_checkpoint(path, {"trainer": self.trainer.state_dict(), "history": self.history})

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


# What ends a trial as failed, while the search goes on. Anything else that a trial raises is a mistake to be mended.
TRIAL_FAILURES = (DivergedError, SolveError, torch.OutOfMemoryError)


def run_trial(trial: Trial, reporter: Reporter) -> Record:
    """Run ``trial`` until it is completed or ``reporter`` stops it, and return its last record."""
    while not trial.completed:
        reporter.report(trial.advance())
        if not trial.completed and reporter.should_stop():
            break
    return trial.record
