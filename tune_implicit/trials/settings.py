"""What a trial understands of its config."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_implicit.hypergradients.arguments import NON_NEGATIVE, at_least, check_fields, one_of, ruled
from tune_implicit.hypergradients.settings import SOLVERS, SolverSettings, relevant

__all__ = ["SETTINGS", "ImplicitSettings"]


@dataclass(frozen=True, kw_only=True)
class ImplicitSettings(SolverSettings):
    """The reserved settings: what a trial itself understands of its config.

    They are those of :class:`SolverSettings`, though a solver only by its name and ``fallback`` as a policy, and these.
    Settings that are for one solver do not bother the others, since a search picks among them.

    Parameters
    ----------
    ll_learning_rate : float, default 0.01
        The learning rate of the ll optimizer; also the step size of the Neumann series, unless ``step_size`` is given.
    warm_start : bool, default True
        Whether a solve starts from the ``v`` of the ul step before.
    ul_learning_rate : float, default 0.01
        The learning rate of the ul optimizer. With 0 the ul values stay as they are and no hypergradient is computed.
    ll_steps : int, default 5
        ll optimizer steps before each ul step.
    ul_steps : int, default 100
        ul steps in all; a trial is completed after them.
    warmup_ll_steps : int, default 0
        ll optimizer steps before the first ul step, besides its own ``ll_steps``.
    ul_steps_per_report : int, default 10
        ul steps between two reports to the search, each with a pass over ``select_data``.
    on_failure : {"skip", "raise", "fallback", "stop"}, default "skip"
        What a failed solve does: skip its ul step and count it; end the trial; try MINRES, then a damped system, then
        the identity, and skip only where all fail; or skip, and end the trial after ``failures_to_stop`` in a row.
    failures_to_stop : int, default 5
        See ``on_failure``.
    seed : int, default 0
        The seed of every random choice in the trial, the initial weights included.

    Raises
    ------
    InvalidTypeError
        If a setting has the wrong type.
    InvalidValueError
        If settings are out of range; one error tells all.
    """

    solver: str = ruled(one_of(SOLVERS), "neumann")
    warm_start: bool = True
    fallback: bool = dataclasses.field(init=False, default=False)
    ul_learning_rate: float = ruled(NON_NEGATIVE, 1e-2)
    ll_steps: int = ruled(at_least(0), 5)
    ul_steps: int = ruled(at_least(1), 100)
    warmup_ll_steps: int = ruled(at_least(0), 0)
    ul_steps_per_report: int = ruled(at_least(1), 10)
    on_failure: str = ruled(one_of(("skip", "raise", "fallback", "stop")), "skip")
    failures_to_stop: int = ruled(at_least(1), 5)
    seed: int = ruled(at_least(0), 0)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "fallback", self.on_failure == "fallback")

    @property
    def of_a_solve(self) -> dict[str, Any]:
        """The fields of :class:`SolverSettings`, without what is for another solver than the one in use."""
        return relevant({field.name: getattr(self, field.name) for field in dataclasses.fields(SolverSettings)})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImplicitSettings":
        """Return the settings in ``config``; keys that are no settings are the user's own and left alone."""
        return cls(**{name: config[name] for name in SETTINGS if name in config})


# The keys of a config that are a trial's own.
SETTINGS = tuple(field.name for field in dataclasses.fields(ImplicitSettings) if field.init)
