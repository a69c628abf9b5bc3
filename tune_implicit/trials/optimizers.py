"""Optimizers and their schedules as a user makes them: made, stepped, resumed."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.borrowed import mark_stepped

__all__ = ["OptimizerFactory", "ScheduledOptimizer", "SchedulerFactory", "quick_adam", "takes_closure"]

# The name of a factory's first parameter that asks for pairs of name and parameter.
_NAMED = ("named_parameters", "named_params")

# What the classes of torch call the length of a schedule.
_LENGTHS = ("steps", "total_steps", "T_max", "total_iters")


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
    steps : int, optional
        The most steps, or epochs, that a trial takes; ``None`` where that is not known.

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
        steps: int | None,
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
        self._steps: int | None = None  # what the schedule has been told
        if schedule is not None:
            self._steps = self._length_for(schedule, steps)
            self._scheduler = schedule(self.optimizer, *([] if self._steps is None else [self._steps]))
            if not isinstance(self._scheduler, LRScheduler):
                raise InvalidTypeError(
                    f"`{name}_scheduler` must return a scheduler of torch.optim.lr_scheduler, got "
                    f"{type(self._scheduler).__name__}."
                )
        # As the settings made them, before any step or loaded state changes them.
        self._own_options = _options(self.optimizer)
        self._own_schedule = self._schedule()
        _check_storable(name, {"optimizer": self._own_options, "scheduler": self._own_schedule})

    def _length_for(self, schedule: SchedulerFactory, steps: int | None) -> int | None:
        """Return how many steps to tell a schedule, ``None`` where it does not ask.

        Raises
        ------
        InvalidTypeError
            If a scheduler's class requires something else.
        InvalidValueError
            If it asks, and that is not known.
        """
        asks = next((p for p in _positional(schedule)[1:2] if p.default is inspect.Parameter.empty), None)
        if asks is None:
            return None
        if isinstance(schedule, type | partial) and asks.name not in _LENGTHS:
            raise InvalidTypeError(
                f"`{self._name}_scheduler` must be callable with an optimizer, or with the steps of a trial as well, "
                f"got one that requires `{asks.name}`. Give it by functools.partial(..., {asks.name}=...)."
            )
        if steps is None:
            raise InvalidValueError(
                f"`{self._name}_scheduler` requires the epochs of a trial, which are not known for data without a "
                "length. Let it be called with the optimizer alone."
            )
        return steps

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
        if self._scheduler is None or isinstance(self._scheduler, ReduceLROnPlateau):
            return
        # One that has loaded another's progress may be at its end.
        if self._steps is None or self._scheduler.last_epoch < self._steps:
            self._scheduler.step()

    def see(self, loss: float) -> None:
        """Show a loss to a schedule that follows one."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both and the options as constructed; tensors are the live ones."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._schedule(),
            "options": self._own_options,
            "schedule": self._own_schedule,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with its own options wherever the two were constructed differently.

        ``Optimizer.load_state_dict`` brings back the donor's. Those the two share are left as loaded: an optimizer may
        keep state of its own among them, which an exact resume needs. With a schedule, a learning rate is where the
        donor's has brought it, in units of where it started, and goes on as its own schedule says.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        scheduled = self._scheduler is not None and state["scheduler"] is not None
        for group, own, donor in zip(self.optimizer.param_groups, self._own_options, state["options"], strict=True):
            reached, start = group.get("lr"), "initial_lr" if "initial_lr" in own and "initial_lr" in donor else "lr"
            for key, value in own.items():
                if key not in donor or donor[key] != value:
                    group[key] = _copied(value)
            if start not in own or state["scheduler"] is None:
                continue
            if not scheduled or not donor[start]:
                group["lr"] = _copied(own["lr"])  # the donor's is where its schedule has brought it
            else:
                group["lr"] = reached if own[start] == donor[start] else reached * (own[start] / donor[start])
        if self._scheduler is not None and scheduled:
            self._scheduler.load_state_dict(_own_of(state["scheduler"], self._own_schedule, state["schedule"]))
            mark_stepped(self.optimizer)

    def _schedule(self) -> dict[str, Any] | None:
        return None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict())


def takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether ``optimizer.step`` has to be given a closure, as that of LBFGS has."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each parameter group's options, such as ``lr`` and ``betas``, without its parameters."""
    return [
        {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def _copied(value: Any) -> Any:
    """Return an option as it is now: a learning rate that is a tensor is changed in place."""
    return value.clone() if isinstance(value, Tensor) else value


def _own_of(loaded: Any, own: Any, donor: Any) -> Any:
    """Return ``loaded`` with what is its own wherever the two schedules were constructed differently."""
    if isinstance(loaded, dict) and isinstance(own, dict) and isinstance(donor, dict):
        return type(loaded)({key: _own_of(loaded[key], own.get(key), donor.get(key)) for key in loaded})
    if isinstance(loaded, list) and any(isinstance(part, dict) for part in loaded):
        return [_own_of(*parts) for parts in zip(loaded, own, donor, strict=True)]
    return loaded if own == donor else own


def _positional(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # one that is not written in Python
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _first_parameter(factory: Callable[..., Any]) -> str:
    return next((parameter.name for parameter in _positional(factory)), "")


def _check_storable(level: str, states: dict[str, Any]) -> None:
    """Check that an optimizer and its schedule can be saved, and loaded as data.

    Raises
    ------
    InvalidTypeError
        If one holds something else than numbers, strings, tensors and containers of them.
    """
    for kind, state in states.items():
        file = io.BytesIO()
        try:
            torch.save(state, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise InvalidTypeError(
                f"`{level}_{kind}` must hold what a checkpoint can, numbers, strings and tensors, got another kind, "
                f"such as a NumPy number (take float(...)) or a function: {str(error).splitlines()[0]}"
            ) from error
