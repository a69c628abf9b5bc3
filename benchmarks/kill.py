"""What it costs a search to be killed, at each point, on each engine and storage.

    python benchmarks/kill.py [--engines optuna ray] [--storages journal sqlite postgresql grpc]
        [--points "in a report" ...] [--output FILE]

A search of the toy, saved at each report, ends at a set point of its second trial, is started again by the same call,
and is compared with one that was left alone.
"""

import argparse
import tempfile
from pathlib import Path

from common import Page, machine

from tests.support.databases import databases, why_not
from tests.support.kills import (
    DOUBLE,
    POINTS,
    Kill,
    Plan,
    end_of,
    has_no_place,
    run_plan,
    toll_of,
)

ENGINES = ("optuna", "ray")
STORAGES = ("journal", "sqlite", "postgresql", "grpc")
NUMBER = 1
NOTES = (
    "`benchmarks/kill.py`, {machine}. Each row is a search of 3 trials of the toy, one at a time, that ends at this",
    "point of its second trial, by SIGKILL where no other signal is named, and is started again by the same call; with",
    'points "by the next" the start after a kill is killed as well. *Lost*: trials that had finished, and have not any',
    "more, or with another value. *Run twice*: trials that had finished and ran again, and trials too many. *Restarted",
    "from 0*: trials that began from 0, or from anywhere before their last save. *Left RUNNING*: after the last start,",
    "or after one that a signal asked to end. *Bit-equal*: params, values, reports, metrics and kept ul values of each",
    "trial are those of a search on Optuna that was left alone.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kill.md")
    arguments = parser.parse_args()
    page = Page()
    page.tell("# What it costs a search to be killed", "", *(note.format(machine=machine()) for note in NOTES), "")
    page.head("killed", "engine", "storage", "lost", "run twice", "restarted from 0", "left RUNNING", "bit-equal")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        alone = Plan(str(folder / "alone"))
        run_plan(alone)
        unharmed = end_of(alone)
        left_out = {}
        for kind in arguments.storages:
            if (why := why_not(kind)) is not None:
                left_out[kind] = why
                continue
            (folder / kind).mkdir()
            with databases(kind, folder / kind) as storage:
                for engine in arguments.engines:
                    for point in arguments.points:
                        if not has_no_place(point, engine, kind):
                            toll = _toll(folder / kind / f"{engine} {point}", point, engine, storage, unharmed)
                            page.row(point, engine, kind, *toll)
    page.tell("", *(f"Left out: {kind}, as {why}." for kind, why in left_out.items()))
    page.write(arguments.output)


def _toll(output: Path, point: str, engine: str, storage: str | None, unharmed: dict) -> tuple[object, ...]:
    first = [Kill("in a report", NUMBER)] if point in DOUBLE else []
    plan = Plan(str(output), [*first, Kill(point, NUMBER)], engine, storage)
    try:
        toll = toll_of(plan, unharmed)
    except Exception as error:  # noqa: BLE001 - a search that cannot be read is a result
        return ("-", "-", "-", "-", f"no: {type(error).__name__}")
    ended = "" if toll.statuses == plan.statuses else f", and ended with {toll.statuses}"
    return (toll.lost, toll.twice, toll.restarted, toll.running, f"{'yes' if toll.equal else 'no'}{ended}")


if __name__ == "__main__":
    main()
