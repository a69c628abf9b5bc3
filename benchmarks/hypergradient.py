"""What a hypergradient costs, against the shortest version one would write by hand.

    python benchmarks/hypergradient.py [--output FILE] [--device cuda] [--dtype bfloat16]

By hand it is: one gradient of the ul loss, one gradient of the ll loss with ``create_graph=True``, k calls of
``autograd.grad`` on lists of tensors, one mixed product; no checks, no certificate, nothing restored. ``Implicit``
does all that on top. Both take k hvps.

*Time.* Rounds of A B, B A, A B, ... on one thread, the first two for warming up. A ratio is the median over
rounds of the ratio within a round, so that a machine that slows down slows both. That both compute the same
hypergradient is the table's last column.

*Memory.* The peak of tensor memory during one call, above what was there before it. On a CPU it is read from the
allocator's own running total, which ``torch.profiler`` records at each allocation and release; on a GPU it is
``max_memory_allocated``. Work space that a library allocates for itself is not seen, and is the same for both.

*Problems.* Ridge in float64, in which it is checked against the closed form, and in float32; there and in logistic
regression a product takes some 0.2 ms, so that what a call costs beside its products weighs most. The networks in
float32 or bfloat16: all is then done in that by hand, while ``Implicit`` solves in float32. The ul values are log-L2
penalties, so large that the Hessian is positive definite; the tolerance is 0, so that all k iterations are taken.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from common import LogL2, Page, Problem, machine
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.state import State

K = 20
WARM_UP_ROUNDS = 2
SOLVERS = ("neumann", "cg")
Gradients = list[Tensor]
Run = Callable[[], Gradients]


@dataclass
class RandomProblem(Problem):
    """One ll model on random data, and the step size of its Neumann series."""

    train: tuple[Tensor, Tensor]
    validate: tuple[Tensor, Tensor]
    step_size: float
    rounds: int
    attention: bool = False

    def to(self, dtype: torch.dtype) -> "RandomProblem":
        """Convert the models and the data, though not the numbers of classes, to ``dtype``."""
        self.name += f", {str(dtype).removeprefix('torch.')}"
        for model in (self.ll_model, self.ul_model):
            model.to(dtype)
        self.train, self.validate = (
            tuple(x.to(dtype) if x.is_floating_point() else x for x in batch) for batch in (self.train, self.validate)
        )
        return self


def ridge() -> RandomProblem:
    ll_model = nn.Linear(500, 1, bias=False)
    truth, scales = torch.randn(500, 1), torch.logspace(-1, 0, 500)  # or CG would converge before k steps
    train, validate = (
        (x, x @ truth + torch.randn(len(x), 1)) for x in (torch.randn(n, 500) * scales for n in (2000, 500))
    )
    return RandomProblem("ridge", ll_model, LogL2(ll_model, -4.0), mse_loss, train, validate, 0.1, 200)


def logistic() -> RandomProblem:
    ll_model = nn.Linear(64, 10, bias=False)
    scales = torch.logspace(-1, 0.5, 64)
    train, validate = ((x * scales, y) for x, y in (classes(1000, 64), classes(1000, 64)))
    return RandomProblem("logistic", ll_model, LogL2(ll_model, -4.0), cross_entropy, train, validate, 1.0, 200)


def mlp(per: str = "entry") -> RandomProblem:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    ll_model = nn.Sequential(*layers)
    train, validate = (classes(128, 784), classes(128, 784))
    return RandomProblem("MLP", ll_model, LogL2(ll_model, -1.0, per), cross_entropy, train, validate, 0.1, 20)


def cnn() -> RandomProblem:
    ll_model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 320), nn.ReLU(), nn.Linear(320, 10),
    )  # fmt: skip
    train, validate = (classes(64, 1, 28, 28), classes(64, 1, 28, 28))
    return RandomProblem("CNN", ll_model, LogL2(ll_model, 0.6, "tensor"), cross_entropy, train, validate, 0.1, 20)


def transformer() -> RandomProblem:
    layer = nn.TransformerEncoderLayer(128, 4, dim_feedforward=512, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ll_model = nn.Sequential(nn.Unflatten(0, (32, 32)), encoder, nn.Flatten(0, 1), nn.Linear(128, 10))
    train, validate = (classes(1024, 128), classes(1024, 128))  # of each token, by its embedding
    ul_model = LogL2(ll_model, -0.5, "tensor")
    return RandomProblem("transformer", ll_model, ul_model, cross_entropy, train, validate, 0.1, 20, attention=True)


def classes(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randint(10, shape[:1])


def packaged(problem: RandomProblem, solver: str) -> Run:
    """Return ``Implicit.compute_gradients`` as a function without arguments."""
    implicit = Implicit(
        problem.ul_objective, problem.ul_model, problem.ll_objective, problem.ll_model, problem.step_size, K,
        tolerance=0.0, solver=solver,
    )  # fmt: skip
    train_data, train_target = problem.train

    def run() -> Gradients:
        result = implicit.compute_gradients(*problem.validate, train_data=train_data, train_target=train_target)
        if result.status.failed or result.solver_steps != K:
            raise RuntimeError(f"{problem.name}, {solver}: {result.status} after {result.solver_steps} of {K} steps.")
        problem.ul_model.zero_grad()
        return list(result.gradients.values())

    return run


def by_hand(problem: RandomProblem, solver: str) -> Run:
    """Return the same with nothing but autograd."""
    w, log_l2 = list(problem.ll_model.parameters()), list(problem.ul_model.parameters())
    solve = {"neumann": neumann_by_hand, "cg": cg_by_hand}[solver]

    def run() -> Gradients:
        b = grad(problem.ul_objective(State(*problem.validate, problem.ul_model, problem.ll_model)), w)
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if problem.attention else nullcontext():
            ll_loss = problem.ll_objective(State(*problem.train, problem.ul_model, problem.ll_model))
        first = grad(ll_loss, w, create_graph=True)
        v = solve(lambda p: grad(first, w, p, retain_graph=True), b, problem.step_size)
        return [-mixed for mixed in grad(first, log_l2, v)]

    return run


def neumann_by_hand(hvp: Callable, b: Gradients, step_size: float) -> Gradients:
    v, r = [step_size * x for x in b], b
    for _ in range(K):
        r = [x - step_size * y for x, y in zip(r, hvp(r), strict=True)]
        v = [x + step_size * y for x, y in zip(v, r, strict=True)]
    return v


def cg_by_hand(hvp: Callable, b: Gradients, _: float) -> Gradients:
    v, r, p = [torch.zeros_like(x) for x in b], b, b
    rr = dot(r, r)
    for _ in range(K):
        hp = hvp(p)
        alpha = rr / dot(p, hp)
        v = [x + alpha * y for x, y in zip(v, p, strict=True)]
        r = [x - alpha * y for x, y in zip(r, hp, strict=True)]
        rr, rr_previous = dot(r, r), rr
        p = [x + rr / rr_previous * y for x, y in zip(r, p, strict=True)]
    return v


def dot(a: Gradients, b: Gradients) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def relative_difference(got: Gradients, expected: Gradients) -> float:
    got, expected = (torch.cat([x.double().reshape(-1) for x in tensors]) for tensors in (got, expected))
    return (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).item()


def seconds(run: Run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Run, device: str) -> int:
    """Return the peak of tensor memory during ``run()``, above what is allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"]
    return max(change["args"]["Total Allocated"] for change in changes) - before


