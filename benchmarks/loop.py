"""What a trial's loop costs: an MLP trained by a trainer without options, and with its ul steps.

    python benchmarks/loop.py [--against ANOTHER_CHECKOUT] [--rounds 9] [--output FILE]

*Plain training* against the loop written by hand, in turns. With ``--against``, both kinds of trial against the same in
another checkout, each round in a process of its own on both trees, in turns. All of it CPU time of one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Page, machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tune_implicit import BilevelProblem, BilevelTrainer, ImplicitSettings, State

STEPS, LL_STEPS = 60, 40
KINDS = {"default trial": {}, "plain training": {"ll_steps": LL_STEPS, "ul_learning_rate": 0.0}}


class Penalties(nn.Module):
    """The logarithm of an L2 penalty for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.log_l2 = nn.Parameter(torch.full((64,), -3.0))


def ul_objective(state: State) -> Tensor:
    return cross_entropy(state.ll_model(state.data), state.target)


def ll_objective(state: State) -> Tensor:
    return ul_objective(state) + (state.ul_model.log_l2.exp() * state.ll_model[0].weight.square()).sum()


def problem() -> BilevelProblem:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(4)]
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    splits = {"train_data": batches, "validate_data": batches}
    return BilevelProblem(
        ul_model=Penalties(), ll_model=network, ul_objective=ul_objective, ll_objective=ll_objective, **splits
    )


def trial(settings: dict) -> Callable[[], None]:
    """Return what takes the ul steps of a trial."""
    trainer = BilevelTrainer(problem(), ImplicitSettings(**settings))
    return lambda: [trainer.step() for _ in range(STEPS)]


def by_hand() -> Callable[[], None]:
    """Return what takes the ll steps of plain training."""
    made = problem()
    optimizer = torch.optim.Adam(made.ll_model.parameters(), lr=ImplicitSettings().ll_learning_rate)

    def run() -> None:
        for step in range(STEPS * LL_STEPS):
            data, target = made.train_data[step % 4]
            loss = ll_objective(State(data, target, made.ul_model, made.ll_model))
            optimizer.zero_grad()
            loss.backward(inputs=list(made.ll_model.parameters()))
            optimizer.step()

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def seconds_in(tree: Path) -> dict[str, float]:
    """Return the seconds of each kind of trial with the package of another checkout."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help="print the seconds of one round as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds(trial({}))
    if arguments.one:
        print(json.dumps({name: seconds(trial(settings)) for name, settings in KINDS.items()}))
        return
    ratios: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        name = "plain training over the loop by hand"
        ratios.setdefault(name, []).append(seconds(trial(KINDS["plain training"])) / seconds(by_hand()))
        if arguments.against:
            theirs, ours = seconds_in(arguments.against), seconds_in(Path(__file__).parents[1])
            for kind, taken in ours.items():
                ratios.setdefault(f"{kind} over that of the other checkout", []).append(taken / theirs[kind])
    page = Page()
    page.tell("# What a trial's loop costs", "", f"`benchmarks/loop.py`, {machine()}, {arguments.rounds} rounds.", "")
    page.head("CPU time of", "median ratio", "least and largest")
    for name, each in ratios.items():
        page.row(name, f"{statistics.median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}")
    if arguments.output:
        page.write(arguments.output)


if __name__ == "__main__":
    main()
