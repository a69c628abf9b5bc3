"""The engines' own lines off the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

import optuna

__all__ = ["quiet_optuna"]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's lines per trial, and its tracebacks of those that failed, off the terminal.

    The search shows its own progress there, keeps why a trial failed, and raises a mistake.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
