"""Whether a solver's status and residual are what they say, over thousands of random systems ``H v = b``.

    python benchmarks/statuses.py [--systems 2000] [--output FILE]

*Systems.* ``H = Q diag(eigenvalues) Q'``, randomly rotated or not, of 2 to 100 unknowns, in float32 and in float64:
definite, indefinite, or singular, with ``b`` in the range of ``H`` or not; condition 1 to 1e16, the eigenvalues spread
evenly or at random over it, or one apart from the rest. Each is solved by each iterative solver, cold or warm, with up
to 2,000 steps and a tolerance that is absolute, relative, or 0, and verified; by preconditioned CG for the third time.

*What is counted as wrong.* The true residual is computed in extended precision.

- ``converged``: the status CONVERGED beside a true residual of more than twice the tolerance asked for.
- ``unverified``: the status UNVERIFIED, which is for solvers that report what is not so.
- ``negative``: the status NEGATIVE_CURVATURE on a system made to be definite, and so after it was rounded.
- ``residual``: an answer whose true residual is more than twice the one reported, and what rounding adds to that.
- ``worse``: an answer that is worse than ``v = 0`` in the norm that its method makes small, the residual of MINRES and
  the energy of the others.

It is run under each set of kernels that torch and MKL can be told to use, since their sums are rounded differently.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Page, machine
from torch import Tensor

from tune_implicit.hypergradients.inverse_hvp import InverseHvp
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.solution import Solution, Status

SOLVERS: dict[str, dict[str, Any]] = {
    "cg": {"solver": "cg"},
    "cg, preconditioned": {"solver": "cg", "preconditioner_memory": 8},
    "minres": {"solver": "minres"},
    "neumann": {"solver": "neumann"},
    "neumann, auto": {"solver": "neumann", "step_size": "auto"},
}
WRONG = ("converged", "unverified", "negative", "residual", "worse")
ATEN = ("default", "avx2", "avx512")
MKL = ("", "SSE4_2", "AVX2")
F64 = torch.float64


@dataclass(frozen=True)
class System:
    """One system, and how it is to be solved."""

    kind: str
    h: Tensor
    b: Tensor
    v0: Tensor | None
    k: int
    tolerance: float
    rtol: float

    @property
    def asked(self) -> float:
        """The residual norm below which a solve has converged."""
        return max(self.tolerance, self.rtol * torch.linalg.vector_norm(self.b.double()).item())

    @property
    def definite(self) -> bool:
        """Whether ``H`` is definite, which in float32 one of condition 1e8 need not be once it is rounded."""
        return self.kind == "definite" and torch.linalg.eigvalsh(self.h.double())[0].item() > 0

    def measure(self, v: Tensor) -> tuple[float, float]:
        """Return ``||b - H v||`` and the energy ``v' H v / 2 - b' v``, in the long double of the platform."""
        h, b, v = (x.double().numpy().astype(np.longdouble) for x in (self.h, self.b, v))
        image = h @ v
        return float(np.linalg.norm((b - image).astype(np.float64))), float(v @ image / 2 - b @ v)

    def rounding(self, v: Tensor) -> float:
        """Return what rounding does to ``b - H v`` where it is measured in the dtype of the system."""
        epsilon, (h, v) = torch.finfo(self.b.dtype).eps, (self.h.double(), v.double())
        return epsilon * (torch.linalg.matrix_norm(h, 2) * torch.linalg.vector_norm(v)).item()


def random_system(random: np.random.Generator) -> System:
    n = int(random.integers(2, 101))
    condition = 10 ** random.uniform(0, 16)
    kind = str(random.choice(["definite", "indefinite", "consistent", "inconsistent"]))
    spread = np.logspace(0, -math.log10(condition), n)
    match random.choice(["even", "random", "one large", "one small"]):
        case "random":
            spread[1:-1] = condition ** -random.random(n - 2)
        case "one large":
            spread[1:] = 1 / condition
        case "one small":
            spread[:-1] = 1.0
    if kind == "indefinite":
        spread = spread * random.choice([-1, 1], n)
        spread[0] = -abs(spread[0])
    elif kind != "definite":
        spread[random.integers(1, n) :] = 0
    values = torch.from_numpy(spread)
    q = torch.eye(n, dtype=F64)
    if random.random() < 0.8:
        q = torch.linalg.qr(torch.from_numpy(random.standard_normal((n, n))))[0]
    h = (q * values) @ q.T
    h = (h + h.T) / 2
    dtype = (torch.float32, F64)[random.integers(2)]
    b, x = (torch.from_numpy(random.standard_normal(n)) for _ in range(2))
    b = h @ b if kind == "consistent" else b
    b = b * 10 ** random.uniform(-3, 3)
    tolerance, rtol = [(1e-10, 0.0), (0.0, 0.0), (0.0, 10 ** random.uniform(-8, -1)), (1e-4, 0.0)][random.integers(4)]
    v0 = None
    if random.random() < 0.3:  # from nearby, from far away, from the answer
        v0 = (torch.linalg.pinv(h) @ b + random.choice([0, 0.1, 10]) * x).to(dtype)
    k = int(random.choice([3, 10, 30, 200, 2000]))
    return System(kind, h.to(dtype), b.to(dtype), v0, k, tolerance, rtol)


def solve(system: System, solver: str) -> tuple[Solution, int]:
    """Return the verified solution, and the products taken."""
    count = 0

    def hvp(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return system.h @ v

    size = torch.linalg.matrix_norm(system.h.double(), 2).item()
    settings = SolverSettings(
        ll_learning_rate=1.8 / size, k=system.k, tolerance=system.tolerance, rtol=system.rtol, warm_start=True,
        verify=True, **SOLVERS[solver],
    )  # fmt: skip
    one = InverseHvp(settings)
    for _ in range(2 if settings.preconditioner_memory else 0):
        one.solve(hvp, system.b)
    learned = one.state_dict()["preconditioner"]
    one.load_state_dict({"v": system.v0, "top": None, "preconditioner": learned}, torch.device("cpu"))
    count = 0
    return one.solve(hvp, system.b), count


def wrongs(system: System, solver: str, solution: Solution) -> list[str]:
    status, (true, energy) = solution.status, system.measure(solution.v)
    found = {
        "converged": status is Status.CONVERGED and true > 2 * system.asked,
        "unverified": status is Status.UNVERIFIED,
        "negative": status is Status.NEGATIVE_CURVATURE and system.definite,
        "residual": not status.failed and true > 2 * solution.residual_norm + system.rounding(solution.v),
    }
    zero = torch.linalg.vector_norm(system.b.double()).item()
    found["worse"] = not status.failed and (true > 1.001 * zero if solver == "minres" else energy > 0)
    return [name for name, wrong in found.items() if wrong]


def count(systems: int, seed: int, tell: bool) -> dict[str, dict[str, int]]:
    """Return by solver how often each status came, and how often each thing was wrong."""
    random = np.random.default_rng(seed)
    counts: dict[str, Counter] = {solver: Counter() for solver in SOLVERS}
    for number in range(systems):
        system = random_system(random)
        for solver in SOLVERS:
            solution, hvps = solve(system, solver)
            found = wrongs(system, solver, solution)
            counts[solver].update([solution.status.value, *(f"wrong: {name}" for name in found)])
            counts[solver]["hvps"] += hvps
            if found and tell:
                print(
                    number, solver, system.kind, str(system.h.dtype)[6:], f"n={len(system.b)} k={system.k}",
                    f"warm={system.v0 is not None} asked={system.asked:.1e} ||b||={system.b.norm():.1e}",
                    f"condition={np.linalg.cond(system.h.double()):.0e}:", solution.status.value, *found,
                    f"reported={solution.residual_norm:.2e} true={system.measure(solution.v)[0]:.2e}",
                    file=sys.stderr,
                )  # fmt: skip
    return {solver: dict(counter) for solver, counter in counts.items()}


def under(aten: str, mkl: str, systems: int, seed: int) -> dict[str, dict[str, int]]:
    """Return the counts of a process that uses these kernels."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": aten} | ({"MKL_ENABLE_INSTRUCTIONS": mkl} if mkl else {})
    command = [sys.executable, __file__, "--here", "--systems", str(systems), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts: dict[str, dict[str, int]] = json.loads(done.stdout)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", type=int, default=2000, help="per set of kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="with the kernels in use only: counts as JSON")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.here:
        print(json.dumps(count(arguments.systems, arguments.seed, tell=True)))
        return
    page = Page()
    page.tell(
        f"# {arguments.systems:,} random systems per set of kernels, seed {arguments.seed}",
        "",
        f"{machine()}. Solves that were wrong, by what was wrong (see the script), and how the solves ended.",
        "",
    )
    statuses = [status.value for status in Status]
    page.head("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "solver", *WRONG, *statuses)
    for aten, mkl in product(ATEN, MKL):
        for solver, counts in under(aten, mkl, arguments.systems, arguments.seed).items():
            wrong = (f"**{counts.get(f'wrong: {name}', 0)}**" for name in WRONG)
            page.row(aten, mkl or "unset", solver, *wrong, *(counts.get(status, 0) for status in statuses))
    if arguments.output:
        page.write(arguments.output)


if __name__ == "__main__":
    main()
