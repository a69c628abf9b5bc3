"""A Tuner restored from its folder: only from one that is whole."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support import toy
from tune_implicit import ImplicitOptunaSearch, ImplicitTrainable, InvalidValueError, restore_tuner

STATE = json.dumps({"trial_data": [["{}", "{}"]], "runner_data": {}, "stats": {}}).encode()
PICKLE = pickle.dumps({"trials": list(range(300))})
# What Tune writes of a session, and what is in it.
SESSION = {
    "experiment_state-{}.json": STATE,
    "search_gen_state-{}.json": PICKLE,
    "searcher-state-{}.pkl": b"whatever a searcher writes",
    "callback-states-{}.pkl": PICKLE,
}
EARLY, LATE = "2026-01-01_10-00-00", "2026-01-02_09-00-00"

Restored = list[tuple[Any, ...]]


def write_session(folder: Path, session: str, **changed: bytes | None) -> None:
    """Write the files of a session; those of kinds that are ``changed`` hold that, or are not there."""
    for name, content in SESSION.items():
        content = changed.get(name.split("-")[0], content)
        if content is not None:
            (folder / name.format(session)).write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a Tuner leaves it that was restored once."""
    (tmp_path / "tuner.pkl").write_bytes(PICKLE)
    (tmp_path / "Trial_1").mkdir()
    write_session(tmp_path, EARLY)
    write_session(tmp_path, LATE)
    return tmp_path


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Restored:
    """What `Tuner.restore` was called with."""
    calls: Restored = []
    monkeypatch.setattr(
        tune.Tuner, "restore", lambda path, trainable, **arguments: calls.append((path, trainable, arguments))
    )
    return calls


def test_a_whole_folder_is_restored_as_tune_does(
    folder: Path, restored: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_tuner(folder, "trainable", resume_errored=True)
    monkeypatch.chdir(folder.parent)
    restore_tuner(folder.name, "trainable")  # which Tune itself takes for no path
    restore_tuner(f"file://{folder}", "trainable")
    assert restored == [
        (str(folder), "trainable", {"resume_errored": True}),
        (str(folder), "trainable", {}),
        (f"file://{folder}", "trainable", {}),
    ]


def test_a_searcher_of_tunes_own_needs_no_file(tmp_path: Path, restored: Restored) -> None:
    (tmp_path / "tuner.pkl").write_bytes(PICKLE)
    (tmp_path / f"experiment_state-{EARLY}.json").write_bytes(STATE)
    (tmp_path / f"basic-variant-state-{EARLY}.json").write_bytes(PICKLE)
    restore_tuner(tmp_path, "trainable")
    assert len(restored) == 1


DAMAGES = {
    "empty": ({"experiment_state": b""}, "experiment_state-{}.json is empty"),
    "cut off": ({"experiment_state": STATE[:-9]}, "experiment_state-{}.json is cut off"),
    "cut to digits": ({"experiment_state": b"1"}, "experiment_state-{}.json holds something else"),
    "without trials": (
        {"experiment_state": STATE.replace(b'["{}", "{}"]', b"")},
        "experiment_state-{}.json holds no trial yet",
    ),
    "generator": ({"search_gen_state": PICKLE[:-9]}, "search_gen_state-{}.json is cut off"),
    "generator without end": ({"search_gen_state": PICKLE[:-1]}, "search_gen_state-{}.json is cut off"),
    "callbacks": ({"callback": b"\xff" + PICKLE}, "callback-states-{}.pkl is cut off"),
    "searcher": ({"searcher": b""}, "searcher-state-{}.pkl is empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_to_delete_is_told_where_an_earlier_state_is_whole(folder: Path, restored: Restored, damage: str) -> None:
    changed, told = DAMAGES[damage]
    write_session(folder, LATE, **changed)
    late = ", ".join(sorted(name.format(LATE) for name in SESSION))
    way_out = re.escape(f"The state of {EARLY} is whole: delete {late}, and call this again.")
    with pytest.raises(
        InvalidValueError, match=rf"`path` must hold .*'{folder}', where {told.format(LATE)}: .*{way_out}"
    ):
        restore_tuner(folder, "trainable")
    for name in SESSION:
        (folder / name.format(LATE)).unlink()
    assert restored == []
    restore_tuner(folder, "trainable")
    assert len(restored) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_an_earlier_state_that_is_whole_one_begins_anew(folder: Path, restored: Restored, damage: str) -> None:
    changed, told = DAMAGES[damage]
    write_session(folder, EARLY, experiment_state=b"")
    write_session(folder, LATE, **changed)
    with pytest.raises(InvalidValueError, match=rf"{told.format(LATE)}: .*Start a new Tuner .*`study_name`.* count"):
        restore_tuner(folder, "trainable")
    assert restored == []


@pytest.mark.parametrize(
    ("lost", "told"), [("experiment_state", "no experiment_state file"), ("searcher", "no searcher-state file")]
)
def test_a_state_that_is_lost_is_an_error(tmp_path: Path, restored: Restored, lost: str, told: str) -> None:
    (tmp_path / "tuner.pkl").write_bytes(PICKLE)
    write_session(tmp_path, EARLY, **{lost: None})
    with pytest.raises(InvalidValueError, match=rf"where there is {told}: .*Start a new Tuner"):
        restore_tuner(tmp_path, "trainable")
    assert restored == []


@pytest.mark.parametrize(
    ("content", "told"), [(None, "no tuner.pkl"), (b"", "a tuner.pkl that is"), (PICKLE[:9], "a tuner.pkl that is")]
)
def test_a_folder_that_is_no_tuners_is_an_error(
    folder: Path, restored: Restored, content: bytes | None, told: str
) -> None:
    (folder / "tuner.pkl").unlink()
    if content is not None:
        (folder / "tuner.pkl").write_bytes(content)
    with pytest.raises(
        InvalidValueError, match=rf"`path` must be the folder of a Tuner, .*'{folder}', which holds {told}.*Correct it"
    ):
        restore_tuner(folder, "trainable")
    with pytest.raises(InvalidValueError, match=r"which holds no tuner\.pkl"):
        restore_tuner(folder / "not" / "there", "trainable")
    assert restored == []


def test_what_tune_itself_writes_is_whole_until_it_is_cut(tuned: Callable[..., Any], tmp_path: Path) -> None:
    results = tuned(search_alg=ImplicitOptunaSearch(toy.SPACE, seed=1), num_samples=2)
    trainable = tune.with_parameters(ImplicitTrainable, problem=toy.problem)
    again = restore_tuner(tmp_path / "ray", trainable).get_results()
    losses = [
        {result.metrics["trial_id"]: result.metrics["select_loss"] for result in each} for each in (results, again)
    ]
    assert losses[0] == losses[1]
    (state,) = (tmp_path / "ray").glob("experiment_state-*.json")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(InvalidValueError, match=rf"{state.name} is cut off: .*Start a new Tuner"):
        restore_tuner(tmp_path / "ray", trainable)
