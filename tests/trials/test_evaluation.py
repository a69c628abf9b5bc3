import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import toy
from tests.support.noisy import assert_same_bits, random_problem
from tests.support.problems import F64
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.rng import get_rng_state
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.evaluation import evaluate, mean_loss

PROBLEM = toy.problem({})
((X, Y),) = PROBLEM.train_data


def length(state: State) -> float:
    return float(len(state.data))


def test_evaluation_weighs_batches_by_their_size() -> None:
    cut = [(X[:5], Y[:5]), (X[5:6], Y[5:6])]
    (whole,) = evaluate(PROBLEM, "x", [(X[:6], Y[:6])], {"loss": toy.ul_objective}).values()
    (parts,) = evaluate(PROBLEM, "x", cut, {"loss": toy.ul_objective}).values()
    assert parts == pytest.approx(whole)


@pytest.mark.parametrize(
    ("target_of", "expected"),
    [
        (lambda x: x, (3 * 3 + 1 * 1) / 4),
        (lambda x: {"none": None, "of all": torch.ones(()), "of each": x}, (3 * 3 + 1 * 1) / 4),
        (lambda x: None, (3 * 3 + 1 * 1) / 4),
        (lambda x: x.repeat(len(x), 1), (9 * 3 + 1 * 1) / 10),
    ],
    ids=["a target", "nested targets", "no target: the data", "more targets than data"],
)
def test_the_size_of_a_batch_is_that_of_its_targets_or_else_of_its_data(
    target_of: Callable[[Tensor], object], expected: float
) -> None:
    split = [(x, target_of(x)) for x in (X[:3], X[:1])]
    assert evaluate(PROBLEM, "x", split, {"length": length})["length"] == pytest.approx(expected)


def test_batches_without_any_size_weigh_the_same() -> None:
    split = [(torch.full((), value), None) for value in (1.0, 4.0)]
    assert evaluate(PROBLEM, "x", split, {"mean": lambda s: s.data}) == {"mean": 2.5}


def test_evaluation_leaves_no_trace() -> None:
    problem = random_problem()
    problem.ll_model[2].eval()
    before = torch.get_rng_state()
    measured = evaluate(problem, "train_data", problem.train_data, {"mode": lambda s: float(s.ll_model.training)})
    assert measured == {"mode": 0.0}
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in problem.ll_model] == [True, True, False, True, True]
    assert problem.ll_model[1].num_batches_tracked == 0


def test_evaluation_leaves_no_trace_where_a_metric_raises_either() -> None:
    def raising(state: State) -> float:
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        raise ZeroDivisionError

    problem, before = random_problem(), get_rng_state()
    with pytest.raises(ZeroDivisionError):
        evaluate(problem, "train_data", problem.train_data, {"mine": raising})
    assert_same_bits(get_rng_state(), before)
    assert all(module.training for module in problem.ll_model.modules())


def test_metrics_are_called_without_gradients_and_with_both_models_in_evaluation_mode() -> None:
    seen = []

    def metric(state: State) -> float:
        seen.append((torch.is_grad_enabled(), state.ul_model.training, state.ll_model.training))
        return 0.0

    evaluate(PROBLEM, "x", [(X, Y)], {"one": metric, "two": metric})
    assert seen == [(False, False, False)] * 2
    assert PROBLEM.ul_model.training


@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, torch.tensor(2), torch.full((1, 1), 2.0, dtype=F64), np.float32(2)]
)
def test_a_number_of_any_kind_is_a_metric(value: object) -> None:
    measured = evaluate(PROBLEM, "x", [(X, Y)], {"mine": lambda s: value})
    assert measured == {"mine": 2.0}
    assert type(measured["mine"]) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(3), r"shape \(3,\)"), (torch.ones(0), r"shape \(0,\)"), (None, "got NoneType"), ([1.0], "got list")],
)
def test_metric_must_be_a_number(value: object, message: str) -> None:
    with pytest.raises(InvalidTypeError, match=f"`mine` must return a number, .*{message}"):
        evaluate(PROBLEM, "x", [(X, Y)], {"mine": lambda s: value})


def test_messages_name_the_split() -> None:
    with pytest.raises(InvalidValueError, match="`select_data` must hold at least one batch, got none"):
        evaluate(PROBLEM, "select_data", iter(()), {"loss": toy.ul_objective})


def test_loss_over_several_ll_problems_is_their_mean() -> None:
    other = toy.problem({"seed": 1})
    parts = [(problem, problem.ll_model) for problem in (PROBLEM, other)]
    each = [evaluate(p, "x", p.train_data, {"loss": p.ll_objective}, model)["loss"] for p, model in parts]
    assert each[0] != each[1]
    assert mean_loss(parts, "train_data", "ll_objective") == pytest.approx(sum(each) / 2)
