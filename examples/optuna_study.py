"""An Optuna study turned hybrid: the study stays yours, with its sampler, pruner and storage.

Run it with ``python examples/optuna_study.py``. The problem and what is searched are in ``breast_cancer.py``.
"""

import optuna
import torch
from breast_cancer import problem, space

from tune_implicit import ImplicitObjective


def main(n_trials: int = 20) -> optuna.Study:
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
    )
    study.optimize(ImplicitObjective(problem, space), n_trials=n_trials)
    metrics = study.best_trial.user_attrs["metrics"]
    print(f"best select_loss {study.best_value:.4f}, accuracy {metrics['accuracy']:.3f}, with {study.best_params}")
    return study


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
