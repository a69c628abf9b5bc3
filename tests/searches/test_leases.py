"""Leases: written, renewed, lost, expired."""

import time
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.searches import leases as room
from tune_implicit.searches.borrowed import put_back, stored
from tune_implicit.searches.leases import Lease, LeaseLostError, Leases, Watch, lease_of, put_back_abandoned

SHORT_S = 0.3


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


@pytest.fixture
def leases(study: optuna.Study) -> Iterator[Leases]:
    with Leases(study, SHORT_S) as held:
        yield held


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims that settle at once."""
    monkeypatch.setattr(room, "SETTLE_S", 0.0)


def running(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=[TrialState.RUNNING])


def until(condition: Any) -> None:
    """Wait until ``condition`` holds; the test runner's own limit ends what never does."""
    while not condition():
        time.sleep(0.01)


def elsewhere(trial: optuna.Trial) -> Lease:
    """Let a worker of another machine hold ``trial``."""
    lease = Lease("another/1/1/a", ("run",), SHORT_S)
    lease.write(trial)
    return lease


def test_a_lease_is_renewed(study: optuna.Study, leases: Leases) -> None:
    trial = study.ask()
    leases.take(trial, leases.new())
    until(lambda: lease_of(stored(study, trial)).beat > 1)
    leases.check(trial, surely=True)


def test_one_that_is_dropped_is_not(study: optuna.Study, leases: Leases) -> None:
    trial = study.ask()
    leases.take(trial, leases.new())
    leases.drop(trial)
    beat = lease_of(stored(study, trial)).beat
    time.sleep(SHORT_S)
    assert lease_of(stored(study, trial)).beat == beat
    with pytest.raises(LeaseLostError, match="Trial 0 was taken over"):
        leases.check(trial)


@pytest.mark.parametrize("how", ["another worker", "queue", "end"])
def test_one_that_is_taken_over_is_lost(study: optuna.Study, leases: Leases, how: str) -> None:
    trial = study.ask()
    leases.take(trial, leases.new())
    if how == "another worker":
        elsewhere(trial)
    elif how == "queue":
        put_back(study, trial)
    else:
        study.tell(trial, 1.0)
    with pytest.raises(LeaseLostError):
        leases.check(trial, surely=True)


def test_a_worker_that_wakes_up_late_asks_before_it_goes_on(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leases, "_renew", lambda self: None)  # as one that is stopped
    with Leases(study, SHORT_S) as leases:
        trial = study.ask()
        leases.take(trial, leases.new())
        elsewhere(trial)
        leases.check(trial)  # it is in time, and does not ask
        time.sleep(SHORT_S)
        with pytest.raises(LeaseLostError):
            leases.check(trial)


def test_a_storage_that_fails_does_not_end_the_renewals(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([OSError("refused"), OSError("refused")])

    def is_ours(self: Leases, trial: optuna.Trial) -> bool:
        error = next(failures, None)
        if error is not None:
            raise error
        return True

    monkeypatch.setattr(Leases, "_is_ours", is_ours)
    with Leases(study, SHORT_S) as leases:
        trial = study.ask()
        leases.take(trial, leases.new())
        until(lambda: lease_of(stored(study, trial)).beat > 0)


def test_a_lease_expires_by_the_clock_of_who_watches_it(study: optuna.Study) -> None:
    # Its own machine's clock is never asked.
    trial, watch = study.ask(), Watch()
    elsewhere(trial)
    assert watch.abandoned(running(study)) == []
    time.sleep(SHORT_S)
    assert [trial.number for trial in watch.abandoned(running(study))] == [0]


def test_one_that_is_renewed_does_not(study: optuna.Study) -> None:
    trial, watch = study.ask(), Watch()
    lease = elsewhere(trial)
    for beat in range(1, 5):
        assert watch.abandoned(running(study)) == []
        time.sleep(SHORT_S / 2)
        Lease(lease.worker, lease.runs, SHORT_S, beat).write(trial)


def test_the_lease_of_a_worker_that_ended_needs_no_watching(study: optuna.Study) -> None:
    with Leases(study) as leases:
        trial = study.ask()
        leases.take(trial, leases.new())
        assert Watch().abandoned(running(study)) == []
    assert len(Watch().abandoned(running(study))) == 1


@pytest.mark.usefixtures("soon")
def test_an_abandoned_trial_goes_back_with_what_it_has(study: optuna.Study) -> None:
    trial = study.ask()
    k = trial.suggest_int("k", 1, 8)
    trial.report(0.5, 1)
    elsewhere(trial)
    put_back_abandoned(study, running(study))
    again = study.ask()
    assert (again.number, again.params) == (0, {"k": k})
    assert stored(study, again).intermediate_values == {1: 0.5}


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["renewed", "ended", "taken"])
def test_what_has_changed_since_it_was_seen_stays(study: optuna.Study, how: str) -> None:
    trial = study.ask()
    lease = elsewhere(trial)
    seen = running(study)
    if how == "renewed":
        Lease(lease.worker, lease.runs, SHORT_S, 1).write(trial)
    elif how == "ended":
        study.tell(trial, 1.0)
    else:
        Lease("a third/1/1/a", lease.runs, SHORT_S).write(trial)
    put_back_abandoned(study, seen)
    assert study.get_trials(states=[TrialState.WAITING]) == []


def test_of_two_that_claim_a_trial_one_puts_it_back(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = study.ask()
    elsewhere(trial)
    seen, put = running(study), []
    # While the first waits for its claim to settle, the second has claimed as well.
    monkeypatch.setattr(room.time, "sleep", lambda seconds: trial.set_user_attr("claim", "of the second"))
    monkeypatch.setattr(room, "put_back", lambda study, trial: put.append(trial.number))
    put_back_abandoned(study, seen)
    assert put == []
