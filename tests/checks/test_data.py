import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.broken import Again, Broken, seen_by, wrong
from tests.support.working import SETTINGS, ll_objective, split, working
from tune_implicit import State
from tune_implicit.checks.budget import Budget
from tune_implicit.checks.check import check
from tune_implicit.checks.data import look_at_data
from tune_implicit.checks.findings import CheckReport, Level
from tune_implicit.checks.fixed import FixedProblem

BROKEN = {
    "no select_data": Broken("no-select-data", partial(working, select_data=None), level=Level.WARNING),
    "the same data twice": Broken("same-data", partial(working, validate_data=split(0)), level=Level.WARNING),
    "trials compared on what ul steps minimise": Broken(
        "same-data", partial(working, select_data=split(1)), level=Level.WARNING
    ),
    "splits swapped": Broken(
        "splits-swapped",
        partial(working, train_data=split(1, 20), validate_data=split(0, 200)),
        level=Level.WARNING,
    ),
    "a split that turns out empty": Broken("data", partial(working, select_data=Again(0))),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_data)) == {broken.finding: broken.level}


def test_of_three_splits_that_hold_enough_there_is_nothing_to_say() -> None:
    assert seen_by(look_at_data, working()).findings == []


def test_splits_are_compared_by_their_examples_not_by_their_batches() -> None:
    train_data = [batch for seed in range(3, 7) for batch in split(seed, 10)]
    report = seen_by(look_at_data, working(train_data=train_data, validate_data=split(1, 45)))
    (finding,) = report.findings
    assert "`validate_data` holds 45 examples and `train_data` 40" in finding.message
    assert seen_by(look_at_data, working(train_data=train_data, validate_data=split(1, 40))).findings == []


def test_one_example_is_not_taken_for_a_swapped_split() -> None:
    problem = working(train_data=split(1, 1), validate_data=split(0, 200))
    assert seen_by(look_at_data, problem).findings == []


def test_a_split_without_end_is_not_read_to_its_end() -> None:
    endless = Again(float("inf"))
    assert wrong(seen_by(look_at_data, working(train_data=endless))) == {}
    assert endless.read == 1000


def test_batches_of_other_shapes_or_types_are_not_the_same() -> None:
    ((x, y),) = split(0)
    for validate_data in ([(x.float(), y)], [(x[:-1], y[:-1])], [(x, (y, y))]):
        assert seen_by(look_at_data, working(validate_data=validate_data)).findings == []


def masked(state: State) -> Tensor:
    """Return a loss that leaves out targets that are NaN."""
    there = state.target.isfinite()
    return (state.ll_model(state.data) - state.target)[there].square().mean()


def test_values_that_an_objective_leaves_out_are_no_fault() -> None:
    data = split(1)
    data[0][1][5] = math.nan
    report = seen_by(look_at_data, working(validate_data=data, ul_objective=masked))
    assert wrong(report) == {"nan-in-data": Level.WARNING}
    assert "The target of `validate_data` holds 1 that is NaN, of 60 values" in report.findings[0].message


def test_a_gradient_that_is_not_finite_is_not_left_out() -> None:
    def replaced(state: State) -> Tensor:
        errors = (state.ll_model(state.data) * state.target).square()
        return torch.where(state.target.isfinite(), errors, torch.zeros_like(errors)).mean()

    data = split(1)
    data[0][1][5] = math.nan
    assert wrong(seen_by(look_at_data, working(validate_data=data, ul_objective=replaced))) == {
        "nan-in-data": Level.FAULT
    }


def test_all_splits_with_values_that_are_no_numbers_are_told_at_once() -> None:
    splits = {name: split(seed) for seed, name in enumerate(("train_data", "validate_data", "select_data"))}
    for data in splits.values():
        data[0][0][0, 0], data[0][0][0, 1] = math.nan, -math.inf
    faults = seen_by(look_at_data, working(**splits)).faults
    assert [name for fault in faults for name in splits if f"`{name}`" in fault.message] == list(splits)
    assert "1 that is NaN and 1 that is infinite, of 240 values" in faults[0].message


def test_an_objective_that_raises_at_such_values_is_not_blamed() -> None:
    def raises(state: State) -> Tensor:
        assert state.data.isfinite().all()
        return ll_objective(state)

    data = split(0)
    data[0][0][0, 0] = math.nan
    assert wrong(seen_by(look_at_data, working(train_data=data, ll_objective=raises))) == {"nan-in-data": Level.FAULT}


def test_integers_and_words_are_numbers_enough() -> None:
    data = [({"x": x, "words": ["a"], "i": torch.arange(len(x))}, y) for x, y in split(0)]
    assert seen_by(look_at_data, working(train_data=data)).findings == []


def test_in_little_time_a_split_is_not_read_to_its_end() -> None:
    endless = Again(float("inf"))
    fixed, report = FixedProblem.of(working(train_data=endless), SETTINGS, Budget(0.0)), CheckReport()
    look_at_data(fixed, report)
    assert endless.read == 1
    assert "What `train_data` holds after batch 1: not looked at for lack of time" in report.findings[0].message


def test_a_mistake_of_ours_is_not_taken_for_data_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = working()
    (x, y), *_ = made.train_data
    problem = replace(made, train_data=[(torch.full_like(x, math.nan), y)])
    monkeypatch.setattr(FixedProblem, "value", lambda *_: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        check(problem)
