"""How exact ``dF/dw`` is on a validation batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.borrowed import map_tensors
from tune_implicit.hypergradients.state import Batch, tensors_of
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["error_of_mean", "halves", "standard_error"]


def error_of_mean(gradients: Sequence[Tensor]) -> float:
    """Return the norm of the standard error of the mean of ``gradients``, two or more, each of shape (n,)."""
    mean = torch.stack(list(gradients)).mean(0)
    squares = math.fsum(norm_of([gradient - mean]).item() ** 2 for gradient in gradients)
    return math.sqrt(squares / (len(gradients) * (len(gradients) - 1)))


def standard_error(loss: Callable[[Batch], Tensor], batch: Batch, params: Sequence[Tensor]) -> float:
    """Return the norm of the standard error of a loss's gradient: half the difference between two half-batches.

    Parameters
    ----------
    loss : callable(batch) -> Tensor
        A mean over examples, with the same random draws at every call.
    batch : (data, target)
        To be halved.
    params : sequence of Tensor
        To differentiate in.

    Raises
    ------
    InvalidValueError
        If the batch cannot be halved.
    """
    one, other = (grad(loss(half), params, allow_unused=True, materialize_grads=True) for half in halves(batch))
    return norm_of([(a - b) / 2 for a, b in zip(one, other, strict=True)]).item()


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return a batch in two halves: each tensor as long as the batch is cut in the middle, others are in both.

    Raises
    ------
    InvalidValueError
        If the batch has fewer than two examples, or holds no tensor that tells how many.
    """
    sizes = [len(tensor) for tensor in tensors_of(batch) if tensor.ndim]
    size = sizes[0] if sizes else 0
    if size < 2:
        raise InvalidValueError(
            f'`stop="noise"` halves the validation batch, which must hold 2 or more examples, got {size}. '
            'Use larger batches, or `stop="tolerance"`.'
        )

    def cut(part: slice) -> Any:
        return map_tensors(lambda tensor: tensor[part] if tensor.ndim and len(tensor) == size else tensor, batch)

    middle = size // 2
    return cut(slice(middle)), cut(slice(middle, None))
