"""What ``report.html`` holds."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support import toy
from tests.support.toy import run
from tune_implicit import InvalidValueError, LearningWarning, SearchResult, write_report


class Page(HTMLParser):
    """The tags of a page, checked to be closed, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attrs: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attrs += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    output = tmp_path_factory.mktemp("report") / "found"
    with pytest.warns(LearningWarning, match=r"\(failed"):
        return run(output, 6, space=toy.faulty("none", "nan"), seed=0)


@pytest.fixture
def page(found: SearchResult) -> Page:
    return Page(write_report(found.output))


def test_the_report_lies_in_the_searchs_folder(found: SearchResult) -> None:
    assert write_report(str(found.output)) == found.output / "report.html"


def test_the_report_needs_no_other_file(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    outside = [value for name, value in page.attrs if value and "//" in value and not name.startswith("xmlns")]
    assert not outside
    links = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert not re.search(r"https?://|@import|src=", links)


def test_the_table_has_every_trial(found: SearchResult, page: Page) -> None:
    assert page.source.count('<tr class="') == 6
    for state in ("complete", "failed"):
        assert page.source.count(f'<tr class="{state}"') == sum(trial.state == state for trial in found.trials) > 0
    assert "The ll loss became nan" in page.text
    assert f"{found.best.value:.4g}" in page.text
    assert f"Best trial: number {found.best.number}" in page.text


def test_it_plots_the_search_and_the_best_trial(page: Page) -> None:
    assert page.tags.count("svg") == 2
    # Matplotlib writes what its glyphs say into comments.
    for label in ("seconds since the first trial began", "relative residual of the solve", "ul values: log_l2"):
        assert f"<!-- {label} -->" in page.source


def test_two_searches_stand_side_by_side(tmp_path: Path) -> None:
    run(tmp_path / "a", 2).annotate(title="hybrid search", test_accuracy=0.9512345)
    run(tmp_path / "b", 1, settings={**toy.SETTINGS, "ul_learning_rate": 0.0})
    page = Page(write_report(tmp_path))
    assert page.source.count("<h2>") == 2
    assert "hybrid search and b" in page.text
    assert "test_accuracy" in page.text
    assert "0.9512" in page.text
    assert page.tags.count("svg") == 3


def test_what_a_user_names_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('--><b>')</script> $x_{ & $"
    space: Any = lambda trial: {"k": trial.suggest_int("k", 1, 2), "fault": evil}  # noqa: E731
    run(tmp_path / "found", 1, space=space).annotate(title=evil, note=evil)
    page = Page(write_report(tmp_path / "found"))
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count(evil) >= 3


def test_a_failure_is_escaped(tmp_path: Path) -> None:
    with pytest.warns(LearningWarning, match=r"\(failed"):
        result = run(tmp_path / "found", 1, space=toy.faulty("nan"))
    path = result.output / "trials.jsonl"
    path.write_text(path.read_text().replace("The ll loss", "<script>alert(1)</script>"))
    assert "script" not in Page(write_report(result.output)).tags


def test_a_search_without_a_completed_trial(tmp_path: Path) -> None:
    with pytest.warns(LearningWarning, match=r"\(failed"):
        run(tmp_path / "found", 2, space=toy.faulty("nan"))
    page = Page(write_report(tmp_path / "found"))
    assert "None of 2 finished trials completed" in page.text
    assert page.source.count('<tr class="failed"') == 2


def test_a_search_interrupted_before_any_trial(tmp_path: Path) -> None:
    def interrupted(config: Any) -> Any:
        raise KeyboardInterrupt

    run(tmp_path / "found", 2, problem=interrupted)
    assert "found (interrupted)" in Page(write_report(tmp_path / "found")).text


def test_a_best_trial_without_its_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path / "found", 1)
    result.best.checkpoint.unlink()
    page = Page(write_report(tmp_path / "found"))
    assert "Trial 0 has no checkpoint" in page.text
    assert page.tags.count("svg") == 1


def test_a_search_without_hypergradients(tmp_path: Path) -> None:
    run(tmp_path / "found", 1, settings={**toy.SETTINGS, "ul_learning_rate": 0.0})
    assert Page(write_report(tmp_path / "found")).tags.count("svg") == 2


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_folder_without_a_search_is_an_error(tmp_path: Path, folder: str) -> None:
    with pytest.raises(InvalidValueError, match=r"holds no search: neither it nor a folder in it has a search.json"):
        write_report(tmp_path / folder)
