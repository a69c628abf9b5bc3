"""The engines' own lines off the terminal, for as long as a search lasts."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import optuna
import pytest

from tune_implicit.searches.quiet import environment, quiet_optuna, quiet_ray

TUNE = ("ray.tune", "ray.tune.execution.insufficient_resources_manager")


def state() -> tuple[int, list[int], dict[str, str]]:
    """Return all that the contexts change."""
    return optuna.logging.get_verbosity(), [logging.getLogger(name).level for name in TUNE], dict(os.environ)


@pytest.mark.parametrize("context", [quiet_optuna, quiet_ray, lambda: environment(THIS="1")])
def test_all_is_as_it_was_after_an_error(context: Callable[[], AbstractContextManager[None]]) -> None:
    before = state()
    with suppress(KeyboardInterrupt), context():
        assert state() != before
        raise KeyboardInterrupt
    assert state() == before


@pytest.mark.parametrize("verbosity", [optuna.logging.DEBUG, optuna.logging.CRITICAL])
def test_optuna_has_the_verbosity_again_that_it_had(verbosity: int) -> None:
    before = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(verbosity)
        with quiet_optuna():
            assert optuna.logging.get_verbosity() == optuna.logging.ERROR
        assert optuna.logging.get_verbosity() == verbosity
    finally:
        optuna.logging.set_verbosity(before)


def test_optunas_lines_on_a_study_and_its_trials_are_kept_off(caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.enable_propagation()
    try:
        with quiet_optuna():
            study = optuna.create_study()
            study.optimize(lambda trial: 1.0 / trial.number, n_trials=2, catch=ZeroDivisionError)
    finally:
        optuna.logging.disable_propagation()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert not caplog.records


def test_tunes_tracebacks_of_trials_that_failed_are_kept_off() -> None:
    controller = logging.getLogger("ray.tune.execution.tune_controller")
    assert controller.isEnabledFor(logging.ERROR)
    with quiet_ray():
        assert not controller.isEnabledFor(logging.ERROR)
    assert controller.isEnabledFor(logging.ERROR)


def test_that_no_machine_has_room_for_a_trial_is_still_told() -> None:
    with quiet_ray():
        assert logging.getLogger(TUNE[1]).isEnabledFor(logging.WARNING)


def test_tune_writes_neither_tables_nor_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", raising=False)
    with quiet_ray():
        assert os.environ["RAY_AIR_NEW_OUTPUT"] == "0"
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
    assert os.environ["RAY_AIR_NEW_OUTPUT"] == "1"
    assert "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS" not in os.environ


def test_a_variable_has_its_value_for_as_long_as_the_context_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "old")
    monkeypatch.delenv("NEW", raising=False)
    with environment(OLD="other", NEW="new"):
        assert (os.environ["OLD"], os.environ["NEW"]) == ("other", "new")
        with environment(OLD="inner"):
            assert os.environ["OLD"] == "inner"
        assert os.environ["OLD"] == "other"
    assert os.environ["OLD"] == "old"
    assert "NEW" not in os.environ
