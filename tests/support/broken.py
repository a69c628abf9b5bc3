"""Problems in which something is wrong, and what a look finds in them."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.problems import generator
from tests.support.working import SETTINGS, ll_objective, split, ul_objective, working
from tune_implicit import BilevelProblem, ImplicitSettings, State
from tune_implicit.checks.check import LOOKS
from tune_implicit.checks.findings import CheckReport, Level, StopCheckError
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.hypergradients.rng import seed_everything

Look = Callable[[FixedProblem, CheckReport], None]


def settings(**changes: Any) -> ImplicitSettings:
    return replace(SETTINGS, **changes)


@dataclass(frozen=True)
class Broken:
    """A problem with something wrong, and the finding that tells it."""

    finding: str
    problem: Callable[[], BilevelProblem]
    settings: ImplicitSettings = SETTINGS
    level: Level = Level.FAULT

    def seen_by(self, look: Look) -> CheckReport:
        return seen_by(look, self.problem(), self.settings)


def seen_by(look: Look, problem: BilevelProblem, settings: ImplicitSettings = SETTINGS) -> CheckReport:
    """Return what ``look`` itself finds, after those before it, as in a check; none of those stops."""
    report = CheckReport()
    seed_everything(settings.seed)
    fixed = FixedProblem.of(problem, settings)
    for other in LOOKS[: LOOKS.index(look)]:
        other(fixed, report)
    before = len(report.findings)
    with suppress(StopCheckError):
        look(fixed, report)
    return replace(report, findings=report.findings[before:])


def wrong(report: CheckReport) -> dict[str, Level]:
    """Return by name what is not well."""
    return {finding.name: finding.level for finding in report.findings if finding.level is not Level.OK}


# ---- what more than one look is shown


def clamped(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return what keeps weights below 0.2, where the data would have two of them at 1."""
    optimizer = torch.optim.Adam(params, lr=lr)

    def project(*_: Any) -> None:
        for param in params:
            param.data.clamp_(max=0.2)

    optimizer.register_step_post_hook(project)
    return optimizer


def flipped(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x, -y) for x, y in data]


def first_weight(state: State) -> Tensor:
    """Return a weight that starts below 0.5 and is trained to almost 1."""
    return state.ll_model[0].weight[0, 0]


def below(state: State) -> Tensor:
    """Return how far the first weight is below 0.6, and 0 above, in a way that keeps infinite derivatives there."""
    gap = 0.6 - first_weight(state)
    return gap * (gap > 0)


def unbounded(state: State) -> Tensor:
    """Return an ll loss without a minimum: its penalty has the wrong sign."""
    return 21 * ul_objective(state) - 20 * ll_objective(state)


class Again:
    """The same batch so many times, and no one knows beforehand how often."""

    def __init__(self, times: float) -> None:
        self.times, self.read = times, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.read = 0
        while self.read < self.times:
            self.read += 1
            yield from split(0, 1)


def drawing() -> BilevelProblem:
    """Return a problem whose ll objective draws from a generator of its own."""
    own = generator()
    return working(ll_objective=lambda s: (1 + 0.01 * torch.rand((), generator=own)) * ll_objective(s))
