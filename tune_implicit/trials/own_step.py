"""An ll step of the user's own, in place of the built-in one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.problem import LlStep
from tune_implicit.trials.settings import ImplicitSettings

__all__ = ["OwnStep"]

# What the built-in step does by these settings, a user's own has to do itself.
_WITHOUT = {"accumulate": 1, "max_ll_gradient_norm": None}


class OwnStep:
    """A user's ``ll_step``, and a look at the gradients that its optimizer steps along.

    Parameters
    ----------
    ll_step : callable(state, optimizer) -> Tensor or float
        Takes a step, and returns its loss.
    optimizer : Optimizer
        That of the ll model.
    look : callable()
        Called when the gradient of a step is in ``.grad``.
    settings : ImplicitSettings
        Of the trial.

    Raises
    ------
    InvalidValueError
        If a setting is given that is for the built-in ll step alone.
    """

    def __init__(
        self, ll_step: LlStep, optimizer: torch.optim.Optimizer, look: Callable[[], None], settings: ImplicitSettings
    ) -> None:
        for name, value in _WITHOUT.items():
            if getattr(settings, name) != value:
                raise InvalidValueError(
                    f"`{name}` must be {value} beside a problem's own `ll_step`, got {getattr(settings, name)!r}. "
                    "It is for the built-in step: do it in your own."
                )
        self._ll_step, self._optimizer, self._look = ll_step, optimizer, look
        optimizer.register_step_pre_hook(self._before_a_step)

    def take(self, state: State) -> Tensor | float:
        """Take a step on the batch of ``state``, and return its loss.

        Raises
        ------
        InvalidTypeError
            If that is no number.
        """
        with torch.enable_grad():
            loss = self._ll_step(state, self._optimizer)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.detach().reshape(())
        if not isinstance(loss, int | float) or isinstance(loss, bool):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidTypeError(f"`ll_step` must return the loss of its step, a number, got {got}.")
        return loss

    def _before_a_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at the gradient that has been computed, or at that which the step's closure will."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._look()
            return None

        def looking() -> Any:
            loss = closure()
            self._look()
            return loss

        return (optimizer, looking, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}
