import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.working import working
from tune_implicit.trials.memory import memory_told
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.trial import TRIAL_FAILURES, Trial

# More than there are addresses.
TOO_MUCH = 2**50

CONFIG = {"ul_steps": 4, "ul_steps_per_report": 2, "ll_steps": 2, "k": 2}


def raising(error: Exception) -> Callable[[], None]:
    def raises() -> None:
        raise error

    return raises


RUNS_OUT = {
    "torch": lambda: torch.empty(TOO_MUCH),
    "numpy": lambda: np.empty(TOO_MUCH),
    "python": raising(MemoryError()),
    "windows": raising(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9")),
    "worker": raising(RuntimeError("Caught RuntimeError in worker 0: DefaultCPUAllocator: can't allocate memory: ...")),
}
each_way = pytest.mark.parametrize("runs_out", RUNS_OUT.values(), ids=RUNS_OUT)


@each_way
def test_memory_that_runs_out_is_told_alike(runs_out: Callable[[], object]) -> None:
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"(?s)^The memory of the CPU ran out: .+\. Take smaller b") as told,
        memory_told(),
    ):
        runs_out()
    assert type(told.value) in TRIAL_FAILURES
    assert isinstance(told.value.__cause__, MemoryError | RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Storage size calculation overflowed"),
        NotImplementedError("no memory"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
def test_any_other_error_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as told, memory_told():
        raise error
    assert told.value is error


def test_what_needs_no_more_than_there_is_goes_on() -> None:
    with memory_told():
        assert torch.empty(2).shape == (2,)


# ---- in a trial


def broken(runs_out: Callable[[], object], part: str) -> Trial:
    """A trial in which memory runs out: as the problem is made, or in an objective or a metric of its."""

    def fails(*arguments: Any) -> Any:
        runs_out()

    def problem(config: dict[str, Any]) -> BilevelProblem:
        if part == "problem":
            fails()
        return replace(working(), **{part: {"mine": fails} if part == "metrics" else fails})

    return Trial(problem, CONFIG)


@each_way
def test_trial_whose_problem_does_not_fit(runs_out: Callable[[], object]) -> None:
    with pytest.raises(TRIAL_FAILURES, match="memory of the CPU ran out"):
        broken(runs_out, "problem")


@each_way
@pytest.mark.parametrize("part", ["ll_objective", "ul_objective", "metrics"])
def test_trial_that_runs_out_of_memory_fails(part: str, runs_out: Callable[[], object]) -> None:
    trial = broken(runs_out, part)
    with pytest.raises(TRIAL_FAILURES, match="memory of the CPU ran out") as told:
        trial.advance()
    record = trial.failure_record(str(told.value))
    assert (record["completed"], record["troubles"]) == (False, "failed")


def test_mistake_in_an_objective_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="a mistake") as told:
        broken(raising(RuntimeError("a mistake")), "ll_objective").advance()
    assert not isinstance(told.value, TRIAL_FAILURES)


def test_signature_of_a_trial_is_its_own() -> None:
    assert list(inspect.signature(Trial).parameters)[:2] == ["problem", "config"]
