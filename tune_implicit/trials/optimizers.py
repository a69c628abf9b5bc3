"""Optimizers and their schedules as a user makes them: made, stepped, resumed."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.borrowed import schedulers_in

__all__ = ["OptimizerFactory", "ScheduledOptimizer", "SchedulerFactory", "quick_adam", "takes_closure"]

# The name of a factory's first parameter that asks for pairs of name and parameter.
_NAMED = ("named_parameters", "named_params")


class OptimizerFactory(Protocol):
    """A torch optimizer class, or any ``callable(params, lr=...)`` that returns an optimizer.

    One whose first parameter is called ``named_parameters`` gets a list of pairs of name and parameter.
    """

    def __call__(self, params: Any, *, lr: float) -> torch.optim.Optimizer:
        """Return an optimizer of ``params``."""
        ...


# From an optimizer, and from the number of its steps in a trial where a second argument is required.
SchedulerFactory = Callable[..., LRScheduler]


def quick_adam(params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    """Return Adam with a short memory, so that ul steps turn as soon as their hypergradients do.

    A trial takes some hundred ul steps, and with the usual memory of ten would go on past its optimum for ten of them.
    """
    return torch.optim.Adam(params, lr=lr, betas=(0.5, 0.9))


class ScheduledOptimizer:
    """An optimizer, and the schedule of its learning rates if it has one.

    Parameters
    ----------
    name : str
        ``"ll"`` or ``"ul"``.
    model : Module
        Its parameters are optimized; frozen ones as well, which have no gradient until they are thawed.
    make : OptimizerFactory
        Makes the optimizer.
    learning_rate : float
        Given to it as ``lr``.
    schedule : SchedulerFactory, optional
        Makes the scheduler.
    steps : int
        The most steps that a trial takes.

    Raises
    ------
    InvalidTypeError
        If a factory returns something else.
    InvalidValueError
        If the optimizer leaves out a parameter that is to be trained.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        make: OptimizerFactory,
        learning_rate: float,
        schedule: SchedulerFactory | None,
        steps: int,
    ) -> None:
        self._name = name
        named = list(model.named_parameters())
        params: Sequence[Any] = named if _first_parameter(make) in _NAMED else [param for _, param in named]
        self.optimizer = make(params, lr=learning_rate)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise InvalidTypeError(
                f"`{name}_optimizer` must return a torch.optim.Optimizer, got {type(self.optimizer).__name__}."
            )
        self.check_all_in(model)
        self._scheduler: LRScheduler | None = None
        if schedule is not None:
            self._scheduler = schedule(*(self.optimizer, steps)[: 1 + _requires_steps(schedule)])
            if not isinstance(self._scheduler, LRScheduler):
                raise InvalidTypeError(
                    f"`{name}_scheduler` must return a scheduler of torch.optim.lr_scheduler, got "
                    f"{type(self._scheduler).__name__}."
                )
        # As the settings made them, before any step or loaded state changes them.
        self._own_options = _options(self.optimizer)

    def check_all_in(self, model: nn.Module) -> None:
        """Check that the optimizer moves every parameter of ``model`` that is to be trained.

        Raises
        ------
        InvalidValueError
            If not: hypergradients would take for trained what is not.
        """
        held = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        left_out = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in held]
        if left_out:
            raise InvalidValueError(
                f"`{self._name}_optimizer` must take every parameter that is to be trained, got one without "
                f"{', '.join(map(repr, left_out))}. Put them in a group, or freeze them with requires_grad=False."
            )

    @property
    def rate(self) -> float | None:
        """The learning rate of the first parameter group, ``None`` where it has none."""
        rate = self.optimizer.param_groups[0].get("lr")
        return None if rate is None else float(rate)

    def advance(self) -> None:
        """Go on in the schedule by one step or epoch."""
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    def see(self, loss: float) -> None:
        """Show a loss to a schedule that follows one."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both and the options as constructed; tensors are the live ones."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "options": self._own_options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with its own options wherever the two were constructed differently.

        ``Optimizer.load_state_dict`` brings back the donor's. Those the two share are left as loaded: an optimizer may
        keep state of its own among them, which an exact resume needs. A learning rate with a schedule is where the
        donor's schedule has brought it, in units of where it started.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        scheduled = [] if self._scheduler is None or state["scheduler"] is None else schedulers_in(self._scheduler)
        if scheduled:
            scheduled[0].load_state_dict(state["scheduler"])
        for group, own, donor in zip(self.optimizer.param_groups, self._own_options, state["options"], strict=True):
            for key, value in own.items():
                if key not in donor or donor[key] != value:
                    follows = scheduled and key == "lr" and donor.get(key)
                    group[key] = group[key] * value / donor[key] if follows else value
        if self._own_options != state["options"]:
            for scheduler in scheduled:
                scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether ``optimizer.step`` has to be given a closure, as that of LBFGS has."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's options, such as ``lr`` and ``betas``, without its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _positional(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # one that is not written in Python
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _first_parameter(factory: Callable[..., Any]) -> str:
    return next((parameter.name for parameter in _positional(factory)), "")


def _requires_steps(schedule: Callable[..., Any]) -> bool:
    """Return whether a second argument is required: one with a default has another meaning."""
    return any(parameter.default is inspect.Parameter.empty for parameter in _positional(schedule)[1:2])
