"""Draws by the number of a trial."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from tune_implicit.searches.sampling import NumberedTPESampler, seed_of

SPACE = {"a": FloatDistribution(1e-3, 1.0, log=True), "b": IntDistribution(1, 100), "c": CategoricalDistribution("xyz")}


def study_of(n_trials: int, seed: int = 0) -> optuna.Study:
    study = optuna.create_study(sampler=NumberedTPESampler(seed))
    for _ in range(n_trials):
        trial = study.ask(SPACE)
        study.tell(trial, trial.params["a"] + trial.params["b"])
    return study


def test_seeds_of_trials_and_uses_differ() -> None:
    seeds = {seed_of(seed, number, *use) for seed in range(20) for number in range(20) for use in ((), ("a",), ("b",))}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("at", [3, 15])
def test_who_draws_and_how_often_does_not_matter(at: int) -> None:
    # Before TPE has seen enough trials to propose on, and after.
    study, whole = study_of(at), study_of(20)
    again = optuna.create_study(sampler=NumberedTPESampler(0))
    again.add_trials(study.trials)
    begun = again.ask({"b": SPACE["b"]})  # cut off between two params
    again.sampler = NumberedTPESampler(0)
    resumed = optuna.Trial(again, begun._trial_id)
    assert {name: resumed._suggest(name, SPACE[name]) for name in SPACE} == whole.trials[at].params


def test_another_seed_draws_another_search() -> None:
    first, second = ([trial.params for trial in study_of(12, seed).trials] for seed in (0, 1))
    assert not any(params in second for params in first)


def test_it_finds_what_tpe_finds() -> None:
    study = study_of(60)
    late = [trial.params["b"] for trial in study.get_trials(states=[TrialState.COMPLETE])[30:]]
    assert sum(late) / len(late) < 35  # at random, 50
