"""A zoo of batches: every kind that a split may yield, of the same examples, and how an objective reads each."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, default_collate

from tune_implicit import State
from tune_implicit.hypergradients.batches import Batch

Pair = namedtuple("Pair", ["left", "right"])


class Triple(NamedTuple):
    x: Tensor
    y: Tensor
    index: Tensor


@dataclass
class Examples:
    x: Tensor
    y: Tensor
    name: str = "examples"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Slim:
    x: Tensor
    y: Tensor


class Named(dict):
    """A dict of a kind of its own, with an attribute."""

    name = "none"


class Encoding(UserDict):
    """As a tokenizer's: it moves itself in place, and returns itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device) -> "Encoding":
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Store(MutableMapping):
    """Where a batch of graphs keeps its attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["_mapping"] = values

    def __getitem__(self, key: str) -> Any:
        return self._mapping[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._mapping[key] = value

    def __delitem__(self, key: str) -> None:
        del self._mapping[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __copy__(self) -> "Store":
        return Store(**self._mapping)


class Graphs:
    """As PyG's batch of graphs: a nested store, a copy with a store of its own, and an in-place ``to``."""

    def __init__(self, num_graphs: int, **values: Any) -> None:
        self.__dict__.update(_store=Store(**values), num_graphs=num_graphs)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __copy__(self) -> "Graphs":
        return Graphs(self.num_graphs, **self._store)

    def to(self, device: torch.device) -> "Graphs":
        for key, value in self._store.items():
            self._store[key] = value.to(device)
        return self


class Silent:
    """It moves itself in place and returns nothing."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device) -> None:
        self.x, self.y = self.x.to(device), self.y.to(device)


class Forgetful(Silent):
    """It leaves the target where it is."""

    def to(self, device: torch.device) -> "Forgetful":
        self.x = self.x.to(device)
        return self


class SelfMoved(Silent):
    """It returns another that is there."""

    def to(self, device: torch.device) -> "SelfMoved":
        return SelfMoved(self.x.to(device), self.y.to(device))


class Split:
    """Batches that are no list."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def packed(rows: Tensor) -> PackedSequence:
    """Each row as a sequence of one."""
    return pack_sequence([row[None] for row in rows])


def joined(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], dim=1)


def cut(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, :-1], rows[:, -1:]


def by_key(state: State) -> tuple[Tensor, Tensor]:
    return state.batch["x"], state.batch["y"]


def by_attribute(state: State) -> tuple[Tensor, Tensor]:
    return state.batch.x, state.batch.y


def by_place(state: State) -> tuple[Tensor, Tensor]:
    return state.batch[0], state.batch[1]


def halves_of_a_pair(state: State) -> tuple[Tensor, Tensor]:
    return state.data, state["target"]


@dataclass(frozen=True)
class Kind:
    """How a batch of ``n`` examples is made of ``x`` of shape (n, d) and ``y`` of shape (n, 1), and read again."""

    make: Callable[[Tensor, Tensor], Batch]
    read: Callable[[State], tuple[Tensor, Tensor]]
    # What can be cut has halves; the message names what has not.
    uncut: str = ""
    # What cannot be moved works where it is; the message names it.
    unmoved: str = ""
    # A list of such batches is a split; otherwise it would be taken for one batch.
    listed: bool = True


PLAIN = Kind(lambda x, y: (x, y), halves_of_a_pair)

KINDS = {
    "tuple": PLAIN,
    "list": Kind(lambda x, y: [x, y], halves_of_a_pair),
    "named pair": Kind(Pair, halves_of_a_pair),
    "named triple": Kind(lambda x, y: Triple(x, y, torch.arange(len(x))), by_attribute),
    "triple with an index": Kind(lambda x, y: (x, y, torch.arange(len(x))), by_place),
    "dict": Kind(lambda x, y: {"x": x, "y": y}, by_key),
    "ordered dict": Kind(lambda x, y: OrderedDict(x=x, y=y), by_key),
    "default dict": Kind(lambda x, y: defaultdict(list, x=x, y=y), by_key),
    "dict of a kind": Kind(lambda x, y: Named(x=x, y=y), by_key),
    "user dict": Kind(lambda x, y: UserDict(x=x, y=y), by_key),
    "encoding": Kind(lambda x, y: Encoding(x=x, y=y), by_key),
    "nested encoding": Kind(
        lambda x, y: (Encoding(x=x), {"labels": [y, None]}), lambda s: (s.data["x"], s.target["labels"][0])
    ),
    "dataclass": Kind(Examples, by_attribute),
    "frozen dataclass": Kind(Frozen, by_attribute),
    "slim dataclass": Kind(Slim, by_attribute),
    "tensor": Kind(joined, lambda s: cut(s.batch), listed=False),
    "tensor as data": Kind(joined, lambda s: cut(s.data), listed=False),
    "list of a tensor": Kind(lambda x, y: [joined(x, y)], lambda s: cut(s.batch[0])),
    "dict with words": Kind(
        lambda x, y: {"words": "four", "n": 3, "scale": torch.ones(()), "none": None, "x": x, "y": y}, by_key
    ),
    "packed": Kind(lambda x, y: packed(joined(x, y)), lambda s: cut(s.batch.data), uncut="PackedSequence"),
    "pair of packed": Kind(lambda x, y: (packed(x), y), lambda s: (s.data.data, s.target), uncut="PackedSequence"),
    "dict of packed": Kind(
        lambda x, y: {"x": packed(x), "y": y}, lambda s: (s.batch["x"].data, s.batch["y"]), uncut="PackedSequence"
    ),
    "graphs": Kind(lambda x, y: Graphs(len(x), x=x, y=y), by_attribute, uncut="Graphs"),
    "pair of graphs": Kind(lambda x, y: (Graphs(len(x), x=x), y), lambda s: (s.data.x, s.target), uncut="Graphs"),
    "returns nothing": Kind(Silent, by_attribute, uncut="Silent"),
    "returns another": Kind(SelfMoved, by_attribute, uncut="SelfMoved"),
    "forgets one": Kind(Forgetful, by_attribute, uncut="Forgetful", unmoved=r"Forgetful\.to\(device\) must move all"),
    "namespace": Kind(
        lambda x, y: SimpleNamespace(x=x, y=y),
        by_attribute,
        uncut="SimpleNamespace",
        unmoved="got a SimpleNamespace that holds tensors",
    ),
    "dict of namespace": Kind(
        lambda x, y: {"x": SimpleNamespace(value=x), "y": y},
        lambda s: (s.batch["x"].value, s.batch["y"]),
        uncut="SimpleNamespace",
        unmoved="got a SimpleNamespace that holds tensors",
    ),
    "proxy": Kind(
        lambda x, y: MappingProxyType({"x": x, "y": y}),
        by_key,
        uncut="mappingproxy",
        unmoved="got a mappingproxy of 'x', 'y' that holds tensors",
    ),
}


def loader(examples: list[Any], batch_size: int = 6, **options: Any) -> DataLoader:
    """Of a list of single examples, which torch puts together."""
    return DataLoader(examples, batch_size=batch_size, collate_fn=default_collate, **options)
