"""The loop of a trial: ll steps, then a ul step along the hypergradient; and all of its state."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tune_implicit.errors import CheckpointError, InvalidValueError, SolveError
from tune_implicit.hypergradients.certificate import Hypergradient, mean_of
from tune_implicit.hypergradients.guards.losses import check_used
from tune_implicit.hypergradients.rng import get_rng_state, set_rng_state
from tune_implicit.hypergradients.state import named_trainable
from tune_implicit.hypergradients.vectors import norm_of
from tune_implicit.trials.checkpoint import FORMAT_VERSION
from tune_implicit.trials.lower_level import LowerLevel
from tune_implicit.trials.optimizers import ScheduledOptimizer, takes_closure
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.rate import UlRate
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.settling import WINDOW

__all__ = ["BilevelTrainer", "Step"]

logger = logging.getLogger(__name__)

# What a trainer counts itself.
_COUNTERS = ("ul_step", "skipped_ul_steps", "fallback_ul_steps", "lagging_ul_steps")


@dataclass(frozen=True)
class Step:
    """What one step of the trainer saw.

    Parameters
    ----------
    train_loss : float
        Mean ll loss over the step's ll steps; NaN where ``ll_steps`` is 0.
    hypergradient : Hypergradient, optional
        The mean over the ll problems. ``None`` where ``ul_learning_rate`` is 0.
    """

    train_loss: float
    hypergradient: Hypergradient | None


class BilevelTrainer:
    """Train the ll model and, as it goes, move the ul values along hypergradients.

    Each ll problem is warm-started from where the ll model is. With several ll models under one ul model all are
    trained, and ul steps go along the mean of their hypergradients. The Hessian is that of the training batch next in
    line, the ul objective that of the next validation batch. Batches are moved to the models' device.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are trained in place.
    settings : ImplicitSettings
        Learning rates, solver and step counts. They stay this trainer's own when another's state is loaded.

    Attributes
    ----------
    levels : list of LowerLevel
        The ll problems, one for each ll model.
    ul_step : int
        Steps taken, skipped ones as well.
    skipped_ul_steps : int
        ul steps not taken because their solve failed.
    fallback_ul_steps : int
        ul steps whose first solver failed, or gave a doubtful answer, so that another was asked.
    lagging_ul_steps : int
        ul steps before which :attr:`ll_lag` was above 1.
    ll_lag : float
        What was left, before the last ul step, of the one before it, in units of what that had promised: how far the ll
        model lagged behind. NaN where it could not be seen.
    """

    def __init__(self, problem: BilevelProblem, settings: ImplicitSettings) -> None:
        self.problem = problem
        self.settings = settings
        self.levels = [LowerLevel(part, settings, alone=len(problem.parts) == 1) for part in problem.parts]
        self.ul_step = 0
        self.skipped_ul_steps = 0
        self.fallback_ul_steps = 0
        self.lagging_ul_steps = 0
        self.ll_lag = math.nan
        self._failures_in_a_row = 0
        self._ul_params = named_trainable(problem.ul_model)
        self._scheduled = _ul_optimizer(problem, settings)
        self._rate = UlRate(self._scheduled.optimizer, list(self._ul_params.values()), settings.adapt_ul_learning_rate)
        self._ul_start = [param.detach().clone() for param in self._ul_params.values()]

    def step(self) -> Step:
        """Take ``ll_steps`` ll optimizer steps, and before the first also ``warmup_ll_steps``; then one ul step.

        Returns
        -------
        Step

        Raises
        ------
        DivergedError
            If the ll loss is no longer finite.
        SolveError
            If the hypergradient's solve failed and ``on_failure`` is ``"raise"``, or ``"stop"`` and it was one of too
            many in a row.
        """
        settings = self.settings
        warmup = settings.warmup_ll_steps if self.ul_step == 0 else 0
        if settings.ll_steps == "auto":
            train_loss = self._train_ll_until_settled(warmup)
        else:
            train_loss = self.train_ll(warmup + int(settings.ll_steps))
        hypergradient = self._step_ul() if settings.ul_learning_rate > 0 else None
        self.ul_step += 1
        return Step(train_loss, hypergradient)

    def _train_ll_until_settled(self, warmup: int) -> float:
        """Take ll steps until what the last ul step has disturbed has settled; return their mean loss."""
        least, most = self.settings.least_ll_steps, self.settings.max_ll_steps
        total, taken = self.train_ll(warmup + least) * (warmup + least), least
        while taken < most and not all(level.settled for level in self.levels):
            steps = min(WINDOW, most - taken)
            total += self.train_ll(steps) * steps
            taken += steps
        return total / (warmup + taken)

    def train_ll(self, steps: int) -> float:
        """Take ``steps`` ll optimizer steps, and no ul step; return their mean loss, NaN where there are none.

        Raises
        ------
        DivergedError
            If it is not finite.
        """
        return math.fsum(level.train(steps) for level in self.levels) / len(self.levels)

    def _step_ul(self) -> Hypergradient:
        seen = [lag for level in self.levels if not math.isnan(lag := level.lag)]
        self.ll_lag = max(seen, default=math.nan)
        self.lagging_ul_steps += self.ll_lag > 1
        self._scheduled.optimizer.zero_grad()
        each = [level.add_hypergradient() for level in self.levels]
        hypergradient = mean_of(each)
        if not hypergradient.answers:
            for level in self.levels:
                level.follow(None, {})
            self._failed(hypergradient)
            return hypergradient
        check_used([name for name in self._ul_params if name not in hypergradient.gradients])
        self._failures_in_a_row = 0
        self.fallback_ul_steps += any(len(one.attempts) > 1 for one in each)
        moves = self._move(hypergradient)
        for level, one in zip(self.levels, each, strict=True):
            level.follow(one, moves)
        return hypergradient

    def _move(self, hypergradient: Hypergradient) -> dict[str, Tensor]:
        """Move the ul values along the hypergradients in ``.grad``, and return by how much."""
        if len(self.levels) > 1:
            for param in self._ul_params.values():
                if param.grad is not None:
                    param.grad /= len(self.levels)
        project = None if self.problem.project is None else partial(self.problem.project, self.problem.ul_model)
        moves = self._rate.step(hypergradient.ul_loss, project)
        self._scheduled.advance()
        return dict(zip(self._ul_params, moves, strict=True))

    def see_report(self, validate_loss: float) -> None:
        """Show a report's validation loss to schedules that follow one."""
        self._scheduled.see(validate_loss)
        for level in self.levels:
            level.see(validate_loss)

    @property
    def ll_models(self) -> list[nn.Module]:
        """The ll models that are measured and kept, one for each ll problem."""
        return [level.model for level in self.levels]

    @property
    def ll_step(self) -> int:
        """Ll optimizer steps taken in each ll problem."""
        return self.levels[0].ll_step

    @property
    def hvps(self) -> int:
        """Hessian-vector products so far."""
        return sum(level.hvps for level in self.levels)

    @property
    def gradient_evaluations(self) -> int:
        """Cost so far in gradients: 1 for each, 2 for each hvp and each mixed product."""
        return sum(level.gradient_evaluations for level in self.levels)

    @property
    def ll_rate(self) -> float:
        """The learning rate of the ll optimizer, that of its first parameter group, as it is now; NaN for none."""
        rate = self.levels[0].rate
        return math.nan if rate is None else rate

    @property
    def ul_rate(self) -> float:
        """The learning rate of the ul optimizer, that of its first parameter group, as it is now; NaN for none."""
        rate = self._scheduled.rate
        return math.nan if rate is None else rate

    @property
    def ul_moved(self) -> float:
        """How far the ul values are from where they started, as the root of their mean square."""
        moved = [param.detach() - start for param, start in zip(self._ul_params.values(), self._ul_start, strict=True)]
        return _size(moved)

    @property
    def ul_scale(self) -> float:
        """How large the ul values were where they started, as the root of their mean square."""
        return _size(self._ul_start)

    def _failed(self, hypergradient: Hypergradient) -> None:
        self.skipped_ul_steps += 1
        self._failures_in_a_row += 1
        tried = ", ".join(f"{attempt.solver} {attempt.status.value}" for attempt in hypergradient.attempts)
        message = (
            f"The solve at ul step {self.ul_step + 1} ended as {hypergradient.status.value} after "
            f"{hypergradient.solver_steps} steps, at relative residual {hypergradient.relative_residual:.2g}. "
            f"{hypergradient.reason}" + (f" Tried: {tried}." if tried else "")
        )
        policy, limit = self.settings.on_failure, self.settings.failures_to_stop
        if policy == "raise":
            raise SolveError(message)
        if policy == "stop" and self._failures_in_a_row >= limit:
            raise SolveError(f"{message} It was failed solve {self._failures_in_a_row} in a row.")
        logger.debug("%s The ul step is skipped.", message)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the trainer goes on, as data that loads with ``weights_only=True``.

        Returns
        -------
        dict
            All models, optimizers with their options as constructed, schedules and averages, the ul rate, what the next
            solve and the next ll steps start from, the position in the data, the random state of Python, NumPy and
            torch, the counters, and the version of this format. Tensors are the live ones.
        """
        return {
            "format_version": FORMAT_VERSION,
            "ul_model": self.problem.ul_model.state_dict(),
            "ul_start": self._ul_start,
            "optimizer": self._scheduled.state_dict(),
            "rate": self._rate.state_dict(),
            "levels": [level.state_dict() for level in self.levels],
            "failures_in_a_row": self._failures_in_a_row,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "rng": get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with this trainer's own settings.

        Loaded by the trainer it came from, it continues bit for bit. Loaded by one with other settings, as
        population-based training does, the optimizers keep their memory of past gradients, while their learning rates
        and other options are those of this trainer wherever the two were constructed differently; the ul rate keeps
        what it has found as a factor of its own start.

        Parameters
        ----------
        state : dict
            From :meth:`state_dict`.

        Raises
        ------
        CheckpointError
            If the state is of another format, or of models and optimizers of other shapes.
        """
        if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
            found = state.get("format_version") if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(
                f"The state must be of format version {FORMAT_VERSION}, got {found}. "
                "Load it with the version of tune_implicit that wrote it."
            )
        try:
            self.problem.ul_model.load_state_dict(state["ul_model"])
            self._scheduled.load_state_dict(state["optimizer"])
            for level, saved in zip(self.levels, state["levels"], strict=True):
                level.load_models(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The state does not fit this problem: {error} A setting that changes a model's shape, such as its "
                "width, cannot be changed between saving and loading."
            ) from error
        self._ul_start = [
            start.to(param) for start, param in zip(state["ul_start"], self._ul_params.values(), strict=True)
        ]
        self._rate.load_state_dict(state["rate"])
        for level, saved in zip(self.levels, state["levels"], strict=True):
            level.load_rest(saved)
        self._failures_in_a_row = state["failures_in_a_row"]
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])
        set_rng_state(state["rng"])


def _size(values: list[Tensor]) -> float:
    """Return the root of the mean square of all entries."""
    return norm_of(values).item() / math.sqrt(sum(value.numel() for value in values))


def _ul_optimizer(problem: BilevelProblem, settings: ImplicitSettings) -> ScheduledOptimizer:
    """Return the optimizer of the ul values.

    Raises
    ------
    InvalidValueError
        If it cannot follow hypergradients, or its rate would be set twice.
    """
    rate, schedule = settings.ul_learning_rate, problem.ul_scheduler
    if schedule is not None and rate and settings.adapt_ul_learning_rate:
        raise InvalidValueError(
            "`ul_scheduler` sets the ul rate, and `adapt_ul_learning_rate` would do so as well. Take the setting "
            "adapt_ul_learning_rate=False with it."
        )
    scheduled = ScheduledOptimizer("ul", problem.ul_model, problem.ul_optimizer, rate, schedule, settings.ul_steps)
    if takes_closure(scheduled.optimizer):
        raise InvalidValueError(
            "`ul_optimizer` must step along a gradient that it is given, got one that evaluates its loss itself, "
            f"{type(scheduled.optimizer).__name__}. Take e.g. torch.optim.Adam."
        )
    return scheduled
