"""An Optuna study turned hybrid: the study stays yours, with its sampler, pruner and storage.

Run it with ``python examples/optuna_study.py``. Each trial learns one L2 penalty per feature of a breast-cancer
classifier by hypergradients; Optuna picks the solver, its effort and the learning rates.
"""

import optuna
import torch
from breast_cancer import problem
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tune_implicit import ImplicitObjective

space = {
    "solver": CategoricalDistribution(["cg", "neumann"]),
    "k": IntDistribution(1, 32, log=True),
    "ll_learning_rate": FloatDistribution(3e-3, 0.3, log=True),
    "ul_learning_rate": FloatDistribution(1e-2, 0.3, log=True),
}


def main(n_trials: int = 20) -> optuna.Study:
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
    )
    study.optimize(ImplicitObjective(problem, space, settings={"ul_steps": 60}), n_trials=n_trials)
    metrics = study.best_trial.user_attrs["metrics"]
    print(f"best select_loss {study.best_value:.4f}, accuracy {metrics['accuracy']:.3f}, with {study.best_params}")
    return study


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
