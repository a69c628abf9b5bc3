"""A journal file of whole lines."""

from pathlib import Path

import optuna
import pytest

from tune_implicit.searches.study import open_storage


@pytest.mark.parametrize("half", [b'{"op_code":4,"stu', b"{", b'{"op_code":0}'])
def test_a_line_cut_short_spoils_no_study(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="one")
    study.tell(study.ask(), 1.0)
    with path.open("ab") as file:
        file.write(half)
    study.tell(study.ask(), 2.0)
    again = optuna.load_study(storage=open_storage(str(path)), study_name="one")
    again.tell(again.ask(), 3.0)
    assert [trial.value for trial in study.trials] == [1.0, 2.0, 3.0]
    assert path.read_bytes().endswith(b"\n")


def test_optuna_reads_it_as_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "study.journal")
    study = optuna.create_study(storage=open_storage(path), study_name="one")
    study.tell(study.ask(), 1.0)
    backend = optuna.storages.journal.JournalFileBackend(path)
    theirs = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="one")
    theirs.tell(theirs.ask(), 2.0)
    assert [trial.value for trial in study.trials] == [1.0, 2.0]
