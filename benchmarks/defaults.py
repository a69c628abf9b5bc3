"""What a trial gets who sets nothing but the ll learning rate: the defaults against what they were chosen among.

    python benchmarks/defaults.py [--seeds 3] [--parts rates solvers ...] [--output benchmarks/results]

*Tasks.* Those of `tasks.py` that the defaults were chosen on, each from two starts far apart. A trial's figure is its
value, the least select loss of its reports; figures of several seeds are their geometric mean.

*rates.* The ul rate that finds itself, from three starts, against eleven constant ones from .002 to 2, and the part of
the ul steps that were skipped, or answered by a fallback.

*solvers.* Each of the iterative solvers, all else by default.

*ll_steps, k.* The rule for ll steps against fixed counts, and several `k` of MINRES, at equal cost: trials without
patience go on until they have taken as many gradient evaluations.

*patience, optimizer.* Reports to wait for a better one, with what that costs; and optimizers of the ul values.

*constants.* Each constant of the rate's rule and of that for ll steps, halved and doubled, or without effect.

*cost.* CPU time of a default trial over that of plain training with the same ll steps and reports, in turns.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Page, machine
from tasks import TASKS, Task

from tune_implicit import BilevelProblem
from tune_implicit.errors import DivergedError
from tune_implicit.trials import lower_level, rate, settling, trainer
from tune_implicit.trials.optimizers import OptimizerFactory, quick_adam
from tune_implicit.trials.trial import Trial

CHOSEN = ("L2, d = 16", "L2, d = 1,280", "cleaning", "breast cancer", "wine", "distillation")
RATES = [0.002 * 10 ** (0.3 * i) for i in range(11)]
STARTS = (0.003, 0.01, 0.03)
GRADIENT_EVALUATIONS = 4000


@dataclass(frozen=True)
class Case:
    """A task from one of its starts, on some seeds."""

    task: Task
    start: int
    seeds: range

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.task.name}, start {self.start + 1}"

    def trial(self, seed: int, ul_optimizer: OptimizerFactory = quick_adam, **settings: Any) -> Trial:
        """Return a trial of the case."""
        config = {"ll_learning_rate": self.task.ll_learning_rate, "seed": seed, **settings}

        def problem(_: Any) -> BilevelProblem:
            return replace(self.task.make(self.task.starts[self.start], seed)[0], ul_optimizer=ul_optimizer)

        return Trial(problem, config)

    def values(self, until: Callable[[Trial], bool] = lambda _: False, **settings: Any) -> list[dict[str, Any]]:
        """Return the last record of a trial of each seed, ended at ``until`` if not before."""
        return [_run(self.trial(seed, **settings), until) for seed in self.seeds]


def _run(trial: Trial, until: Callable[[Trial], bool]) -> dict[str, Any]:
    try:
        while not (trial.completed or until(trial)):
            trial.advance()
    except DivergedError:
        return trial.failure_record("diverged") | {"kept_value": math.inf}
    return trial.record


def mean(records: list[dict[str, Any]]) -> float:
    """Return the geometric mean of the trials' values."""
    values = [record["kept_value"] for record in records]
    return geometric(values) if max(values) < math.inf else math.inf


def best_of(values: dict[Any, float]) -> float:
    return min(values.values())


def rates(cases: list[Case], page: Page) -> None:
    page.tell("## The rate that finds itself, against constant ones", "")
    starts = [f"from {start:g}" for start in STARTS]
    page.head("case", "best of eleven", "at rate", *starts, "worst ratio", "skipped", "fallback")
    ratios = []
    for case in cases:
        constant = {lr: mean(case.values(ul_learning_rate=lr, adapt_ul_learning_rate=False)) for lr in RATES}
        records = {start: case.values(ul_learning_rate=start) for start in STARTS}
        found = [mean(of_start) / best_of(constant) for of_start in records.values()]
        ratios += found
        told = [f"{mean(of_start):.4g} ({ratio:.2f})" for of_start, ratio in zip(records.values(), found, strict=True)]
        at = min(constant, key=constant.__getitem__)
        everyone = [record for of_start in records.values() for record in of_start]
        page.row(case.name, f"{best_of(constant):.4g}", f"{at:.2g}", *told, f"{max(found):.2f}", *shares(everyone))
    within = sum(ratio <= 1.1 for ratio in ratios)
    told = f"Within 10% of the best constant rate: {within} of {len(ratios)}."
    page.tell("", f"{told} Geometric mean of the ratios: {geometric(ratios):.3f}.", "")


