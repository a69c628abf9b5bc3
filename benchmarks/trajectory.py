"""How many Hessian-vector products keep the hypergradient within 1%, along a trajectory of 100 ul steps.

    python benchmarks/trajectory.py [--output benchmarks/results]

*Problems.* (1) Logistic regression on scikit-learn's digits, in float64; the reference is the dense solve. (2) An MLP
on Fashion-MNIST in float32, full batches of 1000. A trained network's Hessian is indefinite, so the system is damped,
for all solvers and for the reference, which is MINRES run to a relative residual of 1e-5, about what float32 can do.
(3) The same MLP with new minibatches of 500 at each ul step: the last answer is one to another system, and a warm start
helps least. The ul values are a log-L2 penalty per weight; the images are those of Debian's dataset-fashion-mnist.

*Trajectory.* Ll steps of SGD with momentum 0.9, then a ul step of Adam on the reference hypergradient, so that all
solvers meet the same systems. On the MLP the ll learning rate is one with which the Neumann series converges.

*Count.* At each ul step every solver gets, from ``InverseHvp``, the state that its own solves before have left: the
last ``v``, the preconditioner's pairs, the eigenvector. Bisection finds the ``k`` with which its hypergradient is
within 1% of the reference, and with ``k - 1`` is not. In each of 280 solves of the first 40 ul steps of (1), in which
all were tried, that was the smallest ``k``. Where an error does not fall evenly there may be a smaller one: another
bisection has moved a total by up to 6%. What counts is all hvps of that solve, those for the warm start, the spectrum
and the measured residual among them; the state that it leaves is kept. Products are remembered within a ul step, so
that a trial repeats none, which saves time and no count. The Neumann series takes so many that it is measured at some
ul steps and scaled up; the first ones, where it is started warm, are the easier ones. A solver that has reached the cap
at three ul steps running is taken to reach it at all that follow.

*Left out of the package*, and measured to see whether rightly, with an advantage each: Chebyshev's semi-iteration, told
the ends of the spectrum for free, and a Nystrom preconditioner, whose hvps are counted at the first ul step alone.
"""

import argparse
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from common import LogL2, Page, Problem, fashion_mnist, machine
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cosine_similarity, cross_entropy

from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.inverse_hvp import InverseHvp
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.solvers.arithmetic import dot, norm, start
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status
from tune_implicit.hypergradients.solvers.spectrum import random_direction
from tune_implicit.hypergradients.state import State
from tune_implicit.hypergradients.vectors import flatten, unflatten

UL_STEPS = 100
TENTHS = range(0, UL_STEPS, 10)
TWENTIETHS = range(0, UL_STEPS, 20)
WITHIN = 0.01
CAP = 2000
HOPELESS = 3
NYSTROM_RANK = 30
NS_LL = "NS, step size the ll learning rate"
Batch = tuple[Tensor, Tensor]


@dataclass
class Journey(Problem):
    """The batches of a trajectory, and the damping of its systems."""

    train: list[Batch]
    validate: list[Batch]
    ll_learning_rate: float
    ul_learning_rate: float
    ll_steps: int
    first_ll_steps: int
    damping: float
    reference: InverseHvp

    def state(self, batch: Batch) -> State:
        """Return what an objective takes."""
        return State(*batch, self.ul_model, self.ll_model)

    @property
    def w(self) -> list[nn.Parameter]:
        """The ll parameters."""
        return list(self.ll_model.parameters())


def logistic_regression() -> Journey:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order] / 16, y[order]
    ll_model = nn.Linear(64, 10, bias=False).double()
    return Journey(
        "1. Logistic regression on digits, 640 weights, float64, full batches",
        ll_model, LogL2(ll_model, -5.0).double(), cross_entropy, [(x[:1000], y[:1000])], [(x[1000:1400], y[1000:1400])],
        ll_learning_rate=0.1, ul_learning_rate=0.1, ll_steps=20, first_ll_steps=600,
        damping=0.0, reference=InverseHvp(SolverSettings(solver="dense")),
    )  # fmt: skip


