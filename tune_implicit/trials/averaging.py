"""Averages of the ll weights: EMA, SWA."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.arguments import at_least, check_argument, check_callable, one_of

__all__ = ["INTERVALS", "Averaging", "RunningAverage"]

INTERVALS = ("step", "epoch")


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How the ll weights are averaged as they are trained.

    Losses on ``select_data``, metrics and the ll model that is kept are then those of the average, as soon as there is
    one.

    Parameters
    ----------
    model : callable(ll_model) -> AveragedModel
        E.g. ``lambda ll_model: AveragedModel(ll_model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)``.
    interval : {"step", "epoch"}, default "step"
        Whether it takes the weights in after each ll step or after each pass over ``train_data``.
    start : int, default 0
        So many steps or epochs are left out before.
    hypergradients : bool, default False
        Whether hypergradients are taken at the averaged weights.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If an argument is of the wrong kind or out of range.
    """

    model: Callable[[nn.Module], AveragedModel]
    interval: str = "step"
    start: int = 0
    hypergradients: bool = False

    def __post_init__(self) -> None:
        check_callable("model", self.model)
        check_argument("interval", self.interval, str, one_of(INTERVALS))
        check_argument("start", self.start, int, at_least(0))
        check_argument("hypergradients", self.hypergradients, bool)


class RunningAverage:
    """The average of one ll model's weights in a trial.

    Parameters
    ----------
    averaging : Averaging
        How it is taken.
    ll_model : Module
        What is averaged.

    Raises
    ------
    InvalidTypeError
        If ``averaging.model`` returns something else.
    InvalidValueError
        If the model has running statistics that would not be averaged, or another model is averaged.
    """

    def __init__(self, averaging: Averaging, ll_model: nn.Module) -> None:
        self._averaging, self._ll_model = averaging, ll_model
        self._average = averaging.model(ll_model)
        if not isinstance(self._average, AveragedModel):
            raise InvalidTypeError(
                f"`model` of Averaging must return a torch.optim.swa_utils.AveragedModel, got "
                f"{type(self._average).__name__}."
            )
        shapes = [
            [(name, p.shape) for name, p in model.named_parameters()] for model in (self._average.module, ll_model)
        ]
        if shapes[0] != shapes[1]:
            raise InvalidValueError(
                "`model` of Averaging must average the ll model that it is given, got parameters of other names or "
                "shapes. Return AveragedModel(ll_model, ...)."
            )
        running = [name for name, _ in ll_model.named_buffers() if name.rpartition(".")[2].startswith("running_")]
        if running and not self._average.use_buffers:
            raise InvalidValueError(
                "`model` of Averaging must average buffers as well where the ll model has running statistics, got "
                f"{running[0]!r} and use_buffers=False. Make it AveragedModel(..., use_buffers=True)."
            )
        self._seen = self._taken = 0

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights; the ll model itself until there is an average."""
        average: nn.Module = self._average.module if self._taken else self._ll_model
        return average

    def for_hypergradients(self) -> nn.Module | None:
        """Return the average, trainable and in training as the ll model is, if hypergradients are taken there."""
        if not (self._averaging.hypergradients and self._taken):
            return None
        for averaged, param in zip(self._average.module.parameters(), self._ll_model.parameters(), strict=True):
            averaged.requires_grad_(param.requires_grad)
        for one, other in zip(self._average.module.modules(), self._ll_model.modules(), strict=True):
            one.training = other.training
        return self.model

    def advance(self, interval: str) -> None:
        """Take in that a step or an epoch has ended."""
        if interval != self._averaging.interval:
            return
        self._seen += 1
        if self._seen > self._averaging.start:
            self._average.update_parameters(self._ll_model)
            self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average; tensors are the live ones."""
        return {"average": self._average.state_dict(), "seen": self._seen, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._average.load_state_dict(state["average"])
        self._seen, self._taken = state["seen"], state["taken"]
