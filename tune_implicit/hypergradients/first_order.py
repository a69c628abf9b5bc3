"""The first derivatives of the ul loss at one point, on one batch or the mean over several."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.noise import error_of_mean, standard_error
from tune_implicit.hypergradients.vectors import flatten

__all__ = ["FirstDerivatives", "coarsest"]


class FirstDerivatives:
    """``dF/dw`` and ``dF/dl``, means over batches, of which each is evaluated and differentiated in turn.

    Parameters
    ----------
    loss_of : callable(batch) -> Tensor
        Computes ``F``, with the same random draws at every call.
    batches : sequence of Batch
    ll_params, ul_params : sequence of Tensor
        ``w`` and ``l``.

    Attributes
    ----------
    losses : list of Loss
        The loss on each batch.
    b : Tensor, shape (n,)
        ``dF/dw``.
    direct : list of Tensor or None
        ``dF/dl`` for each of ``ul_params``, ``None`` where ``F`` does not depend on it.
    """

    def __init__(
        self,
        loss_of: Callable[[Batch], Tensor],
        batches: Sequence[Batch],
        ll_params: Sequence[Tensor],
        ul_params: Sequence[Tensor],
    ) -> None:
        self._loss_of, self._batches, self._ll_params = loss_of, batches, ll_params
        self.losses: list[Loss] = []
        self._each: list[Tensor] = []
        self.direct: list[Tensor | None] = [None] * len(ul_params)
        for batch in batches:
            loss = loss_of(batch)
            first = grad(loss, [*ll_params, *ul_params], allow_unused=True)
            self.losses.append(Loss(loss))
            self._each.append(_flat(first[: len(ll_params)], ll_params))
            self.direct = [_sum(total, g) for total, g in zip(self.direct, first[len(ll_params) :], strict=True)]
        self.b = self._each[0]
        if len(batches) > 1:
            self.b = torch.stack(self._each).mean(0)
            self.direct = [None if total is None else total / len(batches) for total in self.direct]

    def error(self) -> float:
        """Return the norm of the standard error of ``b``: from the spread of the batches, or from two halves of one.

        Raises
        ------
        InvalidValueError
            If the one batch cannot be halved.
        """
        if len(self._each) > 1:
            return error_of_mean(self._each)
        return standard_error(self._loss_of, self._batches[0], self._ll_params)


def coarsest(params: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that decides how many digits products have."""
    return max((param.dtype for param in params), key=lambda dtype: torch.finfo(dtype).eps)


def _flat(gradients: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    b = flatten([torch.zeros_like(w) if g is None else g for g, w in zip(gradients, params, strict=True)])
    # No solve would keep a digit of half precision; and b in more digits than products have cannot be reached.
    return b.to(torch.promote_types(coarsest(params), torch.float32))


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient
