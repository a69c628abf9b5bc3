"""How far the ll model has followed a ul step."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.vectors import inner, unflatten

__all__ = ["WINDOW", "Settling", "promised"]

# All chosen by benchmarks/defaults.py, one setting for all of its tasks.
# So many ll steps are looked at together, and of a single one no noise can be told from what is left. That has
# settled below this part of what the ul step promised, or where the noise between batches hides it: within so many
# standard errors of their mean.
WINDOW = 5
_FEWEST = 2
_SETTLED = 0.25
_HIDDEN = 2.0

# A step that promises less than this part of the one before it is measured by that: what larger steps have left is not
# its own, and where steps become small nothing hangs on it.
_FADES = 0.7


class Settling:
    """What is left, in the ul loss, of the disturbance that a ul step is to the ll problem.

    With ``v`` the inverse-HVP of that step's hypergradient, ``v' df/dw`` is to first order what the ul loss will still
    change by until the ll model is at its minimum: ``dF/dw' H^-1 df/dw``. Right after the ul step it is the decrease
    that the hypergradient has promised by way of the ll weights. It costs an inner product with the gradient of an ll
    step, and has far less noise between batches than ``||df/dw||``, as it looks along one direction.

    Parameters
    ----------
    params : sequence of Parameter
        The ll parameters, whose ``.grad`` is looked at.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = params
        self._v: Tensor | None = None
        self._promised = 0.0
        self._left: list[Tensor] = []

    def begin(self, v: Tensor | None, promised: float) -> None:
        """Take in a ul step: its inverse-HVP of shape (n,), and the decrease of the ul loss that it promises.

        ``None`` and 0 stand for a step that was not taken.
        """
        self._v = v if promised > 0 else None
        self._promised = max(promised, _FADES * self._promised)
        self._left = []

    def see(self) -> None:
        """Look at the gradient of an ll step, on its batch and at the weights before it."""
        if self._v is None:
            return
        pieces = zip(self._params, unflatten(self._v, self._params), strict=True)
        terms = [(param.grad, piece) for param, piece in pieces if param.grad is not None]
        if terms:
            self._left.append(inner(*zip(*terms, strict=True)))

    @property
    def settled(self) -> bool:
        """Whether what the ul step has disturbed has settled, as far as the last ll steps let it be seen."""
        left, noise = self._seen()
        return not left > max(_SETTLED * self._promised, _HIDDEN * noise)  # `not >`: what was not seen is NaN

    @property
    def lag(self) -> float:
        """What is surely left, in units of what the ul step promised; NaN where too little was seen, or nothing is."""
        left, noise = self._seen()
        told = len(self._left) >= _FEWEST
        return max(0.0, left - _HIDDEN * noise) / self._promised if told else math.nan

    def _seen(self) -> tuple[float, float]:
        """Return what is left on the mean over the last ll steps, and the standard error of that, from differences."""
        if not self._left:
            return math.nan, math.nan
        values = torch.stack(self._left[-2 * WINDOW :]).tolist()
        last = values[-WINDOW:]
        squares = [(a - b) ** 2 / 2 for a, b in pairwise(values)]
        variance = math.fsum(squares) / len(squares) if squares else 0.0
        return abs(math.fsum(last) / len(last)), math.sqrt(variance / len(last))

    def state_dict(self) -> dict[str, Any]:
        """Return what a round of ll steps starts from."""
        return {"v": self._v, "promised": self._promised}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with ``state``, moved to ``device``; what does not fit the ll model is not used."""
        v = state["v"]
        fits = v is not None and len(v) == sum(param.numel() for param in self._params)
        self._v, self._promised, self._left = v.to(device) if fits else None, state["promised"], []


def promised(hypergradient: Hypergradient, moved: Mapping[str, Tensor]) -> float:
    """Return the decrease of the ul loss that a ul step promises by way of the ll weights.

    Parameters
    ----------
    hypergradient : Hypergradient
        That of the step.
    moved : mapping of str to Tensor
        By how much each ul value has moved in it.
    """
    direct = hypergradient.direct
    implicit = [g - direct[name] if name in direct else g for name, g in hypergradient.gradients.items()]
    return -inner(implicit, [moved[name] for name in hypergradient.gradients]).item()
