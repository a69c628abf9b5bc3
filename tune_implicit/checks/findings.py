"""What a check of a problem has found: findings with a name, figures, and the settings that follow from them."""

import dataclasses
import json
import math
import textwrap
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from tune_implicit.checks.plainly import first_lines
from tune_implicit.trials.settings import SETTINGS

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

    As text it begins with what a reader needs who wants to know no more than whether to start, and how long it takes,
    and it ends with the line of settings to take.

    Parameters
    ----------
    findings : list of Finding
        In the order in which things were looked at. The first faults may have kept the rest from being looked at; what
        there was no time for is a finding ``"no-time"``.
    figures : dict of str to float
        What was measured, and only that: ``ul_values`` and ``ll_parameters``, how many there are; ``ll_step_s``,
        ``ul_step_s``, ``hvp_s`` and ``trial_s``, the seconds that an ll step, a ul step without ll steps, a
        Hessian-vector product and a whole trial take; ``stationarity``, ``||df/dw||`` after training; ``lambda_min``
        and ``lambda_max`` of the ll Hessian there, and ``largest_step_size`` of the Neumann series; ``k_cg``,
        ``k_minres``, ``k_neumann`` and ``k_neumann_auto``, the ``k`` for 1% error of the implicit term, infinite where
        none suffices and NaN where there was no time; ``relative_residual`` and ``hypergradient_error`` of the
        settings after some ul steps, in units of ``||dF/dw||`` and of the hypergradient; ``ll_steps_per_ul_step``,
        ``ul_moved`` and ``ul_moves``, by how much the ul values moved in the ul steps that were tried, and would in a
        trial (root mean square); ``finite_difference_error``, the relative error of the hypergradient.
    recommended : dict of str to object
        The settings to take for this problem: fields of :class:`ImplicitSettings` by name, each measured here. A
        setting that is fine as it is stands there with its value, one that was not looked at does not.
    """

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    recommended: dict[str, Any] = field(default_factory=dict)

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

    def no_time(self, what: str) -> None:
        """Add that there was no time to look at something."""
        self.warn("no-time", f"{what}: not looked at for lack of time. Take `thorough=True` (--thorough).")

    def recommend(self, **settings: Any) -> None:
        """Recommend settings, in place of what was recommended of the same names."""
        self.recommended.update(settings)

    def to_json(self) -> str:
        """Return the report as JSON; a figure that is not finite is ``null``."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        findings = [dataclasses.asdict(finding) | {"level": finding.level.value} for finding in self.findings]
        told = {"passed": self.passed, "findings": findings, "figures": figures, "recommended": self._in_order()}
        return json.dumps(told, indent=2)

    def _in_order(self) -> dict[str, Any]:
        return {name: self.recommended[name] for name in SETTINGS if name in self.recommended}

    @property
    def summary(self) -> str:
        """What is to be read first: whether a search can be started, and how long a trial takes."""
        warnings = sum(finding.level is Level.WARNING for finding in self.findings)
        lines = first_lines([fault.name for fault in self.faults], warnings, self.figures)
        return "\n".join(textwrap.fill(line, _WIDTH) for line in lines)

    @property
    def details(self) -> str:
        """The findings, how many are to be read, and the line of recommended settings."""
        lines = []
        for finding in self.findings:
            mark = "FAULT" if finding.level is Level.FAULT else finding.level.value
            head = f"{mark:8}{finding.name:20}"
            lines.append(textwrap.fill(head + finding.message, _WIDTH, subsequent_indent=" " * len(head)))
        faults, warnings = len(self.faults), sum(finding.level is Level.WARNING for finding in self.findings)
        verdict = "passed" if self.passed else f"{faults} fault{'s' * (faults > 1)}"
        lines.append(f"{verdict}{f', {warnings} to be read' if warnings else ''}")
        lines.append(f"recommended settings: {_as_python(self._in_order())}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.summary}\n{self.details}"


def _as_python(settings: dict[str, Any]) -> str:
    """Return a dict as Python, to be pasted into a task file, where strings have double quotes."""
    told = {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in settings.items()}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in told.items()) + "}"
