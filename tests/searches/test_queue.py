"""Which trial a worker runs next."""

from collections.abc import Iterator

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from tune_implicit.searches import leases as lease_room
from tune_implicit.searches.borrowed import running_trial
from tune_implicit.searches.leases import Lease, Leases, lease_of
from tune_implicit.searches.outcome import CUT_OFF, write_failure
from tune_implicit.searches.queue import TrialQueue


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


@pytest.fixture
def leases(study: optuna.Study) -> Iterator[Leases]:
    with Leases(study) as held:
        yield held


def test_a_new_trial_comes_with_its_lease(study: optuna.Study, leases: Leases) -> None:
    trial = TrialQueue(study, 2, leases).take("its run")
    assert (trial.number, study.trials[0].state) == (0, TrialState.RUNNING)
    assert (lease_of(study.trials[0]).worker, lease_of(study.trials[0]).runs) == (leases.worker, ("its run",))
    leases.check(trial, surely=True)


def test_a_new_trial_may_be_anothers_before_its_worker_has_looked(
    study: optuna.Study, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = study.add_trial

    def stopped(trial: optuna.trial.FrozenTrial) -> None:
        added(trial)
        Lease("another/1/1/a", ("x",)).write(running_trial(study, study.trials[-1]))

    monkeypatch.setattr(study, "add_trial", stopped)
    assert TrialQueue(study, 1, leases).take() is None


def test_there_are_as_many_as_were_asked_for(study: optuna.Study, leases: Leases) -> None:
    queue = TrialQueue(study, 2, leases)
    first, second = queue.take(), queue.take()
    assert queue.take() is None
    assert not queue.over
    queue.tell(first, 1.0, TrialState.COMPLETE)
    assert queue.take() is None
    queue.tell(second, None, TrialState.FAIL)  # it failed by itself, and counts
    assert queue.over
    assert TrialQueue(study, None, leases).take() is not None


def test_what_was_interrupted_does_not_count(study: optuna.Study, leases: Leases) -> None:
    queue = TrialQueue(study, 1, leases)
    trial = queue.take()
    write_failure(trial, CUT_OFF)
    queue.tell(trial, None, TrialState.FAIL)
    assert not queue.over
    assert queue.take().number == 1


def test_what_waits_comes_first_and_keeps_its_runs(study: optuna.Study, leases: Leases) -> None:
    queue = TrialQueue(study, 3, leases)
    first = queue.take("one")
    queue.give_back(first)
    again = queue.take("two")
    assert again.number == 0
    assert leases.runs(again) == ("one", "two")


def test_a_trial_of_a_worker_that_died_is_taken_up(
    study: optuna.Study, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_room, "SETTLE_S", 0.0)
    with Leases(study) as dead:
        TrialQueue(study, 1, dead).take()
    assert TrialQueue(study, 1, leases).take().number == 0


def test_another_workers_trial_is_neither_told_nor_put_back(study: optuna.Study, leases: Leases) -> None:
    queue = TrialQueue(study, 2, leases)
    for end in (lambda trial: queue.tell(trial, 1.0, TrialState.COMPLETE), queue.give_back):
        trial = queue.take()
        Lease("another/1/1/a", ("x",)).write(trial)
        assert not queue.holds(trial)
        end(trial)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING] * 2


def test_a_sampler_with_no_more_to_propose_ends_the_search(leases: Leases) -> None:
    space = {"k": [1, 2]}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(space))
    with Leases(study) as held:
        queue = TrialQueue(study, 10, held)
        while not queue.over:
            trial = queue.take()
            trial._suggest("k", CategoricalDistribution(space["k"]))
            queue.tell(trial, 1.0, TrialState.COMPLETE)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
