"""What a search leaves in its folder, and how it is read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.toy import run
from tune_implicit import CheckpointError, InvalidValueError, NoCompletedTrialError, SearchResult, load_search
from tune_implicit.searches.results import (
    Summary,
    TrialResult,
    TrialsFile,
    earlier_seconds,
    number_or_text,
    read_trials,
)

SUMMARY = Summary("optuna", "select_loss", "min", 3, 5.0, interrupted=False)


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the fields of a completed trial."""
    fields = {"number": number, "state": "complete", "value": 1.0, "config": {"k": 3}, "metrics": {}, "failure": None}
    return fields | {"started_s": 0.0, "ended_s": 1.0, "checkpoint": None} | changes


def found(*rows: dict[str, Any], mode: str = "min") -> SearchResult:
    summary = Summary("optuna", "select_loss", mode, len(rows), 5.0, interrupted=False)
    return SearchResult(Path("found"), summary, [TrialResult(**row) for row in rows])


# ---- the best


@pytest.mark.parametrize(("mode", "number"), [("min", 1), ("max", 2)])
def test_the_best_is_the_completed_trial_with_the_best_value(mode: str, number: int) -> None:
    rows = [row(0, value=0.0), row(1, value=-1.0), row(2, value=1.0)]
    others = [row(3, value=9.0, state="pruned"), row(4, value=-9.0, state="pruned"), row(5, value=None, state="failed")]
    assert found(*rows, *others, mode=mode).best.number == number


def test_no_completed_trial_has_no_best() -> None:
    result = found(row(0, state="failed", failure="The ll loss became nan."), row(1, state="failed", failure="Other."))
    with pytest.raises(
        NoCompletedTrialError, match=r"None of 2 finished trials completed\. Trial 0: The ll loss became nan\.$"
    ):
        result.best  # noqa: B018


def test_a_search_whose_trials_were_all_pruned_is_told_why_it_has_no_best() -> None:
    with pytest.raises(NoCompletedTrialError, match="Let the pruner or scheduler leave some to their last ul step"):
        found(row(state="pruned")).best  # noqa: B018


# ---- what did not learn

FAILED = {"failure": "The ll loss became nan.", "troubles": "failed"}
SKIPPED = {"skipped_ul_steps": 5, "ul_step": 6, "select_loss": 2.0, "start_loss": 1.0, "troubles": "skipped worse"}


def test_the_troubles_of_a_trial_are_said_with_the_numbers_of_its_record() -> None:
    failed, skipped, well, before = found(
        row(0, metrics=FAILED), row(1, metrics=SKIPPED), row(2, metrics={"troubles": ""}), row(3)
    ).trials
    assert failed.troubles == {"failed": "The trial failed: The ll loss became nan."}
    assert list(skipped.troubles) == ["skipped", "worse"]
    assert skipped.troubles["skipped"].startswith("5 of 6 ul steps were skipped")
    assert "its select_loss is 2, and was 1 before" in skipped.troubles["worse"]
    assert well.troubles == before.troubles == {}


def test_a_trouble_of_another_version_is_passed_over() -> None:
    assert TrialResult(**row(metrics=FAILED | {"troubles": "bored failed"})).troubles.keys() == {"failed"}


def test_the_troubles_of_a_search_are_its_trials_numbers_by_name() -> None:
    rows = [row(0, metrics=SKIPPED), row(1), row(2, metrics=FAILED), row(3, metrics=SKIPPED)]
    assert found(*rows).troubles == {"skipped": [0, 3], "worse": [0, 3], "failed": [2]}
    assert found(row()).troubles == {}


# ---- the list of trials


def test_a_folder_without_a_list_has_no_trials(tmp_path: Path) -> None:
    assert read_trials(tmp_path) == []


def test_trials_are_read_as_they_were_added_and_by_number(tmp_path: Path) -> None:
    TrialsFile(tmp_path).append([row(2), row(0)])
    TrialsFile(tmp_path).append([row(1, value=0.5, config={"k": np.int64(4)})])
    assert [trial.number for trial in read_trials(tmp_path)] == [0, 1, 2]
    assert read_trials(tmp_path)[1] == TrialResult(**row(1, value=0.5, config={"k": 4}))


def test_workers_that_share_a_folder_see_what_the_others_added(tmp_path: Path) -> None:
    mine, theirs = TrialsFile(tmp_path), TrialsFile(tmp_path)
    assert mine.numbers() == set()
    theirs.append([row(0), row(3)])
    assert mine.numbers() == {0, 3}
    mine.append([row(1)])
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('\n{"number": 2, "sta')  # cut short by a kill
    theirs.append([row(4)])
    assert mine.numbers() == theirs.numbers() == {0, 1, 3, 4}


