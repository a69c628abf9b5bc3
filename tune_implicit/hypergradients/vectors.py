"""Between parameters, a sequence of tensors of any shape, and one flat ``(n,)`` tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["flatten", "inner", "norm_of", "unflatten"]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of ``tensors`` in order, as one ``(n,)`` tensor of their promoted dtype.

    Unlike ``torch.nn.utils.parameters_to_vector`` it takes tensors of any memory layout, which gradients have.
    """
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the ``(n,)`` tensor ``vector`` cut into the shapes and dtypes of ``like``, as views where dtypes agree."""
    # The short ways count where the vectors are short: `split` alone takes four times as long.
    if len(like) == 1 and like[0].dtype is vector.dtype:
        return (vector.view(like[0].shape),)
    pieces = vector.split_with_sizes([tensor.numel() for tensor in like])
    shaped = (piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True))
    if all(tensor.dtype is vector.dtype for tensor in like):
        return tuple(shaped)
    return tuple(piece.to(tensor.dtype) for piece, tensor in zip(shaped, like, strict=True))


def inner(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the inner product over all entries as a float64 scalar tensor, accumulated in float64."""
    terms = [(one * other).sum(dtype=torch.float64) for one, other in zip(ones, others, strict=True)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all entries as a float64 scalar tensor, in which no float32 square overflows."""
    norms: list[Tensor] = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
