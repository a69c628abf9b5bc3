"""Hybrid hyperparameter search: implicit hypergradients inside the trials of Ray Tune and Optuna."""
