import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.support.batches import (
    KINDS,
    Encoding,
    Examples,
    Frozen,
    Graphs,
    Kind,
    Named,
    Pair,
    Triple,
    packed,
)
from tests.support.problems import Values, generator
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import (
    Batch,
    described,
    halves,
    is_pair,
    map_tensors,
    moved,
    size_of,
    tensors_of,
)
from tune_implicit.hypergradients.state import State

CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = Values(l=torch.ones(1)), Values(w=torch.ones(1))
X, Y = torch.randn(5, 3, generator=generator()), torch.arange(5.0)[:, None]

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def read(kind: Kind, batch: Batch) -> tuple[Tensor, Tensor]:
    return kind.read(State.of(batch, *MODELS))


@dataclass
class Masked:
    """It holds a tensor beside its fields."""

    x: Tensor

    def __post_init__(self) -> None:
        self.mask = self.x > 0


@dataclass
class Late:
    """A field of it is set later, if at all."""

    x: Tensor
    late: Tensor = field(init=False)


class Slots:
    """Its tensors are in slots, as those of a class that attrs makes."""

    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Shelf:
    """It moves itself in place, in a dict that a copy of it shares."""

    def __init__(self, **values: Tensor) -> None:
        self.values = values

    def to(self, device: torch.device) -> "Shelf":
        for name, value in self.values.items():
            self.values[name] = value.to(device)
        return self


class Own:
    """It holds itself, as a tree holds its parent."""

    def __init__(self, x: Tensor) -> None:
        self.itself, self.x = self, x


class FromOne(namedtuple("FromOne", ["x", "twice"])):
    """A named pair that is made of one."""

    def __new__(cls, x: Tensor) -> "FromOne":
        return super().__new__(cls, x, 2 * x)


# ---- what a batch holds


def test_tensors_of_any_nesting() -> None:
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(())
    pair = namedtuple("pair", ["left", "right"])
    nested = ({"x": [x, "text"], "none": None}, pair(y, (3, z)))
    assert [id(tensor) for tensor in tensors_of(nested)] == [id(tensor) for tensor in (x, y, z)]
    assert tensors_of(x) == [x]
    assert tensors_of((None, "text")) == []


@each_kind
def test_tensors_of_each_kind(kind: Kind) -> None:
    batch = kind.make(X, Y)
    found = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(batch)}
    assert {tensor.untyped_storage().data_ptr() for tensor in read(kind, batch)} <= found
    examples = [tensor for tensor in tensors_of(batch) if tensor.is_floating_point() and tensor.ndim]
    assert sum(tensor.numel() for tensor in examples) == X.numel() + Y.numel()  # each once


def test_what_holds_itself_is_looked_into_once() -> None:
    batch: list[Any] = [X]
    batch.append(batch)
    assert [id(tensor) for tensor in tensors_of(batch)] == [id(X)]
    assert [id(tensor) for tensor in tensors_of(Own(X))] == [id(X)]


def test_a_module_or_a_class_holds_no_tensors_of_a_batch() -> None:
    assert tensors_of([nn.Linear(2, 2), Values, "text", b"text", 3, None, torch.float64, generator()]) == []


def test_the_sizes_of_a_packed_sequence_are_none_of_its_tensors() -> None:
    sequence = packed(X)
    assert [id(tensor) for tensor in tensors_of({"x": sequence})] == [id(sequence.data)]


