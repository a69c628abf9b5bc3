"""Which report of a trial is kept, on both engines: its value, its models, and its end in the study."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from tests.support import toy
from tests.support.toy import InTurn, run, study_in
from tune_implicit import (
    ImplicitObjective,
    ImplicitOptunaSearch,
    InvalidValueError,
    SearchResult,
    TrialResult,
)
from tune_implicit.searches.outcome import is_interrupted
from tune_implicit.trials.evaluation import evaluate

# The trials of the search, by number.
CONFIGS = [
    {"fault": "past", "patience": 2},
    {"fault": "past", "patience": 2, "keep": "last"},
    {"fault": "late nan"},
    {"fault": "late nan", "keep": "last"},
    {"fault": "past", "patience": 0, "ul_steps": 9},
]
PATIENT, PATIENT_LAST, LATE, LATE_LAST, LONG = range(len(CONFIGS))
# By the last of the reports to come the trial has passed its optimum.
SETTINGS = toy.SETTINGS | {"ul_steps": 40, "k": 3, "ll_learning_rate": 0.1}

pytestmark = pytest.mark.filterwarnings("ignore:.* did not learn as .* should:tune_implicit.LearningWarning")


def space(trial: optuna.Trial) -> dict[str, Any]:
    return CONFIGS[trial.suggest_categorical("place", list(range(len(CONFIGS))))]


ARGUMENTS = {"space": space, "settings": SETTINGS, "sampler": InTurn(), "max_concurrent_trials": 1}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SearchResult]:
    """Search on a backend, once: two trials, and in another call the others."""

    @cache
    def search_on(backend: str) -> SearchResult:
        output = tmp_path_factory.mktemp(backend) / "found"
        first = run(output, 2, backend=backend, **ARGUMENTS)
        resumed = run(output, len(CONFIGS), backend=backend, resume=True, **ARGUMENTS)
        assert resumed.trials[:2] == first.trials
        return resumed

    return search_on


@pytest.fixture
def found(searched: Callable[[str], SearchResult], backend: str) -> SearchResult:
    return searched(backend)


def measured(trial: TrialResult) -> list[float]:
    """Return the select losses of a trial's reports."""
    return [record["select_loss"] for record in trial.history]


def recomputed(trial: TrialResult) -> float:
    """Return the select loss of the models that were saved."""
    problem = toy.problem(trial.config)
    problem.ul_model.load_state_dict(trial.ul_state)
    problem.ll_model.load_state_dict(trial.ll_state)
    return evaluate(problem, "select_data", problem.select_data, {"loss": problem.ul_objective})["loss"]


def in_study(found: SearchResult, number: int) -> FrozenTrial:
    return study_in(found.output).trials[number]


class TestSearch:
    def test_a_trial_that_patience_ended_is_complete_with_its_best_value(self, found: SearchResult) -> None:
        trial, losses = found.trials[PATIENT], measured(found.trials[PATIENT])
        assert (trial.state, in_study(found, PATIENT).state.name) == ("complete", "COMPLETE")
        assert trial.metrics["ended_by"] == "patience"
        assert trial.metrics["ul_step"] == 2 * len(losses) < 40
        assert losses.index(min(losses)) == len(losses) - 3
        assert trial.value == in_study(found, PATIENT).value == min(losses)

    def test_a_trial_that_took_all_its_steps_has_its_best_value_as_well(self, found: SearchResult) -> None:
        trial, losses = found.trials[LONG], measured(found.trials[LONG])
        assert (trial.state, trial.metrics["ended_by"], trial.metrics["ul_step"]) == ("complete", "steps", 9)
        assert trial.value == min(losses) < losses[-1]

    def test_a_trial_that_keeps_its_last_report_has_the_last_value(self, found: SearchResult) -> None:
        trial, losses = found.trials[PATIENT_LAST], measured(found.trials[PATIENT_LAST])
        assert (trial.state, trial.metrics["ended_by"]) == ("complete", "patience")
        assert trial.value == in_study(found, PATIENT_LAST).value == losses[-1] > min(losses)
        assert losses == measured(found.trials[PATIENT])

    def test_a_trial_that_diverged_after_a_report_is_complete_with_its_best_value_and_told(
        self, found: SearchResult
    ) -> None:
        trial, losses = found.trials[LATE], measured(found.trials[LATE])
        assert (trial.state, in_study(found, LATE).state.name) == ("complete", "COMPLETE")
        assert trial.metrics["ended_by"] == "divergence"
        assert trial.value == in_study(found, LATE).value == min(losses)
        assert trial.failure is None
        step = trial.metrics["kept_ul_step"]
        assert trial.troubles["diverged"].startswith(f"The trial diverged, and its report of ul step {step} is kept. ")
        assert found.troubles["diverged"] == [LATE]

    def test_a_trial_that_diverged_and_would_keep_its_last_report_fails(self, found: SearchResult) -> None:
        trial = found.trials[LATE_LAST]
        assert (trial.state, trial.value, in_study(found, LATE_LAST).state.name) == ("failed", None, "FAIL")
        assert "The ll loss became nan" in trial.failure
        assert not is_interrupted(in_study(found, LATE_LAST))
        assert "failed" in trial.troubles

    @pytest.mark.parametrize("number", [PATIENT, PATIENT_LAST, LATE, LONG])
    def test_the_models_are_those_of_the_report_that_is_kept(self, found: SearchResult, number: int) -> None:
        trial = found.trials[number]
        assert recomputed(trial) == pytest.approx(trial.value, rel=1e-12)
        (kept,) = (record for record in trial.history if record["select_loss"] == trial.value)
        assert kept["ul_step"] == trial.metrics["kept_ul_step"]
        low, *_, high = kept["ul_quantiles"]["log_l2"]
        assert (low, high) == (trial.ul_state["log_l2"].min(), trial.ul_state["log_l2"].max())

    @pytest.mark.parametrize("number", [PATIENT, PATIENT_LAST, LATE, LONG])
    def test_its_metrics_are_those_of_the_report_that_is_kept(self, found: SearchResult, number: int) -> None:
        trial = found.trials[number]
        (kept,) = (record for record in trial.history if record["select_loss"] == trial.value)
        for name in ("select_loss", "validate_loss", "train_loss", "error"):
            assert trial.metrics[name] == kept[name]
        assert trial.metrics["kept_value"] == trial.value
        assert trial.metrics["last_value"] == measured(trial)[-1]
        # Where it came to and what it cost is told of all of it, of one that diverged since its last report as well.
        assert trial.metrics["ul_step"] == trial.history[-1]["ul_step"]
        for name in ("ll_step", "hvps", "gradient_evaluations"):
            since = trial.metrics[name] - trial.history[-1][name]
            assert (since > 0) == (trial.metrics["ended_by"] == "divergence")

    def test_what_was_measured_is_reported_at_its_step_and_the_kept_value_is_not(self, found: SearchResult) -> None:
        # A study of it shows how the trial went, whatever is kept of it.
        for trial in found.trials:
            told = in_study(found, trial.number).intermediate_values
            assert told == {record["ul_step"]: record["select_loss"] for record in trial.history}

    def test_the_best_trial_is_the_one_with_the_best_kept_value(self, found: SearchResult) -> None:
        kept = {trial.number: min(measured(trial)) for trial in found.trials if trial.number != PATIENT_LAST}
        assert found.best.value == min(kept.values())


