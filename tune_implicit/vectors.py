"""Between parameters, a sequence of tensors of any shape, and one flat ``(n,)`` tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["flatten", "unflatten"]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of ``tensors`` in order, as one ``(n,)`` tensor of their promoted dtype.

    Unlike ``torch.nn.utils.parameters_to_vector`` it takes tensors of any memory layout, which gradients have.
    """
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the ``(n,)`` tensor ``vector`` cut into the shapes and dtypes of ``like``, as views where dtypes agree."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return tuple(piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, like, strict=True))
