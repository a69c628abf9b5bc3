from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.problems import Values, quadratic
from tune_implicit.hypergradients.state import State, check_models, named_trainable
from tune_implicit.trials.record import RESERVED

PROBLEM = quadratic().problem


def test_state_reads_by_attribute_and_by_name() -> None:
    state = State(1, 2, PROBLEM.ul_model, PROBLEM.ll_model)
    assert [state[name] for name in ("data", "target", "ul_model", "ll_model")] == [
        state.data,
        state.target,
        state.ul_model,
        state.ll_model,
    ]
    # A method's name is no field's name.
    for name in ("labels", "__class__"):
        with pytest.raises(KeyError, match="a state holds data, target, ul_model, ll_model"):
            state[name]


def test_named_trainable_takes_a_tied_parameter_once_and_a_frozen_one_never() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert list(named_trainable(model)) == ["0.weight", "0.bias", "1.bias"]


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
        ({"metrics": [len]}, TypeError, r"`metrics` must be a mapping of names to callable\(state\), got list"),
        ({"metrics": {"accuracy": 0.5}}, TypeError, r"`metrics\['accuracy'\]` must be callable, got float"),
        ({"metrics": {"ul_step": len, "hvps": len, "mine": len}}, ValueError, "itself reports, got hvps, ul_step"),
    ],
)
def test_messages(change, error, message) -> None:
    with pytest.raises(error, match=message):
        replace(PROBLEM, **change)


def test_a_problem_needs_no_select_data() -> None:
    assert replace(PROBLEM, select_data=None).select_data is None


def test_frozen_parameters_may_lie_anywhere_and_be_shared() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    ul_model, ll_model = (Values(trained=one()) for _ in range(2))
    ul_model.frozen = ll_model.frozen = frozen
    check_models(ul_model, ll_model)


def test_design_names_of_the_metrics_are_reserved() -> None:
    design = "select_loss validate_loss train_loss hypergradient_norm residual_norm relative_residual solver_steps"
    design += " solver_status skipped_ul_steps hvps gradient_evaluations ul_step ll_step completed"
    assert set(design.split()) <= RESERVED
