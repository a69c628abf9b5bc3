"""When a trial that runs is saved."""

import math

import pytest

from tune_implicit import InvalidValueError
from tune_implicit.trials.saving import SHARE, SaveClock


class FakeTime:
    """A clock that goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


def test_the_first_save_is_due_so_long_after_the_start(time: FakeTime) -> None:
    saves = SaveClock(30, time)
    time.now += 29
    assert not saves.due()
    time.now += 1
    assert saves.due()
    assert saves.due()  # until there was one


@pytest.mark.parametrize(("took_s", "wait_s"), [(0.0, 30), (0.5, 30), (1.0, 50), (60.0, 3000)])
def test_the_next_is_due_so_long_after_the_last_and_later_if_that_took_long(
    time: FakeTime, took_s: float, wait_s: float
) -> None:
    saves = SaveClock(30, time)
    time.now += 100
    saves.saved(took_s)
    time.now += wait_s - 1
    assert not saves.due()
    time.now += 1
    assert saves.due()


def test_a_save_that_was_quick_ends_the_long_wait_after_a_slow_one(time: FakeTime) -> None:
    saves = SaveClock(30, time)
    saves.saved(60)
    time.now += 2999
    saves.saved(0.1)
    time.now += 30
    assert saves.due()


@pytest.mark.parametrize("every_s", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("took_s", [0.01, 0.3, 7.0])
def test_saving_takes_no_more_than_its_share(time: FakeTime, every_s: float, took_s: float) -> None:
    saves, spent = SaveClock(every_s, time), 0.0
    start = time.now
    for _ in range(20_000):
        time.now += 0.5  # a step
        if saves.due():
            time.now += took_s
            spent += took_s
            saves.saved(took_s)
    # The first save came before anything was known of it.
    assert 0 < spent - took_s <= SHARE * (time.now - start)


def test_infinity_means_no_save(time: FakeTime) -> None:
    saves = SaveClock(math.inf, time)
    time.now += 1e9
    assert not saves.due()


def test_time_goes_on_by_itself() -> None:
    assert SaveClock(0).due()
    assert not SaveClock(1e6).due()


@pytest.mark.parametrize("every_s", [-1.0, math.nan])
def test_a_time_below_0_is_an_error(every_s: float) -> None:
    with pytest.raises(InvalidValueError, match=r"`save_every_s` must be 0 or more, got .*math\.inf"):
        SaveClock(every_s)
