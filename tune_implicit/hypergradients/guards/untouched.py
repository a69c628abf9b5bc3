"""What a call must leave as it was."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.rng import preserved_rng
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["check_unedited", "fingerprint", "untouched"]


def fingerprint(params: list[nn.Parameter]) -> tuple[list[int], float]:
    """Return what an edit changes: the versions, and the norm, as writing through ``.data`` leaves no version."""
    norm = norm_of([param.detach() for param in params]).item()
    return [param._version for param in params], 0.0 if math.isnan(norm) else norm


def check_unedited(params: list[nn.Parameter], before: tuple[list[int], float]) -> None:
    """Check that no objective has written into a parameter.

    Raises
    ------
    InvalidValueError
        If one has: the two losses, or a loss and its derivatives, then belong to two points.
    """
    if fingerprint(params) != before:
        raise InvalidValueError(
            "An objective changed a parameter in place, so that its derivatives belong to no one point. Project or "
            "clip parameters after the optimizer's step, and use Embedding without max_norm."
        )


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Leave the models' modes, buffers, gradients and hooks, and the global random state, as they were.

    Hooks on parameters, which clip gradients in training, would be part of every derivative taken inside.
    """
    params = [param for model in models for param in model.parameters()]
    saved = [(param, param.requires_grad, param.grad, param._backward_hooks) for param in params]
    for param in params:
        param.grad = None
        if param._backward_hooks:
            param._backward_hooks = None
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with preserved_rng():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for param, requires_grad, gradient, hooks in saved:
            param.requires_grad_(requires_grad)
            param.grad = gradient
            if hooks:
                param._backward_hooks = hooks
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                buffer.copy_(value)
