from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from tests.support.problems import Values, compute, quadratic

PROBLEM = quadratic().problem


def one() -> torch.Tensor:
    return torch.ones(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ul_model": [1]}, TypeError, "`ul_model` must be a torch.nn.Module, got list"),
        ({"ll_model": one()}, TypeError, "`ll_model` must be a torch.nn.Module, got Tensor"),
        ({"ul_model": Values()}, ValueError, "`ul_model` has no parameter to train. Register its values as"),
        ({"ll_model": Values(w=one()).requires_grad_(False)}, ValueError, "`ll_model` has no parameter to train"),
        ({"ul_model": PROBLEM.ll_model}, ValueError, "share the parameter 'w'.*give each model its own"),
        ({"ul_model": Values(z=one() * 1j)}, TypeError, "parameter 'z' must be real and floating, got torch.complex64"),
        (
            {"ul_model": Values(l=one().to("meta"))},
            ValueError,
            r"on one device, got `ul_model`'s 'l' on meta, `ll_model`'s 'w' on cpu\. Move both models",
        ),
        ({"ul_objective": None}, TypeError, "`ul_objective` must be callable, got NoneType"),
        ({"ll_objective": 3}, TypeError, "`ll_objective` must be callable, got int"),
        ({"ll_optimizer": "adam"}, TypeError, "`ll_optimizer` must be callable, got str"),
        ({"ul_optimizer": "adam"}, TypeError, "`ul_optimizer` must be callable, got str"),
        ({"project": 1}, TypeError, "`project` must be callable, got int"),
        ({"train_data": []}, ValueError, "`train_data` must hold at least one batch, got none"),
        ({"validate_data": ()}, ValueError, "`validate_data` must hold at least one batch, got none"),
        ({"select_data": []}, ValueError, "`select_data` must hold at least one batch, got none"),
        ({"train_data": iter([])}, TypeError, "`train_data` must be a re-iterable of .* got list_iterator"),
        (
            {"metrics": [len]},
            TypeError,
            r"`metrics` must be a mapping of .*, or one callable\(states\), got list",
        ),
        ({"metrics": {"accuracy": 0.5}}, TypeError, r"`metrics\['accuracy'\]` must be callable, got float"),
        ({"metrics": {"ul_step": len, "hvps": len, "mine": len}}, ValueError, "itself reports, got hvps, ul_step"),
    ],
)
def test_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(PROBLEM, **change)


def test_a_problem_needs_no_select_data() -> None:
    assert replace(PROBLEM, select_data=None).select_data is None


def test_trials_are_compared_on_select_data_or_without_it_on_validate_data() -> None:
    assert PROBLEM.selected_on == "select_data"
    assert replace(PROBLEM, select_data=None).selected_on == "validate_data"


def test_a_problem_makes_what_computes_its_hypergradients() -> None:
    case = quadratic()
    implicit = case.problem.implicit(solver="cg", ll_learning_rate=0.1, k=20)
    assert (implicit.settings.solver, implicit.settings.k) == ("cg", 20)
    torch.testing.assert_close(compute(implicit, case.problem).gradients, case.expected)


def test_a_problem_cannot_be_changed_once_it_is_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        PROBLEM.train_data = []
