from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.noisy import assert_same_bits
from tests.support.problems import F64, Values
from tests.support.working import LearningRate, finish, working
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.start import start_from
from tune_implicit.trials.trial import Trial

CONFIG = {"ul_steps": 4, "ul_steps_per_report": 2, "ll_steps": 3, "k": 2, "ll_learning_rate": 0.05}

KNOWN = {"log_l2": torch.tensor([-1.0, 0.5, 2.0, -4.0], dtype=F64)}


def problem(config: dict[str, Any]) -> Any:
    return working()


def started(initial: Any, **config: Any) -> Trial:
    return Trial(problem, CONFIG | config, initial_ul_state=initial)


def test_trial_starts_from_what_is_known() -> None:
    trial = started(KNOWN)
    assert_same_bits(trial.problem.ul_model.state_dict(), OrderedDict(KNOWN))
    assert trial.trainer.ul_moved == 0
    assert trial.trainer.ul_scale == pytest.approx(KNOWN["log_l2"].square().mean().sqrt().item())
    assert finish(trial)["completed"]


def test_without_it_a_trial_starts_from_what_the_problem_was_made_with() -> None:
    first, second = started(None), started(working().ul_model.state_dict())
    assert finish(first) == finish(second)
    assert_same_bits(second.trainer.state_dict()["ul_model"], first.trainer.state_dict()["ul_model"])


def test_start_loss_and_random_state_are_those_of_a_problem_made_with_it() -> None:
    def made(config: dict[str, Any]) -> Any:
        return working(ul_model=Values(**KNOWN))

    expected, got = Trial(made, CONFIG), started(KNOWN)
    assert finish(got) == finish(expected)
    assert_same_bits(got.problem.ll_model.state_dict(), expected.problem.ll_model.state_dict())


def test_tensors_of_the_caller_are_left_alone() -> None:
    given = {"log_l2": KNOWN["log_l2"].clone().requires_grad_()}
    finish(started(given))
    assert torch.equal(given["log_l2"], KNOWN["log_l2"])
    assert given["log_l2"].grad is None


def test_parameters_stay_the_same_of_their_own_dtype() -> None:
    model = nn.BatchNorm1d(2)
    before = {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    start_from(model, {name: torch.full(value.shape, 3.0, dtype=F64) for name, value in model.state_dict().items()})
    after = {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    assert after == before
    assert (model.weight.dtype, model.num_batches_tracked.dtype) == (torch.float32, torch.int64)
    assert [value.flatten().tolist() for value in model.state_dict().values()] == [[3.0] * 2] * 4 + [[3]]


def test_what_a_trial_has_kept_is_what_another_starts_from(tmp_path: Path) -> None:
    first = started(None)
    finish(first)
    first.save(tmp_path / "trial.pt")
    kept = read_checkpoint(tmp_path / "trial.pt")["kept"]["ul_model"]
    assert_same_bits(started(kept).problem.ul_model.state_dict(), kept)


def test_checkpoint_that_is_loaded_takes_its_place(tmp_path: Path) -> None:
    trial, resumed = started(None), started(KNOWN)
    trial.advance()
    trial.save(tmp_path / "trial.pt")
    finish(trial)
    expected = trial.record
    resumed.load(tmp_path / "trial.pt")
    finish(resumed)
    assert resumed.record == expected
    assert resumed.history == trial.history


# ---- what does not fit


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


@pytest.mark.parametrize(
    ("given", "mistakes"),
    [
        ({}, "none of 'log_l2', 'log_lr'"),
        ({"log_l2": zeros(4)}, "none of 'log_lr'"),
        ({"log_l2": zeros(4), "log_lr": zeros(), "l": zeros(), "m": zeros()}, "unknown 'l', 'm'"),
        ({"log_l2": zeros(3), "log_lr": zeros(1)}, r"'log_l2' of shape \(3,\) for \(4,\); 'log_lr' of shape \(1,\)"),
        ({"log_l2": zeros(4, 1), "l": 3}, r"none of 'log_lr'; unknown 'l'; 'log_l2' of shape \(4, 1\) for \(4,\)"),
    ],
    ids=str,
)
def test_names_and_shapes_are_checked_before_anything_is_set(given: dict[str, Any], mistakes: str) -> None:
    message = f"`initial_ul_state` must have the names and shapes of the ul model's state, got {mistakes}.*Pass `ul_st"
    model = LearningRate()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidValueError, match=message):
        start_from(model, given)
    assert_same_bits(dict(model.state_dict()), before)


def test_trial_tells_what_does_not_fit() -> None:
    with pytest.raises(InvalidValueError, match="`initial_ul_state` must have the names and shapes"):
        started({"log_l2": zeros(5)})


@pytest.mark.parametrize(
    ("given", "got"),
    [([zeros(4)], "list"), (zeros(4), "Tensor"), ({"log_l2": [0.0] * 4}, "list for 'log_l2'")],
    ids=str,
)
def test_what_is_no_mapping_of_tensors(given: object, got: str) -> None:
    with pytest.raises(InvalidTypeError, match=f"`initial_ul_state` must be a mapping of names to tensors, got {got}"):
        started(given)
