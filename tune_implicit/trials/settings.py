"""What a trial understands of its config."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.settings import SOLVERS, STOPS

__all__ = ["ImplicitSettings"]

POLICIES = ("skip", "raise", "fallback", "stop")


@dataclass(frozen=True, kw_only=True)
class ImplicitSettings:
    """The reserved settings: what a trial itself understands of its config.

    Parameters
    ----------
    solver : {"neumann", "cg", "minres", "dense"}
        How ``H v = b`` is solved.
    k : int
        Most iterations of a solve.
    tolerance, rtol : float
        A solve stops once ``||b - H v||`` is below ``tolerance``, or below ``rtol * ||b||``.
    stop : {"tolerance", "noise"}
        With ``"noise"`` a solve also stops once it is as exact as the validation batch.
    step_size : float or "auto", optional
        Of the Neumann series; ``ll_learning_rate`` by default. ``"auto"`` estimates the largest safe one.
    damping : float
        Added to the diagonal of ``H``.
    warm_start : bool
        Whether a solve starts from the ``v`` of the ul step before.
    preconditioner_memory : int
        Pairs of vectors that CG's preconditioner keeps from the solves before; 0 is none.
    verify : bool
        Whether the residual is computed anew after each solve, for one hvp.
    ll_learning_rate : float
        Of the ll optimizer; also the step size of the Neumann series, unless ``step_size`` is given.
    ul_learning_rate : float
        Of the ul optimizer. With 0 the ul values stay as they are and no hypergradient is computed.
    ll_steps : int
        ll optimizer steps before each ul step.
    ul_steps : int
        ul steps in all; a trial is completed after them.
    warmup_ll_steps : int
        ll optimizer steps before the first ul step, besides its own ``ll_steps``.
    ul_steps_per_report : int
        ul steps between two reports to the search, each with a pass over ``select_data``.
    on_failure : {"skip", "raise", "fallback", "stop"}
        What a failed solve does: skip its ul step and count it; end the trial; try MINRES, then a damped system, then
        the identity, and skip only where all fail; or skip, and end the trial after ``failures_to_stop`` in a row.
    failures_to_stop : int
        See ``on_failure``.
    seed : int
        Of every random choice in the trial, the initial weights included.

    Raises
    ------
    InvalidTypeError
        If a setting has the wrong type.
    InvalidValueError
        If settings are out of range; one error tells all.
    """

    solver: str = "neumann"
    k: int = 20
    tolerance: float = 1e-10
    rtol: float = 0.0
    stop: str = "tolerance"
    step_size: float | str | None = None
    damping: float = 0.0
    warm_start: bool = True
    preconditioner_memory: int = 0
    verify: bool = False
    ll_learning_rate: float = 1e-2
    ul_learning_rate: float = 1e-2
    ll_steps: int = 5
    ul_steps: int = 100
    warmup_ll_steps: int = 0
    ul_steps_per_report: int = 10
    on_failure: str = "skip"
    failures_to_stop: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _converted(field.name, getattr(self, field.name), field.type))
        mistakes = [
            f"`{name}` must be {rule}, got {getattr(self, name)!r}."
            for name, rule, holds in (
                ("solver", f"one of {', '.join(SOLVERS)}", self.solver in SOLVERS),
                ("k", "0 or more", self.k >= 0),
                ("tolerance", "0 or more", self.tolerance >= 0),
                ("rtol", "0 or more", self.rtol >= 0),
                ("stop", f"one of {', '.join(STOPS)}", self.stop in STOPS),
                ("step_size", 'positive and finite, or "auto"', _is_step_size(self.step_size)),
                ("damping", "0 or more and finite", 0 <= self.damping < math.inf),
                ("preconditioner_memory", "0 or more", self.preconditioner_memory >= 0),
                ("ll_learning_rate", "positive and finite", 0 < self.ll_learning_rate < math.inf),
                ("ul_learning_rate", "0 or more and finite", 0 <= self.ul_learning_rate < math.inf),
                ("ll_steps", "0 or more", self.ll_steps >= 0),
                ("ul_steps", "1 or more", self.ul_steps >= 1),
                ("warmup_ll_steps", "0 or more", self.warmup_ll_steps >= 0),
                ("ul_steps_per_report", "1 or more", self.ul_steps_per_report >= 1),
                ("on_failure", f"one of {', '.join(POLICIES)}", self.on_failure in POLICIES),
                ("failures_to_stop", "1 or more", self.failures_to_stop >= 1),
                ("seed", "0 or more", self.seed >= 0),
            )
            if not holds
        ]
        if mistakes:
            raise InvalidValueError(" ".join(mistakes))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImplicitSettings":
        """Return the settings in ``config``; keys that are no settings are the user's own and left alone."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})


def _is_step_size(value: float | str | None) -> bool:
    if isinstance(value, str):
        return value == "auto"
    return value is None or 0 < value < math.inf


def _converted(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as a Python ``kind``; search engines also sample NumPy's numbers, and whole floats for ints.

    Raises
    ------
    InvalidTypeError
        If it is not one.
    """
    if kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind == float | str | None:
        kind = str if isinstance(value, str) else float
        if value is None:
            return None
    if kind is int and number and float(value).is_integer():
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is str and isinstance(value, str):
        return str(value)
    rule = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}[kind]
    raise InvalidTypeError(f"`{name}` must be {rule}, got {value!r}.")
