"""A Ray Tune script turned hybrid: the Tuner stays yours, with its scheduler, resources and storage.

Run it with ``python examples/ray_tuner.py``. The problem and what is searched are in ``breast_cancer.py``; ASHA stops
poor trials.
"""

import ray
from breast_cancer import problem, space
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tune_implicit import ImplicitOptunaSearch, ImplicitTrainable


def main(n_trials: int = 20) -> tune.ResultGrid:
    tuner = tune.Tuner(
        tune.with_parameters(ImplicitTrainable, problem=problem),
        param_space={"ul_steps_per_report": 10},  # the same in every trial
        tune_config=tune.TuneConfig(
            search_alg=ImplicitOptunaSearch(space, seed=0),
            scheduler=ASHAScheduler(time_attr="ul_step", max_t=200, grace_period=20),
            metric="select_loss",
            mode="min",
            num_samples=n_trials,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
    )
    results = tuner.fit()
    best = results.get_best_result()
    print(f"best select_loss {best.metrics['select_loss']:.4f}, accuracy {best.metrics['accuracy']:.3f}, {best.config}")
    return results


if __name__ == "__main__":
    ray.init(include_dashboard=False)
    main()
    ray.shutdown()
