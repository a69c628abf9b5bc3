"""ImplicitObjective in an ordinary study; what it shares with Ray Tune is in ``test_contract.py``."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from tests.support import toy
from tests.support.toy import PruneAt
from tune_implicit import (
    CheckpointError,
    ImplicitObjective,
    InvalidTypeError,
    InvalidValueError,
    LearningWarning,
    NoCompletedTrialError,
    load_ul_state,
    requeue,
)
from tune_implicit.searches.borrowed import storage_of
from tune_implicit.searches.outcome import CUT_OFF, is_interrupted
from tune_implicit.trials.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("quiet")


def objective(space: Any = None, **arguments: Any) -> ImplicitObjective:
    arguments.setdefault("settings", toy.SETTINGS)
    return ImplicitObjective(arguments.pop("problem", toy.problem), space or toy.SPACE, **arguments)


def new_study(**arguments: Any) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **arguments)


def run_one(objective: ImplicitObjective, study: optuna.Study | None = None, **params: Any) -> FrozenTrial:
    study = study or new_study()
    study.enqueue_trial({**toy.PARAMS, **params})
    study.optimize(objective, n_trials=1)
    return study.trials[-1]


def test_a_trial_without_a_study_runs_as_well() -> None:
    fixed = optuna.trial.FixedTrial(toy.PARAMS)
    assert objective()(fixed) == run_one(objective()).value
    assert fixed.user_attrs["metrics"]["completed"]


def test_a_study_of_several_objectives_is_refused() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    with pytest.raises(InvalidValueError, match=r"as many directions as there are `metrics`, got 2 for select_loss"):
        study.optimize(objective(), n_trials=1)


def test_any_metric_of_the_record_is_the_value() -> None:
    trial = run_one(objective(metric="error"), new_study(direction="maximize"))
    assert trial.value == trial.user_attrs["metrics"]["error"]


def test_a_pruner_has_no_say_at_the_last_step() -> None:
    assert run_one(objective(), new_study(pruner=PruneAt(5))).state is TrialState.COMPLETE


def test_optunas_own_pruners_prune() -> None:
    study = new_study(pruner=optuna.pruners.ThresholdPruner(upper=-1.0))
    assert run_one(objective(), study).state is TrialState.PRUNED


def test_a_failed_solve_fails_the_trial_if_asked_to() -> None:
    settings = {**toy.SETTINGS, "on_failure": "raise"}
    with pytest.warns(
        LearningWarning, match=r"Trial 0 .* \(failed\)\. The trial failed: The solve at ul step 1 ended as"
    ):
        trial = run_one(objective(toy.faulty("indefinite"), settings=settings), fault="indefinite")
    assert trial.state is TrialState.FAIL
    assert "negative_curvature" in trial.user_attrs["failure"]


def test_a_skipped_solve_is_counted() -> None:
    settings = {**toy.SETTINGS, "on_failure": "skip"}
    with pytest.warns(LearningWarning, match=r"\((skipped|unmoved|worse)\)"):
        trial = run_one(objective(toy.faulty("indefinite"), settings=settings), fault="indefinite")
    assert trial.state is TrialState.COMPLETE
    assert trial.user_attrs["metrics"]["skipped_ul_steps"] == 5


@pytest.mark.parametrize("fault", ["mistake", "mistake at once"])
def test_a_mistake_of_the_users_ends_the_study_and_says_why(fault: str) -> None:
    study = new_study()
    with pytest.raises(toy.MistakeError, match="is wrong"):
        run_one(objective(toy.faulty(fault)), study, fault=fault)
    assert study.trials[0].state is TrialState.FAIL
    assert "It raised MistakeError: the" in study.trials[0].user_attrs["failure"]


@pytest.mark.parametrize("place", ["space", "factory", "training"])
def test_ctrl_c_anywhere_in_a_trial_leaves_it_marked_as_interrupted(place: str) -> None:
    def problem(config: Any) -> Any:
        if place == "factory":
            raise KeyboardInterrupt
        made = toy.problem(config)
        made.metrics["press"] = press
        return made

    def press(state: Any) -> float:
        raise KeyboardInterrupt

    def space(trial: optuna.Trial) -> None:
        trial.suggest_int("k", 1, 8)
        if place == "space":
            raise KeyboardInterrupt

    study = new_study()
    with pytest.raises(KeyboardInterrupt):
        run_one(objective(space, problem=problem), study)
    assert study.trials[0].state is TrialState.FAIL
    assert study.trials[0].user_attrs["failure"] == CUT_OFF.failure
    assert is_interrupted(study.trials[0])


def test_a_key_that_no_one_reads_is_an_error() -> None:
    space = {**toy.SPACE, "ul_learning_rat": FloatDistribution(0.1, 1.0)}
    with pytest.raises(InvalidValueError, match=r"'ul_learning_rat' \(did you mean 'ul_learning_rate'\?\)"):
        run_one(objective(space))


def test_a_setting_out_of_range_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match="`k` must be 0 or more, got -1"):
        run_one(objective({"k": CategoricalDistribution([-1])}), k=-1)


def test_an_unknown_metric_is_an_error_that_names_the_known() -> None:
    with pytest.raises(InvalidValueError, match=r"'accuracy' is reported by no one.*The trial reports .*error, "):
        run_one(objective(metric="accuracy"))


@pytest.mark.parametrize("metric", ["solver_status", "completed"])
def test_a_metric_that_is_no_number_is_an_error(metric: str) -> None:
    with pytest.raises(InvalidValueError, match=f"{metric!r} is reported by no one"):
        run_one(objective(metric=metric))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must name at least one setting"),
        ({"k": 3}, r"`space`\['k'\] must be an Optuna distribution, got 3"),
        ([("k", 3)], "must be a dict of Optuna distributions or a callable"),
    ],
)
def test_a_space_is_checked_at_once(space: Any, message: str) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=message):
        ImplicitObjective(toy.problem, space)


def test_settings_stand_under_the_space() -> None:
    trial = run_one(objective(settings={**toy.SETTINGS, "k": 7, "ul_steps": 2}))
    assert trial.params["k"] == 3
    assert trial.user_attrs["metrics"]["ul_step"] == 2


def test_data_is_the_factorys_second_argument() -> None:
    seen = []

    def problem(config: Any, data: Any) -> Any:
        seen.append(data)
        return toy.problem(config)

    arrays = {"x": 1}
    run_one(objective(problem=problem, data=arrays))
    assert seen == [arrays]


def test_equal_params_give_equal_bits() -> None:
    one, other = run_one(objective()), run_one(objective())
    assert one.value == other.value
    assert one.value != run_one(objective(settings={**toy.SETTINGS, "seed": 1})).value


@pytest.mark.filterwarnings(r"ignore:Trial 0 did not learn as it should \(failed:tune_implicit.LearningWarning")
@pytest.mark.parametrize("fault", ["none", "nan", "mistake"])
def test_the_global_random_state_is_left_as_it_was(fault: str) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    try:
        run_one(objective(toy.faulty(fault)), fault=fault)
    except toy.MistakeError:
        assert fault == "mistake"
    assert draws() == expected


def test_a_trial_is_saved_with_its_ul_values(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(tmp_path)
    trial = run_one(objective(artifact_store=store, checkpoint_frequency=1))
    # Each save takes the place of the one before.
    assert [path.name for path in tmp_path.iterdir()] == [trial.user_attrs["checkpoint"]]
    saved = read_checkpoint(tmp_path / trial.user_attrs["checkpoint"])
    assert (saved["trainer"]["ul_model"]["log_l2"] != -3.0).all()
    assert saved["history"][-1]["select_loss"] == trial.value


# A trial that takes all its steps, and one that its patience ends two reports after the second, its best.
LEARNING = (toy.SETTINGS, 3)
PATIENT = (toy.SETTINGS | {"fault": "past", "patience": 2, "ul_steps": 40, "ll_steps": 10}, 4)


@pytest.mark.filterwarnings("ignore:Trial . did not learn as it should:tune_implicit.LearningWarning")
@pytest.mark.parametrize(
    ("settings", "of", "reports"),
    [(*LEARNING, 1), (*LEARNING, 2), (*PATIENT, 1), (*PATIENT, 2), (*PATIENT, 3)],
)
def test_a_killed_trial_goes_on_from_its_checkpoint_to_the_same_bits(
    tmp_path: Path, settings: dict[str, Any], of: int, reports: int
) -> None:
    expected = run_one(objective(settings=settings))
    measured = 0

    def killed(config: Any) -> Any:
        made = toy.problem(config)
        made.metrics["error"] = count
        return made

    def count(state: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured == reports + 1:
            raise toy.MistakeError("the power went out")
        return toy.error(state)

    store, study = FileSystemArtifactStore(tmp_path), new_study()
    with pytest.raises(toy.MistakeError):
        run_one(objective(problem=killed, settings=settings, artifact_store=store, checkpoint_frequency=1), study)
    assert requeue(study) == 1
    again = objective(problem=killed, settings=settings, artifact_store=store, checkpoint_frequency=1)
    study.optimize(again, n_trials=1)
    trial = study.trials[1]
    assert trial.value == expected.value
    assert trial.user_attrs["metrics"] == expected.user_attrs["metrics"]
    assert measured == of + 1  # what was done is not done again
    saved = read_checkpoint(tmp_path / trial.user_attrs["checkpoint"])
    assert saved["best"]["record"]["select_loss"] == trial.value
    assert len(saved["history"]) == of


def test_a_trial_that_begins_from_anothers_checkpoint_leaves_it_alone(tmp_path: Path) -> None:
    store, study = FileSystemArtifactStore(tmp_path), new_study()
    followed = {**toy.SETTINGS, "ll_steps": 40}
    donor = run_one(objective(settings=followed, artifact_store=store), study, ll_learning_rate=0.1)
    checkpoint = donor.user_attrs["checkpoint"]
    study.enqueue_trial(donor.params, user_attrs={"checkpoint": checkpoint})
    longer = {**followed, "ul_steps": 12}
    study.optimize(objective(settings=longer, artifact_store=store, checkpoint_frequency=1), n_trials=1)
    assert study.trials[1].user_attrs["metrics"]["ul_step"] == 12
    assert study.trials[1].value == run_one(objective(settings=longer), ll_learning_rate=0.1).value
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint, study.trials[1].user_attrs["checkpoint"]}


def test_a_failed_trial_is_saved_as_well(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(tmp_path)
    with pytest.warns(LearningWarning, match="The ll loss became nan"):
        trial = run_one(objective(toy.faulty("nan"), artifact_store=store), fault="nan")
    assert (tmp_path / trial.user_attrs["checkpoint"]).exists()


def test_two_threads_of_one_process_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"`n_jobs` of study\.optimize must be 1.*Start several processes"):
        new_study().optimize(objective(), n_trials=4, n_jobs=2)


def test_several_objectives_have_a_front() -> None:
    study = new_study(directions=["minimize", "minimize"])
    study.optimize(objective(metrics=["select_loss", "gradient_evaluations"]), n_trials=4)
    for trial in study.trials:
        assert trial.values == [trial.user_attrs["select_loss"], trial.user_attrs["gradient_evaluations"]]
    assert study.best_trials


def test_the_largest_of_a_loss_is_refused_among_several_objectives() -> None:
    study = new_study(directions=["minimize", "maximize"])
    with pytest.raises(InvalidValueError, match="`metric` 'validate_loss' is a loss, of which the least is best"):
        study.optimize(objective(metrics=["error", "validate_loss"]), n_trials=1)


def test_dashboards_and_dataframes_see_columns() -> None:
    study = new_study()
    run_one(objective(), study)
    columns = set(study.trials_dataframe().columns)
    assert {"user_attrs_error", "user_attrs_hvps", "user_attrs_ul log_l2 median"} <= columns


def test_an_artifact_that_is_linked_is_there_and_of_the_right_kind(tmp_path: Path) -> None:
    store, study = FileSystemArtifactStore(tmp_path), new_study()
    trial = run_one(objective(artifact_store=store, save_every_s=0.0), study)
    (link,) = get_all_artifact_meta(trial, storage=storage_of(study))
    assert (link.artifact_id, link.mimetype) == (trial.user_attrs["checkpoint"], "application/octet-stream")
    assert [path.name for path in tmp_path.iterdir()] == [link.artifact_id]


class Full(FileSystemArtifactStore):
    """A disk that is full."""

    def write(self, artifact_id: str, content_body: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_store_that_fails_keeps_the_value(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Trial 0 could not be saved: OSError: .*its value is kept.*Free room on"):
        trial = run_one(objective(artifact_store=Full(tmp_path), save_every_s=0.0))
    assert (trial.state, trial.value) == (TrialState.COMPLETE, run_one(objective()).value)


def test_the_best_trials_ul_values_start_another(tmp_path: Path) -> None:
    study = new_study()
    study.optimize(objective(artifact_store=FileSystemArtifactStore(tmp_path)), n_trials=3)
    learned = load_ul_state(study, tmp_path)
    assert learned["log_l2"].shape == (4,)
    begun = run_one(objective(initial_ul_state=learned, settings=toy.SETTINGS | {"ul_learning_rate": 0.0}))
    assert begun.user_attrs["ul log_l2 largest"] == pytest.approx(float(learned["log_l2"].max()))
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not in `artifact_store`\. Pass the store"):
        load_ul_state(study, tmp_path)
    with pytest.raises(NoCompletedTrialError, match="No trial of the study"):
        load_ul_state(new_study(), tmp_path)
