"""A trial in which nothing was learned is told wherever someone may look, on both engines."""

import html
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from optuna.trial import FrozenTrial
from ray import tune

from tests.support import toy
from tests.support.toy import InTurn, run, study_in
from tune_implicit import (
    ImplicitObjective,
    ImplicitOptunaSearch,
    ImplicitTrainable,
    LearningWarning,
    Progress,
    SearchResult,
    load_search,
    write_report,
)
from tune_implicit.cli import _show

TOLD = {
    "skipped": r"5 of 5 ul steps were skipped, as their solves failed \(the last ended as negative_curvature\): take ",
    "unmoved": r"The ul values hardly moved, by \de-0\d \(root mean square\) in 5 ul steps, at a rate of 1e-09 ",
    "failed": r"The trial failed: The ll loss became (inf|nan) within ll steps 1 to 2, with ll_learning_rate=1e\+200",
}


def space_of(trouble: str) -> Callable[[optuna.Trial], dict[str, Any]]:
    """Return a space of two trials with ``trouble`` and, after them, one without."""

    def space(trial: optuna.Trial) -> dict[str, Any]:
        return toy.TROUBLED[trouble] if trial.suggest_categorical("place", [0, 1, 2]) < 2 else {"k": 3}

    return space


class Searched(NamedTuple):
    result: SearchResult
    progress: list[Progress]
    warned: list[str]
    place: str  # the file that the last warning names

    @property
    def study(self) -> optuna.Study:
        return study_in(self.result.output)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Searched]:
    """Search with a trouble on a backend, once."""

    @cache
    def search_on(backend: str, trouble: str) -> Searched:
        progress: list[Progress] = []
        arguments = {"space": space_of(trouble), "sampler": InTurn(), "max_concurrent_trials": 1, "backend": backend}
        with pytest.warns(LearningWarning) as warned:
            found = run(tmp_path_factory.mktemp(backend) / "found", on_progress=progress.append, **arguments)
        return Searched(found, progress, [str(warning.message) for warning in warned], warned[-1].filename)

    return search_on


