from functools import partial

import pytest
import torch

from tests.support.broken import Again, Broken, seen_by, wrong
from tests.support.working import split, working
from tune_implicit.checks.data import look_at_data
from tune_implicit.checks.findings import Level

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
    "a later batch that is no pair": Broken("data", partial(working, train_data=[*split(0), torch.ones(3)])),
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
