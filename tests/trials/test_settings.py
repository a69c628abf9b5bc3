import dataclasses
import math

import numpy as np
import pytest

from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.trials.settings import SETTINGS, ImplicitSettings

# Settings that may also be None.
OPTIONAL = ("max_ll_gradient_norm", "max_gradient_evaluations")


def test_from_config_takes_its_own_and_leaves_the_rest() -> None:
    settings = ImplicitSettings.from_config({"k": 3, "solver": "cg", "width": 64})
    assert settings == ImplicitSettings(k=3, solver="cg")


def test_numbers_of_search_engines_become_plain_ones() -> None:
    # Ray's quantised samplers return whole floats, NumPy's generators their own types.
    settings = ImplicitSettings(
        k=np.int64(3), ll_steps=5.0, seed=np.uint8(7), rtol=np.float32(0.5), tolerance=0, solver=np.str_("cg")
    )
    assert [settings.k, settings.ll_steps, settings.seed, settings.rtol, settings.tolerance] == [3, 5, 7, 0.5, 0.0]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        assert type(value) is field.type or field.name in ("step_size", "ll_steps", *OPTIONAL)
    assert type(settings.ll_steps) is int
    assert type(ImplicitSettings(max_gradient_evaluations=np.float64(9.0)).max_gradient_evaluations) is int
    assert type(ImplicitSettings(step_size=np.float32(0.5)).step_size) is float
    assert type(ImplicitSettings(verify=np.bool_(True)).verify) is bool


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("solver", ["CG", ""], "one of cg, minres, neumann, dense"),
        ("k", [-1], "0 or more"),
        ("tolerance", [-1e-9, math.nan], "0 or more"),
        ("rtol", [-1e-9, math.nan], "0 or more"),
        ("ll_learning_rate", [0.0, -1.0, math.inf, math.nan], "positive and finite"),
        ("ul_learning_rate", [-1.0, math.inf, math.nan], "0 or more and finite"),
        ("ll_steps", [-1, "", "automatic"], '0 or more, or "auto"'),
        ("ul_steps", [0, -1], "1 or more"),
        ("min_ll_steps", [0, -1], "1 or more"),
        ("max_ll_steps", [0, -1], "1 or more"),
        ("max_gradient_evaluations", [0, -1], "positive"),
        ("warmup_ll_steps", [-1], "0 or more"),
        ("ul_batches", [0, -1], "1 or more"),
        ("ul_steps_per_report", [0], "1 or more"),
        ("keep", ["first", ""], "one of best, last"),
        ("patience", [-1], "0 or more"),
        ("step_size", [0.0, -1.0, math.nan, "automatic"], 'positive and finite, or "auto"'),
        ("on_failure", ["ignore"], "one of fallback, skip, raise, stop"),
        ("seed", [-1], "0 or more"),
    ],
)
def test_message_of_a_value_out_of_range(name: str, values: list, rule: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` must be {rule}, got {value!r}\\.$"):
            ImplicitSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("k", [1.5, "3", True, None, math.nan, math.inf, [3]], "an integer"),
        ("tolerance", ["1e-3", True, None], "a number"),
        ("solver", [None, 3, ConjugateGradient(1)], "a string"),
        ("ll_steps", [1.5, True, None, [3]], '0 or more, or "auto"'),
        ("ul_batches", [1.5, "2", None], "an integer"),
        ("max_gradient_evaluations", [1.5, "9", True, math.inf], "positive"),
        ("adapt_ul_learning_rate", [1, "yes", None], "True or False"),
        ("keep", [None, True], "a string"),
    ],
)
def test_message_of_a_wrong_type(name: str, values: list, rule: str) -> None:
    for value in values:
        with pytest.raises(TypeError, match=f"`{name}` must be {rule}, got "):
            ImplicitSettings(**{name: value})


def test_several_mistakes_are_told_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"`k` must be .* -1\. `ul_steps` must be .* 0\. `on_failure` must be"):
        ImplicitSettings(k=-1, ul_steps=0, on_failure="hope")


def test_a_search_picks_solvers_and_what_is_for_one_does_not_bother_the_others() -> None:
    settings = ImplicitSettings(preconditioner_memory=4, solver="minres", step_size="auto")
    assert SolverSettings(**settings.of_a_solve).preconditioner() is None
    settings = ImplicitSettings(preconditioner_memory=4, solver="cg")
    assert SolverSettings(**settings.of_a_solve).preconditioner().memory == 4


@pytest.mark.parametrize("policy", ["skip", "raise", "fallback", "stop"])
def test_fallback_is_a_policy(policy: str) -> None:
    assert "fallback" not in SETTINGS
    settings = ImplicitSettings.from_config({"on_failure": policy, "fallback": "a key of the user's own"})
    assert SolverSettings(**settings.of_a_solve).fallback is (policy == "fallback")


@pytest.mark.parametrize(("ll_steps", "least"), [("auto", 7), (3, 3), (0, 0), (np.float64(12.0), 12)])
def test_ll_steps_that_are_surely_taken(ll_steps: object, least: int) -> None:
    assert ImplicitSettings(ll_steps=ll_steps, min_ll_steps=7).least_ll_steps == least


def test_of_a_least_above_the_most_the_most_wins() -> None:
    """A search may vary the one and fix the other."""
    assert ImplicitSettings(min_ll_steps=9, max_ll_steps=8).least_ll_steps == 8
    assert ImplicitSettings(min_ll_steps=7, max_ll_steps=8).least_ll_steps == 7


@pytest.mark.parametrize("step_size", [None, "auto", 0.5])
def test_step_size_is_for_the_series(step_size: object) -> None:
    settings = ImplicitSettings(step_size=step_size, solver="neumann", ll_learning_rate=0.1)
    assert settings.of_a_solve["step_size"] == step_size
