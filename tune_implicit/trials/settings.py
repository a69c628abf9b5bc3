"""What a trial understands of its config."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_implicit.hypergradients.arguments import NON_NEGATIVE, Rule, at_least, check_fields, one_of, ruled
from tune_implicit.hypergradients.settings import SOLVERS, STEP_SIZE, SolverSettings, relevant

__all__ = ["SETTINGS", "ImplicitSettings"]


# "auto", or how many.
_LL_STEPS: Rule = ('0 or more, or "auto"', lambda value: value == "auto" or (isinstance(value, int) and value >= 0))

# None, or a length or an amount.
_POSITIVE: Rule = ("positive", lambda value: value is None or value > 0)


@dataclass(frozen=True, kw_only=True)
class ImplicitSettings(SolverSettings):
    """The reserved settings: what a trial itself understands of its config.

    They are those of :class:`SolverSettings`, though a solver only by its name and ``fallback`` as a policy, and these.
    Settings that are for one solver do not bother the others, since a search picks among them. The defaults are one for
    all tasks, chosen by ``benchmarks/defaults.py``.

    Parameters
    ----------
    solver : {"minres", "cg", "neumann", "dense"}, default "minres"
        See :class:`SolverSettings`.
    k : int, default 5
        Few steps suffice, as each solve starts from the last one.
    step_size : float or "auto", default "auto"
        The step size of the Neumann series; ``None`` is ``ll_learning_rate``.
    ll_learning_rate : float, default 0.01
        The learning rate of the ll optimizer.
    warm_start : bool, default True
        Whether a solve starts from the ``v`` of the ul step before.
    ul_learning_rate : float, default 0.01
        The learning rate that the ul optimizer starts with. With 0 the ul values stay as they are and no hypergradient
        is computed.
    adapt_ul_learning_rate : bool, default True
        Whether the rate follows what each hypergradient says of the ul step before; see :class:`UlRate`. Otherwise it
        is constant.
    ll_steps : int or "auto", default "auto"
        ll optimizer steps before each ul step. ``"auto"`` takes them until what the ul step before has disturbed has
        settled, as far as the noise between batches lets it be seen; see :class:`Settling`.
    min_ll_steps, max_ll_steps : int, default 10 and 40
        The least and the most that ``"auto"`` takes; the most wins.
    ul_steps : int, default 100
        ul steps in all; a trial is completed after them.
    max_gradient_evaluations : int, optional
        A trial is completed at its first report by which it has cost so many gradients, as ``gradient_evaluations`` of
        its records counts them: 1 for each, 2 for each hvp and each mixed product. What a loaded checkpoint has cost
        counts. Schedules are still made for ``ul_steps``.
    warmup_ll_steps : int, default 0
        ll optimizer steps before the first ul step, besides its own ``ll_steps``.
    accumulate : int, default 1
        Batches whose gradients an ll step averages; the Hessian then averages as many for each of ``ul_batches``.
    max_ll_gradient_norm : float, optional
        The norm that the ll gradient is clipped to before each ll step.
    ul_batches : int, default 1
        Training batches, and validation batches, over which each hypergradient averages.
    ul_steps_per_report : int, default 5
        ul steps between two reports to the search, each with a pass over ``select_data``.
    keep : {"best", "last"}, default "best"
        Whether a trial's value, ul values and ll model are those of its best report by the search's metric, or of its
        last.
    patience : int, default 6
        A trial is completed after so many reports in a row that are no better than the best; 0 is never.
    on_failure : {"fallback", "skip", "raise", "stop"}, default "fallback"
        What a failed solve does: try MINRES, then a damped system, then the identity, and skip the ul step only where
        all fail; skip it and count it; end the trial; or skip, and end the trial after ``failures_to_stop`` in a row.
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

    solver: str = ruled(one_of(SOLVERS), "minres")
    k: int = ruled(at_least(0), 5)
    step_size: float | str | None = ruled(STEP_SIZE, "auto")
    warm_start: bool = True
    fallback: bool = dataclasses.field(init=False, default=True)
    ul_learning_rate: float = ruled(NON_NEGATIVE, 1e-2)
    adapt_ul_learning_rate: bool = True
    ll_steps: int | str = ruled(_LL_STEPS, "auto")
    min_ll_steps: int = ruled(at_least(1), 10)
    max_ll_steps: int = ruled(at_least(1), 40)
    ul_steps: int = ruled(at_least(1), 100)
    max_gradient_evaluations: int | None = ruled(_POSITIVE, None)
    warmup_ll_steps: int = ruled(at_least(0), 0)
    accumulate: int = ruled(at_least(1), 1)
    max_ll_gradient_norm: float | None = ruled(_POSITIVE, None)
    ul_batches: int = ruled(at_least(1), 1)
    ul_steps_per_report: int = ruled(at_least(1), 5)
    keep: str = ruled(one_of(("best", "last")), "best")
    patience: int = ruled(at_least(0), 6)
    on_failure: str = ruled(one_of(("fallback", "skip", "raise", "stop")), "fallback")
    failures_to_stop: int = ruled(at_least(1), 5)
    seed: int = ruled(at_least(0), 0)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "fallback", self.on_failure == "fallback")

    @property
    def least_ll_steps(self) -> int:
        """The ll steps that are surely taken before each ul step."""
        return self.ll_steps if isinstance(self.ll_steps, int) else min(self.min_ll_steps, self.max_ll_steps)

    @property
    def most_ll_steps(self) -> int:
        """The most ll steps that a trial takes, 1 or more."""
        each = self.ll_steps if isinstance(self.ll_steps, int) else self.max_ll_steps
        return max(1, self.warmup_ll_steps + self.ul_steps * each)

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
