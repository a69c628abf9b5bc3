"""Batches of any kind: their tensors, how to move them, how many examples they hold, and their halves."""

import copy
import dataclasses
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = ["Batch", "described", "halves", "is_pair", "map_tensors", "moved", "size_of", "tensors_of"]

# What a collated list of strings or numbers is made of.
_PLAIN = str | bytes | int | float

# Whatever a split yields.
Batch = Any


def is_pair(batch: Batch) -> bool:
    """Return whether a batch is a tuple or a list of two, as ``(data, target)`` is."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch: in any nesting of tuples, lists, mappings, dataclasses and objects."""
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}  # what has been looked into, held so that no other takes its id

    def look(part: Batch) -> None:
        if isinstance(part, Tensor):
            tensors.append(part)
        elif id(part) not in seen and (parts := _parts(part)):
            seen[id(part)] = part
            for inner in parts:
                look(inner)

    look(batch)
    return tensors


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

    That is the length of its first tensor, or of a list of mappings or of words; of a packed sequence, the number of
    sequences; of an object with ``num_graphs``, as batches of graphs have, that.
    """
    return _size(batch, [])


def _size(batch: Batch, inside: list[Any]) -> int:
    if isinstance(batch, Tensor | np.ndarray):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if (inside or not is_pair(batch)) and _holds_examples(batch):
        return len(batch)
    if any(batch is outer for outer in inside):
        return 0
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    # Words and the like count where there is no tensor.
    parts = reversed(batch) if is_pair(batch) else sorted(_parts(batch), key=lambda part: not tensors_of(part))
    return next((size for part in parts if (size := _size(part, [*inside, batch]))), 0)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return a batch in two halves: what is as long as the batch is cut in the middle, all else is in both.

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

    def cut(part: slice, held: Batch) -> Batch:
        if isinstance(held, Tensor | np.ndarray):
            return held[part] if held.ndim and len(held) == size else held
        if not (held is batch and is_pair(batch)) and _lists(held, size):
            return held[part]
        return _rebuilt(held, partial(cut, part)) if _parts(held) else held

    middle = size // 2
    return cut(slice(middle), batch), cut(slice(middle, None), batch)


def _lists(batch: Batch, size: int) -> bool:
    """Return whether it is a list of so many examples, and not of tensors that hold as many each."""
    if type(batch) not in (list, tuple) or len(batch) != size:
        return False
    return not any(isinstance(part, Tensor) and part.ndim and len(part) == size for part in batch)


def _holds_examples(batch: Batch) -> bool:
    """Return whether it is a list of examples: of mappings, or of words and numbers that belong to them."""
    return (
        type(batch) in (list, tuple)
        and len(batch) > 0
        and (all(isinstance(part, Mapping) for part in batch) or all(isinstance(part, _PLAIN) for part in batch))
    )


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
    if isinstance(batch, deque | set | frozenset):
        return list(batch)
    return [getattr(batch, name) for name in _names(batch)]


def _names(batch: Batch) -> list[str]:
    """Return the names of an object's own attributes, those in slots included."""
    slots = [kind.__dict__.get("__slots__", ()) for kind in reversed(type(batch).__mro__)]
    listed = [name for names in slots for name in ([names] if isinstance(names, str) else names)]
    own = dict.fromkeys((*listed, *getattr(batch, "__dict__", {})))
    return [name for name in own if name not in ("__dict__", "__weakref__") and hasattr(batch, name)]


def _moves_itself(batch: Batch) -> bool:
    return callable(getattr(batch, "to", None)) and not isinstance(batch, nn.Module | type)


def _moved_by_itself(batch: Batch, device: torch.device) -> Batch:
    """Return what its own ``to`` makes of a copy: some move themselves in place.

    Raises
    ------
    InvalidTypeError
        If that has tensors on another device.
    """
    copied: Any = _copied(batch)
    result = copied.to(device)
    result = copied if result is None else result
    if any(tensor.device != device for tensor in tensors_of(result)):
        raise InvalidTypeError(
            f"{type(batch).__name__}.to(device) must move all tensors of a batch, got one that is not on {device} "
            "after it."
        )
    return result


def _copied(batch: Batch) -> Batch:
    """Return a copy that shares tensors with a batch and no container of tensors, so that it may move itself."""
    if isinstance(batch, Tensor | PackedSequence) or not tensors_of(batch):
        return batch
    if isinstance(batch, tuple | list | dict):
        return _rebuilt(batch, _copied)
    made = copy.copy(batch)
    for name in _names(made):
        part = getattr(made, name)
        if (own := _copied(part)) is not part:
            object.__setattr__(made, name, own)
    return made


def _rebuilt(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Return a container made anew, with ``function`` of each of its parts; what holds no tensor is left as it is.

    Raises
    ------
    InvalidTypeError
        If it holds tensors and is none that can be made anew.
    """
    if isinstance(batch, tuple | list):
        parts = [function(part) for part in batch]
        return type(batch)._make(parts) if hasattr(batch, "_make") else type(batch)(parts)
    if not tensors_of(batch):
        return batch
    if isinstance(batch, dict | UserDict):
        made: Any = copy.copy(batch)
        for key, part in batch.items():
            made[key] = function(part)
        return made
    if dataclasses.is_dataclass(batch):
        made = copy.copy(batch)
        for name in _names(batch):
            object.__setattr__(made, name, function(getattr(batch, name)))
        return made
    raise InvalidTypeError(
        f"A batch must be made of tensors, tuples, lists, dicts, dataclasses and objects with a method `to(device)`, "
        f"got {described(batch)} that holds tensors. Give it a method `to(device)` that returns it, moved."
    )


def _uncut(batch: Batch) -> Iterator[Any]:
    """Yield what holds tensors and is no container that can be made anew."""
    if isinstance(batch, Tensor):
        if batch.layout is not torch.strided:
            yield batch
        return
    plain = isinstance(batch, tuple | list | dict | UserDict) or dataclasses.is_dataclass(batch)
    if isinstance(batch, PackedSequence) or (not plain and tensors_of(batch)):
        yield batch
        return
    for part in _parts(batch) if plain else []:
        yield from _uncut(part)
