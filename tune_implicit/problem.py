"""What a user brings: two models, two objectives, the data, and how to take steps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tune_implicit.batches import Batch, check_split
from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = [
    "NO_SELECT_DATA",
    "BilevelProblem",
    "Metric",
    "Objective",
    "OptimizerFactory",
    "State",
    "check_models",
    "named_trainable",
]


@dataclass(frozen=True)
class State:
    """What an objective or a metric is called with; ``state["data"]`` is ``state.data``.

    Parameters
    ----------
    data, target : any nesting of Tensor
        One batch.
    ul_model, ll_model : Module
        The upper-level and the lower-level model.
    """

    data: Any
    target: Any
    ul_model: nn.Module
    ll_model: nn.Module

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(f"{name!r}: a state holds {', '.join(self.__dataclass_fields__)}.")
        return getattr(self, name)


Objective = Callable[[State], Tensor]
Metric = Callable[[State], Tensor | float]


class OptimizerFactory(Protocol):
    """A torch optimizer class, or any ``callable(params, lr=...)`` that returns an optimizer."""

    def __call__(self, params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
        """Return an optimizer of ``params``."""
        ...


NO_SELECT_DATA = (
    "Without `select_data` trials are compared on `validate_data`, which their ul steps minimised: the search then "
    "favours the trial that overfits it most. Hold out a third split."
)

# The names under which a trial reports its own numbers.
RESERVED_METRICS = frozenset(
    {
        "select_loss",
        "validate_loss",
        "train_loss",
        "hypergradient_norm",
        "residual_norm",
        "relative_residual",
        "stationarity",
        "lambda_min",
        "lambda_max",
        "damping",
        "noise_norm",
        "solver_steps",
        "solver_status",
        "solver_used",
        "skipped_ul_steps",
        "fallback_ul_steps",
        "hvps",
        "gradient_evaluations",
        "ul_step",
        "ll_step",
        "completed",
        "selected_on",
        "failure",
    }
)


@dataclass(frozen=True, kw_only=True)
class BilevelProblem:
    """One bilevel problem, checked once, here.

    The ll model is trained on ``ll_objective``; the ul model's parameters are moved by hypergradients of
    ``ul_objective`` at the trained ll model; trials are compared on ``select_data``, which no gradient touches.

    Parameters
    ----------
    ul_model, ll_model : Module
        Their parameters with ``requires_grad`` are the ul values and the ll parameters, on one device and disjoint.
    ul_objective, ll_objective : callable(State) -> Tensor
        The scalar losses, differentiable (``ll_objective`` twice).
    train_data, validate_data : re-iterable of (data, target)
        For ll steps and the Hessian, and for the ul objective: a list of batches or a DataLoader.
    select_data : re-iterable of (data, target), optional
        What the search compares. Without it, that is ``validate_data``, and a warning says so.
    metrics : mapping of str to callable(State) -> float, optional
        Measured on ``select_data`` in evaluation mode, and averaged over batches by their size.
    ll_optimizer, ul_optimizer : callable(params, lr=...) -> Optimizer
        Adam by default.
    project : callable(ul_model), optional
        Called after each ul step, without gradients, to put constrained ul values back into their set in place.

    Raises
    ------
    InvalidTypeError
        If an argument is of the wrong kind.
    InvalidValueError
        If a model has nothing to train, the models share parameters or lie on two devices, a split is empty, or a
        metric has a name that a trial itself reports.
    """

    ul_model: nn.Module
    ll_model: nn.Module
    ul_objective: Objective
    ll_objective: Objective
    train_data: Iterable[Batch]
    validate_data: Iterable[Batch]
    select_data: Iterable[Batch] | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    ll_optimizer: OptimizerFactory = torch.optim.Adam
    ul_optimizer: OptimizerFactory = torch.optim.Adam
    project: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        check_models(self.ul_model, self.ll_model)
        for name in ("ul_objective", "ll_objective", "ll_optimizer", "ul_optimizer"):
            check_callable(name, getattr(self, name))
        if self.project is not None:
            check_callable("project", self.project)
        for name in ("train_data", "validate_data", "select_data"):
            if name != "select_data" or self.select_data is not None:
                check_split(name, getattr(self, name))
        if not isinstance(self.metrics, Mapping):
            raise InvalidTypeError(
                f"`metrics` must be a mapping of names to callable(state), got {type(self.metrics).__name__}."
            )
        for name, metric in self.metrics.items():
            check_callable(f"metrics[{name!r}]", metric)
        if taken := RESERVED_METRICS & set(self.metrics):
            raise InvalidValueError(
                f"`metrics` must not use names that a trial itself reports, got {', '.join(sorted(taken))}. "
                "Rename them."
            )

    @property
    def selected_on(self) -> str:
        """The split that trials are compared on: ``"select_data"``, or ``"validate_data"`` where there is none."""
        return "validate_data" if self.select_data is None else "select_data"


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` with ``requires_grad``, by name; a tied one stands under its first name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def check_callable(name: str, value: object) -> None:
    """Check that ``value`` can be called.

    Raises
    ------
    InvalidTypeError
        If not.
    """
    if not callable(value):
        raise InvalidTypeError(f"`{name}` must be callable, got {type(value).__name__}.")


def check_models(ul_model: nn.Module, ll_model: nn.Module) -> None:
    """Check that the two models can form a bilevel problem.

    Raises
    ------
    InvalidTypeError
        If one is not a module, or has parameters that are not real floating-point tensors.
    InvalidValueError
        If one has nothing to train, or they share a parameter, or their parameters lie on two devices.
    """
    devices: dict[torch.device, str] = {}
    names: dict[int, str] = {}
    for argument, model in (("ul_model", ul_model), ("ll_model", ll_model)):
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"`{argument}` must be a torch.nn.Module, got {type(model).__name__}.")
        params = named_trainable(model)
        if not any(param.numel() for param in params.values()):
            raise InvalidValueError(
                f"`{argument}` has no parameter to train. "
                "Register its values as nn.Parameter and leave requires_grad=True on those to learn."
            )
        for name, param in params.items():
            if not param.is_floating_point():
                raise InvalidTypeError(
                    f"`{argument}`'s parameter {name!r} must be real and floating, got {param.dtype}."
                )
            if id(param) in names:
                raise InvalidValueError(
                    f"`ul_model` and `ll_model` share the parameter {names[id(param)]!r} (`ll_model`'s {name!r}). "
                    "A value is learned at one level: give each model its own, or freeze it with requires_grad=False."
                )
            devices.setdefault(param.device, f"`{argument}`'s {name!r}")
        names = {id(param): name for name, param in params.items()}
    if len(devices) > 1:
        places = ", ".join(f"{owner} on {device}" for device, owner in devices.items())
        raise InvalidValueError(
            f"All parameters must be on one device, got {places}. Move both models with .to(device)."
        )
