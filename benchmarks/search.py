"""The hybrid search against black boxes, at equal CPU time on one core.

    python benchmarks/search.py [--seconds 60] [--seeds 5] [--rivals 0] [--output benchmarks/results]

*Hybrid.* `recommended_space()` and the range in which the ul values start, all else by default: TPE picks, and each
trial takes hypergradient steps.

*Black boxes.* Optuna's random search, TPE, CMA-ES (separable above 100 values) and GP (up to 130 values: beyond, a
suggestion takes longer than the search) pick the same ul values as suggestions, or those of a coarse version: one value
shared by all, one for each of 16 groups of features, one by class; for the distilled images, the class means of the
validation data, scaled and shifted. They also pick the ll learning rate, from the hybrid's range. A trial of theirs is
a trial of ours with the ul steps switched off: 1,000 ll steps at most, the best report kept, patience included. The
best of them, by its median, is the rival.

*Turns.* In one process, one thread; the next trial is that of the search which has had the least CPU time so far, its
sampler's included, until all have had theirs. A trial counts if it ended in time.

*Losses.* Each search selects the trial with the least loss on `select_data`, which no gradient has touched. Its test
loss is that of its ll model on data that nothing has touched; *refitted* is that of an ll model trained from other
initial weights at the trial's ul values, with its ll learning rate. Each seed draws splits and noise anew.

*Seeds.* With `--rivals N` the first seed has all black boxes; the others, the N that were best there.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from common import Page, machine
from matplotlib.figure import Figure
from optuna.artifacts import FileSystemArtifactStore
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from tasks import TASKS, Task
from torch import Tensor

from tune_implicit import BilevelProblem, ImplicitObjective, LearningWarning, State, recommended_space
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.trial import Trial

SAMPLERS: dict[str, Callable[[int, int], BaseSampler | None]] = {
    "random": lambda seed, _: RandomSampler(seed),
    "TPE": lambda seed, _: TPESampler(seed=seed),
    "CMA-ES": lambda seed, d: CmaEsSampler(seed=seed, use_separable_cma=d > 100),
    "GP": lambda seed, d: GPSampler(seed=seed) if d <= 130 else None,
}
HYBRID = "hybrid"
UNTOUCHED = 1000  # added to a seed where a model is refitted


class Search:
    """One search, taken a trial at a time, and what its trials came to."""

    def __init__(
        self,
        task: Task,
        seed: int,
        space: Mapping[str, Any],
        values: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
        settings: Mapping[str, Any],
        sampler: BaseSampler,
        folder: Path,
    ) -> None:
        self.task, self.seed, self.values, self.settings = task, seed, values, {"seed": seed, **settings}
        self.store = FileSystemArtifactStore(folder)
        self.folder = folder
        self.study = optuna.create_study(sampler=sampler)
        self.objective = ImplicitObjective(self.problem, dict(space), settings=self.settings, artifact_store=self.store)
        self.used = 0.0
        self.trials: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Any], dict[str, Tensor]] | None = None

    def problem(self, config: Mapping[str, Any]) -> BilevelProblem:
        """Return the problem of a trial."""
        return self.task.make(self.values(config, self.seed), self.seed)[0]

    def advance(self, seconds: float) -> None:
        """Run one trial; it counts if it ends within ``seconds`` of CPU time in all."""
        start = time.process_time()
        self.study.optimize(self.objective, n_trials=1)
        self.used += time.process_time() - start
        trial = self.study.get_trials(deepcopy=False)[-1]
        artifact = self.folder / trial.user_attrs["checkpoint"]
        saved = read_checkpoint(artifact)
        artifact.unlink()
        if trial.state is not TrialState.COMPLETE or self.used > seconds:
            return
        metrics = trial.user_attrs["metrics"]
        row = {"seconds": self.used, "select": trial.value, "last_select": metrics["last_value"]}
        row["test"] = self.test(saved["kept"]["ll_model"])
        row["last_test"] = self.test(saved["trainer"]["levels"][0]["model"])
        row |= {name: metrics[name] for name in ("ul_step", "skipped_ul_steps", "fallback_ul_steps", "troubles")}
        self.trials.append(row)
        if self.best is None or row["select"] < self.best[0]:
            self.best = (row["select"], trial.params, saved["kept"]["ul_model"])

    def test(self, ll_state: dict[str, Tensor]) -> float:
        """Return the test loss of an ll model."""
        problem, (data, target) = self.task.make(self.task.starts[0], self.seed)
        problem.ll_model.load_state_dict(ll_state)
        with torch.no_grad():
            return float(problem.ul_objective(State(data, target, problem.ul_model, problem.ll_model)))

    def refit(self) -> float:
        """Return the test loss of an ll model trained anew at the ul values of the best trial."""
        if self.best is None:
            return math.nan
        _, params, ul_state = self.best

        def problem(config: Mapping[str, Any]) -> BilevelProblem:
            made = self.task.make(self.task.starts[0], self.seed)[0]
            made.ul_model.load_state_dict(ul_state)
            return made

        rate = params["ll_learning_rate"]
        trial = Trial(problem, {"ll_learning_rate": rate, "ul_learning_rate": 0.0, "seed": UNTOUCHED + self.seed})
        while not trial.completed:
            trial.advance()
        with tempfile.TemporaryDirectory() as folder:
            trial.save(Path(folder) / "trial.pt")
            return self.test(read_checkpoint(Path(folder) / "trial.pt")["kept"]["ll_model"])

    def result(self) -> dict[str, Any]:
        """Return what is kept of the search."""
        selected = min(self.trials, key=lambda row: row["select"], default=None)
        last = min(self.trials, key=lambda row: row["last_select"], default=None)
        return {
            "used": self.used,
            "params": self.best[1] if self.best and len(self.best[1]) < 50 else {},
            "select": selected["select"] if selected else math.nan,
            "test": selected["test"] if selected else math.nan,
            "test_by_last": last["last_test"] if last else math.nan,
            "refitted": self.refit(),
            "trials": self.trials,
        }


def searches(task: Task, seed: int, folder: Path) -> dict[str, Search]:
    """Return the hybrid and every black box by name."""
    recommended = recommended_space()
    rate = {"ll_learning_rate": recommended["ll_learning_rate"]}
    made = {
        HYBRID: Search(
            task,
            seed,
            recommended | task.space,
            lambda config, _: {name: config[name] for name in task.space},
            {},
            TPESampler(seed=seed),
            folder,
        )
    }
    for name, box in task.boxes.items():
        for kind, make in SAMPLERS.items():
            space = rate | box.space
            sampler = make(seed, len(space))
            if sampler is not None:
                label = f"{kind}, {name}" if len(task.boxes) > 1 else kind
                off = {"ul_learning_rate": 0.0}
                made[label] = Search(task, seed, space, box.values, off, sampler, folder)
    return made


def compete(task: Task, seed: int, names: list[str] | None, seconds: float) -> dict[str, dict[str, Any]]:
    """Return what each search, or each of ``names``, has come to with ``seconds`` of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = searches(task, seed, Path(folder))
        chosen = {name: search for name, search in all_of_them.items() if names is None or name in names}
        while (next_one := min(chosen.values(), key=lambda search: search.used)).used < seconds:
            next_one.advance(seconds)
        return {name: search.result() for name, search in chosen.items()}


