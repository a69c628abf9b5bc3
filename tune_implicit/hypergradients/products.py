"""Products with the second derivatives of the ll loss at one point: the only module that differentiates twice."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.hypergradients.vectors import flatten, norm_of, unflatten

__all__ = ["SecondOrder"]


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
    unused : list of int
        The indices of those ``ll_params`` that ``f`` does not use.
    stationarity, stationarity_at_zeros : Tensor, scalar
        ``||df/dw||``, and that part of it which is on weights that are exactly 0, in float64.
    hvps : int
        Hessian-vector products taken so far.
    """

    def __init__(self, ll_loss: Tensor, ll_params: Sequence[Tensor]) -> None:
        gradients = dict(enumerate(grad(ll_loss, ll_params, create_graph=True, allow_unused=True)))
        self._ll_params = ll_params
        self.unused = [index for index, gradient in gradients.items() if gradient is None]
        # A gradient that is constant in everything has no graph, and no second derivative.
        varying = {index: g for index, g in gradients.items() if g is not None and g.requires_grad}
        self._varying, self._gradients = list(varying), list(varying.values())
        used = {index: gradient.detach() for index, gradient in gradients.items() if gradient is not None}
        self.stationarity = norm_of(list(used.values()) or [torch.zeros_like(ll_loss)])
        at_zeros = [gradient * (ll_params[index].detach() == 0) for index, gradient in used.items()]
        self.stationarity_at_zeros = norm_of(at_zeros or [torch.zeros_like(ll_loss)])
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
