"""What an objective must return, must not do, and must leave as it was."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tune_implicit.batches import tensors_of
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.rng import preserved_rng
from tune_implicit.vectors import norm_of

__all__ = [
    "Loss",
    "check_devices",
    "check_second_derivatives",
    "check_unedited",
    "check_used",
    "fingerprint",
    "scalar_loss",
    "untouched",
]


def scalar_loss(name: str, loss: object) -> Tensor:
    """Return ``loss`` as a scalar tensor that can be differentiated.

    Raises
    ------
    InvalidTypeError
        If it is not a real floating tensor.
    InvalidValueError
        If it has more than one entry, or depends on no parameter.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidTypeError(f"`{name}` must return a real floating tensor, got {got}.")
    if loss.numel() != 1:
        raise InvalidValueError(
            f"`{name}` must return a scalar, got a tensor of shape {tuple(loss.shape)}. "
            "Reduce it with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise InvalidValueError(
            f"`{name}` returned a loss that depends on no parameter. Compute it from `state.ll_model` and "
            "`state.ul_model`, without .detach(), .item(), NumPy or torch.no_grad()."
        )
    return loss.reshape(())


def check_devices(device: torch.device, **batches: Any) -> None:
    """Check that all tensors of ``batches``, by the name of their split, are on ``device``.

    Raises
    ------
    InvalidValueError
        If one is not.
    """
    for name, batch in batches.items():
        for tensor in tensors_of(batch):
            if tensor.device != device:
                raise InvalidValueError(
                    f"`{name}_data` and `{name}_target` must be on the models' device, {device}, got a tensor on "
                    f"{tensor.device}. Move the batch with .to({str(device)!r})."
                )


class Loss:
    """A loss and its graph without its memory: a mean is as large as what it is the mean of."""

    def __init__(self, loss: Tensor) -> None:
        self.value = loss.detach().to(torch.float64, copy=True)
        self.grad_fn = loss.grad_fn


def check_used(params: dict[str, Tensor], ul_loss: Loss, ll_loss: Loss) -> None:
    """Check that each of ``params``, whose derivative is structurally zero, at least enters one of the losses.

    Raises
    ------
    InvalidValueError
        If one does not: nothing would ever move it.
    """
    if not params:
        return
    reached = _leaves(ul_loss) | _leaves(ll_loss)
    unused = [name for name, param in params.items() if id(param) not in reached]
    if unused:
        raise InvalidValueError(
            f"Neither objective uses the ul model's {', '.join(map(repr, unused))}, so no hypergradient can move it. "
            "Use it in an objective, or freeze it with requires_grad=False. A learning rate belongs to the search."
        )


def _leaves(loss: Loss) -> set[int]:
    """Return the ids of the leaf tensors from which ``loss`` was computed."""
    return {id(leaf) for node in _nodes(loss) if (leaf := getattr(node, "variable", None)) is not None}


def _nodes(loss: Loss) -> set[Any]:
    """Return the nodes of the graph that computed ``loss``."""
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return seen


# All functions that `once_differentiable` returns share it.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def check_second_derivatives(ll_loss: Loss) -> None:
    """Check that every custom function in ``ll_loss`` has a second derivative.

    Raises
    ------
    InvalidValueError
        If not. ``torch.autograd.grad`` takes it for zero, without a word.
    """
    for node in _nodes(ll_loss):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                raise InvalidValueError(
                    f"`ll_objective` uses {node._forward_cls.__name__}, whose backward is marked once_differentiable: "
                    "it has no second derivative. Use another implementation of it."
                )
            backward = getattr(backward, "__wrapped__", None)


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
