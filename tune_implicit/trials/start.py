"""Ul values that a trial starts from, in place of those that its problem was made with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = ["start_from"]

_WAY_OUT = "Pass `ul_state` of a trial of the same problem, or ul_model.state_dict()."


def start_from(ul_model: nn.Module, initial_ul_state: Mapping[str, Tensor]) -> None:
    """Copy ``initial_ul_state`` into ``ul_model``, whose tensors stay the same objects, of their own dtype and device.

    Parameters
    ----------
    ul_model : Module
        The ul model as its problem was made with it. It is left alone if anything does not fit.
    initial_ul_state : mapping of str to Tensor
        A value for each entry of ``ul_model.state_dict()``, of its shape.

    Raises
    ------
    InvalidTypeError
        If it is no mapping of names to tensors.
    InvalidValueError
        If its names or shapes are others; one error tells all.
    """
    if not isinstance(initial_ul_state, Mapping):
        raise InvalidTypeError(
            f"`initial_ul_state` must be a mapping of names to tensors, got {type(initial_ul_state).__name__}. "
            f"{_WAY_OUT}"
        )
    own = ul_model.state_dict()
    for name, value in initial_ul_state.items():
        if isinstance(own.get(name), Tensor) and not isinstance(value, Tensor):
            raise InvalidTypeError(
                f"`initial_ul_state` must be a mapping of names to tensors, got {type(value).__name__} for {name!r}. "
                f"{_WAY_OUT}"
            )
    if mistakes := _mistakes(own, initial_ul_state):
        raise InvalidValueError(
            f"`initial_ul_state` must have the names and shapes of the ul model's state, got {'; '.join(mistakes)}. "
            f"{_WAY_OUT}"
        )
    ul_model.load_state_dict(dict(initial_ul_state))


def _mistakes(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return in what the names and shapes differ."""
    told = []
    if missing := [name for name in own if name not in given]:
        told.append(f"none of {', '.join(map(repr, missing))}")
    if unknown := [name for name in given if name not in own]:
        told.append(f"unknown {', '.join(map(repr, unknown))}")
    for name, value in own.items():
        if isinstance(value, Tensor) and name in given and given[name].shape != value.shape:
            told.append(f"{name!r} of shape {tuple(given[name].shape)} for {tuple(value.shape)}")
    return told
