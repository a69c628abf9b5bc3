"""A Ray Tune script turned hybrid: the Tuner stays yours, with its scheduler, resources and storage.

Run it with ``python examples/ray_tuner.py``. Each trial learns one L2 penalty per feature of a breast-cancer
classifier by hypergradients; the search picks the solver, its effort and the learning rates, ASHA stops poor trials.
"""

import ray
from breast_cancer import problem
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tune_implicit import ImplicitOptunaSearch, ImplicitTrainable

space = {
    "solver": CategoricalDistribution(["cg", "neumann"]),
    "k": IntDistribution(1, 32, log=True),
    "ll_learning_rate": FloatDistribution(3e-3, 0.3, log=True),
    "ul_learning_rate": FloatDistribution(1e-2, 0.3, log=True),
}


def main(n_trials: int = 20) -> tune.ResultGrid:
    tuner = tune.Tuner(
        tune.with_parameters(ImplicitTrainable, problem=problem),
        param_space={"ul_steps": 60},  # the same in every trial
        tune_config=tune.TuneConfig(
            search_alg=ImplicitOptunaSearch(space, seed=0),
            scheduler=ASHAScheduler(time_attr="ul_step", max_t=60, grace_period=20),
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