def compare(first: Run, second: Run, rounds: int, device: str) -> tuple[float, float, str]:
    """Return the median times of both in ms, and in words that of their ratio within a round with its quartiles."""
    times = []
    for turn in range(WARM_UP_ROUNDS + rounds):
        taken = {run: seconds(run, device) for run in ((first, second) if turn % 2 else (second, first))}
        if turn >= WARM_UP_ROUNDS:
            times.append((taken[first], taken[second]))
    first_ms, second_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    low, ratio, high = statistics.quantiles((a / b for a, b in times), n=4)
    return first_ms, second_ms, f"**{ratio:.2f}** ({low:.2f} to {high:.2f})"


def against_hand(problem: RandomProblem, device: str, page: Page) -> None:
    """Write one row of the first table per solver."""
    weights, values = (sum(x.numel() for x in m.parameters()) for m in (problem.ll_model, problem.ul_model))
    for solver in SOLVERS:
        ours, hand = packaged(problem, solver), by_hand(problem, solver)
        difference = relative_difference(ours(), hand())
        ours_ms, hand_ms, ratio = compare(ours, hand, problem.rounds, device)
        ours_mib, hand_mib = (peak_bytes(run, device) / 2**20 for run in (ours, hand))
        page.row(
            problem.name, f"{weights:,}", f"{values:,}", solver, f"{hand_ms:.1f}", f"{ours_ms:.1f}", ratio,
            f"{hand_mib:.2f}", f"{ours_mib:.2f}", f"**{ours_mib / hand_mib:.2f}**", f"{difference:.0e}",
        )  # fmt: skip


def against_one_value(many: RandomProblem, one: RandomProblem, device: str, page: Page) -> None:
    """Write one row of the second table per solver."""
    for solver in SOLVERS:
        columns = []
        for way in (packaged, by_hand):
            many_ms, one_ms, ratio = compare(way(many, solver), way(one, solver), many.rounds, device)
            columns += [f"{one_ms:.1f}", f"{many_ms:.1f}", ratio]
        page.row(many.name, solver, *columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the networks")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler prints its stages
    torch.set_num_threads(1)
    device, dtype, page = arguments.device, getattr(torch, arguments.dtype), Page()

    def built(build: Callable[..., RandomProblem], dtype: torch.dtype, **options: str) -> RandomProblem:
        torch.manual_seed(0)
        with torch.device(device):  # for the building alone: in it, each torch call costs more
            return build(**options).to(dtype)

    page.tell(
        f"# One hypergradient, k = {K}: `Implicit` against the shortest hand-written version",
        "",
        f"{machine(device)}.",
        "Ratios are ours over hand-written: of time, the median over interleaved rounds (and its quartiles).",
        "",
    )
    page.head(
        "problem", "ll parameters", "ul values", "solver", "by hand, ms", "ours, ms", "time ratio",
        "by hand, MiB", "ours, MiB", "memory ratio", "relative difference",
    )  # fmt: skip
    small = ((ridge, torch.float64), (ridge, torch.float32), (logistic, torch.float32))
    for build, precision in (*small, (mlp, dtype), (cnn, dtype), (transformer, dtype)):
        against_hand(built(build, precision), device, page)

    many, one = built(mlp, dtype), built(mlp, dtype, per="model")
    values = sum(x.numel() for x in many.ul_model.parameters())
    page.tell(
        "",
        f"Scaling in ul values: the same ll model with 1 of them and with {values:,}. Ratios are many over one.",
        "",
    )
    page.head(
        "problem", "solver", "ours at 1, ms", f"ours at {values:,}, ms", "ratio",
        "by hand at 1, ms", f"by hand at {values:,}, ms", "ratio",
    )  # fmt: skip
    against_one_value(many, one, device, page)
    if arguments.output:
        page.write(arguments.output)


if __name__ == "__main__":
    main()
