import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.support.problems import generator
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.hypergradients.state import tensors_of
from tune_implicit.trials.splits import BatchStream, batches_of, check_split, move

X, Y = torch.arange(10), torch.arange(10) + 100


class Augmented(Dataset):
    """Noise on each sample, drawn from all three global generators."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[float, float]:
        return X[index] + random.random() + np.random.rand() + torch.rand(()).item(), Y[index]  # noqa: NPY002


class Drawing:
    """A re-iterable generator that draws each batch from the global generator, and one more than once a pass."""

    def __iter__(self):
        for _ in range(torch.randint(2, 5, ()).item()):
            index = torch.randint(10, (3,))
            yield X[index], Y[index]


class Walk:
    """A re-iterable whose batches depend on all the draws before them, like a shuffle buffer."""

    def __iter__(self):
        position = torch.zeros(())
        for _ in range(4):
            position = position + torch.randn(())
            yield position, position


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


# Each makes its data anew, like the factory in a new process.
DATA = {
    "list": lambda: [(X[i : i + 3], Y[i : i + 3]) for i in range(0, 9, 3)],
    "tuple of lists": lambda: tuple([X[i : i + 3], Y[i : i + 3]] for i in range(0, 9, 3)),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "own generator": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator(5)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "iterable data set": lambda: DataLoader(Stream(), batch_size=4),
    "drawing": Drawing,
    "walk": Walk,
}


def take(stream: BatchStream, count: int, draw: bool) -> list[float]:
    """Take batches as training does, whose dropout draws from the same generators between them."""
    taken = []
    for _ in range(count):
        data, target = stream.next()
        taken += [*data.reshape(-1).tolist(), *target.reshape(-1).tolist()]
        if draw:
            taken += [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    return taken


@pytest.mark.parametrize("draw", [False, True], ids=["", "draws between"])
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("kind", DATA)
def test_resumed_stream_goes_on_the_same(kind: str, taken: int, draw: bool) -> None:
    # `taken` of 3 ends a pass of the lists and loaders; that of 4 is the first of the next.
    seed_everything(1)
    stream = BatchStream("train_data", DATA[kind]())
    take(stream, taken, draw)
    state = stream.state_dict()
    expected = take(stream, 9, draw)
    seed_everything(2)
    resumed = BatchStream("train_data", DATA[kind]())
    take(resumed, 2, draw)
    resumed.load_state_dict(state)
    if "list" in kind:  # which draws nothing, so that the global state is left to the caller
        seed_everything(1)
        take(BatchStream("train_data", DATA[kind]()), taken, draw)
    assert take(resumed, 9, draw) == expected


def test_stream_repeats_a_list_for_ever() -> None:
    stream = BatchStream("train_data", [(X, Y), (Y, X)])
    assert [int(stream.next()[0][0]) for _ in range(5)] == [0, 100, 0, 100, 0]


def test_a_state_is_plain_data(tmp_path: Path) -> None:
    stream = BatchStream("train_data", DATA["own generator"]())
    stream.next()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    expected = take(stream, 5, draw=False)
    stream.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(stream, 5, draw=False) == expected


def test_tensors_in_any_nesting_are_moved_and_the_rest_is_left() -> None:
    Pair = namedtuple("Pair", "x y")
    nested = {"a": [X, (Y, 3)], "b": None, "c": Pair(X, "text")}
    moved = move(nested, torch.device("meta"))
    assert [tensor.device.type for tensor in tensors_of(moved)] == ["meta"] * 3
    assert (moved["a"][1][1], moved["b"], moved["c"].y) == (3, None, "text")
    assert move(X, X.device) is X


# ---- messages


class Empty:
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    "data",
    [[], (), DataLoader(TensorDataset(X[:2]), batch_size=4, drop_last=True)],
    ids=["list", "tuple", "loader that drops its only batch"],
)
def test_message_of_a_split_known_to_be_empty(data: object) -> None:
    with pytest.raises(ValueError, match=r"`select_data` must hold at least one batch, got none\. Check the split"):
        check_split("select_data", data)


def test_message_of_a_split_that_turns_out_empty() -> None:
    check_split("select_data", Empty())
    with pytest.raises(ValueError, match="`select_data` must hold at least one batch, got none"):
        list(batches_of("select_data", Empty()))
    with pytest.raises(ValueError, match="`train_data` must hold at least one batch, got none"):
        BatchStream("train_data", Empty()).next()


@pytest.mark.parametrize("data", [iter([(X, Y)]), zip(X, Y, strict=True), ((x, x) for x in X), 3, None], ids=repr)
def test_message_of_what_cannot_be_read_twice(data: object) -> None:
    with pytest.raises(TypeError, match=r"`train_data` must be a re-iterable of .*got .*Pass a list of pairs or a"):
        check_split("train_data", data)


@pytest.mark.parametrize("kind", ["list", "iterable data set", "drawing"])
def test_a_split_needs_no_length(kind: str) -> None:
    check_split("train_data", DATA[kind]())


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ((X, Y), r"a tensor of shape \(10,\)"),  # the batch itself, in place of a list of it
        (X, r"a tensor of shape \(\)"),
        ([(X, Y, Y)], "a tuple of 3"),
        ([[X]], "a list of 1"),
        ([{"data": X}], "dict"),
        (["xy"], "str"),
    ],
)
def test_message_of_a_batch_that_is_no_pair(data: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"must yield \(data, target\) pairs, got {got}\. .*pass \[\(data, target\)\]"):
        list(batches_of("train_data", data))
