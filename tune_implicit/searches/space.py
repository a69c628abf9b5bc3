"""What is searched: a dict of Optuna distributions, or a define-by-run callable."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.searches.quiet import quiet_optuna

__all__ = ["Space", "call_space", "check_space", "middle_config", "recommended_space", "suggest"]

Space = Mapping[str, BaseDistribution] | Callable[[optuna.Trial], dict[str, Any] | None]


def recommended_space(settings: Mapping[str, Any] | None = None) -> dict[str, BaseDistribution]:
    """Return what to search where nothing is known of a problem.

    Add the problem's own settings to it, and where its ul values start: ``recommended_space() | {"log_l2":
    FloatDistribution(-8, 0)}``. A hypergradient points downhill from there, and not always to the lowest place.

    Parameters
    ----------
    settings : mapping, optional
        What is the same in every trial, and so left out; ``min_ll_steps`` as well where ``ll_steps`` is a number.

    Returns
    -------
    dict of Optuna distributions
        ``ll_learning_rate``; ``ul_learning_rate``, the start of the ul rate; ``ul_steps`` and ``min_ll_steps``, how a
        trial is split into ul steps of ll steps; ``solver``, with each of the iterative ones, and its ``k``.
    """
    space: dict[str, BaseDistribution] = {
        "ll_learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
        "ul_learning_rate": FloatDistribution(3e-3, 1e-1, log=True),
        "ul_steps": IntDistribution(50, 200, log=True),
        "min_ll_steps": IntDistribution(5, 20, log=True),
        "solver": CategoricalDistribution(["minres", "cg", "neumann"]),
        "k": IntDistribution(3, 10, log=True),
    }
    fixed = dict(settings or {})
    if isinstance(fixed.get("ll_steps"), int):
        fixed["min_ll_steps"] = None
    return {name: distribution for name, distribution in space.items() if name not in fixed}


def check_space(space: Space) -> None:
    """Check that ``space`` is a dict of Optuna distributions or a callable.

    Raises
    ------
    InvalidTypeError
        If it is not.
    InvalidValueError
        If it is empty.
    """
    if callable(space):
        return
    if not isinstance(space, Mapping):
        raise InvalidTypeError(
            "`space` must be a dict of Optuna distributions or a callable(trial) that returns a config, "
            f"got {type(space).__name__}."
        )
    if not space:
        raise InvalidValueError('`space` must name at least one setting, e.g. {"k": IntDistribution(1, 32, log=True)}.')
    for key, distribution in space.items():
        if not isinstance(distribution, FloatDistribution | IntDistribution | CategoricalDistribution):
            raise InvalidTypeError(
                f"`space`[{key!r}] must be an Optuna distribution, got {distribution!r}. "
                "Of a few values make a CategoricalDistribution([...]); what does not vary belongs in `settings`."
            )


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Return the config of ``trial``: its params, or what a define-by-run ``space`` makes of them."""
    if not callable(space):
        return {name: _suggest_one(trial, name, distribution) for name, distribution in space.items()}
    config = call_space(space, trial)
    return dict(trial.params) if config is None else config


def call_space(space: Callable[[optuna.Trial], dict[str, Any] | None], trial: optuna.Trial) -> dict[str, Any] | None:
    """Return what a define-by-run ``space`` returns for ``trial``.

    Raises
    ------
    InvalidTypeError
        If that is neither a dict nor ``None``.
    """
    config = space(trial)
    if config is not None and not isinstance(config, dict):
        raise InvalidTypeError(
            f"`space(trial)` must return the config as a dict, or None for the trial's params, got {config!r}."
        )
    return config


def _suggest_one(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise AssertionError("check_space lets no other distribution pass")


def middle_config(space: Space) -> dict[str, Any]:
    """Return the config in the middle of ``space``: of ranges the middle, of choices the first."""
    with quiet_optuna():
        return suggest(optuna.create_study(sampler=_MiddleSampler()).ask(), space)


class _MiddleSampler(optuna.samplers.BaseSampler):
    """Take the middle of each distribution, the geometric one on a logarithmic scale."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        match param_distribution:
            case FloatDistribution(low=low, high=high, step=step, log=log):
                middle = math.sqrt(low * high) if log else (low + high) / 2
                return middle if step is None else low + step * round((middle - low) / step)
            case IntDistribution(low=low, high=high, step=step, log=log):
                middle = math.sqrt(low * high) if log else (low + high) / 2
                return low + step * round((middle - low) / step)
            case CategoricalDistribution(choices=choices):
                return choices[0]
        raise AssertionError("Optuna has three kinds of distributions")
