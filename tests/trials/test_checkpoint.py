import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.noisy import assert_same_bits, random_problem
from tune_implicit.errors import CheckpointError
from tune_implicit.trials.checkpoint import read_checkpoint, read_newest, write_checkpoint
from tune_implicit.trials.trial import Trial

STATE = {
    "trainer": {"w": torch.arange(3.0), "step": 2, "name": "cg", "nothing": None},
    "history": [{"ul_step": 2}],
    "kept": {"ul_model": {"l": torch.zeros(2)}},
}
OTHER: dict[str, Any] = {"trainer": {}, "history": [], "kept": {}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.pt"


def test_what_is_written_is_read_and_nothing_else_is_left_in_the_folder(path: Path) -> None:
    write_checkpoint(path, OTHER)
    write_checkpoint(path, STATE)
    assert_same_bits(read_checkpoint(path), STATE)
    assert list(path.parent.iterdir()) == [path]


def test_layout_is_a_line_of_text_and_what_torch_saves(path: Path) -> None:
    write_checkpoint(path, STATE)
    with path.open("rb") as file:
        assert file.readline().startswith(b"tune_implicit checkpoint 5 sha256:")
        path.with_name("saved.pt").write_bytes(file.read())
    assert_same_bits(torch.load(path.with_name("saved.pt"), weights_only=True), STATE)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_before(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(path, STATE)

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[name], full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, OTHER)
    assert_same_bits(read_checkpoint(path), STATE)
    assert list(path.parent.iterdir()) == [path]


def test_state_that_cannot_be_saved_leaves_no_file(path: Path) -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        write_checkpoint(path, OTHER | {"function": lambda: None})
    assert list(path.parent.iterdir()) == []


def test_every_write_has_a_partial_file_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that write one trial are not in each other's way, and what a killed one has left is in no one's."""
    left = path.with_name("trial.pt.1-0.partial")
    left.write_bytes(b"half of")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.extend(set(path.parent.iterdir()) - {path, left}))
    for _ in range(3):
        write_checkpoint(path, STATE)
    assert len(set(seen)) == 3
    assert all(partial.name.startswith(f"trial.pt.{os.getpid()}-") for partial in seen)
    assert_same_bits(read_checkpoint(path), STATE)
    assert set(path.parent.iterdir()) == {path, left}


# ---- what is no checkpoint


@pytest.mark.parametrize("content", [{"a": 1}, {"trainer": {}, "history": []}, [STATE]], ids=str)
def test_what_holds_something_else(content: Any, path: Path) -> None:
    write_checkpoint(path, content)
    with pytest.raises(CheckpointError, match=r"trial\.pt' must be a trial's checkpoint, got another file"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"tune_implicit checkpoint 4 sha256:" + 99 * b"0"], ids=str)
def test_what_begins_otherwise(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"trial\.pt' is no .* or is damaged: it must begin with 'tune_implicit c"
    ):
        read_checkpoint(path)


def test_files_of_older_versions_are_told_apart(path: Path) -> None:
    torch.save(STATE, path)
    with pytest.raises(CheckpointError, match=r"before 0\.6 are not read: load them with the version .* that wrote"):
        read_checkpoint(path)


@pytest.mark.parametrize("exists", [True, False])
def test_what_cannot_be_read(exists: bool, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a trial's checkpoint"):
        read_checkpoint(tmp_path if exists else tmp_path / "trial.pt")


def test_checkpoints_run_no_code(path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (path.parent / "sprung",))

    write_checkpoint(path, OTHER | {"trainer": Trap()})
    with pytest.raises(CheckpointError, match="cannot be read as a trial's checkpoint"):
        read_checkpoint(path)
    assert not (path.parent / "sprung").exists()


# ---- damage


@pytest.fixture(scope="module")
def of_a_trial(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a trial that has everything: optimizers, schedules of batches, random states."""
    trial = Trial(lambda config: random_problem(), {"ul_steps": 4, "ul_steps_per_report": 2, "ll_steps": 2, "k": 2})
    trial.advance()
    path = tmp_path_factory.mktemp("whole") / "trial.pt"
    trial.save(path)
    return path.read_bytes()


def flipped(whole: bytes, bits: list[int]) -> Iterator[bytes]:
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def noticed(path: Path, contents: Iterator[bytes]) -> int:
    """Return how many of the files are refused by their name as damaged."""
    count = 0
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"trial\.pt' is .*damaged: "):
            read_checkpoint(path)
        count += 1
    return count


def test_every_flipped_bit_is_noticed(of_a_trial: bytes, path: Path) -> None:
    bits = random.Random(0).sample(range(8 * len(of_a_trial)), 1000)
    assert noticed(path, flipped(of_a_trial, bits)) == 1000
    header = list(range(8 * (of_a_trial.index(b"\n") + 1)))
    assert noticed(path, flipped(of_a_trial, header)) == len(header)


def test_a_file_cut_short_or_with_something_at_its_end_is_noticed(of_a_trial: bytes, path: Path) -> None:
    size = len(of_a_trial)
    cuts = [*range(120), *random.Random(0).sample(range(size), 100), size - 1]
    assert noticed(path, (of_a_trial[:cut] for cut in cuts)) == len(cuts)
    assert noticed(path, iter([of_a_trial + b"\0"])) == 1
    path.write_bytes(of_a_trial)
    assert read_checkpoint(path)["history"][0]["ul_step"] == 2


# ---- several of one trial


def state_at(ul_step: int, records: int) -> dict[str, Any]:
    return {"trainer": {"counters": {"ul_step": ul_step}}, "history": [{}] * records, "kept": {}}


def written(folder: Path, *progress: tuple[int, int]) -> list[Path]:
    paths = [folder / f"{number}.pt" for number in range(len(progress))]
    for path, (ul_step, records) in zip(paths, progress, strict=True):
        write_checkpoint(path, state_at(ul_step, records))
    return paths


@pytest.mark.parametrize(
    ("progress", "newest"),
    [
        ([(2, 1)], 0),
        ([(4, 1), (10, 2), (8, 3)], 1),
        ([(4, 2), (4, 3)], 1),
        ([(4, 3), (4, 2)], 0),
        ([(4, 3), (4, 3)], 0),
        ([(0, 0)], 0),
    ],
)
def test_newest_is_the_furthest(progress: list[tuple[int, int]], newest: int, tmp_path: Path) -> None:
    paths = written(tmp_path, *progress)
    assert read_newest([tmp_path / "none.pt", *paths]) == (paths[newest], state_at(*progress[newest]))


def test_newest_of_a_real_trial(tmp_path: Path) -> None:
    trial = Trial(lambda config: random_problem(), {"ul_steps": 3, "ul_steps_per_report": 1, "ll_steps": 2, "k": 2})
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for path in paths:
        trial.save(path)
        trial.advance()
    path, state = read_newest(paths)
    assert (path, len(state["history"])) == (paths[2], 2)


def test_damaged_ones_are_told_and_left_out(tmp_path: Path) -> None:
    paths = written(tmp_path, (2, 1), (4, 2))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"1\.pt' is damaged: .* The one before it is used, if there is one\."):
        assert read_newest(reversed(paths)) == (paths[0], state_at(2, 1))
    paths[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged") as told:
        assert read_newest(iter(paths)) is None
    assert len(told) == 2


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert read_newest([]) is None
    assert read_newest([tmp_path / "none.pt"]) is None
