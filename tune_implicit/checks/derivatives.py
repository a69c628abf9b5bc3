"""Derivatives against differences, and the modules whose second derivatives torch does not have."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils import _pytree as pytree

from tune_implicit.hypergradients.solvers.spectrum import random_direction
from tune_implicit.hypergradients.state import tensors_of
from tune_implicit.hypergradients.vectors import unflatten

__all__ = ["directional_error", "once_differentiable_modules"]


def directional_error(
    params: Sequence[nn.Parameter], gradient: Tensor, value: Callable[[], Tensor], steps: Sequence[float]
) -> float:
    """Return how far ``gradient`` is from differences of ``value()`` along a random direction over ``params``.

    Parameters
    ----------
    params : sequence of Parameter
        Moved, and moved back.
    gradient : Tensor, shape (n,)
        Of the scalar ``value()`` over all entries of ``params``.
    value : callable() -> Tensor
        In float64, and the same at every call.
    steps : sequence of float
        Of the differences. A kink within a step spoils one, rounding another.

    Returns
    -------
    float
        Relative to the derivative or the norm of ``gradient``, whichever is larger; the best over ``steps``.
    """
    direction = random_direction(gradient)
    pieces = unflatten(direction, params)
    expected = (gradient @ direction).item()
    scale = max(abs(expected), torch.linalg.vector_norm(gradient).item(), 1e-12)

    def shift(by: float) -> None:
        with torch.no_grad():
            for param, piece in zip(params, pieces, strict=True):
                param.add_(piece, alpha=by)

    best = math.inf
    for h in steps:
        shift(h)
        high = value().item()
        shift(-2 * h)
        low = value().item()
        shift(h)
        best = min(best, abs((high - low) / (2 * h) - expected) / scale)
    return best


def once_differentiable_modules(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Return the innermost modules of ``model`` that cannot be differentiated twice at what ``run()`` feeds them."""
    fed: dict[str, tuple[nn.Module, tuple[object, ...]]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: fed.__setitem__(name, (module, inputs)))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        f"{name!r} ({type(module).__name__})" for name, (module, inputs) in fed.items() if not _twice(module, inputs)
    ]


def _twice(module: nn.Module, inputs: Iterable[object]) -> bool:
    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    made = pytree.tree_map_only(Tensor, leaf, inputs)
    leaves = [tensor for tensor in (*tensors_of(made), *module.parameters()) if tensor.requires_grad]
    try:
        with torch.enable_grad():
            outputs = [tensor for tensor in tensors_of(module(*made)) if tensor.requires_grad]
            if not (outputs and leaves):
                return True
            # A square, so that the derivative varies even where the module is linear.
            total = torch.stack([output.square().sum() for output in outputs]).sum()
            varying = [g for g in grad(total, leaves, create_graph=True, allow_unused=True) if g is not None]
            grad(varying, leaves, [torch.ones_like(g) for g in varying], allow_unused=True)
    except RuntimeError:
        return False
    return True