@pytest.mark.parametrize(
    ("batch", "pair"),
    [
        ((X, Y), True),
        ([X, Y], True),
        (Pair(X, Y), True),
        ((X, None), True),
        (Triple(X, Y, Y), False),
        ((X,), False),
        ({"x": X, "y": Y}, False),
        (torch.ones(2), False),
        ("xy", False),
        (deque([X, Y]), False),
        (packed(X), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pair_is_a_tuple_or_a_list_of_two(batch: Batch, pair: bool) -> None:
    assert is_pair(batch) is pair


# ---- what an objective finds in its state


@each_kind
def test_a_state_holds_the_batch_itself(kind: Kind) -> None:
    batch = kind.make(X, Y)
    state = State.of(batch, *MODELS)
    assert state.batch is state["batch"] is batch
    if is_pair(batch):
        assert state.data is state["data"] is batch[0]
        assert state.target is state["target"] is batch[1]
        return
    assert state.data is state["data"] is batch
    for target in (lambda: state.target, lambda: state["target"]):
        with pytest.raises(
            InvalidTypeError, match=r"`state\.target` is the second half of a \(data, target\) pair, got "
        ):
            target()


def test_a_state_of_a_pair_is_made_of_both() -> None:
    state = State(X, Y, *MODELS)
    assert state.batch[0] is X
    assert state.batch[1] is Y


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (X, "a tensor of shape (5, 3)"),
        ((X, Y, Y), "a tuple of 3"),
        ([X], "a list of 1"),
        ({"x": X, 2: Y}, "a dict of 'x', 2"),
        (Encoding(x=X), "a Encoding of 'x'"),
        (Triple(X, Y, Y), "a Triple"),
        (Frozen(X, Y), "a Frozen"),
        (packed(X), "a PackedSequence"),
        (None, "a NoneType"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_say_what_a_batch_is(batch: Batch, words: str) -> None:
    assert described(batch) == words
    assert repr(State.of(batch, *MODELS)) == f"State of {words}"


# ---- a batch on another device


@each_kind
def test_a_batch_is_moved(kind: Kind) -> None:
    batch = kind.make(X, Y)
    before = read(kind, batch)
    if kind.unmoved:
        with pytest.raises(InvalidTypeError, match=kind.unmoved):
            moved(batch, META)
    else:
        there = moved(batch, META)
        assert type(there) is type(batch)
        assert [tensor.shape for tensor in read(kind, there)] == [tensor.shape for tensor in before]
        assert {tensor.device for tensor in (*read(kind, there), *tensors_of(there))} == {META}
        assert size_of(there) == size_of(batch) == 5
        # What is there already is not copied.
        for old, new in zip(tensors_of(there), tensors_of(moved(there, META)), strict=True):
            assert old is new
    # The batch itself stays where it is.
    assert {tensor.device for tensor in (*read(kind, batch), *tensors_of(batch))} == {CPU}
    for old, new, value in zip(before, read(kind, batch), (X, Y), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(new, value)


@each_kind
def test_a_batch_that_is_there_is_left_as_it_is(kind: Kind) -> None:
    batch = kind.make(X, Y)
    there = moved(batch, CPU)
    assert type(there) is type(batch)
    assert [id(tensor) for tensor in tensors_of(there)] == [id(tensor) for tensor in tensors_of(batch)]
    if type(batch) not in (tuple, list):
        assert there is batch


def test_what_a_kind_has_beside_its_tensors_is_moved_along() -> None:
    named = Named(x=X, word="four")
    named.name = "mine"
    there = moved(named, META)
    assert (there.name, there["word"], there["x"].device) == ("mine", "four", META)
    default = moved(defaultdict(list, x=X), META)
    assert default.default_factory is list
    assert list(moved(OrderedDict(y=Y, x=X), META)) == ["y", "x"]
    assert moved(Examples(X, Y, "mine"), META).name == "mine"
    graphs = moved(Graphs(3, x=X), META)
    assert graphs.num_graphs == 3


def test_what_holds_no_tensor_is_not_moved() -> None:
    words, nothing, model = ["four"], object(), nn.Linear(1, 1)
    there = moved({"words": words, "nothing": nothing, "model": model, "n": 3, "x": X}, META)
    assert (there["words"], there["n"]) == (words, 3)
    assert there["nothing"] is nothing
    assert there["model"] is model
    assert model.weight.device == CPU


def test_a_part_that_is_there_already_is_not_copied() -> None:
    here = Examples(X.to(META), Y.to(META))
    there = moved({"here": here, "x": X}, META)
    assert there["here"] is here
    assert there["x"].device == META


def test_packed_sequences_are_moved_with_their_order() -> None:
    there = moved(pack_sequence([X[:2], X], enforce_sorted=False), META)
    assert there.data.device == there.sorted_indices.device == there.unsorted_indices.device == META
    assert there.batch_sizes.device == CPU


def test_a_class_or_a_module_s_own_to_is_not_called() -> None:
    there = moved((X, nn.Linear, nn.Linear(1, 1)), META)
    assert there[1] is nn.Linear
    assert there[2].weight.device == CPU


@pytest.mark.parametrize("nested", [lambda x: x, lambda x: (x, Y), lambda x: {"x": [x]}], ids=["bare", "pair", "dict"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (types.SimpleNamespace(x=X), r"got a SimpleNamespace that holds tensors\. Give it a method `to\(device\)`"),
        (types.MappingProxyType({"x": X}), r"made of tensors, tuples, lists, dicts, .*got a mappingproxy of 'x' that"),
        (KINDS["forgets one"].make(X, Y), r"Forgetful\.to\(device\) must move all .* one that is not on meta after it"),
    ],
    ids=["namespace", "proxy", "forgetful"],
)
def test_message_of_what_cannot_be_moved(batch: Batch, message: str, nested: Any) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        moved(nested(batch), META)


# ---- how many examples


@each_kind
def test_the_size_of_each_kind(kind: Kind) -> None:
    assert size_of(kind.make(X, Y)) == 5
    assert size_of(kind.make(X[:1], Y[:1])) == 1


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(()), 0),
        (torch.ones(0, 3), 0),
        (None, 0),
        ("text", 0),
        (7, 0),
        ({}, 0),
        ([], 0),
        ({"scale": torch.ones(()), "x": X}, 5),
        ({"words": ["four"], "x": {"deep": [X]}}, 5),
        ((X, torch.ones(9)), 9),
        ((X, None), 5),
        ((X, torch.ones(())), 5),
        ([X], 5),
        ((X, Y[:2], Y), 5),
        (Pair(X, Y[:3]), 3),
        (Triple(X[:2], Y, Y), 2),
        (pack_sequence([X, X[:2], X[:1]]), 3),
        ((pack_sequence([X, X[:2]]), None), 2),
        (Graphs(2, x=X), 2),
        ({"graphs": Graphs(2, x=X), "y": Y}, 2),
        ((Graphs(2, x=X), Y[:3]), 3),
        (types.SimpleNamespace(num_graphs=None, x=X), 5),
    ],
    ids=repr,
)
def test_size(batch: Batch, size: int) -> None:
    assert size_of(batch) == size


# ---- a batch with other tensors


@each_kind
def test_tensors_are_replaced_or_that_is_refused(kind: Kind) -> None:
    batch = kind.make(X, Y)
    if kind.uncut and kind.uncut != "PackedSequence":
        with pytest.raises(InvalidTypeError, match=f"got a {kind.uncut}.* that holds tensors"):
            map_tensors(torch.Tensor.double, batch)
        return
    doubled = map_tensors(lambda tensor: tensor.double(), batch)
    assert type(doubled) is type(batch)
    for new, old, value in zip(read(kind, doubled), read(kind, batch), (X, Y), strict=True):
        assert torch.equal(old, value)
        assert old.dtype == torch.float32
        assert torch.equal(new, value.double())
        assert new.dtype == torch.float64


def test_packed_sequences_keep_their_order() -> None:
    sequence = pack_sequence([X[:2], X], enforce_sorted=False)
    doubled = map_tensors(lambda tensor: tensor.double(), sequence)
    assert isinstance(doubled, PackedSequence)
    assert doubled.batch_sizes is sequence.batch_sizes
    assert doubled.unsorted_indices is sequence.unsorted_indices


def test_containers_without_tensors_are_left_as_they_are() -> None:
    words = {"words": "four"}
    made = map_tensors(torch.neg, {"meta": words, "x": X})
    assert made["meta"] is words


# ---- the two halves of a batch


def test_examples_are_cut_in_the_middle() -> None:
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    (x_one, y_one), (x_other, y_other) = halves((x, y))
    assert torch.equal(x_one, x[:2])
    assert torch.equal(x_other, x[2:])
    assert (y_one.tolist(), y_other.tolist()) == ([0, 1], [2, 3, 4])


def test_batches_may_be_nested_and_stay_of_their_kind() -> None:
    pair = namedtuple("pair", ["left", "right"])
    x = torch.arange(4)
    for part, expected in zip(
        halves((OrderedDict(x=[x]), pair({"y": x}, (x,)))), (torch.tensor([0, 1]), torch.tensor([2, 3])), strict=True
    ):
        data, target = part
        assert isinstance(data, OrderedDict)
        assert isinstance(target, pair)
        for tensor in (data["x"][0], target.left["y"], target.right[0]):
            assert torch.equal(tensor, expected)


def test_what_is_not_of_the_batch_s_length_is_in_both_halves() -> None:
    scale, weights = torch.tensor(2.0), torch.ones(3)
    for (x, got_scale, got_weights, name), none in halves(((torch.ones(4), scale, weights, "text"), None)):
        assert len(x) == 2
        assert got_scale is scale
        assert got_weights is weights
        assert (name, none) == ("text", None)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.ones(1, 3), torch.ones(1)), 1),
        ((torch.ones(0, 3), None), 0),
        ((None, None), 0),
        (("text", torch.tensor(1.0)), 0),
    ],
    ids=["one example", "none", "no tensor", "a scalar"],
)
def test_message_of_a_batch_that_cannot_be_halved(batch: Batch, size: int) -> None:
    with pytest.raises(
        InvalidValueError,
        match=rf"halves the validation batch.* 2 or more examples, got {size}\. Use larger batches, `ul_batches` of 2",
    ):
        halves(batch)


@each_kind
def test_halves_of_each_kind(kind: Kind) -> None:
    batch = kind.make(X, Y)
    if kind.uncut:
        message = (
            f"halves the validation batch.* got a {kind.uncut}, which cannot be halved. .*`ul_batches` of 2 or more"
        )
        with pytest.raises(InvalidValueError, match=message):
            halves(batch)
        return
    for half, part in zip(halves(batch), (slice(2), slice(2, None)), strict=True):
        assert type(half) is type(batch)
        for tensor, value in zip(read(kind, half), (X, Y), strict=True):
            assert torch.equal(tensor, value[part])
    for tensor, value in zip(read(kind, batch), (X, Y), strict=True):
        assert torch.equal(tensor, value)


def test_both_halves_are_those_of_the_same_examples() -> None:
    one, other = halves(Triple(X, Y, torch.arange(5)))
    assert (one.index.tolist(), other.index.tolist()) == ([0, 1], [2, 3, 4])
    assert halves({"word": "fiver", "x": X})[0]["word"] == "fiver"  # of as many letters


# ---- what is easily overlooked


def test_tensors_in_slots_are_not_overlooked() -> None:
    with pytest.raises(InvalidTypeError, match="got a Slots that holds tensors"):
        moved(Slots(X, Y), META)


def test_tensors_in_slots_are_counted() -> None:
    assert size_of(Slots(X, Y)) == 5


