"""What torch can differentiate twice: modules, functions, kernels."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.function import once_differentiable
from torch.backends import cuda, cudnn

from tune_implicit.errors import DerivativeError
from tune_implicit.hypergradients.borrowed import (
    custom_function_of,
    is_spectral_norm,
    is_weight_norm,
    leaves_of,
    map_tensors,
)
from tune_implicit.hypergradients.guards.losses import Loss

__all__ = [
    "check_derivatives",
    "check_twice_differentiable",
    "named_derivatives",
    "twice_differentiable_kernels",
]

# How torch words it that an operation has no derivative, or no second one; the group is its name.
_MISSING = (
    re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented"),
    re.compile(r"The function '(\w+)' is not differentiable with respect to argument '(\w+)'"),
    re.compile(r"differentiate twice a function that was marked with @(once_differentiable)"),
    re.compile(r"[Dd]ouble backwards? is not supported for (\w+)"),
)

# What to write instead of an operation, by how its name begins.
_INSTEAD = {
    "hardsigmoid": "nn.ReLU6()(x + 3) / 6",
    "_cdist": "(x[:, None] - y).norm(dim=-1)",
    "_pdist": "(x[:, None] - x).norm(dim=-1), of the pairs above the diagonal",
    "nll_loss": 'reduction="none", and the weights times the losses',
    "cross_entropy": 'reduction="none", and the weights times the losses',
    "binary_cross_entropy": 'reduction="none", and the weights times the losses',
    "multi_margin": "(margin - x.gather(1, y[:, None]) + x).clamp(min=0)",
    "_segment_reduce": "index_add or scatter_reduce",
    "_sparse_softmax": "a dense softmax",
    "_embedding_bag": "an Embedding and a sum",
    "_standard_gamma": "another distribution",
}


def check_twice_differentiable(name: str, model: nn.Module) -> None:
    """Check that ``model`` trains no module whose second derivative torch gets wrong or does not have.

    Raises
    ------
    DerivativeError
        If it does. That of ``weight_norm`` is wrong in torch 2.13, without a word: by 30% of the largest entry of the
        Hessian of a linear layer, against differences of its gradient.
    """
    for path, module in model.named_modules():
        kind = None
        if isinstance(module, nn.EmbeddingBag):
            kind, instead = "EmbeddingBag", "an Embedding and a sum"
        elif is_weight_norm(module):
            kind, instead = "weight_norm", "a parametrization of your own that returns g * v / v.norm(...)"
        elif is_spectral_norm(module):
            kind, instead = "spectral_norm", "a parametrization of your own that divides by matrix_norm(w, 2)"
        elif isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse):
            kind, instead = "Embedding with scale_grad_by_freq or sparse", "neither option"
        if kind and any(param.requires_grad for param in module.parameters()):
            raise DerivativeError(
                f"`{name}`'s module {path!r} uses {kind}, which torch cannot differentiate twice. Use {instead}, or "
                "set requires_grad=False on its parameters."
            )


# All functions that `once_differentiable` returns share it.
_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def check_derivatives(ul_loss: Loss, ll_loss: Loss) -> None:
    """Check that torch takes no derivative of the two losses for zero, or gets it wrong, without a word.

    Raises
    ------
    DerivativeError
        If it does: the first of reentrant checkpointing in either, the second in ``ll_loss`` of a custom function whose
        backward is marked once_differentiable, or of ``weight_norm``.
    """
    for objective, loss in (("ul_objective", ul_loss), ("ll_objective", ll_loss)):
        if any(node.name().startswith("CheckpointFunction") for node in loss.nodes()):
            raise DerivativeError(
                f"`{objective}` uses reentrant checkpointing, which hides parameters from torch.autograd.grad. Pass "
                "use_reentrant=False to torch.utils.checkpoint.checkpoint; in transformers, "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
    for node in ll_loss.nodes():
        if node.name().startswith("WeightNorm"):
            raise DerivativeError(
                "`ll_objective` uses weight_norm, whose second derivative torch gets wrong. Write g * v / v.norm(...)."
            )
        custom = custom_function_of(node)
        backward = getattr(custom, "backward", None)
        while custom is not None and backward is not None:
            if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                raise DerivativeError(
                    f"`ll_objective` uses {custom.__name__}, whose backward is marked once_differentiable: "
                    "it has no second derivative. Use another implementation of it."
                )
            backward = getattr(backward, "__wrapped__", None)


@contextmanager
def named_derivatives(objective: str, model: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Name the operation, and the module, where torch has no derivative for what is done inside.

    Parameters
    ----------
    objective : str
        What the message calls what ``run`` computes.
    model : Module
        In which to look for the module.
    run : callable()
        Computes the loss once more, so that its modules can be tried one by one.

    Raises
    ------
    DerivativeError
        In place of torch's RuntimeError, if it is one about a derivative.
    RuntimeError
        If it is another.
    """
    try:
        yield
    except RuntimeError as error:
        found = next((match for pattern in _MISSING if (match := pattern.search(str(error)))), None)
        if found is None:
            raise
        operation, *argument = found.groups()
        what = f"{operation} in its {argument[0]!r}" if argument else f"{operation} twice"
        modules = [] if argument else _once_differentiable_modules(model, run)
        where = f" (in {'; '.join(modules)})" if modules else ""
        instead = next((way for name, way in _INSTEAD.items() if operation.startswith(name)), None)
        raise DerivativeError(
            f"torch cannot differentiate {what}, which `{objective}` needs{where}: "
            + (f"write {instead}" if instead else "write it from functions that torch can differentiate")
            + ", or freeze all parameters that it depends on."
        ) from error


def _once_differentiable_modules(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the innermost modules of ``model`` that cannot be differentiated twice at what ``run()`` feeds them."""
    fed: dict[str, tuple[nn.Module, Any]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, *inputs: fed.__setitem__(name, (module, inputs))

    hooks = [
        module.register_forward_pre_hook(remember(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        run()
    except RuntimeError:
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return [
        f"{name!r}, {type(module).__name__}" for name, (module, inputs) in fed.items() if not _twice(module, inputs)
    ]


def _twice(module: nn.Module, inputs: Any) -> bool:
    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    def varying(nested: Any) -> list[Tensor]:
        return [each for each in leaves_of(nested) if isinstance(each, Tensor) and each.requires_grad]

    args, kwargs = made = map_tensors(leaf, inputs)
    leaves = varying([made, list(module.parameters())])
    try:
        with torch.enable_grad():
            outputs = varying(module(*args, **kwargs))
            if not (outputs and leaves):
                return True
            # A square, so that the derivative varies even where the module is linear.
            total = torch.stack([output.square().sum() for output in outputs]).sum()
            gradients = varying(grad(total, leaves, create_graph=True, allow_unused=True))
            grad(gradients, leaves, [torch.ones_like(g) for g in gradients], allow_unused=True)
    except RuntimeError:
        return False
    return True


@contextmanager
def twice_differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Compute with what torch can differentiate twice: unfused attention, RNNs without cuDNN, no compiled code.

    Autocast that is on around the caller is off inside: matrix products of a backward pass are autocast too, and a
    solve in float16 gives NaN. All this is for the backward passes as well, in which checkpointed modules are computed
    once more.
    """
    device_type = next(model.parameters()).device.type
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_math_attention())
        yield


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