def mlp(name: str, train: int, validate: int, batch: int, damping: float) -> Journey:
    x, y = fashion_mnist()
    ll_model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    reference = SolverSettings(solver=Minres(CAP, rtol=1e-5), damping=damping, warm_start=True)
    return Journey(
        name, ll_model, LogL2(ll_model, -6.0), cross_entropy,
        batches(x[:train], y[:train], batch), batches(x[-validate:], y[-validate:], batch),
        ll_learning_rate=0.02, ul_learning_rate=0.1, ll_steps=10, first_ll_steps=600,
        damping=damping, reference=InverseHvp(reference),
    )  # fmt: skip


def batches(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    return list(zip(x.split(size), y.split(size), strict=True))


def draws(of: list[Batch]) -> Iterator[Batch]:
    """Yield batches without end, each epoch in a new order, or every tenth ul step would meet the same one."""
    while True:
        for index in torch.randperm(len(of)).tolist():
            yield of[index]


class Products:
    """The product ``v -> H v`` of one ul step, counted, and computed once for each ``v``."""

    def __init__(self, hvp: Hvp) -> None:
        self.uncounted = hvp
        self.hvps = 0
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, v: Tensor) -> Tensor:
        """Return ``H v``."""
        self.hvps += 1
        key = v.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.uncounted(v)
        return self._known[key]


class Point:
    """The system ``(H + damping I) v = b`` of one ul step, with its reference solution and hypergradient."""

    def __init__(self, problem: Journey, ul_step: int, train: Batch, validate: Batch) -> None:
        self.problem, self.ul_step, self.train, self.validate = problem, ul_step, train, validate
        self.b = flatten(grad(problem.ul_objective(problem.state(validate)), problem.w))
        self.products = Products(self._second_order().hvp)
        self.solution = problem.reference.solve(self.products.uncounted, self.b)
        self.relative_residual = self.solution.residual_norm / norm(self.b).item()
        # The mixed derivative of the penalty `sum exp(l) w^2` is diagonal, and the ul loss has no direct term.
        l2 = flatten([log_l2.detach() for log_l2 in problem.ul_model.log_l2]).exp()
        self._mixed = 2 * l2 * flatten([w.detach() for w in problem.w])
        self.hypergradient = -self._mixed * self.solution.v
        if ul_step == 0:
            by_autograd = self._second_order().mixed_vjp(self.solution.v, list(problem.ul_model.parameters()))
            torch.testing.assert_close(-flatten(by_autograd), self.hypergradient)

    def _second_order(self) -> SecondOrder:
        problem = self.problem
        return SecondOrder(problem.ll_objective(problem.state(self.train)), problem.w)

    def damped(self, v: Tensor) -> Tensor:
        """Return the product with the damped matrix, uncounted."""
        return self.products.uncounted(v) + self.problem.damping * v

    def error(self, v: Tensor) -> float:
        """Return the relative error of the hypergradient that ``v`` gives."""
        return relative_error(-self._mixed * v, self.hypergradient)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return (norm(got - expected) / norm(expected)).item()