def shares(records: list[dict[str, Any]]) -> list[str]:
    """Return the parts of the ul steps that were skipped, and answered by another solver."""
    taken = sum(record["ul_step"] for record in records)
    return [f"{sum(r[name] for r in records) / taken:.1%}" for name in ("skipped_ul_steps", "fallback_ul_steps")]


def solvers(cases: list[Case], page: Page) -> None:
    page.tell("## Solvers", "")
    names = ("minres", "cg", "neumann")
    page.head("case", *names, *(f"{name}: skipped, fallback" for name in names))
    worst = 0.0
    for case in cases:
        records = {name: case.values(solver=name) for name in names}
        found = {name: mean(of_solver) for name, of_solver in records.items()}
        ratios = {name: value / best_of(found) for name, value in found.items()}
        worst = max(worst, *ratios.values())
        told = [f"{found[name]:.4g} ({ratios[name]:.2f})" for name in names]
        page.row(case.name, *told, *(", ".join(shares(of_solver)) for of_solver in records.values()))
    page.tell("", f"In brackets: over the best of the three. The largest is {worst:.2f}.", "")


def at_equal_cost(title: str, ways: dict[str, dict[str, Any]], reference: str, cases: list[Case], page: Page) -> None:
    """Write a table of several settings at equal gradient evaluations."""
    page.tell(f"## {title}, at {GRADIENT_EVALUATIONS:,} gradient evaluations", "")
    page.head("case", *ways)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for case in cases:
        found = {
            name: mean(
                case.values(
                    lambda trial: trial.trainer.gradient_evaluations >= GRADIENT_EVALUATIONS,
                    patience=0,
                    ul_steps=10**6,
                    **settings,
                )
            )
            for name, settings in ways.items()
        }
        page.row(case.name, *(f"{value:.4g}" for value in found.values()))
        for name, value in found.items():
            ratios[name].append(value / found[reference])
    page.row(f"geometric mean over {reference}", *(f"{geometric(of_way):.3f}" for of_way in ratios.values()))
    page.tell("")


def cost(cases: list[Case], page: Page) -> None:
    page.tell("## Cost", "")
    page.head("case", "ll steps per ul step", "CPU time over plain training", "over plain gradients")
    for case in cases:
        case = replace(case, seeds=range(1))
        times: list[float] = []
        for _ in range(3):
            start = time.process_time()
            record = case.values(patience=0)[0]
            middle = time.process_time()
            reports = record["ul_step"]
            plain = {"ul_learning_rate": 0.0, "ll_steps": round(record["ll_step"] / reports), "ul_steps": reports}
            trained = case.values(patience=0, **plain)[0]
            spent = middle - start, time.process_time() - middle
            times.append(spent[0] / spent[1] * trained["ll_step"] / record["ll_step"])
        page.row(
            case.name,
            f"{record['ll_step'] / record['ul_step']:.1f}",
            f"{statistics.median(times):.2f}",
            f"{record['gradient_evaluations'] / record['ll_step']:.2f}",
        )
    page.tell("")