def test_tensors_in_slots_are_not_halved() -> None:
    with pytest.raises(InvalidValueError, match="got a Slots, which cannot be halved"):
        halves((Slots(X, Y), Y))


def test_a_batch_that_moves_what_a_copy_shares_stays_where_it_is() -> None:
    shelf = Shelf(x=X)
    assert moved(shelf, META).values["x"].device == META
    assert shelf.values["x"].device == CPU


def test_what_a_dataclass_holds_beside_its_fields_is_moved() -> None:
    assert moved(Masked(X), META).mask.device == META


def test_what_a_dataclass_holds_beside_its_fields_is_halved() -> None:
    assert len(halves(Masked(X))[0].mask) == 2


def test_a_field_that_is_not_set_is_left_so() -> None:
    assert moved(Late(X), META).x.device == META


@pytest.mark.parametrize("make", [list, tuple], ids=["list", "tuple"])
def test_lists_as_long_as_the_batch_are_halved(make: type) -> None:
    one, other = halves({"words": make("abcde"), "y": Y})
    assert (one["words"], other["words"]) == (make("ab"), make("cde"))


IMAGES = [torch.ones(3, 8, 8) for _ in range(5)]
BOXES = [{"boxes": torch.ones(3, 4), "labels": torch.ones(3)} for _ in IMAGES]


def test_a_list_of_dicts_is_one_of_examples() -> None:
    assert size_of((IMAGES, BOXES)) == 5


def test_a_list_of_examples_is_cut_between_them_or_refused() -> None:
    try:
        one, other = halves((IMAGES, BOXES))
    except InvalidValueError:
        return
    assert [image.shape for image in one[0]] == [(3, 8, 8)] * 2
    assert [image.shape for image in other[0]] == [(3, 8, 8)] * 3
    assert (len(one[1]), len(other[1])) == (2, 3)


def test_objects_that_hold_each_other_are_looked_into_once() -> None:
    nodes = [Own(X.clone()) for _ in range(6)]
    for node in nodes:
        node.itself = [other for other in nodes if other is not node]
    assert len(tensors_of(nodes[0])) == 6


def test_the_size_of_what_holds_itself() -> None:
    assert size_of(Own(X)) == 5


@pytest.mark.parametrize("batch", [deque([X]), {X}], ids=["deque", "set"])
def test_other_collections_are_not_overlooked(batch: Batch) -> None:
    with pytest.raises(InvalidTypeError, match="that holds tensors"):
        moved((batch, Y), META)


def test_a_named_tuple_with_a_constructor_of_its_own_is_moved() -> None:
    there = moved(FromOne(X), META)
    assert type(there) is FromOne
    assert there.twice.device == META


def test_sparse_tensors_are_refused_by_name() -> None:
    with pytest.raises(InvalidValueError, match="which cannot be halved"):
        halves((torch.eye(5).to_sparse(), Y))
