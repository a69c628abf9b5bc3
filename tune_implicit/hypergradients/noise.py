"""How exact ``dF/dw`` is on a validation batch."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.hypergradients.batches import Batch, halves
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["error_of_mean", "standard_error"]


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
    batch : Batch
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