def geometric(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def beside(title: str, ways: dict[str, dict[str, Any]], cases: list[Case], page: Page) -> None:
    """Write how other settings do beside the first of ``ways``, over all cases."""
    page.tell(f"## {title}", "")
    page.head("way", f"value over that of {next(iter(ways))}", "least and largest", "gradient evaluations")
    records = {name: [case.values(**settings) for case in cases] for name, settings in ways.items()}
    write_beside(records, page)


def write_beside(records: dict[str, list[list[dict[str, Any]]]], page: Page) -> None:
    """Write the ratios of each way's records, by case and seed, to those of the first."""
    own = next(iter(records.values()))
    for name, theirs in records.items():
        ratios = [mean(a) / mean(b) for a, b in zip(theirs, own, strict=True)]
        spent, usual = (sum(r["gradient_evaluations"] for of_case in w for r in of_case) for w in (theirs, own))
        page.row(name, f"{geometric(ratios):.3f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{spent / usual:.2f}")
    page.tell("")


def constants(cases: list[Case], page: Page) -> None:
    page.tell("## Constants of the rate's rule and of that for ll steps", "")
    page.head("constant", "value over the default's", "least and largest", "gradient evaluations")
    records = {"as they are": [case.values() for case in cases]}
    for module, name, values in CONSTANTS:
        for value in values:
            rooms = [room for room in (module, lower_level, trainer) if hasattr(room, name)]  # that have imported it
            with ExitStack() as stack:
                for room in rooms:
                    stack.enter_context(patch.object(room, name, value))
                records[f"`{module.__name__.rpartition('.')[2]}.{name}` = {value:g}"] = [c.values() for c in cases]
    write_beside(records, page)


OFF = math.inf
CONSTANTS = (
    (rate, "MOST_GROWTH", (math.exp(0.15), math.exp(0.6))),
    (rate, "_SMOOTHING", (0.25, 0.75)),
    (rate, "_OUTLIER", (2.0, 8.0, OFF)),
    (rate, "_TRUST", (0.125, 0.5, OFF)),
    (rate, "_FALLEN", (0.05, 0.2)),
    (rate, "_MEMORY", (0.4, 0.85)),
    (rate, "_PAYS", (0.15, 0.6, 1e-9)),
    (rate, "_DELIVERED", (0.025, 0.1, -OFF)),
    (rate, "_WINDOW", (2, 8)),
    (settling, "WINDOW", (3, 10)),
    (settling, "_SETTLED", (0.125, 0.5)),
    (settling, "_HIDDEN", (1.0, 4.0)),
    (settling, "_FADES", (0.0, 0.9)),
)
PATIENCE = {f"patience = {n}": {"patience": n} for n in (6, 3, 12, 0)}
OPTIMIZERS = {
    f"Adam, betas {betas}": {"ul_optimizer": partial(torch.optim.Adam, betas=betas)}
    for betas in ((0.5, 0.9), (0.0, 0.9), (0.9, 0.9), (0.9, 0.999))
}
LL_STEPS = {
    "auto": {},
    "auto, 5 to 40": {"min_ll_steps": 5},
    "auto, 10 to 20": {"max_ll_steps": 20},
    **{f"{steps}": {"ll_steps": steps} for steps in (5, 10, 20, 40)},
}
K = {f"k = {k}": {"k": k} for k in (2, 3, 5, 10)}
PARTS = {
    "rates": rates,
    "solvers": solvers,
    "ll_steps": lambda cases, page: at_equal_cost("ll steps before a ul step", LL_STEPS, "10", cases, page),
    "k": lambda cases, page: at_equal_cost("Steps of MINRES", K, "k = 5", cases, page),
    "patience": partial(beside, "Patience", PATIENCE),
    "optimizer": partial(beside, "Optimizer of the ul values", OPTIMIZERS),
    "constants": constants,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", default=list(CHOSEN), choices=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("tune_implicit_results/bench_defaults"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [Case(TASKS[name], start, range(arguments.seeds)) for name in arguments.tasks for start in range(2)]
    page = Page()
    page.tell("# The defaults of a trial", "", f"`make bench-defaults`, {machine()}, {arguments.seeds} seeds.", "")
    for part in arguments.parts:
        PARTS[part](cases, page)
        page.write(arguments.output / "defaults.md")


if __name__ == "__main__":
    main()
