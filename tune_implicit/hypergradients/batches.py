"""Batches of any kind: their tensors, how to move them, how many examples they hold, and their halves."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = ["Batch", "described", "halves", "is_pair", "map_tensors", "moved", "size_of", "tensors_of"]

# Whatever a split yields.
Batch = Any


def is_pair(batch: Batch) -> bool:
    """Return whether a batch is a tuple or a list of two, as ``(data, target)`` is."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch: in any nesting of tuples, lists, mappings, dataclasses and objects."""
    return list(_tensors(batch, set()))


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on ``device``; what is there already is not copied, and none is changed.

    An object is moved by its own ``to(device)``. Without one, tuples, lists, dicts and dataclasses are made anew.

    Raises
    ------
    InvalidTypeError
        If an object holds tensors and has no ``to``, or one that leaves some of them where they are.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if type(batch) in (tuple, list):
        return type(batch)(moved(part, device) for part in batch)
    tensors = tensors_of(batch)
    if tensors and all(tensor.device == device for tensor in tensors):
        return batch
    if _moves_itself(batch):
        return _moved_by_itself(batch, device)
    return _rebuilt(batch, lambda part: moved(part, device))


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return a batch with ``function`` of each of its tensors in its place.

    Raises
    ------
    InvalidTypeError
        If an object holds tensors that cannot be replaced.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):
        return batch._replace(data=function(batch.data))
    return _rebuilt(batch, lambda part: map_tensors(function, part))


def size_of(batch: Batch) -> int:
    """Return how many examples a batch holds, 0 where nothing tells: of a pair, those of the target count first.

    That is the length of its first tensor; of a packed sequence, the number of sequences; of an object with
    ``num_graphs``, as batches of graphs have, that.
    """
    if is_pair(batch):
        return size_of(batch[1]) or size_of(batch[0])
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    return next((size for part in _parts(batch) if (size := size_of(part))), 0)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return a batch in two halves: each tensor as long as the batch is cut in the middle, others are in both.

    Raises
    ------
    InvalidValueError
        If the batch has fewer than two examples, or holds what cannot be cut.
    """
    size = size_of(batch)
    uncut = next(_uncut(batch), None)
    if size < 2 or uncut is not None:
        got = f"a {type(uncut).__name__}, which cannot be halved" if uncut is not None else f"{size}"
        raise InvalidValueError(
            f'`stop="noise"` halves the validation batch, which must hold 2 or more examples, got {got}. '
            'Use larger batches, `ul_batches` of 2 or more, or `stop="tolerance"`.'
        )
    middle = size // 2

    def cut(part: slice) -> Batch:
        return map_tensors(lambda tensor: tensor[part] if tensor.ndim and len(tensor) == size else tensor, batch)

    return cut(slice(middle)), cut(slice(middle, None))


def described(batch: Batch) -> str:
    """Return what a batch is, for a message."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if type(batch) in (tuple, list):
        return f"a {type(batch).__name__} of {len(batch)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(repr, batch))}"
    return f"a {type(batch).__name__}"


def _parts(batch: Batch) -> list[Any]:
    """Return what a container holds; a tensor, a module, a number or a string holds nothing."""
    if isinstance(batch, Tensor | nn.Module | type | str | bytes):
        return []
    if isinstance(batch, PackedSequence):
        return [batch.data]  # its `batch_sizes` stay on the CPU
    if isinstance(batch, tuple | list):
        return list(batch)
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(getattr(batch, "__dict__", {}).values()) or [
        getattr(batch, field.name) for field in _fields(batch) if hasattr(batch, field.name)
    ]


def _fields(batch: Batch) -> tuple[Any, ...]:
    return dataclasses.fields(batch) if dataclasses.is_dataclass(batch) else ()


def _tensors(batch: Batch, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif id(batch) not in seen:
        for part in (parts := _parts(batch)):
            yield from _tensors(part, seen | {id(batch)} if parts else seen)


def _moves_itself(batch: Batch) -> bool:
    return callable(getattr(batch, "to", None)) and not isinstance(batch, nn.Module | type)


def _moved_by_itself(batch: Batch, device: torch.device) -> Batch:
    """Return what its own ``to`` makes of a copy: some move themselves in place.

    Raises
    ------
    InvalidTypeError
        If that has tensors on another device.
    """
    copied: Any = batch if isinstance(batch, PackedSequence) else copy.copy(batch)
    result = copied.to(device)
    result = copied if result is None else result
    if any(tensor.device != device for tensor in tensors_of(result)):
        raise InvalidTypeError(
            f"{type(batch).__name__}.to(device) must move all tensors of a batch, got one that is not on {device} "
            "after it."
        )
    return result


def _rebuilt(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Return a container made anew, with ``function`` of each of its parts; what holds no tensor is left as it is.

    Raises
    ------
    InvalidTypeError
        If it holds tensors and is none that can be made anew.
    """
    if isinstance(batch, tuple | list):
        parts = [function(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if not tensors_of(batch):
        return batch
    if isinstance(batch, dict | UserDict):
        made: Any = copy.copy(batch)
        for key, part in batch.items():
            made[key] = function(part)
        return made
    if dataclasses.is_dataclass(batch):
        made = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(made, field.name, function(getattr(batch, field.name)))
        return made
    raise InvalidTypeError(
        f"A batch must be made of tensors, tuples, lists, dicts, dataclasses and objects with a method `to(device)`, "
        f"got {described(batch)} that holds tensors. Give it a method `to(device)` that returns it, moved."
    )


def _uncut(batch: Batch) -> Iterator[Any]:
    """Yield what holds tensors and is no container that can be made anew."""
    if isinstance(batch, Tensor):
        return
    plain = isinstance(batch, tuple | list | dict | UserDict) or dataclasses.is_dataclass(batch)
    if isinstance(batch, PackedSequence) or (not plain and tensors_of(batch)):
        yield batch
        return
    for part in _parts(batch) if plain else []:
        yield from _uncut(part)
