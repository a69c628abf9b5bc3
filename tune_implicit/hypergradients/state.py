"""What an objective is called with, and what the two models must be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import Batch, described, is_pair

__all__ = ["Objective", "State", "check_models", "named_trainable"]

_FIELDS = ("batch", "data", "target", "ul_model", "ll_model")


class State:
    """What an objective or a metric is called with; ``state["data"]`` is ``state.data``.

    Parameters
    ----------
    data, target : any nesting of Tensor
        One batch, a pair.
    ul_model, ll_model : Module
        The upper-level and the lower-level model.

    Attributes
    ----------
    batch : Batch
        What the split has yielded, on the models' device: ``(data, target)`` or anything else.
    """

    __slots__ = ("batch", "ll_model", "ul_model")

    batch: Batch
    ul_model: nn.Module
    ll_model: nn.Module

    def __init__(self, data: Any, target: Any, ul_model: nn.Module, ll_model: nn.Module) -> None:
        self._hold((data, target), ul_model, ll_model)

    @classmethod
    def of(cls, batch: Batch, ul_model: nn.Module, ll_model: nn.Module) -> "State":
        """Return the state of a batch of any kind."""
        state = cls.__new__(cls)
        state._hold(batch, ul_model, ll_model)
        return state

    def _hold(self, batch: Batch, ul_model: nn.Module, ll_model: nn.Module) -> None:
        for name, value in (("batch", batch), ("ul_model", ul_model), ("ll_model", ll_model)):
            object.__setattr__(self, name, value)

    @property
    def data(self) -> Any:
        """The first half of a batch that is a pair; the whole of any other."""
        return self.batch[0] if is_pair(self.batch) else self.batch

    @property
    def target(self) -> Any:
        """The second half of a batch that is a pair.

        Raises
        ------
        InvalidTypeError
            If it is none.
        """
        if not is_pair(self.batch):
            raise InvalidTypeError(
                f"`state.target` is the second half of a (data, target) pair, got {described(self.batch)}. Take what "
                "you need from `state.batch`. For one pair that is all the data, make the split [(data, target)]."
            )
        return self.batch[1]

    def __getitem__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise KeyError(f"{name!r}: a state holds {', '.join(_FIELDS)}.")
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A state cannot be changed, got {name!r}. Objectives read it.")

    def __repr__(self) -> str:
        return f"State of {described(self.batch)}"


Objective = Callable[[State], Tensor]


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` with ``requires_grad``, by name; a tied one stands under its first name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


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