# ---- what came of it

Results = dict[str, dict[int, dict[str, dict[str, Any]]]]  # by task, seed and search


def best_so_far(trials: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return when the best select loss was lowered, and to what."""
    lowest = itertools.accumulate((row["select"] for row in trials), min)
    return [(row["seconds"], value) for row, value in zip(trials, lowest, strict=True)]


def reached(trials: list[dict[str, Any]], loss: float) -> float:
    """Return the CPU time after which the best select loss was at most ``loss``."""
    return next((seconds for seconds, value in best_so_far(trials) if value <= loss), math.inf)


def medians(by_seed: dict[int, dict[str, dict[str, Any]]], entry: str) -> dict[str, float]:
    """Return the median of an entry of each search that all seeds have."""
    everywhere = set.intersection(*(set(of_seed) for of_seed in by_seed.values()))
    found = {name: statistics.median(of_seed[name][entry] for of_seed in by_seed.values()) for name in everywhere}
    return {name: value for name, value in sorted(found.items()) if math.isfinite(value)}


def rival_of(by_seed: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Return the black box with the least median select loss."""
    found = medians(by_seed, "select")
    return min((name for name in found if name != HYBRID), key=found.__getitem__)


def spread(values: list[float]) -> str:
    """Return the median and the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.4g}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def write(results: Results, seconds: float, page: Page) -> None:
    """Write the tables."""
    page.tell("# Hybrid search against black boxes", "")
    page.tell(
        f"`make bench-search`, {machine()}; {seconds:g} s of CPU time for each search. Median (quartiles) over seeds."
    )
    page.tell(
        "The rival is the best black box of the task. *Ratio* is the median of hybrid over rival in the same seed,"
    )
    page.tell("*time* the part of its time after which the hybrid was as low as the rival at its end.", "")
    page.head(
        "task", "seeds", "rival", "select: hybrid", "select: rival", "ratio", "time", "test: hybrid", "test: rival",
        "refitted: hybrid", "refitted: rival",
    )  # fmt: skip
    for task, by_seed in results.items():
        rival = rival_of(by_seed)
        pairs = [(of_seed[HYBRID], of_seed[rival]) for of_seed in by_seed.values()]
        time_to_rival = statistics.median(reached(ours["trials"], theirs["select"]) / seconds for ours, theirs in pairs)
        time_told = f"{time_to_rival:.0%}" if math.isfinite(time_to_rival) else "not reached"
        columns = [
            spread([one[entry] for one in side])
            for entry in ("select", "test", "refitted")
            for side in zip(*pairs, strict=True)
        ]
        ratio = statistics.median(ours["select"] / theirs["select"] for ours, theirs in pairs)
        page.row(task, len(pairs), rival, *columns[:2], f"{ratio:.3f}", time_told, *columns[2:])
    page.tell("", "## Every search, median select loss", "")
    page.head("task", "search", "select", "test", "refitted", "trials")
    for task, by_seed in results.items():
        pilot = {0: by_seed[min(by_seed)]}
        found = medians(pilot, "select")
        for name in sorted(found, key=found.__getitem__):
            having = {seed: of_seed for seed, of_seed in by_seed.items() if name in of_seed}
            told = [
                f"{statistics.median(s[name][entry] for s in having.values()):.4g}"
                for entry in ("select", "test", "refitted")
            ]
            trials = statistics.median(len(s[name]["trials"]) for s in having.values())
            page.row(task, f"{name} ({len(having)})", *told, f"{trials:g}")
    page.tell("", "In brackets: seeds that the search was run with.", "")
    write_best_and_last(results, page)


def write_best_and_last(results: Results, page: Page) -> None:
    """Write what keeping the best report does, and how the hybrids' ul steps went."""
    hybrids = [of_seed[HYBRID] for by_seed in results.values() for of_seed in by_seed.values()]
    ratios = sorted(one["test"] / one["test_by_last"] for one in hybrids if math.isfinite(one["test_by_last"]))
    worst = max(
        (of_seed[HYBRID]["test"] / of_seed[HYBRID]["test_by_last"], task, seed)
        for task, by_seed in results.items()
        for seed, of_seed in by_seed.items()
    )
    page.tell('## `keep="best"` against `keep="last"`', "")
    page.tell(
        "Test loss of the trial selected by its best report, in units of that of the trial selected by its last",
        f"report, over the {len(ratios)} hybrid searches: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f}",
        f"to {worst[0]:.3f} ({worst[1]}, seed {worst[2]}).",
        "",
    )
    trials = [row for one in hybrids for row in one["trials"]]
    taken = sum(row["ul_step"] for row in trials)
    skipped, fallback = (sum(row[name] for row in trials) / taken for name in ("skipped_ul_steps", "fallback_ul_steps"))
    page.tell("## ul steps", "")
    page.tell(
        f"{taken:,} in {len(trials):,} trials of hybrid searches: {skipped:.2%} skipped, {fallback:.1%} answered by"
    )
    page.tell("another solver than the trial's.")


def draw(results: Results, seconds: float, path: Path) -> None:
    """Draw the best select loss against CPU time: median and quartiles of hybrid and the best fine and coarse box."""
    columns = 3
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, (task, by_seed) in zip(grid, results.items(), strict=False):
        found = medians(by_seed, "select")
        boxes = sorted((name for name in found if name != HYBRID), key=found.__getitem__)
        for color, name in zip(("C0", "C1", "C7"), [HYBRID, *boxes[:2]], strict=False):
            times = torch.linspace(seconds / 200, seconds, 200).tolist()
            curves = torch.tensor([[_at(of_seed[name]["trials"], t) for t in times] for of_seed in by_seed.values()])
            low, middle, high = (curves.quantile(q, 0).tolist() for q in (0.25, 0.5, 0.75))
            axes.plot(times, middle, color=color, label=name)
            axes.fill_between(times, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set(title=task, xscale="log", yscale="log", xlabel="CPU seconds", ylabel="best select loss")
        ticks = [tick for tick in (1, 3, 10, 30, 100, 300) if tick < 0.9 * seconds] + [seconds]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(results) :]:
        axes.remove()
    figure.savefig(path, dpi=100)


def _at(trials: list[dict[str, Any]], seconds: float) -> float:
    """Return the best select loss at a time."""
    return min((row["select"] for row in trials if row["seconds"] <= seconds), default=math.nan)


# ---- the run


def read(path: Path) -> Results:
    """Return the results in a file, one line for each task and seed."""
    results: Results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        results.setdefault(row["task"], {}).setdefault(row["seed"], {}).update(row["searches"])
    return {name: dict(sorted(results[name].items())) for name in TASKS if name in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time, for each search")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rivals", type=int, default=0, help="black boxes of the seeds after the first; 0 is all")
    parser.add_argument("--searches", nargs="+", help="only these, in place of what has been kept of them")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("tune_implicit_results/bench_search"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", LearningWarning)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    arguments.output.mkdir(parents=True, exist_ok=True)
    kept = arguments.output / "search.jsonl"
    for seed, name in itertools.product(arguments.seeds, arguments.tasks):
        results = read(kept)
        names = arguments.searches
        if seed in results.get(name, {}) and not names:
            continue
        if not names and arguments.rivals and (before := results.get(name)):
            first = before[min(before)]
            boxes = sorted((box for box in first if box != HYBRID), key=lambda box: first[box]["select"])
            names = [HYBRID, *boxes[: arguments.rivals]]
        found = compete(TASKS[name], seed, names, arguments.seconds)
        with kept.open("a") as file:
            file.write(json.dumps({"task": name, "seed": seed, "searches": found}) + "\n")
        print(name, seed, {search: round(one["select"], 4) for search, one in found.items()}, flush=True)
    page = Page()
    write(read(kept), arguments.seconds, page)
    page.write(arguments.output / "search.md")
    draw(read(kept), arguments.seconds, arguments.output / "search.png")


if __name__ == "__main__":
    main()
