"""How exact ``dF/dw`` is on a validation batch."""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.state import Batch, tensors_of

__all__ = ["halves"]


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
        return pytree.tree_map_only(Tensor, lambda t: t[part] if t.ndim and len(t) == size else t, batch)

    middle = size // 2
    return cut(slice(middle)), cut(slice(middle, None))
