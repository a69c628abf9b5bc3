import math

import pytest
import torch
from torch import Tensor

from tune_implicit.hypergradients.solvers.solution import Attempt, Hvp, Solution, Solver, Status

ANSWERS = {Status.CONVERGED, Status.MAX_STEPS, Status.STAGNATED}


# ---- how a solve ended


@pytest.mark.parametrize("status", Status)
def test_three_endings_are_answers_and_the_others_failures(status: Status) -> None:
    assert status.failed is (status not in ANSWERS)


@pytest.mark.parametrize("status", Status)
def test_every_ending_is_explained_in_sentences(status: Status) -> None:
    assert status.explanation[0].isupper()
    assert status.explanation.endswith(".")


@pytest.mark.parametrize("status", [Status.DIVERGED, Status.NEGATIVE_CURVATURE])
def test_a_failure_that_settings_can_mend_names_them(status: Status) -> None:
    assert "`" in status.explanation


def test_a_status_is_written_as_its_value() -> None:
    assert all(Status(status.value) is status and status.value == status.name.lower() for status in Status)


# ---- the solution


@pytest.mark.parametrize("status", Status)
def test_an_ending_that_is_an_answer_answers_unless_nothing_was_found(status: Status) -> None:
    some, none = (Solution(torch.tensor([value, 0.0]), status, 3, 0.5) for value in (1.0, 0.0))
    assert some.answers is (status in ANSWERS)
    assert none.answers is (status is Status.CONVERGED)  # zero is the solution then


def test_a_multiple_of_a_solution_is_that_of_the_multiple_of_b() -> None:
    solution = Solution(
        torch.tensor([1.0, -2.0]), Status.MAX_STEPS, 3, 0.5, 0.1, 2.0, 0.3, (Attempt("cg", Status.DIVERGED, 7),)
    )
    twice = solution.times(2.0)
    assert torch.equal(twice.v, torch.tensor([2.0, -4.0]))
    assert twice.residual_norm == 1.0
    # What belongs to `H`, or to the way there, is the same.
    for name in ("status", "steps", "lambda_min", "lambda_max", "damping", "attempts"):
        assert getattr(twice, name) == getattr(solution, name)
    assert torch.equal(solution.v, torch.tensor([1.0, -2.0]))


def test_once_a_solution_is_itself() -> None:
    solution = Solution(torch.ones(2), Status.CONVERGED, 1, 0.0)
    assert solution.times(1.0) is solution


def test_what_is_not_known_is_not_a_number() -> None:
    solution = Solution(torch.ones(2), Status.MAX_STEPS, 0, math.nan)
    assert math.isnan(solution.lambda_min)
    assert math.isnan(solution.lambda_max)
    assert math.isnan(solution.times(2.0).residual_norm)
    assert (solution.damping, solution.attempts) == (0.0, ())


# ---- the solver


def test_whatever_solves_is_a_solver() -> None:
    class Solves:
        def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
            return Solution(b, Status.CONVERGED, 0, 0.0)

    assert isinstance(Solves(), Solver)


@pytest.mark.parametrize("other", ["cg", None, object(), lambda hvp, b: b], ids=["name", "None", "object", "function"])
def test_what_does_not_solve_is_none(other: object) -> None:
    assert not isinstance(other, Solver)
