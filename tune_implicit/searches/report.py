"""What finished searches look like to a person: one self-contained HTML file."""

import math
from collections.abc import Callable
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from tune_implicit.errors import CheckpointError, InvalidValueError, NoCompletedTrialError
from tune_implicit.searches.results import SUMMARY_FILE, SearchResult, TrialResult, load_search
from tune_implicit.trials.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_report"]

REPORT_FILE = "report.html"

# What the table of trials says of how each learned, by heading.
LEARNING: dict[str, Callable[[Record], Any]] = {
    "ul steps": lambda record: record.get("ul_step"),
    "skipped": lambda record: _share(record, "skipped_ul_steps"),
    "by another solver": lambda record: _share(record, "fallback_ul_steps"),
    "ul values moved": lambda record: record.get("ul_moved"),
    "residual": lambda record: record.get("relative_residual"),
    "stationarity": lambda record: record.get("relative_stationarity"),
}
MAX_UL_PLOTS = 6


def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` into ``directory``, and return its path.

    Parameters
    ----------
    directory : path
        The folder of a search, or one whose subfolders hold searches, which are then shown side by side.

    Returns
    -------
    Path

    Raises
    ------
    InvalidValueError
        If there is no search.
    """
    folder = Path(directory)
    found = sorted(path.parent for pattern in ("", "*/") for path in folder.glob(pattern + SUMMARY_FILE))
    if not found:
        raise InvalidValueError(
            f"`directory` {str(folder)!r} holds no search: neither it nor a folder in it has a {SUMMARY_FILE}. "
            "Pass the `output` of a search that ended."
        )
    searches = [load_search(path) for path in found]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tune_implicit.searches", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = _short
    html = environment.get_template("report.html.jinja").render(
        overview=_svg(_best_so_far(searches)),
        columns=_names(search.summary.notes for search in searches),
        learning=LEARNING,
        searches=[_section(search) for search in searches],
    )
    path = folder / REPORT_FILE
    path.write_text(html, encoding="utf-8")
    return path


def _section(search: SearchResult) -> dict[str, Any]:
    """Return what the template shows of one search."""
    sign = 1 if search.summary.mode == "min" else -1
    ranked = sorted(search.trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0)))
    states = [trial.state for trial in search.trials]
    try:
        best = search.best
    except NoCompletedTrialError as error:
        return _common(search, ranked, states) | {"best": None, "best_note": str(error), "plots": []}
    try:
        history = best.history
    except CheckpointError as error:
        return _common(search, ranked, states) | {"best": best, "best_note": str(error), "plots": []}
    return _common(search, ranked, states) | {"best": best, "best_note": "", "plots": [_svg(_best_trial(history))]}


def _common(search: SearchResult, ranked: list[TrialResult], states: list[str]) -> dict[str, Any]:
    names = _names(trial.config for trial in ranked)
    first = ranked[0].config if len(ranked) > 1 else {}
    constants = {
        name: first[name] for name in names if all(trial.config.get(name, trial) == first.get(name) for trial in ranked)
    }
    return {
        "title": _title(search),
        "summary": search.summary,
        "counts": {state: states.count(state) for state in ("complete", "pruned", "failed")},
        "trials": ranked,
        "settings": [name for name in names if name not in constants],
        "constants": constants,
    }


def _title(search: SearchResult) -> str:
    return str(search.summary.notes.get("title", search.output.absolute().name))


def _names(rows: Any) -> list[str]:
    """Return the keys of ``rows`` in the order of first appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "title"]


def _share(record: Record, name: str) -> str | None:
    """Return the part of a trial's ul steps that ``name`` counts."""
    return f"{record[name] / record['ul_step']:.0%}" if record.get("ul_step") and name in record else None


def _short(value: Any) -> str:
    """Return a number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _best_so_far(searches: list[SearchResult]) -> "Figure":
    figure, (axes,) = _figure(1)
    for search in searches:
        completed = sorted(
            (trial.ended_s, trial.value)
            for trial in search.trials
            if trial.state == "complete" and trial.value is not None
        )
        if completed:
            times, values = zip(*completed, strict=True)
            better = min if search.summary.mode == "min" else max
            best = list(accumulate(values, better))
            (line,) = axes.step(times, best, where="post", label=_plain(_title(search)))
            axes.plot(times, values, ".", color=line.get_color(), alpha=0.4)
    axes.set(xlabel="seconds since the first trial began", ylabel=_plain(f"best {searches[0].summary.metric} so far"))
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def _best_trial(history: list[dict[str, Any]]) -> "Figure":
    """Return the losses, the residuals and the ul values of a trial over its ul steps."""
    names = list(history[-1]["ul_quantiles"])[:MAX_UL_PLOTS]
    relative = [record.get("relative_residual", math.nan) for record in history]
    solved = any(value > 0 for value in relative)
    figure, (losses, *others) = _figure(1 + solved + len(names))
    steps = [record["ul_step"] for record in history]
    for name in ("train_loss", "validate_loss", "select_loss"):
        losses.plot(steps, [record[name] for record in history], label=name)
    losses.set(xlabel="ul step", title="losses")
    losses.legend(frameon=False)
    if solved:
        others[0].semilogy(steps, relative, ".-")
        others[0].set(xlabel="ul step", title="relative residual of the solve")
        del others[0]
    for axes, name in zip(others, names, strict=True):
        _plot_quantiles(axes, steps, [record["ul_quantiles"][name] for record in history])
        axes.set(xlabel="ul step", title=_plain(f"ul values: {name}"))
    return figure


def _plain(label: str) -> str:
    """Return a label that Matplotlib shows as it is, dollars and a leading underscore included."""
    return " " * label.startswith("_") + label.replace("$", r"\$")


def _plot_quantiles(axes: "Axes", steps: list[int], quantiles: list[list[float]]) -> None:
    """Plot the median and bands that hold 50%, 90% and all of the values."""
    columns = list(zip(*quantiles, strict=True))
    for low in range(3):
        axes.fill_between(steps, columns[low], columns[-1 - low], color="C0", alpha=0.2, linewidth=0)
    axes.plot(steps, columns[3], color="C0")


def _figure(count: int) -> tuple["Figure", list["Axes"]]:
    """Return a figure with ``count`` axes, at most three in a row, bound to no window."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * max(columns, 2), 3.2 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def _svg(figure: "Figure") -> str:
    """Return the figure as an SVG element to stand inside HTML."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]