@pytest.fixture(params=TOLD)
def trouble(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(searched: Callable[[str, str], Searched], backend: str, trouble: str) -> Searched:
    return searched(backend, trouble)


def assert_told_in(trial: FrozenTrial, trouble: str) -> None:
    """Check that a trial in its study tells of ``trouble``."""
    assert trouble in trial.user_attrs["metrics"]["troubles"].split()
    assert list(trial.user_attrs["troubles"]) == trial.user_attrs["metrics"]["troubles"].split()
    assert re.match(TOLD[trouble], trial.user_attrs["troubles"][trouble])


class TestSearch:
    def test_is_told_at_the_trials_end_once(self, found: Searched, trouble: str) -> None:
        (message,) = (message for message in found.warned if f"did not learn as it should ({trouble}). " in message)
        assert message.endswith(found.result.trials[0].troubles[trouble])

    def test_is_told_at_the_searchs_end(self, found: Searched, trouble: str) -> None:
        assert found.warned[-1].startswith("2 of 3 trials did not learn as they should (")
        assert f"{trouble}: 0, 1" in found.warned[-1]
        assert found.place == toy.__file__  # where `search` is called
        assert sum("trials did not learn" in message for message in found.warned) == 1
        assert found.result.troubles[trouble] == [0, 1]
        assert load_search(found.result.output).troubles == found.result.troubles

    def test_is_told_in_the_trials_results_and_of_no_other(self, found: Searched, trouble: str) -> None:
        one, other, well = found.result.trials
        assert trouble in one.troubles
        assert one.troubles == other.troubles
        assert well.troubles == {}

    def test_is_told_in_the_progress(self, found: Searched, trouble: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert [progress.troubled for progress in found.progress] == [1, 2, 2]
        skipped = [1.0, 1.0, 10 / 15] if trouble == "skipped" else [0.0, 0.0, 0.0]
        assert [progress.skipped for progress in found.progress] == skipped
        assert [progress.fallback for progress in found.progress] == [0.0, 0.0, 0.0]
        _show(found.progress[-1])
        line = capsys.readouterr().err
        assert ", 2 did not learn, " in line
        assert ("67% of ul steps skipped" in line) == (trouble == "skipped")

    def test_is_told_in_the_table_of_trials(self, found: Searched, trouble: str) -> None:
        page = html.unescape(write_report(found.result.output).read_text(encoding="utf-8"))
        rows = dict(re.findall(r'<tr class="\w+"><td>(\d)</td>(.*?)</tr>', page, flags=re.DOTALL))
        for trial in found.result.trials:
            told = " ".join(trial.troubles.values())
            assert rows[str(trial.number)].endswith(f'<td class="text">{told}</td>')
        assert found.result.trials[0].troubles[trouble] in rows["0"]
        assert ("<td>100%</td>" in rows["0"]) == (trouble == "skipped")
        for heading in ("ul steps", "skipped", "by another solver", "ul values moved", "residual", "stationarity"):
            assert f"<th>{heading}</th>" in page

    def test_is_told_in_the_study(self, found: Searched, trouble: str) -> None:
        one, other, well = found.study.trials
        for trial in (one, other):
            assert_told_in(trial, trouble)
            assert trial.user_attrs["troubles"] == found.result.trials[trial.number].troubles
        assert well.user_attrs["metrics"]["troubles"] == ""
        assert "troubles" not in well.user_attrs
        assert found.study.user_attrs["troubles"] == found.result.troubles


@pytest.mark.usefixtures("ray_session")
def test_both_engines_tell_the_same(searched: Callable[[str, str], Searched], trouble: str) -> None:
    on_optuna, on_ray = searched("optuna", trouble), searched("ray", trouble)
    for one, other in zip(on_optuna.result.trials, on_ray.result.trials, strict=True):
        assert one.troubles == other.troubles
        assert one.metrics == other.metrics


def test_a_search_whose_trials_all_learn_tells_of_nothing(output: Path) -> None:
    told: list[Progress] = []
    result = run(output, 2, on_progress=told.append)  # a warning would be an error
    assert result.troubles == {}
    assert study_in(output).user_attrs["troubles"] == {}
    assert [(progress.skipped, progress.fallback, progress.troubled) for progress in told] == [(0, 0, 0)] * 2


def test_steps_that_another_solver_answered_are_told_in_the_progress(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Progress] = []
    settings = toy.SETTINGS | toy.TROUBLED["skipped"] | {"on_failure": "fallback"}
    result = run(output, 1, space={"seed": toy.SPACE["k"]}, settings=settings, on_progress=told.append)
    assert (result.trials[0].metrics["solver_used"], result.troubles) == ("minres", {})
    assert [(progress.skipped, progress.fallback, progress.troubled) for progress in told] == [(0, 1, 0)]
    _show(told[0])
    assert ", 100% of ul steps by another solver, " in capsys.readouterr().err


# ---- without a search of ours


@pytest.mark.usefixtures("quiet")
def test_a_plain_study_tells_once(trouble: str) -> None:
    study = optuna.create_study(sampler=InTurn())
    objective = ImplicitObjective(toy.problem, space_of(trouble), settings=toy.SETTINGS)
    with pytest.warns(LearningWarning) as warned:
        study.optimize(objective, n_trials=3)
    told = [str(warning.message) for warning in warned if f"({trouble})" in str(warning.message)]
    one, other, well = study.trials
    assert told == [f"Trial 0 did not learn as it should ({trouble}). {one.user_attrs['troubles'][trouble]}"]
    for trial in (one, other):
        assert_told_in(trial, trouble)
    assert "troubles" not in well.user_attrs


@pytest.mark.usefixtures("quiet", "ray_session")
def test_a_plain_tuner_tells_in_each_result(tmp_path: Path) -> None:
    def space(trial: optuna.Trial) -> dict[str, Any]:
        return toy.TROUBLED.get(trial.suggest_categorical("trouble", [*TOLD, "none"]), {"k": 3})

    searcher = ImplicitOptunaSearch(space, sampler=InTurn())
    config = tune.TuneConfig(
        search_alg=searcher, metric="select_loss", mode="min", num_samples=4, max_concurrent_trials=1, reuse_actors=True
    )
    results = tune.Tuner(
        tune.with_parameters(ImplicitTrainable, problem=toy.problem),
        param_space=toy.SETTINGS,
        tune_config=config,
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="ray", verbose=0),
    ).fit()
    assert not results.errors
    *ill, well = searcher.study.trials
    for trial in ill:
        assert_told_in(trial, trial.params["trouble"])
    assert "troubles" not in well.user_attrs
    told = [result.metrics["troubles"] for result in results]
    assert sorted(told) == sorted(trial.user_attrs["metrics"]["troubles"] for trial in searcher.study.trials)
