"""A problem held fixed, to be looked at: copies of its models, one batch a level, and the same draws at every call."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from tune_implicit.checks.budget import Budget
from tune_implicit.errors import TuneImplicitError
from tune_implicit.hypergradients.batches import Batch, map_tensors, moved, tensors_of
from tune_implicit.hypergradients.guards.losses import scalar_loss
from tune_implicit.hypergradients.guards.twice import named_derivatives, twice_differentiable_kernels
from tune_implicit.hypergradients.guards.untouched import preserved_buffers, preserved_modes
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.hypergradients.state import Objective, State, named_trainable
from tune_implicit.hypergradients.vectors import flatten
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.splits import batches_of

__all__ = ["FixedProblem", "raised_by"]

# The attribute of an exception that says which objective raised it.
_RAISED_BY = "_tune_implicit_raised_by"


@dataclass(frozen=True)
class FixedProblem:
    """What every look at a problem is given.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are copies, which a look may train and freeze.
    settings : ImplicitSettings
        What a trial is run with.
    origin : BilevelProblem
        The problem as it was given, whose models stay as they are.
    train, validate : Batch
        The first batch of each split, on the models' device.
    draw : int
        The seed of what the objectives draw, at every call the same.
    budget : Budget
        How long a look may take; without end by default.
    """

    problem: BilevelProblem
    settings: ImplicitSettings
    origin: BilevelProblem
    train: Batch
    validate: Batch
    draw: int = 0
    budget: Budget = field(default_factory=Budget)

    @classmethod
    def of(cls, problem: BilevelProblem, settings: ImplicitSettings, budget: Budget | None = None) -> "FixedProblem":
        """Return ``problem`` with copies of its models, on its first batches.

        Raises
        ------
        InvalidTypeError, InvalidValueError
            If a split has no batch.
        """
        device = next(problem.ll_model.parameters()).device
        first = {name: next(batches_of(name, getattr(problem, name))) for name in ("train_data", "validate_data")}
        models = {name: copy.deepcopy(getattr(problem, name)) for name in ("ul_model", "ll_model")}
        named = {name: _named(name, getattr(problem, name)) for name in ("ul_objective", "ll_objective")}
        if problem.ll_step is not None:
            named["ll_step"] = _named("ll_step", problem.ll_step)
        train, validate = (moved(batch, device) for batch in first.values())
        changed: dict[str, Any] = models | named
        return cls(replace(problem, **changed), settings, problem, train, validate, budget=budget or Budget())

    def within(self, share: float) -> "FixedProblem":
        """Return the same problem, to be looked at in that part of the time that is left."""
        return replace(self, budget=self.budget.part(share))

    def fresh(self) -> BilevelProblem:
        """Return the problem with further copies of its models as a trial starts from them."""
        models = {name: copy.deepcopy(getattr(self.origin, name)) for name in ("ul_model", "ll_model")}
        in_use = self.ul_params()
        for name, param in named_trainable(models["ul_model"]).items():
            param.requires_grad_(name in in_use)
        return replace(self.problem, **models)

    def copied(self) -> BilevelProblem:
        """Return the problem with further copies of its models as they are."""
        models = {name: copy.deepcopy(getattr(self.problem, name)) for name in ("ul_model", "ll_model")}
        return replace(self.problem, **models)

    def doubled(self) -> "FixedProblem":
        """Return a copy in float64."""
        models = {name: copy.deepcopy(getattr(self.problem, name)).double() for name in ("ul_model", "ll_model")}

        def double(batch: Batch) -> Batch:
            if all(not t.is_floating_point() or t.dtype == torch.float64 for t in tensors_of(batch)):
                return batch
            return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)

        return replace(
            self, problem=replace(self.problem, **models), train=double(self.train), validate=double(self.validate)
        )

    def repeatable(self) -> BilevelProblem:
        """Return the problem with objectives that draw the same random numbers at every call."""
        problem = self.problem
        return replace(
            problem,
            ul_objective=_repeated(problem.ul_objective, self.draw),
            ll_objective=_repeated(problem.ll_objective, self.draw),
        )

    def ll_params(self) -> list[nn.Parameter]:
        """Return the ll parameters."""
        return list(named_trainable(self.problem.ll_model).values())

    def ul_params(self) -> dict[str, nn.Parameter]:
        """Return the ul values, by name."""
        return named_trainable(self.problem.ul_model)

    def loss(self, level: str, batch: Batch | None = None) -> Tensor:
        """Return the loss of the ``level``, ``"ul"`` or ``"ll"``, on its batch, or on another."""
        name, models = f"{level}_objective", (self.problem.ul_model, self.problem.ll_model)
        objective = _repeated(getattr(self.problem, name), self.draw)
        if batch is None:
            batch = {"ul": self.validate, "ll": self.train}[level]
        with torch.enable_grad(), self.kernels(), preserved_modes(*models), preserved_buffers(*models):
            return scalar_loss(name, objective(State.of(batch, *models)))

    def value(self, level: str, batch: Batch | None = None) -> float:
        """Return the value of :meth:`loss`."""
        return self.loss(level, batch).item()

    def gradients(
        self, level: str, params: Sequence[Tensor], batch: Batch | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return :meth:`loss`, and its gradient in each of ``params``, ``None`` where it does not depend on it."""
        model = self.problem.ll_model
        with self.kernels(), named_derivatives(f"{level}_objective", model, partial(self.loss, level, batch)):
            loss = self.loss(level, batch)
            return loss.detach(), list(grad(loss, params, allow_unused=True))

    def gradient(self, level: str, params: Sequence[Tensor], batch: Batch | None = None) -> Tensor:
        """Return the gradient of :meth:`loss` over all entries of ``params``, of shape (n,)."""
        _, gradients = self.gradients(level, params, batch)
        return flatten([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, params, strict=True)])

    @contextmanager
    def second_order(self) -> Iterator[SecondOrder]:
        """Yield the ll loss, ready to be differentiated twice for as long as the context lasts."""
        loss = partial(self.loss, "ll")
        with self.kernels(), named_derivatives("ll_objective", self.problem.ll_model, loss):
            yield SecondOrder(loss(), self.ll_params())

    def kernels(self) -> AbstractContextManager[None]:
        """Return a context in which all is computed with what torch can differentiate twice."""
        return twice_differentiable_kernels(self.problem.ll_model)


def _repeated(objective: Objective, seed: int) -> Objective:
    def repeated(state: State) -> Tensor:
        with preserved_rng():
            seed_everything(seed)
            return objective(state)

    return repeated


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, whose exceptions say that it raised them."""

    def named(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            if not isinstance(error, TuneImplicitError | torch.OutOfMemoryError):
                setattr(error, _RAISED_BY, name)
            raise

    return named


def raised_by(error: Exception) -> str | None:
    """Return the name of the objective, or step, whose own code raised ``error``, ``None`` where none did."""
    name: str | None = getattr(error, _RAISED_BY, None)
    return name
