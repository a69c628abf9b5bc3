"""What an objective must return."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_implicit.errors import DetachedError, InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import tensors_of

__all__ = ["Loss", "check_devices", "check_used", "scalar_loss", "unused_among"]


def scalar_loss(name: str, loss: object) -> Tensor:
    """Return ``loss`` as a scalar tensor that can be differentiated.

    Raises
    ------
    InvalidTypeError
        If it is not a real floating tensor.
    InvalidValueError
        If it has more than one entry.
    DetachedError
        If it depends on no parameter.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidTypeError(f"`{name}` must return a real floating tensor, got {got}.")
    if loss.numel() != 1:
        raise InvalidValueError(
            f"`{name}` must return a scalar, got a tensor of shape {tuple(loss.shape)}. "
            "Reduce it with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise DetachedError(
            f"`{name}` returned a loss that depends on no parameter. Compute it from `state.ll_model` and "
            "`state.ul_model`, without .detach(), .item(), NumPy or torch.no_grad()."
        )
    return loss.reshape(())


def check_devices(device: torch.device, **batches: Any) -> None:
    """Check that all tensors of ``batches``, by the name of their split, are on ``device``.

    Raises
    ------
    InvalidValueError
        If one is not.
    """
    for name, batch in batches.items():
        for tensor in tensors_of(batch):
            if tensor.device != device:
                raise InvalidValueError(
                    f"`{name}_data` and `{name}_target` must be on the models' device, {device}, got a tensor on "
                    f"{tensor.device}. Move the batch with .to({str(device)!r})."
                )


class Loss:
    """A loss and its graph without its memory: ``mse_loss`` keeps its scalar in a storage as large as all elements."""

    def __init__(self, loss: Tensor) -> None:
        self.value = loss.detach().to(torch.float64, copy=True)
        self._grad_fn = loss.grad_fn

    def nodes(self) -> set[Any]:
        """Return the nodes of the graph that computed it."""
        seen: set[Any] = set()
        nodes: list[Any] = [self._grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes.extend(next_node for next_node, _ in node.next_functions)
        return seen

    def leaves(self) -> set[int]:
        """Return the ids of the leaf tensors from which it was computed."""
        return {id(leaf) for node in self.nodes() if (leaf := getattr(node, "variable", None)) is not None}


def unused_among(params: Mapping[str, Tensor], losses: Sequence[Loss]) -> list[str]:
    """Return the names of those of ``params``, whose derivative is structurally zero, that enter none of the losses."""
    if not params:
        return []
    reached = set().union(*(loss.leaves() for loss in losses))
    return [name for name, param in params.items() if id(param) not in reached]


def check_used(unused: Sequence[str]) -> None:
    """Check that there are no ul values that neither objective uses: nothing would ever move them.

    Raises
    ------
    InvalidValueError
        If there are.
    """
    if unused:
        raise InvalidValueError(
            f"Neither objective uses the ul model's {', '.join(map(repr, unused))}, so no hypergradient can move it. "
            "Use it in an objective, or freeze it with requires_grad=False. A learning rate belongs to the search."
        )
