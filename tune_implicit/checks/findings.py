"""What a check of a problem has found: findings with a name, and figures."""

import dataclasses
import json
import math
import textwrap
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn

__all__ = ["AGREES", "CheckReport", "Finding", "Level", "StopCheckError"]

# Two figures for one derivative, relative to it: what differences over a small step can tell.
AGREES = 0.02

_WIDTH = 120


class StopCheckError(Exception):
    """There was a fault after which nothing else can be looked at."""


class Level(Enum):
    """How much a finding matters: a ``FAULT`` makes a search worthless, a ``WARNING`` wants to be read."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
        What kind of thing, e.g. ``"unused-ul-value"``; the same name for the same kind on every problem.
    level : Level
        Whether it is well.
    message : str
        What was seen, and the way out.
    """

    name: str
    level: Level
    message: str


@dataclass(frozen=True)
class CheckReport:
    """The result of :func:`check`.

    Parameters
    ----------
    findings : list of Finding
        In the order in which things were looked at. The first faults may have kept the rest from being looked at.
    figures : dict of str to float
        ``lambda_min`` and ``lambda_max`` of the ll Hessian, ``largest_step_size`` of the Neumann series, by solver the
        ``k`` for 1% error of the hypergradient, ``ll_step_s`` and ``ul_step_s`` in seconds, and the like.
    """

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def faults(self) -> list[Finding]:
        """The findings that make a search worthless."""
        return [finding for finding in self.findings if finding.level is Level.FAULT]

    @property
    def passed(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def ok(self, name: str, message: str) -> None:
        """Add that something is well."""
        self.findings.append(Finding(name, Level.OK, message))

    def warn(self, name: str, message: str) -> None:
        """Add something that wants to be read."""
        self.findings.append(Finding(name, Level.WARNING, message))

    def fault(self, name: str, message: str) -> None:
        """Add a fault."""
        self.findings.append(Finding(name, Level.FAULT, message))

    def stop(self, name: str, message: str) -> NoReturn:
        """Add a fault that keeps the rest from being looked at.

        Raises
        ------
        StopCheckError
            Always.
        """
        self.fault(name, message)
        raise StopCheckError

    def to_json(self) -> str:
        """Return the report as JSON; a figure that is not finite is ``null``."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        findings = [dataclasses.asdict(finding) | {"level": finding.level.value} for finding in self.findings]
        return json.dumps({"passed": self.passed, "findings": findings, "figures": figures}, indent=2)

    def __str__(self) -> str:
        lines = []
        for finding in self.findings:
            mark = "FAULT" if finding.level is Level.FAULT else finding.level.value
            head = f"{mark:8}{finding.name:20}"
            lines.append(textwrap.fill(head + finding.message, _WIDTH, subsequent_indent=" " * len(head)))
        faults, warnings = len(self.faults), sum(finding.level is Level.WARNING for finding in self.findings)
        verdict = "passed" if self.passed else f"{faults} fault{'s' * (faults > 1)}"
        lines.append(f"{verdict}{f', {warnings} to be read' if warnings else ''}")
        return "\n".join(lines)
