"""A ul rate that finds itself."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.vectors import inner, norm_of

__all__ = ["MOST_GROWTH", "UlRate"]

# All chosen by benchmarks/defaults.py, one setting for all of its tasks.
# The rate is multiplied by MOST_GROWTH ** agreement, the agreement smoothed over some two steps.
MOST_GROWTH = math.exp(0.3)
_SMOOTHING = 0.5

# A hypergradient is shortened to so many times the geometric mean of those before it: a solve that was truncated along
# a direction of hardly any curvature is off by orders of magnitude, which an optimizer's memory would keep for long.
_OUTLIER = 4.0

# A step's predicted decrease is at most this part of the ul loss, or of a tenth of what it has fallen by where that is
# more. The rate goes down with it, but by no more than half.
_TRUST = 0.25
_FALLEN = 0.1
_HALF = 0.5

# Losses and gains are smoothed over some three steps. The rate grows more slowly once a step promises less than this
# part of the most that one has promised, for the same rate: near an optimum and on a plateau.
_MEMORY = 0.7
_PAYS = 0.3

# The rate shrinks where the ul loss has fallen by less than this part of what so many steps have promised, by more than
# so many standard errors: the steps then lead nowhere, as where a penalty that is too large already grows for ever.
_DELIVERED = 0.05
_WINDOW = 4
_HIDDEN = 2.0


class UlRate:
    """Take ul steps whose rate follows what the next hypergradient says of the last one.

    The derivative of the ul loss in the rate of the last step is the inner product of the new hypergradient ``g`` with
    that step. So the rate grows while ``-g`` and the step agree, and shrinks where they do not. They agree by their
    cosine, in units of the one that the step had with its own hypergradient: an optimizer such as Adam takes no step
    along it. A value that ``g`` does not touch has no part in it, and each is compared by its own last update: with
    minibatches the weight of a training sample is touched once an epoch. A step that promises too large a decrease of
    the ul loss is shortened: the linear model that a hypergradient is does not reach that far. And where steps promise
    and the ul loss does not fall, the rate shrinks.

    Parameters
    ----------
    optimizer : Optimizer
        Its learning rates are where the rate starts, each group's its own; they are set to their start times
        :attr:`factor` before each step.
    params : sequence of Parameter
        The ul values.
    adapts : bool
        Whether the rate changes at all.

    Attributes
    ----------
    factor : float
        What the rates are multiplied by so far.

    Raises
    ------
    InvalidValueError
        If the rate is to adapt, and the optimizer has none.

    References
    ----------
    Baydin et al., Online learning rate adaptation with hypergradient descent, ICLR 2018, with a multiplicative rule as
    in Almeida et al., Parameter adaptation in stochastic optimization (1998).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], adapts: bool) -> None:
        self._optimizer, self._params, self._adapts = optimizer, params, adapts
        self._starts = [group.get("lr", math.nan) for group in optimizer.param_groups]
        if adapts and any(map(math.isnan, self._starts)):
            raise InvalidValueError(
                f"`ul_optimizer` must make an optimizer whose groups have an `lr`, got {type(optimizer).__name__} "
                "without: its rate cannot be adapted. Take adapt_ul_learning_rate=False, or another optimizer."
            )
        self.factor = 1.0
        self._last: list[Tensor] | None = None  # the latest update of each ul value
        self._own = 0.0  # how the last step agreed with its own hypergradient
        self._agreement = _Smoothed(_SMOOTHING)
        self._loss, self._gain, self._size = (_Smoothed(_MEMORY) for _ in range(3))
        self._highest, self._lowest, self._largest_gain = -math.inf, math.inf, 0.0
        self._losses: list[float] = []  # of the last steps, and what those have promised
        self._promises: list[float] = []

    def step(self, ul_loss: float, project: Callable[[], object] | None = None) -> list[Tensor]:
        """Take a step along the gradients in ``.grad``, and return by how much each of the parameters has moved.

        Parameters
        ----------
        ul_loss : float
            At the point that the gradients belong to.
        project : callable(), optional
            Puts the ul values back into their set.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        if self._adapts:
            self._clip(gradients)
            self._losses = [*self._losses, ul_loss][-2 * _WINDOW :]
            if self._delivers():
                self._follow(gradients)
            else:
                self.factor /= MOST_GROWTH
                self._set()
        before = [param.detach().clone() for param in self._params]
        self._optimizer.step()
        with torch.no_grad():
            if self._adapts:
                self._shorten(gradients, before, ul_loss)
            if project is not None:
                project()
            moved = _differences(self._params, before)
        if self._adapts:
            self._remember(gradients, moved)
        return moved

    def _clip(self, gradients: list[Tensor]) -> None:
        """Shorten a hypergradient that is far longer than those before it, in place."""
        size = norm_of(gradients).item()
        if not 0 < size < math.inf:
            return
        most = _OUTLIER * math.exp(self._size.value) if self._size.state[1] else size
        if size > most:
            for gradient in gradients:
                gradient.mul_(most / size)
        self._size.add(math.log(min(size, most)))

    def _follow(self, gradients: list[Tensor]) -> None:
        """Let the rate follow how a new hypergradient agrees with the latest updates."""
        if self._last is not None and self._own > 0:
            touched = [g * (last != 0) for g, last in zip(gradients, self._last, strict=True)]
            compared = [last * (g != 0) for g, last in zip(gradients, self._last, strict=True)]
            found = _agreement(touched, compared)
            if found is not None:
                agreement = self._agreement.add(max(-1.0, min(1.0, found / self._own)))
                self.factor *= MOST_GROWTH ** (agreement * (self._pays() if agreement > 0 else 1.0))
        self._set()

    def _delivers(self) -> bool:
        """Return whether the ul loss falls by a part of what the last steps promised, or noise may hide it."""
        if len(self._losses) < 2 * _WINDOW:
            return True
        before, after = self._losses[:_WINDOW], self._losses[_WINDOW:]
        seen = (math.fsum(before) - math.fsum(after)) / _WINDOW
        promised = math.fsum(self._promises) / len(self._promises) * _WINDOW
        squares = [(a - b) ** 2 / 2 for a, b in pairwise(self._losses)]
        noise = math.sqrt(2 * math.fsum(squares) / len(squares) / _WINDOW)
        return seen + _HIDDEN * noise >= _DELIVERED * promised

    def _pays(self) -> float:
        """Return from 0 to 1 how much the last steps promised, in units of what is worth to grow for."""
        worth = _PAYS * self._largest_gain
        return min(1.0, max(0.0, self._gain.value) / worth) if worth else 1.0

    def _shorten(self, gradients: list[Tensor], before: list[Tensor], ul_loss: float) -> None:
        """Shorten the step just taken, and the rate with it, where it promises more than can be trusted."""
        loss = self._loss.add(ul_loss)
        self._highest, self._lowest = max(self._highest, loss), min(self._lowest, loss)
        moved = _differences(self._params, before)
        predicted = -inner(gradients, moved).item()
        self._largest_gain = max(self._largest_gain, self._gain.add(predicted / self.factor))
        trusted = _TRUST * max(abs(loss), _FALLEN * (self._highest - self._lowest))
        if predicted > trusted > 0:
            part = trusted / predicted
            for param, old, move in zip(self._params, before, moved, strict=True):
                param.copy_(torch.add(old, move, alpha=part))
            self.factor *= max(part, _HALF)
            self._set()

    def _remember(self, gradients: list[Tensor], moved: list[Tensor]) -> None:
        before = self._last or [torch.zeros_like(m) for m in moved]
        self._last = [torch.where(g != 0, m, old) for g, m, old in zip(gradients, moved, before, strict=True)]
        self._promises = [*self._promises, -inner(gradients, moved).item()][1 - 2 * _WINDOW :]
        touched = [m * (g != 0) for g, m in zip(gradients, moved, strict=True)]
        self._own = _agreement(gradients, touched) or 0.0

    def _set(self) -> None:
        for group, start in zip(self._optimizer.param_groups, self._starts, strict=True):
            group["lr"] = start * self.factor

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as data; tensors are the live ones."""
        smoothed = {name: getattr(self, f"_{name}").state for name in _SMOOTHED}
        return {"last": self._last, "factor": self.factor, **smoothed} | {
            name: getattr(self, f"_{name}") for name in _NUMBERS
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with this rate's own start: of another's rate the factor is taken over."""
        if not self._adapts:
            if state["factor"] != 1:
                self._set()  # the optimizer's state came with another's rate
            return
        last = state["last"]
        self._last = None if last is None else [m.to(p) for m, p in zip(last, self._params, strict=True)]
        self.factor = state["factor"]
        for name in _SMOOTHED:
            getattr(self, f"_{name}").state = state[name]
        for name in _NUMBERS:
            setattr(self, f"_{name}", state[name])
        self._set()


# What a rate remembers besides the latest updates.
_SMOOTHED = ("agreement", "loss", "gain", "size")
_NUMBERS = ("own", "highest", "lowest", "largest_gain", "losses", "promises")


class _Smoothed:
    """The exponential moving average of what was added, without the bias of its start."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self.state = (0.0, 0.0)  # the weighted sum, and the weights

    @property
    def value(self) -> float:
        total, weight = self.state
        return total / weight if weight else 0.0

    def add(self, value: float) -> float:
        total, weight = self.state
        self.state = (
            self._memory * total + (1 - self._memory) * value,
            self._memory * weight + (1 - self._memory),
        )
        return self.value


def _differences(params: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach() - old for param, old in zip(params, before, strict=True)]


def _agreement(gradients: Sequence[Tensor], moved: Sequence[Tensor]) -> float | None:
    """Return the cosine between a move and the descent direction ``-g``, ``None`` where there is none."""
    size = norm_of(gradients).item() * norm_of(moved).item()
    return -inner(gradients, moved).item() / size if 0 < size < math.inf else None
