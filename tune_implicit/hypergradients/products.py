"""Products with the second derivatives of the ll loss at one point: the only module that differentiates twice."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.vectors import flatten, norm_of, unflatten

__all__ = ["MeanSecondOrder", "SecondDerivatives", "SecondOrder"]


class SecondDerivatives(Protocol):
    """The ll loss at one point, ready to be differentiated twice: on one batch, or the mean over several.

    Attributes
    ----------
    losses : list of Loss
        The loss on each batch.
    unused : list of int
        The indices of those ll parameters that the loss does not use.
    stationarity, stationarity_at_zeros : Tensor, scalar
        ``||df/dw||``, and that part of it which is on weights that are exactly 0, in float64.
    hvps : int
        Hessian-vector products taken so far, each on one batch.
    """

    losses: list[Loss]
    unused: list[int]
    stationarity: Tensor
    stationarity_at_zeros: Tensor
    hvps: int

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v`` of shape (n,), with ``H = d2f / dw2``, for ``v`` of shape (n,), in the dtype of ``v``."""
        ...

    def mixed_vjp(self, v: Tensor, ul_params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return ``(d2f / dl dw) v`` for each tensor of ``l``, ``None`` where ``df/dw`` does not depend on it."""
        ...


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
    gradients : list of Tensor or None
        ``df/dw`` for each of ``ll_params``, without a graph; ``None`` for those that ``f`` does not use.
    losses, unused, stationarity, stationarity_at_zeros, hvps
        See :class:`SecondDerivatives`.
    """

    def __init__(self, ll_loss: Tensor, ll_params: Sequence[Tensor]) -> None:
        self.losses = [Loss(ll_loss)]
        gradients = dict(enumerate(grad(ll_loss, ll_params, create_graph=True, allow_unused=True)))
        self._ll_params = ll_params
        self.unused = [index for index, gradient in gradients.items() if gradient is None]
        # A gradient that is constant in everything has no graph, and no second derivative.
        varying = {index: g for index, g in gradients.items() if g is not None and g.requires_grad}
        self._varying, self._gradients = list(varying), list(varying.values())
        self.gradients = [None if gradient is None else gradient.detach() for gradient in gradients.values()]
        self.stationarity, self.stationarity_at_zeros = _stationarity(self.gradients, ll_params)
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


class MeanSecondOrder:
    """The mean ll loss over several batches at one point, ready to be differentiated twice.

    Parameters
    ----------
    losses : sequence of callable() -> Tensor
        Each computes the scalar loss on one batch, alike at every call.
    ll_params : sequence of Tensor
        ``w``.
    retain : bool
        Whether all batches keep their graphs. Otherwise each is built anew for each product, which takes the memory of
        one, and a gradient more.

    Attributes
    ----------
    losses, unused, stationarity, stationarity_at_zeros, hvps
        See :class:`SecondDerivatives`.
    """

    def __init__(self, losses: Sequence[Callable[[], Tensor]], ll_params: Sequence[Tensor], retain: bool) -> None:
        self._ll_params = ll_params
        self.losses: list[Loss] = []
        self._each: list[Callable[[], SecondOrder]] = []
        gradients = []
        for loss in losses:
            second = SecondOrder(loss(), ll_params)
            self.losses += second.losses
            gradients.append(second.gradients)
            self._each.append(partial(_itself, second) if retain else partial(self._anew, loss))
            del second  # or it would still be there while the next is built
        mean = [_mean(of_param) for of_param in zip(*gradients, strict=True)]
        self.unused = [index for index, gradient in enumerate(mean) if gradient is None]
        self.stationarity, self.stationarity_at_zeros = _stationarity(mean, ll_params)
        self.hvps = 0

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v`` of shape (n,), the mean of the batches' own."""
        self.hvps += len(self._each)
        total = torch.zeros_like(v)
        for second in self._each:
            total += second().hvp(v)
        return total / len(self._each)

    def mixed_vjp(self, v: Tensor, ul_params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the mean of the batches' ``(d2f / dl dw) v``; it is the last product."""
        each = [second().mixed_vjp(v, ul_params) for second in self._each]
        return tuple(_mean(of_param) for of_param in zip(*each, strict=True))

    def _anew(self, loss: Callable[[], Tensor]) -> SecondOrder:
        return SecondOrder(loss(), self._ll_params)


def _itself(second: SecondOrder) -> SecondOrder:
    return second


def _mean(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return the mean, ``None`` counting as zero; ``None`` where there is nothing else."""
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(given).sum(0) / len(tensors) if given else None


def _stationarity(gradients: Sequence[Tensor | None], ll_params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``||df/dw||``, and that part of it which is on weights that are exactly 0."""
    used = [(g, w.detach()) for g, w in zip(gradients, ll_params, strict=True) if g is not None]
    if not used:
        zero = ll_params[0].new_zeros((), dtype=torch.float64)
        return zero, zero
    return norm_of([g for g, _ in used]), norm_of([g * (w == 0) for g, w in used])