@pytest.mark.usefixtures("ray_session")
def test_both_engines_keep_the_same_bits(searched: Callable[[str], SearchResult]) -> None:
    for one, other in zip(searched("optuna").trials, searched("ray").trials, strict=True):
        assert (one.state, one.value, one.metrics, one.failure) == (
            other.state,
            other.value,
            other.metrics,
            other.failure,
        )


# ---- by which metric, and which end of it


@pytest.mark.parametrize(("mode", "best"), [("min", min), ("max", max)])
def test_a_search_keeps_the_best_report_by_its_own_metric(
    backend: str, output: Path, mode: str, best: Callable[..., float]
) -> None:
    arguments = ARGUMENTS | {"space": {"patience": optuna.distributions.CategoricalDistribution([2])}}
    settings = SETTINGS | {"fault": "past"}
    (trial,) = run(output, 1, backend=backend, metric="error", mode=mode, **arguments | {"settings": settings}).trials
    errors = [record["error"] for record in trial.history]
    assert trial.value == best(errors)
    assert trial.value != errors[-1]
    # Patience counts from there on.
    assert (trial.metrics["ended_by"], len(errors)) == ("patience", errors.index(trial.value) + 3)


@pytest.mark.parametrize("metric", ["select_loss", "validate_loss", "train_loss"])
def test_a_search_for_the_largest_loss_is_an_error(backend: str, output: Path, metric: str) -> None:
    with pytest.raises(InvalidValueError, match=largest(metric)):
        run(output, backend=backend, metric=metric, mode="max")
    assert not output.exists()


@pytest.mark.usefixtures("quiet")
def test_a_plain_study_that_maximizes_a_loss_is_an_error() -> None:
    study = optuna.create_study(direction="maximize")
    with pytest.raises(InvalidValueError, match=largest("select_loss")):
        study.optimize(ImplicitObjective(toy.problem, toy.SPACE, settings=toy.SETTINGS), n_trials=1)
    assert "It raised InvalidValueError" in study.trials[0].user_attrs["failure"]


@pytest.mark.usefixtures("quiet")
def test_a_plain_study_that_maximizes_a_users_metric_keeps_the_largest() -> None:
    values = []
    for direction in ("minimize", "maximize"):
        study = optuna.create_study(direction=direction, sampler=InTurn())
        objective = ImplicitObjective(toy.problem, space, settings=SETTINGS, metric="error")
        study.optimize(objective, n_trials=1)
        told = study.trials[0].intermediate_values.values()
        values.append(study.best_value)
        assert study.best_value == {"minimize": min, "maximize": max}[direction](told)
    assert values[0] < values[1]


def test_a_searcher_for_the_largest_loss_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match=largest("select_loss")):
        ImplicitOptunaSearch(toy.SPACE, mode="max")
    assert ImplicitOptunaSearch(toy.SPACE, metric="error", mode="max").mode == "max"


def largest(metric: str) -> str:
    """Return how an error begins that names the metric, the rule, what came and the way out."""
    return (
        rf"^`metric` '{metric}' is a loss, of which the least is best, but trials would be compared by the largest: "
        r'take mode="min" \(direction="minimize"\), or a metric of the problem\'s own \(`metrics` of BilevelProblem\)'
    )
