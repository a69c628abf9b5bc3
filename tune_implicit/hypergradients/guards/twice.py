"""What torch can differentiate twice: modules, functions, kernels."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.backends import cuda, cudnn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.guards.losses import Loss, nodes_of

__all__ = ["check_second_derivatives", "check_twice_differentiable", "no_autocast", "twice_differentiable_kernels"]


def check_twice_differentiable(name: str, model: nn.Module) -> None:
    """Check that ``model`` trains no module whose second derivative torch gets wrong or does not have.

    Raises
    ------
    InvalidValueError
        If it does. That of ``weight_norm`` is wrong in torch 2.13, without a word: by 30% of the largest entry of the
        Hessian of a linear layer, against differences of its gradient.
    """
    for path, module in model.named_modules():
        kind = None
        if isinstance(module, nn.EmbeddingBag):
            kind, instead = "EmbeddingBag", "an Embedding and a sum"
        elif _is_weight_norm(module):
            kind, instead = "weight_norm", "a parametrization of your own that returns g * v / v.norm(...)"
        elif _is_spectral_norm(module):
            kind, instead = "spectral_norm", "a parametrization of your own that divides by matrix_norm(w, 2)"
        elif isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse):
            kind, instead = "Embedding with scale_grad_by_freq or sparse", "neither option"
        if kind and any(param.requires_grad for param in module.parameters()):
            raise InvalidValueError(
                f"`{name}`'s module {path!r} uses {kind}, which torch cannot differentiate twice. Use {instead}, or "
                "set requires_grad=False on its parameters."
            )


def _is_weight_norm(module: nn.Module) -> bool:
    if isinstance(module, ParametrizationList):
        return any(isinstance(parametrization, _WeightNorm) for parametrization in module)
    return any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())


def _is_spectral_norm(module: nn.Module) -> bool:
    if isinstance(module, ParametrizationList):
        return any(isinstance(parametrization, _SpectralNorm) for parametrization in module)
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


# All functions that `once_differentiable` returns share it.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def check_second_derivatives(ll_loss: Loss) -> None:
    """Check that every custom function in ``ll_loss`` has a second derivative.

    Raises
    ------
    InvalidValueError
        If not. ``torch.autograd.grad`` takes it for zero, without a word.
    """
    for node in nodes_of(ll_loss):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                raise InvalidValueError(
                    f"`ll_objective` uses {node._forward_cls.__name__}, whose backward is marked once_differentiable: "
                    "it has no second derivative. Use another implementation of it."
                )
            backward = getattr(backward, "__wrapped__", None)


@contextmanager
def twice_differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Compute with what torch can differentiate twice: unfused attention, RNNs without cuDNN, no compiled code.

    Autocast that is on around the caller is off inside: a solve in float16 gives NaN. Only the forward pass that builds
    the graph needs all this; its backward passes stay with the kernels it chose.
    """
    with ExitStack() as stack:
        stack.enter_context(no_autocast(model))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_math_attention())
        yield


def no_autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Compute in the parameters' own dtypes; matrix products of a backward pass are autocast too."""
    device_type = next(model.parameters()).device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@contextmanager
def _math_attention() -> Iterator[None]:
    """Compute attention without fused kernels, as ``sdpa_kernel(SDPBackend.MATH)`` does in ten times the time."""
    enable = (cuda.enable_math_sdp, cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp)
    before = (
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    for switch, on in zip(enable, (True, False, False, False), strict=True):
        switch(on)
    try:
        yield
    finally:
        for switch, on in zip(enable, before, strict=True):
            switch(on)
