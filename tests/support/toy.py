"""A search that takes milliseconds a trial, and every way in which a trial can end."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from torch import Tensor, nn

from tests.support.problems import F64, Values, generator
from tune_implicit import BilevelProblem, ImplicitObjective, SearchResult, State, search
from tune_implicit.searches.study import open_storage

SPACE = {"k": IntDistribution(1, 8), "ll_learning_rate": FloatDistribution(1e-3, 1e-1, log=True)}
# Three reports a trial. Of five ul steps at most four find the ll model lagging, which is not yet told of. One ul value
# may come back to where it began, but not four. One seed, so that trials of equal params are equal.
SETTINGS = {"ul_steps": 5, "ul_steps_per_report": 2, "ll_steps": 2, "solver": "cg", "penalties": 4, "seed": 0}
PARAMS = {"k": 3, "ll_learning_rate": 0.02}
# Settings with which a trial does not learn, by what is then told.
TROUBLED = {
    "skipped": {"fault": "indefinite", "k": 1, "on_failure": "skip", "ll_steps": 0},
    "unmoved": {"ul_learning_rate": 1e-9, "adapt_ul_learning_rate": False},
    "failed": {"ll_learning_rate": 1e200},
}


class MistakeError(Exception):
    """What a bug of the user's own raises."""


def ul_objective(state: State) -> Tensor:
    return (state.ll_model(state.data) - state.target).square().mean()


def error(state: State) -> Tensor:
    return (state.ll_model(state.data) - state.target).abs().mean()


def problem(config: Mapping[str, Any], data: Any = None) -> BilevelProblem:
    # Ridge regression whose `fault`, from the config, is how its trial ends.
    fault, penalties = config.get("fault", "none"), config.get("penalties", 1)
    x = torch.randn(3, 8, 4, generator=generator(), dtype=F64)
    y = x.sum(-1, keepdim=True) + 0.1 * torch.randn(3, 8, 1, generator=generator(1), dtype=F64)

    def ll_objective(state: State) -> Tensor:
        if fault == "mistake":
            raise MistakeError("the objective is wrong")
        # "past" is trained past where the ul objective is least, up to three times as far.
        aim = 3 * state.target if fault == "past" else state.target
        loss = (state.ll_model(state.data) - aim).square().mean()
        loss = loss + (state.ul_model.log_l2.exp() * state.ll_model.weight.square()).sum()
        late = fault == "late nan" and state.ll_model.weight.sum() > 3
        return loss * (math.nan if late else {"nan": math.nan, "indefinite": -1.0}.get(fault, 1.0))

    if fault == "mistake at once":
        raise MistakeError("the factory is wrong")
    return BilevelProblem(
        ul_model=Values(log_l2=torch.full((penalties,), -3.0, dtype=F64)),
        ll_model=nn.Linear(4, 1, dtype=F64),
        ul_objective=ul_objective,
        ll_objective=ll_objective,
        train_data=[(x[0], y[0])],
        validate_data=[(x[1], y[1])],
        select_data=[(x[2], y[2])],
        metrics={"error": error},
    )


def two_splits(config: Mapping[str, Any], data: Any = None) -> BilevelProblem:
    """Return the problem without `select_data`."""
    return replace(problem(config, data), select_data=None)


def faulty(*faults: str) -> dict[str, Any]:
    """Return a space of trials that end by one of ``faults``."""
    return {**SPACE, "fault": CategoricalDistribution(faults)}


class Interrupting:
    """A factory whose n-th call presses Ctrl-C, or raises another error."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.calls, self.configs = at, error, 0, []

    def __call__(self, config: Mapping[str, Any], data: Any = None) -> BilevelProblem:
        self.calls += 1
        self.configs.append(dict(config))
        if self.calls == self.at:
            raise self.error("pressed")
        return problem(config)


class InTurn(RandomSampler):
    """Give one trial after the other the next choice of a categorical setting."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return param_distribution.choices[trial.number % len(param_distribution.choices)]


class PruneAt(BasePruner):
    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.last_step >= self.step


def run(output: Path, n_trials: int = 3, **arguments: Any) -> SearchResult:
    """Search in the toy, by Optuna and with its own space unless told otherwise."""
    arguments = {"backend": "optuna", "settings": SETTINGS, "space": SPACE, "problem": problem} | arguments
    made_by, space = arguments.pop("problem"), arguments.pop("space")
    return search(made_by, space, n_trials=n_trials, output=output, **arguments)


def study_in(output: Path, storage: Any = None) -> optuna.Study:
    """Return the study of the search in ``output``."""
    return optuna.load_study(storage=open_storage(storage or str(output / "study.journal")), study_name=output.name)


def on_optuna(params: dict[str, Any], space: Any = None) -> FrozenTrial:
    """Return the trial of ``params`` as Optuna alone runs it."""
    study = optuna.create_study()
    study.enqueue_trial(params)
    study.optimize(ImplicitObjective(problem, space or SPACE, settings=SETTINGS), n_trials=1)
    return study.trials[0]
