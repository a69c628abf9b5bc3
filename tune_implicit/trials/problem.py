"""What a user brings: two models, two objectives, the data, and how to take steps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.arguments import check_callable
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.state import Batch, Objective, State, check_models
from tune_implicit.trials.record import RESERVED
from tune_implicit.trials.splits import check_split

__all__ = ["NO_SELECT_DATA", "BilevelProblem", "Metric", "OptimizerFactory", "quick_adam"]

Metric = Callable[[State], Tensor | float]


class OptimizerFactory(Protocol):
    """A torch optimizer class, or any ``callable(params, lr=...)`` that returns an optimizer."""

    def __call__(self, params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
        """Return an optimizer of ``params``."""
        ...


def quick_adam(params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    """Return Adam with a short memory, so that ul steps turn as soon as their hypergradients do.

    A trial takes some hundred ul steps, and with the usual memory of ten would go on past its optimum for ten of them.
    """
    return torch.optim.Adam(params, lr=lr, betas=(0.5, 0.9))


NO_SELECT_DATA = (
    "Without `select_data` trials are compared on `validate_data`, which their ul steps minimised: the search then "
    "favours the trial that overfits it most. Hold out a third split."
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
    ll_optimizer : callable(params, lr=...) -> Optimizer
        Adam by default.
    ul_optimizer : callable(params, lr=...) -> Optimizer
        By default Adam with ``betas=(0.5, 0.9)``: it is to turn as soon as the hypergradients do.
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
    ul_optimizer: OptimizerFactory = quick_adam
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
        if taken := RESERVED & set(self.metrics):
            raise InvalidValueError(
                f"`metrics` must not use names that a trial itself reports, got {', '.join(sorted(taken))}. "
                "Rename them."
            )

    @property
    def selected_on(self) -> str:
        """The split that trials are compared on: ``"select_data"``, or ``"validate_data"`` where there is none."""
        return "validate_data" if self.select_data is None else "select_data"

    def implicit(self, **settings: Any) -> Implicit:
        """Return what computes this problem's hypergradients, with settings of :class:`SolverSettings`."""
        return Implicit(self.ul_objective, self.ul_model, self.ll_objective, self.ll_model, **settings)
