"""One ll problem in training: its model, its optimizer, its batches, and its hypergradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.errors import DivergedError, InvalidValueError
from tune_implicit.hypergradients.batches import Batch, moved
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.guards.losses import scalar_loss
from tune_implicit.hypergradients.state import State, named_trainable
from tune_implicit.trials.averaging import RunningAverage
from tune_implicit.trials.optimizers import ScheduledOptimizer, takes_closure
from tune_implicit.trials.own_step import OwnStep
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.settling import WINDOW, Settling, promised
from tune_implicit.trials.splits import BatchStream

__all__ = ["LowerLevel"]


class LowerLevel:
    """One ll problem of a trial, trained step by step.

    Parameters
    ----------
    problem : BilevelProblem
        With one ll model, which is trained in place.
    settings : ImplicitSettings
        Of the trial.
    alone : bool, default True
        Whether each ul value must be used in it, as there is no other ll problem.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If an optimizer, a schedule or an average is not what it must be, or a setting has no effect.

    Attributes
    ----------
    ll_step : int
        ll optimizer steps taken.
    hvps : int
        Hessian-vector products so far.
    gradient_evaluations : int
        Cost so far in gradients: 1 for each, 2 for each hvp and each mixed product.
    """

    def __init__(self, problem: BilevelProblem, settings: ImplicitSettings, alone: bool = True) -> None:
        self.problem = problem
        self.ll_step = self.hvps = self.gradient_evaluations = 0
        self._settings, self._alone = settings, alone
        self._model: nn.Module = problem.ll_model
        self._params = list(named_trainable(self._model).values())
        self._device = self._params[0].device
        self._scheduled = ScheduledOptimizer(
            "ll",
            self._model,
            problem.ll_optimizer,
            settings.ll_learning_rate,
            problem.ll_scheduler,
            _most(problem.ll_scheduler_interval, problem, settings),
        )
        self._takes_closure = takes_closure(self._scheduled.optimizer)
        self._average = None if problem.ll_average is None else RunningAverage(problem.ll_average, self._model)
        self._settling = Settling(self._params)
        self._looks = False  # whether the next gradient is one to look at
        self._epochs = 0  # passes over the training data in which ll steps have been taken
        self._pass, self._in_epoch = 0, False  # the last of them, and whether it goes on
        self._own_step: OwnStep | None = None
        if problem.ll_step is not None:
            self._own_step = OwnStep(problem.ll_step, self._scheduled.optimizer, self._look, settings)
        self._train = BatchStream("train_data", problem.train_data)
        self._validate = BatchStream("validate_data", problem.validate_data)
        self._implicit = problem.implicit(**settings.of_a_solve)

    @property
    def model(self) -> nn.Module:
        """The model that is measured and kept: the averaged one where there is an average."""
        return self._model if self._average is None else self._average.model

    @property
    def rate(self) -> float | None:
        """The learning rate of the ll optimizer's first parameter group, as it is now."""
        return self._scheduled.rate

    @property
    def settled(self) -> bool:
        """Whether what the last ul step has disturbed has settled, as far as it can be seen."""
        return self._settling.settled

    @property
    def lag(self) -> float:
        """What is surely left of the last ul step's disturbance, in units of what it promised."""
        return self._settling.lag

    def train(self, steps: int) -> float:
        """Take ``steps`` ll optimizer steps; return their mean loss, NaN where there are none.

        Raises
        ------
        DivergedError
            If it is not finite.
        """
        if steps == 0:
            return math.nan
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for left in reversed(range(steps)):
            batches = [self._next(self._train) for _ in range(self._settings.accumulate)]
            if self._train.passes > self._pass:
                self._begin_epoch()
            self._looks = left < 2 * WINDOW
            total += self._step(batches)
            self.ll_step += 1
            self._end("step")
            if self._train.at_end:
                self._end_epoch()
        if self._own_step is not None:
            self._find_trainable()
        mean = total.item() / steps
        if not math.isfinite(mean):
            raise DivergedError(
                f"The ll loss became {mean} within ll steps {self.ll_step - steps + 1} to {self.ll_step}, with "
                f"ll_learning_rate={self._settings.ll_learning_rate:g}. Try a smaller one, or bound the ul values."
            )
        return mean

    def _step(self, batches: list[Batch]) -> Tensor | float:
        """Take one ll step, and return its loss."""
        if self._own_step is not None:
            self.gradient_evaluations += 1
            return self._own_step.take(self._state(batches[0]))
        if not self._takes_closure:
            loss = self._backward(batches)
            self._scheduled.optimizer.step()
            return loss
        losses: list[Tensor] = []

        def closure() -> Tensor:
            losses.append(self._backward(batches))
            return losses[-1]

        self._scheduled.optimizer.step(closure)  # type: ignore[arg-type]
        return losses[0]

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Set the ll parameters' ``.grad`` and return the loss; optimizers may call it several times a step."""
        with torch.enable_grad():
            self._scheduled.optimizer.zero_grad()
            losses = [self._backward_of(batch, len(batches)) for batch in batches]
        self._look()
        if self._settings.max_ll_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._settings.max_ll_gradient_norm)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _backward_of(self, batch: Batch, batches: int) -> Tensor:
        loss = scalar_loss("ll_objective", self.problem.ll_objective(self._state(batch)))
        (loss if batches == 1 else loss / batches).backward(inputs=self._params)
        self.gradient_evaluations += 1
        return loss.detach()

    def _look(self) -> None:
        """Look at a gradient, if it is one to look at: an optimizer that evaluates again has moved."""
        if self._looks:
            self._settling.see()
            self._looks = False

    def _begin_epoch(self) -> None:
        self._end_epoch()  # where the data did not tell that it was over
        self._pass, self._in_epoch = self._train.passes, True
        if self.problem.on_epoch is not None:
            self.problem.on_epoch(self._model, self._epochs)
            self._find_trainable()
        self._epochs += 1

    def _end_epoch(self) -> None:
        if self._in_epoch:
            self._in_epoch = False
            self._end("epoch")

    def _end(self, interval: str) -> None:
        if self.problem.ll_scheduler_interval == interval:
            self._scheduled.advance()
        if self._average is not None:
            self._average.advance(interval)

    def _find_trainable(self) -> None:
        """Look which parameters are trained from here on.

        Raises
        ------
        InvalidValueError
            If there are none.
        """
        params = list(named_trainable(self._model).values())
        if not params:
            raise InvalidValueError(
                "`on_epoch` and `ll_step` must leave something to train, got an ll model that is frozen."
            )
        if [id(param) for param in params] != [id(param) for param in self._params]:
            self._scheduled.check_all_in(self._model)
            self._params, self._settling = params, Settling(params)

    def add_hypergradient(self) -> Hypergradient:
        """Add the hypergradient on the next batches to ``.grad`` of the ul values, and return it."""
        settings = self._settings
        validate = [self._next(self._validate) for _ in range(settings.ul_batches)]
        train = [self._next(self._train) for _ in range(settings.ul_batches * settings.accumulate)]
        if self._train.at_end or self._train.passes > self._pass:
            self._end_epoch()
        at = None if self._average is None else self._average.for_hypergradients()
        hypergradient = self._implicit.compute_mean_gradients(validate, train, at, allow_unused=not self._alone)
        self._count(hypergradient.hvps)
        return hypergradient

    def _count(self, hvps: int) -> None:
        """Take in what a hypergradient has cost."""
        settings = self._settings
        validate, train = settings.ul_batches, settings.ul_batches * settings.accumulate
        self.hvps += hvps
        self.gradient_evaluations += validate + 3 * train + 2 * hvps
        if train > 1 and not settings.retain_graphs:
            self.gradient_evaluations += hvps + train
        # Both halves of one batch cost one gradient more.
        self.gradient_evaluations += validate == 1 and settings.stop == "noise"

    def follow(self, hypergradient: Hypergradient | None, moves: Mapping[str, Tensor]) -> None:
        """Take in a ul step: its hypergradient, ``None`` where it was not taken, and by how much ul values moved."""
        if hypergradient is None:
            self._settling.begin(None, 0.0)
        else:
            self._settling.begin(hypergradient.v, promised(hypergradient, moves))

    def see(self, loss: float) -> None:
        """Show a report's validation loss to a schedule that follows one."""
        self._scheduled.see(loss)

    def _next(self, stream: BatchStream) -> Batch:
        return moved(stream.next(), self._device)

    def _state(self, batch: Batch) -> State:
        return State.of(batch, self.problem.ul_model, self._model)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the ll problem goes on; tensors are the live ones."""
        return {
            "model": self._model.state_dict(),
            "trainable": list(named_trainable(self._model)),
            "training": [name for name, module in self._model.named_modules() if module.training],
            "optimizer": self._scheduled.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "settling": self._settling.state_dict(),
            "implicit": self._implicit.state_dict(),
            "data": {"train": self._train.state_dict(), "validate": self._validate.state_dict()},
            "epoch": [self._epochs, self._pass, self._in_epoch],
            "counters": [self.ll_step, self.hvps, self.gradient_evaluations],
        }

    def load_models(self, state: dict[str, Any]) -> None:
        """Load the parts of ``state`` that must be of this problem's shapes.

        Raises
        ------
        RuntimeError, ValueError, KeyError
            As torch does where they are not.
        """
        self._model.load_state_dict(state["model"])
        for name, module in self._model.named_modules():
            module.training = name in state["training"]
        if self.problem.on_epoch is not None or self._own_step is not None:
            for name, param in self._model.named_parameters():
                param.requires_grad_(name in state["trainable"])
            self._find_trainable()
        self._scheduled.load_state_dict(state["optimizer"])
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])

    def load_rest(self, state: dict[str, Any]) -> None:
        """Load everything else. This moves the global random state, which the caller sets afterwards."""
        if self._settings.ul_learning_rate > 0:  # or there is no ul step to disturb the ll model
            self._settling.load_state_dict(state["settling"], self._device)
        self._implicit.load_state_dict(state["implicit"])
        self._train.load_state_dict(state["data"]["train"])
        self._validate.load_state_dict(state["data"]["validate"])
        self._epochs, self._pass, self._in_epoch = state["epoch"]
        self.ll_step, self.hvps, self.gradient_evaluations = state["counters"]


def _most(interval: str, problem: BilevelProblem, settings: ImplicitSettings) -> int | None:
    """Return the most ll steps, or epochs, that a trial takes; ``None`` where the data have no length."""
    if interval == "step":
        return settings.most_ll_steps
    steps = settings.most_ll_steps + settings.ul_steps * settings.ul_batches * (settings.ul_learning_rate > 0)
    try:
        return math.ceil(steps * settings.accumulate / len(problem.train_data))  # type: ignore[arg-type]
    except TypeError:
        return None
