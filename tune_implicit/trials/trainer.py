"""The loop of a trial: ll steps, then a ul step along the hypergradient; and all of its state."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tune_implicit.errors import CheckpointError, DivergedError, SolveError
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.guards.losses import scalar_loss
from tune_implicit.hypergradients.rng import get_rng_state, set_rng_state
from tune_implicit.hypergradients.state import Batch, State, named_trainable
from tune_implicit.hypergradients.vectors import norm_of
from tune_implicit.trials.problem import BilevelProblem, OptimizerFactory
from tune_implicit.trials.rate import UlRate
from tune_implicit.trials.record import COUNTERS
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.settling import WINDOW, Settling, promised
from tune_implicit.trials.splits import BatchStream, move

__all__ = ["FORMAT_VERSION", "BilevelTrainer", "Step"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Step:
    """What one step of the trainer saw.

    Parameters
    ----------
    train_loss : float
        Mean ll loss over the step's ll steps; NaN where ``ll_steps`` is 0.
    hypergradient : Hypergradient, optional
        ``None`` where ``ul_learning_rate`` is 0.
    """

    train_loss: float
    hypergradient: Hypergradient | None


class BilevelTrainer:
    """Train the ll model and, as it goes, move the ul values along hypergradients.

    Each ll problem is warm-started from where the ll model is. The Hessian is that of the training batch next in line,
    the ul objective that of the next validation batch. Batches are moved to the models' device.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are trained in place.
    settings : ImplicitSettings
        Learning rates, solver and step counts. They stay this trainer's own when another's state is loaded.

    Attributes
    ----------
    ul_step, ll_step : int
        Steps taken; ``ul_step`` counts skipped ones as well.
    skipped_ul_steps : int
        ul steps not taken because their solve failed.
    fallback_ul_steps : int
        ul steps whose first solver failed, or gave a doubtful answer, so that another was asked.
    lagging_ul_steps : int
        ul steps before which :attr:`ll_lag` was above 1.
    hvps : int
        Hessian-vector products so far.
    gradient_evaluations : int
        Cost so far in gradients: 1 for each, 2 for each hvp and each mixed product.
    ll_lag : float
        What was left, before the last ul step, of the one before it, in units of what that had promised: how far the ll
        model lagged behind. NaN where it could not be seen.
    """

    def __init__(self, problem: BilevelProblem, settings: ImplicitSettings) -> None:
        self.problem = problem
        self.settings = settings
        self.ul_step = 0
        self.ll_step = 0
        self.skipped_ul_steps = 0
        self.fallback_ul_steps = 0
        self.lagging_ul_steps = 0
        self.hvps = 0
        self.gradient_evaluations = 0
        self.ll_lag = math.nan
        self._failures_in_a_row = 0
        self._looks = False  # whether the next gradient is one to look at
        self._ll_params = list(named_trainable(problem.ll_model).values())
        self._ul_params = list(named_trainable(problem.ul_model).values())
        self._device = self._ll_params[0].device
        self._ll_optimizer = _make_optimizer(problem.ll_optimizer, self._ll_params, settings.ll_learning_rate)
        self._ul_optimizer = _make_optimizer(problem.ul_optimizer, self._ul_params, settings.ul_learning_rate)
        # As the settings made them, before any step or loaded state changes them.
        self._own_options = {name: _options(optimizer) for name, optimizer in self._optimizers().items()}
        self._rate = UlRate(self._ul_optimizer, self._ul_params, settings.adapt_ul_learning_rate)
        self._settling = Settling(self._ll_params)
        self._ul_start = [param.detach().clone() for param in self._ul_params]
        self._train = BatchStream("train_data", problem.train_data)
        self._validate = BatchStream("validate_data", problem.validate_data)
        self._implicit = problem.implicit(**settings.of_a_solve)

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
        while taken < most and not self._settling.settled:
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
        if steps == 0:
            return math.nan
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for left in reversed(range(steps)):
            batch = self._next(self._train)
            self._looks = left < 2 * WINDOW
            total += self._ll_optimizer.step(partial(self._ll_backward, batch))  # type: ignore[arg-type]
            self.ll_step += 1
        mean = total.item() / steps
        if not math.isfinite(mean):
            raise DivergedError(
                f"The ll loss became {mean} within ll steps {self.ll_step - steps + 1} to {self.ll_step}, with "
                f"ll_learning_rate={self.settings.ll_learning_rate:g}. Try a smaller one, or bound the ul values."
            )
        return mean

    def _ll_backward(self, batch: Batch) -> Tensor:
        """Set the ll parameters' ``.grad`` and return the loss; optimizers may call it several times a step."""
        with torch.enable_grad():
            self._ll_optimizer.zero_grad()
            loss = scalar_loss("ll_objective", self.problem.ll_objective(self._state(batch)))
            loss.backward(inputs=self._ll_params)
        if self._looks:
            self._settling.see()
            self._looks = False  # an optimizer that evaluates again has moved
        self.gradient_evaluations += 1
        return loss.detach()

    def _step_ul(self) -> Hypergradient:
        self.ll_lag = self._settling.lag
        self.lagging_ul_steps += self.ll_lag > 1
        batches = range(self.settings.ul_batches)
        train, validate = ([self._next(stream) for _ in batches] for stream in (self._train, self._validate))
        self._ul_optimizer.zero_grad()
        hypergradient = self._implicit.compute_mean_gradients(validate, train)
        self._count(hypergradient.hvps)
        if hypergradient.answers:
            self._failures_in_a_row = 0
            self.fallback_ul_steps += len(hypergradient.attempts) > 1
            project = None if self.problem.project is None else partial(self.problem.project, self.problem.ul_model)
            moved = self._rate.step(hypergradient.ul_loss, project)
            self._settling.begin(hypergradient.v, promised(hypergradient, moved))
        else:
            self._settling.begin(None, 0.0)
            self._failed(hypergradient)
        return hypergradient

    def _count(self, hvps: int) -> None:
        """Take in what a hypergradient has cost."""
        batches = self.settings.ul_batches
        self.hvps += hvps
        self.gradient_evaluations += 4 * batches + 2 * hvps
        if batches > 1 and not self.settings.retain_graphs:
            self.gradient_evaluations += hvps + batches
        # Both halves of one batch cost one gradient more.
        self.gradient_evaluations += batches == 1 and self.settings.stop == "noise"

    @property
    def ul_rate(self) -> float:
        """The learning rate of the ul optimizer, that of its first parameter group, as it is now."""
        return self._rate.value

    @property
    def ul_moved(self) -> float:
        """How far the ul values are from where they started, as the root of their mean square."""
        moved = [param.detach() - start for param, start in zip(self._ul_params, self._ul_start, strict=True)]
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

    def _next(self, stream: BatchStream) -> Batch:
        data, target = move(stream.next(), self._device)
        return data, target

    def _state(self, batch: Batch) -> State:
        return State(*batch, ul_model=self.problem.ul_model, ll_model=self.problem.ll_model)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"ll_optimizer": self._ll_optimizer, "ul_optimizer": self._ul_optimizer}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the trainer goes on, as data that loads with ``weights_only=True``.

        Returns
        -------
        dict
            Both models, both optimizers and their options as constructed, the ul rate, what the next solve and the next
            ll steps start from, the position in the data, the random state of Python, NumPy and torch, the counters,
            and the version of this format. Tensors are the live ones.
        """
        return {
            "format_version": FORMAT_VERSION,
            "ul_start": self._ul_start,
            "rate": self._rate.state_dict(),
            "settling": self._settling.state_dict(),
            "ul_model": self.problem.ul_model.state_dict(),
            "ll_model": self.problem.ll_model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers().items()},
            "options": self._own_options,
            "implicit": self._implicit.state_dict(),
            "failures_in_a_row": self._failures_in_a_row,
            "data": {"train": self._train.state_dict(), "validate": self._validate.state_dict()},
            "counters": {name: getattr(self, name) for name in COUNTERS},
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
            self.problem.ll_model.load_state_dict(state["ll_model"])
            for name, optimizer in self._optimizers().items():
                optimizer.load_state_dict(state["optimizers"][name])
                _restore_options(optimizer, self._own_options[name], state["options"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The state does not fit this problem: {error} A setting that changes a model's shape, such as its "
                "width, cannot be changed between saving and loading."
            ) from error
        self._ul_start = [start.to(self._device) for start in state["ul_start"]]
        self._rate.load_state_dict(state["rate"])
        if self.settings.ul_learning_rate > 0:  # or there is no ul step to disturb the ll model
            self._settling.load_state_dict(state["settling"], self._device)
        self._implicit.load_state_dict(state["implicit"])
        self._failures_in_a_row = state["failures_in_a_row"]
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        self._train.load_state_dict(state["data"]["train"])
        self._validate.load_state_dict(state["data"]["validate"])
        set_rng_state(state["rng"])


def _size(values: list[Tensor]) -> float:
    """Return the root of the mean square of all entries."""
    return norm_of(values).item() / math.sqrt(sum(value.numel() for value in values))


def _make_optimizer(factory: OptimizerFactory, params: list[Any], learning_rate: float) -> torch.optim.Optimizer:
    return factory(params, lr=learning_rate)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's options, such as ``lr`` and ``betas``, without its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _restore_options(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]], donor: list[dict[str, Any]]) -> None:
    """Set the options in which ``own`` differs from ``donor``, both as constructed.

    ``Optimizer.load_state_dict`` brings back the donor's. Those the two share are left as loaded: an optimizer may keep
    state of its own among them, which an exact resume needs.
    """
    for group, own_options, donor_options in zip(optimizer.param_groups, own, donor, strict=True):
        for key, value in own_options.items():
            if key not in donor_options or donor_options[key] != value:
                group[key] = value
