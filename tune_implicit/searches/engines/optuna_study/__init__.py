"""Optuna: an ordinary objective in an ordinary study, and a worker of a search."""
