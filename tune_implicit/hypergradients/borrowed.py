"""What torch keeps private and nothing public replaces, each name behind a function of ours.

A test sees to it that they are there, under the oldest and the newest torch that is promised.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

__all__ = [
    "custom_function_of",
    "is_spectral_norm",
    "is_weight_norm",
    "leaves_of",
    "map_tensors",
    "mark_stepped",
    "set_backward_hooks",
    "take_backward_hooks",
    "version_of",
]


def leaves_of(nested: Any) -> list[Any]:
    """Return the leaves of any nesting of tuples, lists, dicts and named tuples."""
    leaves: list[Any] = pytree.tree_leaves(nested)
    return leaves


def map_tensors(function: Callable[[Tensor], Any], nested: Any) -> Any:
    """Return ``nested`` with ``function`` of each of its tensors in its place."""
    return pytree.tree_map_only(Tensor, function, nested)


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers know that ``optimizer`` has stepped before, in another process."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place edits that ``tensor`` has seen."""
    return tensor._version


def take_backward_hooks(param: nn.Parameter) -> Any:
    """Return the hooks on the gradient of ``param``, and take them off."""
    hooks = param._backward_hooks
    if hooks:
        param._backward_hooks = None
    return hooks


def set_backward_hooks(param: nn.Parameter, hooks: Any) -> None:
    """Put back what :func:`take_backward_hooks` returned."""
    if hooks:
        param._backward_hooks = hooks


def custom_function_of(node: Any) -> type[torch.autograd.Function] | None:
    """Return the ``torch.autograd.Function`` that a node of a graph belongs to, if it does to one."""
    return getattr(node, "_forward_cls", None)


def is_weight_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is, or has, a weight normalisation."""
    if isinstance(module, ParametrizationList):
        return any(isinstance(parametrization, _WeightNorm) for parametrization in module)
    return any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())


def is_spectral_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is, or has, a spectral normalisation."""
    if isinstance(module, ParametrizationList):
        return any(isinstance(parametrization, _SpectralNorm) for parametrization in module)
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