def test_a_trial_added_twice_is_the_one_added_last(tmp_path: Path) -> None:
    TrialsFile(tmp_path).append([row(value=1.0)])
    TrialsFile(tmp_path).append([row(value=2.0)])
    assert [trial.value for trial in read_trials(tmp_path)] == [2.0]


def test_the_file_of_a_finished_trial_is_valid_json(output: Path) -> None:
    run(output, 2)
    rows = [json.loads(line) for line in (output / "trials.jsonl").read_text().splitlines() if line]
    assert [row["number"] for row in rows] == [0, 1]


def test_a_line_cut_short_by_a_kill_spoils_no_other(output: Path) -> None:
    first = run(output, 2)
    path = output / "trials.jsonl"
    path.write_text(path.read_text()[:-40])
    assert [trial.number for trial in load_search(output).trials] == [0]
    assert run(output, 3, resume=True).trials[:2] == first.trials


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.int64(4), 4), (np.float32(0.5), 0.5), (Path("a"), "a"), (object, "<class 'object'>"), (np.arange(2), "[0 1]")],
)
def test_a_number_stays_a_number_and_all_else_becomes_text(value: object, said: Any) -> None:
    assert number_or_text(value) == said
    assert type(number_or_text(value)) is type(said)


# ---- checkpoints


def test_a_checkpoint_is_found_that_its_engine_writes_after_the_trial_ended(tmp_path: Path) -> None:
    TrialsFile(tmp_path).append([row(checkpoint="*_a_*/checkpoint_*/trial.pt")])
    assert read_trials(tmp_path)[0].checkpoint is None
    for number in (2, 10, 1):
        folder = tmp_path / "trial_a_1" / f"checkpoint_{number:06}"
        folder.mkdir(parents=True)
        (folder / "trial.pt").touch()
    # The last of several.
    assert read_trials(tmp_path)[0].checkpoint == tmp_path / "trial_a_1" / "checkpoint_000010" / "trial.pt"


def test_a_trial_that_was_never_saved_says_so() -> None:
    trial = TrialResult(**row(3, state="failed"))
    for read in ("ul_state", "ll_state", "history"):
        with pytest.raises(CheckpointError, match=r"Trial 3 has no checkpoint: it ended as failed before it was saved"):
            getattr(trial, read)


def test_a_lost_checkpoint_is_told(output: Path) -> None:
    result = run(output, 1)
    result.best.checkpoint.unlink()
    with pytest.raises(CheckpointError, match="Trial 0 has no checkpoint"):
        load_search(output).best.ul_state  # noqa: B018


def test_a_checkpoint_lost_since_the_list_was_read_is_told(output: Path) -> None:
    best = run(output, 1).best
    best.checkpoint.unlink()
    with pytest.raises(CheckpointError, match="cannot be read as a trial's checkpoint"):
        best.history  # noqa: B018


# ---- the summary


def test_a_search_is_read_as_it_was_written(tmp_path: Path) -> None:
    TrialsFile(tmp_path).append([row()])
    written = SearchResult.write(tmp_path, SUMMARY)
    assert load_search(tmp_path) == load_search(str(tmp_path)) == written
    assert written.summary == SUMMARY
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_notes_are_in_the_folder(output: Path) -> None:
    result = run(output, 1).annotate(title="with ul steps").annotate(test_accuracy=0.5)
    assert result.summary.notes == {"title": "with ul steps", "test_accuracy": 0.5}
    assert load_search(output) == result


def test_a_note_of_the_same_name_takes_the_place_of_the_old(tmp_path: Path) -> None:
    result = SearchResult.write(tmp_path, SUMMARY).annotate(title="a", note=1).annotate(title="b")
    assert result.summary.notes == {"title": "b", "note": 1}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"backend": "ray"}', "3"])
def test_a_folder_without_a_finished_search_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "search.json").write_text(content)
    with pytest.raises(InvalidValueError, match="holds no finished search"):
        load_search(tmp_path)
    assert earlier_seconds(tmp_path) == 0


def test_earlier_calls_took_the_seconds_of_the_summary(tmp_path: Path) -> None:
    SearchResult.write(tmp_path, SUMMARY)
    assert earlier_seconds(tmp_path) == 5.0
