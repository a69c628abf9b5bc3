import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.support.problems import generator
from tune_implicit.hypergradients.batches import moved, tensors_of
from tune_implicit.hypergradients.rng import get_rng_state, same_rng_state, seed_everything
from tune_implicit.trials.splits import BatchStream, batches_of, check_split

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


class Shuffled:
    """A re-iterable that draws the whole order of a pass at its start."""

    def __iter__(self):
        for index in torch.randperm(10).split(3):
            yield X[index], Y[index]


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
    "shuffled a pass": Shuffled,
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
    made = moved(nested, torch.device("meta"))
    assert [tensor.device.type for tensor in tensors_of(made)] == ["meta"] * 3
    assert (made["a"][1][1], made["b"], made["c"].y) == (3, None, "text")
    assert moved(X, X.device) is X


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
    with pytest.raises(TypeError, match=r"`train_data` must be a re-iterable of .*got .*Pass a list of batches"):
        check_split("train_data", data)


@pytest.mark.parametrize("kind", ["list", "iterable data set", "drawing"])
def test_a_split_needs_no_length(kind: str) -> None:
    check_split("train_data", DATA[kind]())


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ((X, Y), "a tuple of 2 tensors"),  # the batch itself, in place of a list of it
        ([X, Y, Y], "a list of 3 tensors"),
        (X, r"a tensor of shape \(10,\)"),
        ({"data": X}, "a dict of 'data'"),
    ],
)
def test_message_of_one_batch_in_place_of_several(data: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"`train_data` must be a re-iterable of batches, got {got}\. For one batch"):
        check_split("train_data", data)


# ---- data that draw


@pytest.mark.parametrize("kind", ["shuffled a pass", "drawing", "walk", "iterable data set"])
def test_drawing_data_leave_the_random_state_of_the_trial_alone(kind: str) -> None:
    seed_everything(1)
    stream = BatchStream("train_data", DATA[kind]())
    stream.next()  # which draws a seed
    before = get_rng_state()
    for _ in range(30):
        stream.next()
        assert same_rng_state(get_rng_state(), before)


@pytest.mark.parametrize("kind", ["shuffled a pass", "drawing", "walk"])
def test_drawing_data_are_the_same_whatever_else_is_drawn(kind: str) -> None:
    taken = []
    for draws in (False, False, True):
        seed_everything(1)
        stream = BatchStream("train_data", DATA[kind]())
        batches = []
        for _ in range(30):
            batches.append(stream.next()[0].tolist())
            if draws:
                take(BatchStream("validate_data", DATA["augmented"]()), 1, draw=True)
        taken.append(batches)
    assert taken[0] == taken[1] == taken[2]
    assert len(set(map(str, taken[0]))) > 20  # and every pass draws anew
    seed_everything(2)
    stream = BatchStream("train_data", DATA[kind]())
    assert [stream.next()[0].tolist() for _ in range(30)] != taken[0]


class Watching:
    """Data that see, at each batch, whether the random state is that of the trial."""

    def __init__(self, draws: str) -> None:
        self.draws, self.of_trial, self.swapped = draws, torch.get_rng_state(), []

    def __iter__(self):
        if self.draws == "at start":
            torch.randperm(10)
        for _ in range(4):
            if self.draws == "at each":
                torch.randn(())
            self.swapped.append(not torch.equal(torch.get_rng_state(), self.of_trial))
            yield X, Y


@pytest.mark.parametrize(
    ("draws", "later"),
    [("at start", [True, False, False, False]), ("at each", [True] * 4), ("nothing", [True, False, False, False])],
)
def test_random_state_is_changed_at_each_batch_only_for_data_that_draw_there(draws: str, later: list[bool]) -> None:
    data = Watching(draws)
    stream = BatchStream("train_data", data)
    stream.next()
    data.of_trial = torch.get_rng_state()
    data.swapped.clear()
    while len(data.swapped) < 11:
        stream.next()
    # The first pass finds it out.
    assert data.swapped == [True] * 3 + later * 2
    # And a stream that goes on from its state knows it.
    resumed = BatchStream("train_data", data)
    resumed.load_state_dict(stream.state_dict())
    data.of_trial = torch.get_rng_state()
    data.swapped.clear()
    while len(data.swapped) < 4:
        resumed.next()
    assert data.swapped == later


def test_stream_saved_in_its_first_pass_has_not_forgotten_what_it_has_seen() -> None:
    """Data that draw once after the first batch, and have done so when the state is taken."""

    class Once:
        def __iter__(self):
            for index in range(4):
                shift = torch.randn(()) if index == 1 else 0.0
                yield X + shift, Y

    seed_everything(1)
    stream = BatchStream("train_data", Once())
    take(stream, 3, draw=True)
    state = stream.state_dict()
    expected = take(stream, 12, draw=True)
    seed_everything(2)
    resumed = BatchStream("train_data", Once())
    resumed.load_state_dict(state)
    assert take(resumed, 12, draw=True) == expected


def test_data_that_begin_to_draw_later_are_found_out() -> None:
    class Augmented:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for _ in range(4):
                yield X + (torch.randn(()) if self.passes > 9 else 0.0), Y

    stream = BatchStream("train_data", Augmented())
    for _ in range(4 * 20):
        stream.next()
    before = get_rng_state()
    for _ in range(8):
        stream.next()
        assert same_rng_state(get_rng_state(), before)
