"""Products with the second derivatives of the ll loss at one point: the only module that differentiates twice."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.backends import cuda, cudnn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tune_implicit.errors import InvalidValueError
from tune_implicit.vectors import flatten, norm_of, unflatten

__all__ = ["SecondOrder", "check_twice_differentiable", "twice_differentiable_kernels"]


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


class SecondOrder:
    """The ll loss ``f(w, l)`` at one point, differentiated once in ``w`` and ready to be differentiated again.

    The graph of ``df/dw`` is built once and retained, so that a product costs one backward pass through it and every
    product is with the Hessian of the same batch, dropout mask and random state.

    Parameters
    ----------
    ll_loss : Tensor, scalar
        ``f``, with the graph that computed it.
    ll_params : sequence of Tensor
        ``w``. One that ``f`` does not use has zero derivatives.

    Attributes
    ----------
    stationarity : Tensor, scalar
        ``||df/dw||``, in float64.
    hvps : int
        Hessian-vector products taken so far.
    """

    def __init__(self, ll_loss: Tensor, ll_params: Sequence[Tensor]) -> None:
        gradients = grad(ll_loss, ll_params, create_graph=True, materialize_grads=True)
        self._ll_params = ll_params
        # A gradient that is constant in everything has no graph, and no second derivative.
        self._varying = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]
        self._gradients = [gradients[index] for index in self._varying]
        self.stationarity = norm_of([gradient.detach() for gradient in gradients])
        self.hvps = 0

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v`` of shape (n,), with ``H = d2f / dw2``, for ``v`` of shape (n,), in the dtype of ``v``."""
        self.hvps += 1
        products = self._vjp(v, self._ll_params, retain_graph=True)
        image = flatten(
            [torch.zeros_like(w) if hv is None else hv for hv, w in zip(products, self._ll_params, strict=True)]
        )
        return image if image.dtype is v.dtype else image.to(v.dtype)

    def mixed_vjp(self, v: Tensor, ul_params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return ``(d2f / dl dw) v`` for each tensor of ``l``, ``None`` where ``df/dw`` does not depend on it.

        It is the last product: the graph is freed.
        """
        return self._vjp(v, ul_params, retain_graph=False)

    def _vjp(self, v: Tensor, inputs: Sequence[Tensor], retain_graph: bool) -> tuple[Tensor | None, ...]:
        if not self._gradients:
            return (None,) * len(inputs)
        pieces = unflatten(v, self._ll_params)
        if len(self._gradients) < len(pieces):
            pieces = tuple(pieces[index] for index in self._varying)
        return grad(self._gradients, inputs, pieces, retain_graph=retain_graph, allow_unused=True)
