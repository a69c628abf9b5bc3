"""The settings a trial understands, and the record of which keys of a config someone has read."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.solvers import (
    ConjugateGradient,
    Damped,
    DenseSolve,
    Fallback,
    Minres,
    NeumannSeries,
    QuasiNewton,
    Solver,
)
from tune_implicit.solvers.base import check_stopping

__all__ = ["ImplicitSettings", "TrackedConfig", "make_solver"]

SOLVERS = ("cg", "minres", "neumann", "dense")
POLICIES = ("skip", "raise", "fallback", "stop")
STOPS = ("tolerance", "noise")


def make_solver(
    solver: str | Solver,
    step_size: float,
    k: int,
    tolerance: float,
    rtol: float,
    preconditioner: QuasiNewton | None = None,
    fallback: bool = False,
) -> Solver:
    """Return the solver of a name, or ``solver`` itself where it is an object, which brings its own ``k``.

    With ``fallback``, where it fails, MINRES is tried, then CG on a damped system, then the identity scaled.

    Raises
    ------
    InvalidValueError
        If the name is none of ``SOLVERS``, or an argument of the solver is out of range.
    InvalidTypeError
        If ``solver`` is neither a name nor an object with ``solve``.
    """
    check_stopping(k, tolerance, rtol)
    made: Solver
    match solver:
        case "cg":
            made = ConjugateGradient(k, tolerance, rtol, preconditioner)
        case "minres":
            made = Minres(k, tolerance, rtol)
        case "neumann":
            made = NeumannSeries(step_size, k, tolerance, rtol)
        case "dense":
            made = DenseSolve()
        case str():
            raise InvalidValueError(f"`solver` must be one of {', '.join(SOLVERS)}, or an object, got {solver!r}.")
        case _:
            if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
                raise InvalidTypeError(
                    f"`solver` must be one of {', '.join(SOLVERS)}, or an object with `solve(hvp, b, v0=None)`, "
                    f"got {solver!r}."
                )
            made = solver
    if not fallback:
        return made
    name = solver if isinstance(solver, str) else type(solver).__name__
    chain = {
        name: made,
        "minres": Minres(k, tolerance, rtol),
        "damped": Damped(ConjugateGradient(k, tolerance, rtol)),
        "identity": NeumannSeries(step_size, 0),
    }
    return Fallback(chain)


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


class TrackedConfig(dict[str, Any]):
    """A config that remembers which of its keys were read.

    A user's factory gets it in place of a plain dict. Reading it whole, by iteration, ``items`` or ``**``, reads every
    key.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._unread = set(config)

    def check_all_read(self) -> None:
        """Check that every key is a setting, or was read.

        Raises
        ------
        InvalidValueError
            If there is a key that no one reads: the search would vary what has no effect.
        """
        settings = [field.name for field in dataclasses.fields(ImplicitSettings)]
        mistakes = []
        for key in sorted(self._unread.difference(settings)):
            close = difflib.get_close_matches(key, settings, n=1)
            mistakes.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        if mistakes:
            raise InvalidValueError(
                f"No one reads the config's {', '.join(mistakes)}. Read it in your problem's factory, take it out of "
                f"the space, or use the name of a setting: {', '.join(settings)}."
            )

    def __getitem__(self, key: str) -> Any:
        self._unread.discard(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._unread.clear()
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default``."""
        self._unread.discard(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its value, or ``default``."""
        self._unread.discard(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, which is ``default`` from now on where there was none."""
        self._unread.discard(key)
        return super().setdefault(key, default)

    def keys(self) -> Any:
        """Return the keys, all of which then count as read."""
        self._unread.clear()
        return super().keys()

    def values(self) -> Any:
        """Return the values, all of which then count as read."""
        self._unread.clear()
        return super().values()

    def items(self) -> Any:
        """Return the items, all of which then count as read."""
        self._unread.clear()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a plain copy; all keys then count as read."""
        return dict(self.items())
