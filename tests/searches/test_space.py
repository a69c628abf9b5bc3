"""What is searched: checked, suggested, and its middle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from tests.support import toy
from tests.support.systems import ITERATIVE
from tests.support.toy import run
from tune_implicit import BilevelProblem, ImplicitSettings, InvalidTypeError, InvalidValueError, recommended_space
from tune_implicit.searches.space import call_space, check_space, middle_config, suggest
from tune_implicit.trials.settings import SETTINGS

SPACE = {
    "lr": FloatDistribution(1e-4, 1.0, log=True),
    "rate": FloatDistribution(0.0, 1.0, step=0.25),
    "k": IntDistribution(1, 32, log=True),
    "width": IntDistribution(16, 64, step=16),
    "solver": CategoricalDistribution(["cg", "neumann"]),
}


def ask() -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()


def returning(returned: Any) -> Callable[[optuna.Trial], Any]:
    """Return a define-by-run space that suggests `k` and returns ``returned``."""

    def space(trial: optuna.Trial) -> Any:
        trial.suggest_int("k", 1, 5)
        return returned

    return space


def test_a_dict_is_suggested_as_it_is() -> None:
    trial = ask()
    assert suggest(trial, SPACE) == trial.params
    assert trial.distributions == SPACE


@pytest.mark.parametrize("returned", [None, {"a": 1}, {}])
def test_a_callable_returns_the_config_or_nothing(returned: dict[str, int] | None) -> None:
    trial = ask()
    assert suggest(trial, returning(returned)) == (trial.params if returned is None else returned)
    assert call_space(returning(returned), ask()) == returned


@pytest.mark.parametrize("returned", [5, [("k", 1)]])
def test_a_callable_that_returns_something_else_is_an_error(returned: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"`space\(trial\)` must return the config as a dict, or None .* got "):
        suggest(ask(), returning(returned))


@pytest.mark.parametrize("space", [SPACE, returning(None)], ids=["dict", "callable"])
def test_a_dict_or_a_callable_is_a_space(space: Any) -> None:
    check_space(space)


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ([1], InvalidTypeError, r"or a callable\(trial\) that returns a config, got list"),
        ({}, InvalidValueError, "must name at least one setting"),
        ({"k": 5}, InvalidTypeError, r"`space\['k'\]|`space`\['k'\] must be an Optuna distribution, got 5"),
        ({"k": [1, 2]}, InvalidTypeError, r"Of a few values make a CategoricalDistribution"),
        ({"k": 5}, InvalidTypeError, "what does not vary belongs in `settings`"),
    ],
)
def test_what_is_no_space_is_told(space: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_space(space)


@pytest.mark.parametrize(
    ("distribution", "middle"),
    [
        (FloatDistribution(0.0, 3.0), 1.5),
        (FloatDistribution(1e-4, 1.0, log=True), 1e-2),
        (FloatDistribution(0.0, 1.0, step=0.25), 0.5),
        (IntDistribution(1, 9), 5),
        (IntDistribution(1, 64, log=True), 8),
        (IntDistribution(16, 80, step=16), 48),
        (CategoricalDistribution(["neumann", "cg"]), "neumann"),
    ],
    ids=repr,
)
def test_the_middle_is_that_of_its_scale_and_of_choices_the_first(distribution: BaseDistribution, middle: Any) -> None:
    assert middle_config({"it": distribution}) == {"it": pytest.approx(middle) if middle != "neumann" else middle}


def test_the_middle_of_a_callable_is_what_it_makes_of_the_middles() -> None:
    assert middle_config(lambda trial: {"k": 2 * trial.suggest_int("half", 1, 3)}) == {"k": 4}
    assert middle_config(returning(None)) == {"k": 3}


def test_the_middle_has_the_types_of_the_space() -> None:
    assert {name: type(value) for name, value in middle_config(SPACE).items()} == {
        "lr": float,
        "rate": float,
        "k": int,
        "width": int,
        "solver": str,
    }


# ---- the recommended one


def test_the_recommended_space_offers_every_iterative_solver() -> None:
    assert set(recommended_space()["solver"].choices) == set(ITERATIVE)


def test_the_recommended_space_is_of_a_trials_own_settings_alone() -> None:
    space = recommended_space()
    check_space(space)
    assert set(space) <= set(SETTINGS)


@pytest.mark.parametrize("end", ["low", "high"])
def test_both_ends_of_the_recommended_space_are_settings(end: str) -> None:
    ends = {name: getattr(at, end) for name, at in recommended_space().items() if name != "solver"}
    for solver in ITERATIVE:
        assert ImplicitSettings.from_config({**ends, "solver": solver}).ul_steps == ends["ul_steps"]


def test_the_recommended_space_leaves_out_what_is_fixed() -> None:
    fixed = {"solver": "minres", "ll_steps": 3, "width": 8}
    assert set(recommended_space()) - set(recommended_space(fixed)) == {"solver", "min_ll_steps"}
    assert set(recommended_space({"ll_steps": "auto"})) == set(recommended_space())


def test_the_recommended_space_is_ones_own_to_change() -> None:
    recommended_space().clear()
    assert recommended_space()


# What is picked at random need not learn.
@pytest.mark.filterwarnings("ignore:.* did not learn as .* should:tune_implicit.LearningWarning")
def test_a_problems_own_settings_are_added_to_the_recommended_space(output: Path) -> None:
    seen = []

    def problem(config: Any) -> BilevelProblem:
        seen.append(config["width"])
        return toy.problem(config)

    space = recommended_space() | {"width": IntDistribution(4, 8), "ul_steps": IntDistribution(2, 3)}
    result = run(output, 4, problem=problem, space=space, settings={"penalties": 4}, seed=0)
    assert [trial.state for trial in result.trials] == ["complete"] * 4
    assert [trial.config["width"] for trial in result.trials] == seen
    assert all(set(trial.config) == {*space, "penalties", "seed"} for trial in result.trials)
