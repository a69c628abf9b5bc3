"""Exceptions of trials: whether a search goes on, and what is kept."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from tune_implicit import InvalidValueError
from tune_implicit.searches.failures import Failures

RAISED = create_trial(state=TrialState.FAIL, user_attrs={"raised": "ValueError"})
DIVERGED = create_trial(state=TrialState.FAIL)
COMPLETE = create_trial(value=1.0)


@pytest.mark.parametrize(
    ("on_error", "before", "goes_on"),
    [
        (None, [], False),
        (None, [RAISED], False),
        (None, [DIVERGED], False),
        (None, [COMPLETE], True),
        (None, [COMPLETE, RAISED, RAISED, RAISED], True),
        ("record", [], True),
        ("record", [RAISED], True),
        ("record", [RAISED, RAISED], False),
        ("record", [DIVERGED, DIVERGED], True),
        ("record", [RAISED, RAISED, COMPLETE], True),
        ("raise", [COMPLETE], False),
    ],
)
def test_a_search_goes_on_where_a_mistake_is_not_likely(
    tmp_path: Path, on_error: str | None, before: list[optuna.trial.FrozenTrial], goes_on: bool
) -> None:
    study = optuna.create_study()
    study.add_trials(before)
    assert Failures(on_error, tmp_path).may_go_on(study) is goes_on


def test_what_was_raised_is_kept_with_its_traceback(tmp_path: Path) -> None:
    try:
        raise ValueError("the objective is wrong")
    except ValueError as error:
        failure = Failures(None, tmp_path).keep(3, error)
    assert failure == "It raised ValueError: the objective is wrong (see errors/trial_3.txt)"
    assert "in test_what_was_raised" in (tmp_path / "errors" / "trial_3.txt").read_text()


def test_another_policy_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="`on_error` must be one of record, raise, or None, got 'ignore'"):
        Failures("ignore", tmp_path)
