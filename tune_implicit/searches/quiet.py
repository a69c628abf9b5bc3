"""The engines' own lines off the terminal: a search shows its own progress there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import optuna

__all__ = ["environment", "quiet_optuna", "quiet_ray"]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's lines per trial, and its tracebacks of those that failed, off the terminal.

    The search keeps why a trial failed, and raises a mistake.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def quiet_ray() -> Iterator[None]:
    """Keep Tune's tables and Ray's logs off the terminal, and Tune's records to the checkpoints, which hold them all.

    Tune's tables go by ``verbose=0`` only in its old output, its loggers to CSV, JSON and TensorBoard by a variable.
    It logs a traceback for each failure, which the search raises, or records and survives; and Ray one for each that
    no one fetched, since the search had ended.
    """
    variables = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    }
    levels = {"ray.tune": logging.CRITICAL, "ray.tune.execution.insufficient_resources_manager": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with environment(**variables):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
