"""What a user brings: two models, two objectives, the data, and how to take steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.arguments import check_argument, check_callable, one_of
from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.state import Objective, State, check_models
from tune_implicit.trials.averaging import INTERVALS, Averaging
from tune_implicit.trials.optimizers import OptimizerFactory, SchedulerFactory, quick_adam
from tune_implicit.trials.record import RESERVED
from tune_implicit.trials.splits import check_split

__all__ = ["NO_SELECT_DATA", "BilevelProblem", "LlStep", "Metric", "SplitMetrics", "check_metric_names"]

Metric = Callable[[State], Tensor | float]
# All metrics at once, from the states of all batches of a split.
SplitMetrics = Callable[[Iterator[State]], Mapping[str, Tensor | float]]
LlStep = Callable[[State, torch.optim.Optimizer], Tensor | float]

_SPLITS = ("train_data", "validate_data", "select_data")
_CALLABLES = ("ul_objective", "ll_objective", "ll_optimizer", "ul_optimizer")
_OPTIONAL_CALLABLES = ("ll_scheduler", "ul_scheduler", "ll_step", "on_epoch", "project")

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
        ``ll_model`` may be a list of models, such as one for each fold of a cross-validation: each split is then a
        list with one for each of them, hypergradients and losses are means over them.
    ul_objective, ll_objective : callable(State) -> Tensor
        The scalar losses, differentiable (``ll_objective`` twice).
    train_data, validate_data : re-iterable of Batch
        For ll steps and the Hessian, and for the ul objective: a DataLoader or a list of batches. Whatever it yields is
        ``state.batch``, moved to the models' device; of a pair, ``state.data`` and ``state.target`` are the halves.
    select_data : re-iterable of Batch, optional
        What the search compares. Without it, that is ``validate_data``, and a warning says so.
    metrics : mapping of str to callable(State) -> float, or callable(states) -> mapping of str to float, optional
        Measured on ``select_data`` in evaluation mode. Those of a mapping are averaged over batches by their size; one
        callable gets an iterator over the states of all batches, for what is no mean over them (F1, AUC).
    ll_optimizer : callable(params, lr=...) -> Optimizer
        Adam by default. A factory whose first parameter is called ``named_parameters`` gets pairs of name and
        parameter. It gets frozen parameters as well, which have no gradient.
    ul_optimizer : callable(params, lr=...) -> Optimizer
        By default Adam with ``betas=(0.5, 0.9)``: it is to turn as soon as the hypergradients do.
    ll_scheduler, ul_scheduler : callable(optimizer) or callable(optimizer, steps) -> LRScheduler, optional
        Any of ``torch.optim.lr_scheduler``; ``steps`` are the most steps, or epochs, that a trial takes, and given
        where a second argument is required. The ul schedule goes on with each ul step that is taken, and needs the
        setting ``adapt_ul_learning_rate=False``. A ReduceLROnPlateau follows the validation loss of each report.
    ll_scheduler_interval : {"step", "epoch"}, default "step"
        Whether the ll schedule goes on after each ll step or after each pass over ``train_data``.
    ll_average : Averaging, optional
        An average of the ll weights (EMA, SWA), which is then what is measured and kept.
    ll_step : callable(state, optimizer) -> Tensor or float, optional
        Takes one ll step on one batch, in place of the built-in one, and returns its loss. It must lower
        ``ll_objective``, whose Hessian is taken, by moving the parameters of ``state.ll_model``, draw from the global
        generators alone, and keep what it remembers from step to step in the optimizer or in buffers of the models:
        anything else is not in the checkpoint. Other parameters of its own, such as an adversary's, belong into
        ``ll_model`` with ``requires_grad=False`` between steps. A step counts as one gradient.
    on_epoch : callable(ll_model, epoch), optional
        Called before the first ll step of each pass over ``train_data``, with how many passes had ll steps before, e.g.
        to thaw a frozen backbone. Batches that hypergradients take are part of a pass.
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
    ll_model: Any  # a module, or a list of them
    ul_objective: Objective
    ll_objective: Objective
    train_data: Iterable[Batch]
    validate_data: Iterable[Batch]
    select_data: Iterable[Batch] | None = None
    metrics: Mapping[str, Metric] | SplitMetrics = field(default_factory=dict)
    ll_optimizer: OptimizerFactory = torch.optim.Adam
    ul_optimizer: OptimizerFactory = quick_adam
    ll_scheduler: SchedulerFactory | None = None
    ul_scheduler: SchedulerFactory | None = None
    ll_scheduler_interval: str = "step"
    ll_average: Averaging | None = None
    ll_step: LlStep | None = None
    on_epoch: Callable[[nn.Module, int], object] | None = None
    project: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        for name in _CALLABLES:
            check_callable(name, getattr(self, name))
        for name in _OPTIONAL_CALLABLES:
            if getattr(self, name) is not None:
                check_callable(name, getattr(self, name))
        check_argument("ll_scheduler_interval", self.ll_scheduler_interval, str, one_of(INTERVALS))
        if self.ll_scheduler is None and self.ll_scheduler_interval != "step":
            raise InvalidValueError("`ll_scheduler_interval` must go with an `ll_scheduler`, got it without one.")
        check_argument(
            "ll_average",
            self.ll_average,
            Averaging | None,
            ("None or an Averaging, e.g. Averaging(model=AveragedModel)", lambda value: True),
        )
        self._check_metrics()
        if isinstance(self.ll_model, list | tuple):
            self._check_lists()
            _ = self.parts  # each of which is checked
            return
        check_models(self.ul_model, self.ll_model)
        for name in _SPLITS:
            if name != "select_data" or self.select_data is not None:
                check_split(name, getattr(self, name))

    def _check_metrics(self) -> None:
        if isinstance(self.metrics, Mapping):
            for name, metric in self.metrics.items():
                check_callable(f"metrics[{name!r}]", metric)
            check_metric_names(self.metrics)
        elif not callable(self.metrics):
            raise InvalidTypeError(
                "`metrics` must be a mapping of names to callable(state), or one callable(states), got "
                f"{type(self.metrics).__name__}."
            )

    def _check_lists(self) -> None:
        """Check that there is a split of each kind for each of several ll models, which share no parameter.

        Raises
        ------
        InvalidValueError
            If not.
        """
        models = len(self.ll_model)
        if not models:
            raise InvalidValueError("`ll_model` must be a module or a list of one or more, got an empty list.")
        for name in _SPLITS:
            splits = getattr(self, name)
            if splits is None and name == "select_data":
                continue
            if not isinstance(splits, list | tuple) or len(splits) != models:
                got = f"{len(splits)}" if isinstance(splits, list | tuple) else type(splits).__name__
                raise InvalidValueError(
                    f"`{name}` must be a list of splits, one for each of the {models} ll models, got {got}."
                )
        owners: dict[int, int] = {}
        for number, model in enumerate(self.ll_model):
            check_models(self.ul_model, model)
            for name, param in model.named_parameters():
                if owners.setdefault(id(param), number) != number:
                    raise InvalidValueError(
                        f"The ll models must not share parameters, got {name!r} in models {owners[id(param)]} and "
                        f"{number}. Make each of its own, e.g. by copy.deepcopy."
                    )

    @cached_property
    def parts(self) -> "tuple[BilevelProblem, ...]":
        """The problem as one for each ll model; with a single one, itself."""
        if not isinstance(self.ll_model, list | tuple):
            return (self,)
        return tuple(
            replace(
                self,
                ll_model=model,
                train_data=self.train_data[number],  # type: ignore[index]
                validate_data=self.validate_data[number],  # type: ignore[index]
                select_data=None if self.select_data is None else self.select_data[number],  # type: ignore[index]
            )
            for number, model in enumerate(self.ll_model)
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics, as far as they are known before they are measured."""
        return tuple(self.metrics) if isinstance(self.metrics, Mapping) else ()

    @property
    def selected_on(self) -> str:
        """The split that trials are compared on: ``"select_data"``, or ``"validate_data"`` where there is none."""
        return "validate_data" if self.select_data is None else "select_data"

    def implicit(self, **settings: Any) -> Implicit:
        """Return what computes this problem's hypergradients, with settings of :class:`SolverSettings`."""
        return Implicit(self.ul_objective, self.ul_model, self.ll_objective, self.ll_model, **settings)


def check_metric_names(names: Iterable[str]) -> None:
    """Check that metrics have names of their own.

    Raises
    ------
    InvalidValueError
        If a trial itself reports one of them.
    """
    if taken := RESERVED & set(names):
        raise InvalidValueError(
            f"`metrics` must not use names that a trial itself reports, got {', '.join(sorted(taken))}. Rename them."
        )
