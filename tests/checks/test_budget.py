import math

import pytest

from tune_implicit.checks.budget import Budget


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_spent_at_its_deadline() -> None:
    clock = Clock()
    budget = Budget.of(10.0, clock)
    assert (budget.left_s, budget.spent) == (10.0, False)
    clock.now += 10
    assert (budget.left_s, budget.spent) == (0.0, True)
    clock.now += 5
    assert budget.left_s == 0


def test_a_part_is_one_of_what_is_left() -> None:
    clock = Clock()
    budget = Budget.of(10.0, clock)
    clock.now += 6
    assert budget.part(0.5).ends == 108
    clock.now += 6
    assert budget.part(0.5).spent


@pytest.mark.parametrize(("each_s", "most", "number"), [(1.0, 5, 5), (2.0, 5, 5), (3.0, 5, 3), (20.0, 5, 0)])
def test_it_affords_as_many_as_there_is_time_for(each_s: float, most: int, number: int) -> None:
    assert Budget.of(10.0, Clock()).affords(each_s, most) == number


def test_without_a_deadline_it_is_never_spent() -> None:
    budget = Budget()
    assert not budget.spent
    assert budget.part(0.1).left_s == math.inf
    assert budget.affords(1e9, 7) == 7
