from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.noisy import assert_same_bits
from tune_implicit.errors import CheckpointError
from tune_implicit.trials.checkpoint import read_checkpoint, write_checkpoint

STATE = {
    "trainer": {"w": torch.arange(3.0), "step": 2, "name": "cg", "nothing": None},
    "history": [{"ul_step": 2}],
    "kept": {"ul_model": {"l": torch.zeros(2)}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.pt"


def test_what_is_written_is_read_and_nothing_else_is_left_in_the_folder(path: Path) -> None:
    write_checkpoint(path, {"trainer": {}, "history": [], "kept": {}})
    write_checkpoint(path, STATE)
    assert_same_bits(read_checkpoint(path), STATE)
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(path, STATE)

    def full(state: object, file: Path) -> None:
        file.write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, {"trainer": {}, "history": [], "kept": {}})
    assert_same_bits(read_checkpoint(path), STATE)


def test_what_a_write_cut_short_has_left_is_in_the_way_of_no_other(path: Path) -> None:
    path.with_name("trial.pt.partial").write_bytes(b"half of")
    write_checkpoint(path, STATE)
    assert_same_bits(read_checkpoint(path), STATE)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"", b"no archive", None, {"a": 1}, {"trainer": {}, "history": []}, [STATE]], ids=str
)
def test_what_is_no_checkpoint(content: object, path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"trial\.pt"):
        read_checkpoint(path)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a trial's checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_no_checkpoint(kept: float, path: Path) -> None:
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="cannot be read as a trial's checkpoint"):
        read_checkpoint(path)


def test_checkpoints_run_no_code(path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (path.parent / "sprung",))

    torch.save({"trainer": Trap(), "history": [], "kept": {}}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not (path.parent / "sprung").exists()