@dataclass
class Entrant:
    """One solver on its way along the trajectory; ``make(k)`` builds it.

    ``prepare`` is what it does before the solve of an ul step, and returns the hvps of that. It is measured at the
    ``ul_steps`` alone, which must follow on each other unless it keeps nothing.
    """

    name: str
    make: Callable[[int], InverseHvp]
    prepare: Callable[[Point], int] = lambda point: 0
    ul_steps: range = range(UL_STEPS)
    shipped: bool = True
    hvps: dict[int, int] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)
    _state: dict | None = None
    _k: int = 8

    def measure(self, point: Point) -> None:
        """Find the fewest hvps at ``point``, and keep the state of the solve that took them."""
        if point.ul_step not in self.ul_steps:
            return
        if len(self.missed) >= HOPELESS and self.missed[-HOPELESS:] == list(self.hvps)[-HOPELESS:]:
            self.missed.append(point.ul_step)
            self.hvps[point.ul_step] = CAP
            return
        prepared = self.prepare(point)
        runs: dict[int, tuple[int, dict, Status]] = {}

        def within(k: int) -> bool:
            solver = self.make(k)
            if self._state is not None:
                solver.load_state_dict(self._state, point.b.device)
            point.products.hvps = 0
            solution = solver.solve(point.products, point.b)
            runs[k] = point.products.hvps, solver.state_dict(), solution.status
            return not solution.status.failed and point.error(solution.v) <= WITHIN

        low, high = -1, min(self._k + 2, CAP)
        while not (found := within(high)) and high < CAP and runs[high][2] is Status.MAX_STEPS:
            low, high = high, min(high + high // 4 + 2, CAP)
        if found:
            high = low + 1 + bisect_left(range(low + 1, high), True, key=within)
            self._k = high
        else:
            self.missed.append(point.ul_step)
        hvps, self._state, _ = runs[high]
        self.hvps[point.ul_step] = hvps + prepared

    @property
    def total(self) -> int:
        """The hvps of the whole trajectory, scaled up from those measured."""
        return round(sum(self.hvps.values()) * UL_STEPS / len(self.hvps))


def begin(hvp: Hvp, b: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where to start from, and the residual there."""
    found = None if v0 is None else start(hvp, b, v0, definite=True)
    return (torch.zeros_like(b), b) if found is None else found[:2]


@dataclass
class Chebyshev:
    """Chebyshev's semi-iteration for a spectrum in (low, high): Saad, Iterative Methods, 2nd ed., Algorithm 12.1."""

    k: int
    low: float
    high: float

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` after ``k`` products, not counting that of the warm start."""
        v, r = begin(hvp, b, v0)
        theta, delta = (self.high + self.low) / 2, (self.high - self.low) / 2
        rho, d = delta / theta, r / theta
        for _ in range(self.k):
            v, r = v + d, r - hvp(d)
            rho_previous, rho = rho, 1 / (2 * theta / delta - rho)
            d = rho * rho_previous * d + 2 * rho / delta * r
        return Solution(v + d, Status.MAX_STEPS, self.k, norm(r).item())


@dataclass
class Nystrom:
    """CG preconditioned by a low-rank sketch: Frangella, Tropp & Udell, SIAM J. Matrix Anal. Appl. 44 (2023)."""

    k: int
    u: Tensor
    shrink: Tensor

    @staticmethod
    def sketch(hvp: Hvp, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the matrix's largest eigenvectors, nearly, and what brings their eigenvalues to the smallest of them.

        It takes ``rank`` products with a positive-definite matrix.
        """
        normal = torch.stack([random_direction(b, seed) for seed in range(rank)], dim=1)
        basis = torch.linalg.qr(normal.double()).Q
        image = torch.stack([hvp(q) for q in basis.T.to(b.dtype)], dim=1).double()
        inner = basis.T @ image
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        u, singular, _ = torch.linalg.svd(image @ (vectors / values.sqrt()), full_matrices=False)
        return u.to(b.dtype), (singular[-1] ** 2 / singular**2 - 1).to(b.dtype)

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` after ``k`` products, not counting that of the warm start."""
        v, r = begin(hvp, b, v0)
        z = p = self._apply(r)
        rz = dot(r, z)
        for _ in range(self.k):
            hp = hvp(p)
            alpha = rz / dot(p, hp)
            v, r = torch.addcmul(v, p, alpha), torch.addcmul(r, hp, alpha, value=-1)
            z = self._apply(r)
            rz, rz_previous = dot(r, z), rz
            p = torch.addcmul(z, p, rz / rz_previous)
        return Solution(v, Status.MAX_STEPS, self.k, norm(r).item())

    def _apply(self, r: Tensor) -> Tensor:
        return r + self.u @ (self.shrink * (self.u.T @ r))


def entrants(problem: Journey) -> list[Entrant]:
    settings = SolverSettings(ll_learning_rate=problem.ll_learning_rate, tolerance=0.0, damping=problem.damping)

    def made(**changes: object) -> InverseHvp:
        return InverseHvp(replace(settings, **changes))

    def named(solver: str, **options: object) -> Callable[[int], InverseHvp]:
        return lambda k: made(solver=solver, k=k, **options)

    sketched, ends = [], []

    def sketch(point: Point) -> int:
        if point.ul_step:
            return 0
        sketched[:] = Nystrom.sketch(point.damped, point.b, NYSTROM_RANK)
        return NYSTROM_RANK

    def tell_ends(point: Point) -> int:
        ends[:] = [point.solution.lambda_min, 1.05 * point.solution.lambda_max]
        return 0

    return [
        Entrant("CG, cold", named("cg")),
        Entrant("CG, warm", named("cg", warm_start=True)),
        *(
            Entrant(f"CG, warm, {memory} pairs", named("cg", warm_start=True, preconditioner_memory=memory))
            for memory in (8, 16, 32)
        ),
        Entrant("MINRES, cold", named("minres")),
        Entrant("MINRES, warm", named("minres", warm_start=True)),
        Entrant(NS_LL, named("neumann"), ul_steps=TWENTIETHS),
        Entrant("NS, step size auto, cold", named("neumann", step_size="auto"), ul_steps=TWENTIETHS),
        Entrant(
            "NS, step size auto, warm",
            named("neumann", step_size="auto", warm_start=True),
            ul_steps=range(30 if problem.damping else UL_STEPS),  # as long as an hvp is cheap
        ),
        Entrant(
            "Chebyshev, warm",
            lambda k: made(solver=Chebyshev(k, *ends), warm_start=True),
            tell_ends,
            shipped=False,
        ),
        Entrant(
            f"CG, warm, Nystrom rank {NYSTROM_RANK}",
            lambda k: made(solver=Nystrom(k, *sketched), warm_start=True),
            sketch,
            shipped=False,
        ),
    ]


def trajectory(problem: Journey) -> Iterator[Point]:
    """Yield the system of each ul step, and go on from it by the reference hypergradient."""
    ll_optimizer = torch.optim.SGD(problem.w, problem.ll_learning_rate, momentum=0.9)
    ul_params = list(problem.ul_model.parameters())
    ul_optimizer = torch.optim.Adam(ul_params, problem.ul_learning_rate)
    train, validate = draws(problem.train), draws(problem.validate)
    for ul_step in range(UL_STEPS):
        for _ in range(problem.ll_steps if ul_step else problem.first_ll_steps):
            ll_optimizer.zero_grad()
            problem.ll_objective(problem.state(next(train))).backward(inputs=problem.w)
            ll_optimizer.step()
        point = Point(problem, ul_step, next(train), next(validate))
        yield point
        for param, gradient in zip(ul_params, unflatten(point.hypergradient, ul_params), strict=True):
            param.grad = gradient.clone()
        ul_optimizer.step()


class Noise:
    """What the products past the noise of a minibatch buy, against the hypergradient of all the data."""

    title = 'Problem 3: solving exactly, and with `stop="noise"`, against the hypergradient of all the data'
    note = (
        "The zero hypergradient has a relative error of 1: what 500 images tell of each of 50,890 penalties is mostly "
        "noise, however exact the solve. The hvps are means over all ul steps, the errors those at every tenth."
    )
    head = ("solver", "hvps per ul step", "relative error: median (range)", "cosine: median (range)")

    def __init__(self, problem: Journey) -> None:
        made = partial(
            Implicit, problem.ul_objective, problem.ul_model, problem.ll_objective, problem.ll_model,
            problem.ll_learning_rate, CAP, damping=problem.damping,
        )  # fmt: skip
        self._all = made(solver=Minres(CAP, rtol=1e-4))
        self._solvers = {
            "CG, cold, rtol 1e-4": made(solver="cg", rtol=1e-4),
            "CG, cold, rtol 0.01": made(solver="cg", rtol=0.01),
            'CG, cold, stop="noise"': made(solver="cg", stop="noise"),
            'CG, warm, 16 pairs, stop="noise"': made(
                solver="cg", stop="noise", warm_start=True, preconditioner_memory=16
            ),
        }
        self._hvps: dict[str, list[int]] = {name: [] for name in self._solvers}
        self._errors: dict[str, list[float]] = {name: [] for name in self._solvers}
        self._cosines: dict[str, list[float]] = {name: [] for name in self._solvers}

    def __call__(self, point: Point) -> None:
        """Solve at ``point``; at every tenth, with all data as well."""
        problem = point.problem
        if tenth := point.ul_step in TENTHS:
            all_data = [[torch.cat(part) for part in zip(*b, strict=True)] for b in (problem.train, problem.validate)]
            expected, _ = self._solve(self._all, *all_data)
        for name, implicit in self._solvers.items():
            got, hvps = self._solve(implicit, point.train, point.validate)
            self._hvps[name].append(hvps)
            if tenth:
                self._errors[name].append(relative_error(got, expected))
                self._cosines[name].append(cosine_similarity(got, expected, dim=0).item())

    @staticmethod
    def _solve(implicit: Implicit, train: Batch, validate: Batch) -> tuple[Tensor, int]:
        result = implicit.compute_gradients(*validate, train_data=train[0], train_target=train[1])
        if result.status is not Status.CONVERGED:
            raise RuntimeError(f"A solve for the comparison with all data ended as {result.status}.")
        return flatten(list(result.gradients.values())), result.hvps

    def rows(self) -> Iterator[tuple]:
        """Yield the table."""
        for name, hvps in self._hvps.items():
            columns = (
                f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                for values in (self._errors[name], self._cosines[name])
            )
            yield name, f"{statistics.mean(hvps):.1f}", *columns


class Undamped:
    """What CG and MINRES make of the network's own Hessian, without damping."""

    title = "Problem 2 without damping: CG and MINRES at an indefinite Hessian"
    note = "The relative residual of CG is that of its last iterate before the negative curvature; 1 is that of zero."
    head = (
        "ul step", "CG ends as", "hvps", "lambda_min met", "CG: relative residual",
        "MINRES, as many hvps: relative residual", "MINRES, 100 hvps",
    )  # fmt: skip

    def __init__(self) -> None:
        self._rows: list[tuple] = []

    def __call__(self, point: Point) -> None:
        """Solve at every tenth ``point``."""
        if point.ul_step not in TENTHS:
            return
        products, b_norm = point.products, norm(point.b).item()
        products.hvps = 0
        cg = ConjugateGradient(200, 0.0, 1e-4).solve(products, point.b)
        hvps = products.hvps
        # The last of the hvps is for the residual.
        minres = [Minres(n - 1, 0.0).solve(products, point.b).residual_norm / b_norm for n in (hvps, 100)]
        self._rows.append((
            point.ul_step, cg.status.value, hvps, f"{cg.lambda_min:.2g}", f"{cg.residual_norm / b_norm:.2g}",
            *(f"{residual:.2g}" for residual in minres),
        ))  # fmt: skip

    def rows(self) -> Iterator[tuple]:
        """Yield the table."""
        yield from self._rows


class GaussNewton:
    """The error of the hypergradient in which the Gauss-Newton matrix, solved with exactly, stands for the Hessian."""

    title = "Problem 2: the Gauss-Newton matrix in place of the Hessian"
    note = "The same damping, solved to a relative residual of 1e-5."
    head = ("ul step", "hvps", "relative error of its hypergradient")

    def __init__(self) -> None:
        self._rows: list[tuple] = []

    def __call__(self, point: Point) -> None:
        """Solve at every tenth ``point``."""
        if point.ul_step not in TENTHS:
            return
        problem = point.problem
        w = {name: param.detach() for name, param in problem.ll_model.named_parameters()}
        diagonal = 2 * flatten([log_l2.detach() for log_l2 in problem.ul_model.log_l2]).exp() + problem.damping

        def outputs(w: dict[str, Tensor]) -> Tensor:
            return functional_call(problem.ll_model, w, (point.train[0],))

        z, pull_back = vjp(outputs, w)
        probabilities = z.softmax(1)

        def product(v: Tensor) -> Tensor:
            tangent = dict(zip(w, unflatten(v, list(w.values())), strict=True))
            _, dz = jvp(outputs, (w,), (tangent,))
            centred = probabilities * (dz - (probabilities * dz).sum(1, keepdim=True))
            (pulled,) = pull_back(centred / len(z))
            return flatten([pulled[name] for name in w]) + diagonal * v

        solution = ConjugateGradient(CAP, 0.0, rtol=1e-5).solve(product, point.b)
        self._rows.append((point.ul_step, solution.steps, f"{point.error(solution.v):.1%}"))

    def rows(self) -> Iterator[tuple]:
        """Yield the table."""
        yield from self._rows


def report(page: Page, problem: Journey, measured: list[Entrant], residuals: list[float]) -> None:
    """Write the table of one problem and its verdict."""
    cold = measured[0].total
    damping = f" Damping {problem.damping:g}." if problem.damping else ""
    page.tell(
        f"## {problem.name}",
        "",
        f"Largest relative residual of the references: {max(residuals):.0e}.{damping}",
        "",
    )
    page.head("solver", f"hvps in {UL_STEPS} ul steps", "per ul step: median", "most", "of CG, cold", "remarks")
    for entrant in measured:
        more = "> " if entrant.missed else ""
        remarks = [] if entrant.shipped else ["left out"]
        if len(entrant.hvps) < UL_STEPS:
            which = (
                "every twentieth ul step"
                if entrant.ul_steps == TWENTIETHS
                else f"the first {len(entrant.hvps)} ul steps"
            )
            remarks.append(f"scaled up from {which}")
        if entrant.missed:
            remarks.append(f"{CAP} were not enough at {len(entrant.missed)} of {len(entrant.hvps)} ul steps")
        counts = entrant.hvps.values()
        page.row(
            entrant.name, f"{more}{entrant.total:,}", f"{statistics.median(counts):g}", max(counts),
            f"{more}{entrant.total / cold:.2f}", "; ".join(remarks),
        )  # fmt: skip
    best = min((entrant for entrant in measured if entrant.shipped), key=lambda entrant: entrant.total)
    neumann = next(entrant for entrant in measured if entrant.name == NS_LL)
    page.tell(
        "",
        f"Best of those in the package: {best.name}, {best.total:,} hvps: {best.total / cold:.2f} of cold CG's, "
        f"{'less than ' if neumann.missed else ''}{best.total / neumann.total:.2g} of NS's at the ll learning rate.",
        "",
    )


STYLES = {
    NS_LL: {"color": "black", "marker": "x", "linestyle": ":"},
    "NS, step size auto, cold": {"color": "tab:orange", "marker": "o", "markersize": 4, "linestyle": ":"},
    "NS, step size auto, warm": {"color": "tab:orange"},
    "MINRES, cold": {"color": "tab:green", "linestyle": "--"},
    "MINRES, warm": {"color": "tab:green"},
    "CG, cold": {"color": "tab:blue", "linestyle": "--"},
    "CG, warm": {"color": "tab:blue"},
    "CG, warm, 16 pairs": {"color": "tab:red", "linewidth": 2},
}


def plot(results: dict[str, list[Entrant]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(12, 4.8), sharey=True, layout="constrained")
    for axis, (name, measured) in zip(axes, results.items(), strict=True):
        by_name = {entrant.name: entrant for entrant in measured}
        for solver, style in STYLES.items():
            hvps = by_name[solver].hvps
            axis.plot(hvps.keys(), hvps.values(), label=solver, **{"linewidth": 1.3, **style})
        axis.set(yscale="log", xlabel="ul step", title=name.split(" on ")[0])
        axis.axhline(CAP, color="gray", linewidth=0.8)
        axis.annotate("cap", (0, CAP), xytext=(0, 3), textcoords="offset points", color="gray")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("hvps until the hypergradient is within 1%")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write trajectory.md and trajectory.png to this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = Page()
    page.tell(
        "# Hessian-vector products that keep the hypergradient within 1%, along 100 ul steps",
        "",
        f"{machine()}: "
        "`python benchmarks/trajectory.py --output benchmarks/results`, whose docstring says how they are counted.",
        f'">": not within 1% by {CAP} steps, counted as that many. "pairs": `preconditioner_memory`.',
        "",
    )
    builders = (
        logistic_regression,
        partial(mlp, "2. MLP 784-64-10 on Fashion-MNIST, 50,890 weights, float32, full batches", 1000, 1000, 1000, 0.3),
        partial(mlp, "3. The same MLP, new minibatches of 500 at each ul step", 10000, 5000, 500, 1.0),
    )
    results = {}
    for build in builders:
        torch.manual_seed(0)
        problem = build()
        measured, residuals = entrants(problem), []
        observers = {"1": [], "2": [GaussNewton(), Undamped()], "3": [Noise(problem)]}[problem.name[0]]
        started = time.process_time()
        for point in trajectory(problem):
            residuals.append(point.relative_residual)
            for entrant in measured:
                entrant.measure(point)
            for observer in observers:
                observer(point)
        report(page, problem, measured, residuals)
        for observer in observers:
            page.tell(f"### {observer.title}", "", observer.note, "")
            page.head(*observer.head)
            for row in observer.rows():
                page.row(*row)
            page.tell("")
        print(f"({time.process_time() - started:.0f} s of CPU time)\n", flush=True)
        results[problem.name] = measured
    if arguments.output:
        page.write(arguments.output / "trajectory.md")
        plot({name: results[name] for name in list(results)[:2]}, arguments.output / "trajectory.png")


if __name__ == "__main__":
    main()
