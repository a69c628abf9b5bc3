import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.support.broken import Broken, clamped, first_weight, flipped, seen_by, settings, wrong
from tests.support.problems import F64, Values
from tests.support.working import SETTINGS, D, ll_objective, split, ul_objective, working
from tune_implicit import BilevelProblem, State
from tune_implicit.checks.findings import CheckReport, Level
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.training import look_at_training


def with_l1(state: State) -> Tensor:
    return ul_objective(state) + 0.5 * state.ul_model.log_l2.exp().mean() * state.ll_model[0].weight.abs().sum()


def leaves_eval_on(state: State) -> Tensor:
    loss = ll_objective(state)
    state.ll_model.eval()
    return loss


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 1), nn.Dropout(0.1)).to(F64)


class DroppedPenalties(Values):
    def __init__(self) -> None:
        super().__init__(log_l2=torch.full((D,), -3.0, dtype=F64))
        self.dropout = nn.Dropout(0.5)

    def forward(self) -> Tensor:
        return self.dropout(self.log_l2.exp())


def leaky_ul_model() -> BilevelProblem:
    def objective(state: State) -> Tensor:
        penalty = (state.ul_model() * state.ll_model[0].weight.square()).sum()
        state.ul_model.eval()
        return ul_objective(state) + penalty

    return working(ul_model=DroppedPenalties(), ll_objective=objective)


BROKEN = {
    "ll training diverges": Broken(
        "training-diverges", partial(working, ll_optimizer=torch.optim.SGD), settings(ll_learning_rate=5.0)
    ),
    "a ul loss that is NaN where training ends": Broken(
        "non-finite", partial(working, ul_objective=lambda s: ul_objective(s) + 0.001 * (0.6 - first_weight(s)).log())
    ),
    "a metric that is NaN": Broken("non-finite", partial(working, metrics={"mine": lambda s: math.nan})),
    "ll not at a minimum": Broken(
        "not-at-minimum",
        partial(working, ll_optimizer=torch.optim.SGD),
        settings(ll_steps=1, ul_steps=5, ll_learning_rate=1e-4),
    ),
    "an L1 penalty": Broken(
        "not-smooth",
        lambda: working(ll_objective=with_l1, ul_model=Values(log_l2=torch.zeros(D, dtype=F64))),
        settings(ll_steps=20),
    ),
    "weights that are projected": Broken("not-smooth", partial(working, ll_optimizer=clamped), level=Level.WARNING),
    "an objective that leaves evaluation mode on": Broken(
        "mode-leak", lambda: working(ll_model=with_dropout(), ll_objective=leaves_eval_on)
    ),
    "an objective that leaves the ul model in evaluation mode": Broken("mode-leak", lambda: leaky_ul_model()),
    "ul loss of the wrong sign": Broken("wrong-sign", partial(working, ul_objective=lambda s: -ul_objective(s))),
    "an ll model that generalises badly": Broken(
        "wrong-sign",
        partial(working, ll_objective=lambda s: ll_objective(s) + 1e-9 * s.data.sum(), validate_data=flipped(split(1))),
        level=Level.WARNING,
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_found_by_name(broken: Broken) -> None:
    assert wrong(broken.seen_by(look_at_training)) == {broken.finding: broken.level}


def test_training_to_a_minimum_is_well() -> None:
    report = seen_by(look_at_training, working())
    (finding,) = report.findings
    assert (finding.name, finding.level) == ("training", Level.OK)
    assert report.figures["ll_step_s"] > 0
    assert report.figures["stationarity"] < 1e-4


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"ll_steps": 2, "ul_steps": 20, "warmup_ll_steps": 60}, 100),
        ({"ll_steps": 0, "warmup_ll_steps": 100}, 100),
        ({"ll_steps": 11, "ul_steps": 100}, 1000),
        ({"ll_steps": 0}, 0),
    ],
    ids=str,
)
def test_it_trains_as_long_as_a_trial_but_no_more_than_a_thousand_steps(change: dict[str, int], steps: int) -> None:
    assert (
        seen_by(look_at_training, working(), settings(**change)).findings[-1].message.startswith(f"{steps} ll steps:")
    )


def test_the_ll_model_is_left_trained_and_the_ul_values_where_they_were() -> None:
    problem = working()
    fixed = FixedProblem.of(problem, SETTINGS)
    look_at_training(fixed, CheckReport())
    assert fixed.value("ll") < 0.2 < FixedProblem.of(problem, SETTINGS).value("ll")
    assert torch.equal(fixed.ul_params()["log_l2"], problem.ul_model.log_l2)


def test_what_a_trial_does_not_train_is_not_judged_by_its_minimum() -> None:
    model = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 1)).to(F64)
    fixed = FixedProblem.of(working(ll_model=model), settings(ll_steps=0))
    report = CheckReport()
    look_at_training(fixed, report)
    assert wrong(report) == {}
    for name, param in fixed.problem.ll_model.named_parameters():
        assert torch.equal(param, model.get_parameter(name))


@pytest.mark.parametrize("batches", [1, 6])
def test_the_noise_of_dropout_and_of_batches_is_no_kink(batches: int) -> None:
    train_data = [batch for seed in range(batches) for batch in split(10 + seed)]
    assert wrong(seen_by(look_at_training, working(ll_model=with_dropout(), train_data=train_data))) == {}


def test_modes_that_an_objective_sets_and_puts_back_are_no_leak() -> None:
    def in_evaluation(state: State) -> Tensor:
        state.ll_model.eval()
        loss = ll_objective(state)
        state.ll_model.train()
        return loss

    assert wrong(seen_by(look_at_training, working(ll_model=with_dropout(), ll_objective=in_evaluation))) == {}


def test_the_metric_that_is_not_finite_is_named_with_its_split() -> None:
    problem = working(metrics={"good": lambda s: 1.0, "mine": lambda s: math.inf}, select_data=None)
    (fault,) = seen_by(look_at_training, problem).faults
    assert fault.message == "`mine` is inf on `validate_data`: every trial would fail."


# ---- a step of the user's own


def own_step(state: State, optimizer: torch.optim.Optimizer, factor: float = 1.0, steps: bool = True) -> Tensor:
    optimizer.zero_grad()
    loss = factor * ll_objective(state)
    loss.backward()
    if steps:
        optimizer.step()
    return loss


def test_a_step_that_lowers_the_ll_objective_is_fine() -> None:
    assert wrong(seen_by(look_at_training, working(ll_step=own_step))) == {}


@pytest.mark.parametrize(
    ("changes", "finding", "level"),
    [({"factor": 1.1}, "ll-step-loss", Level.WARNING), ({"steps": False}, "ll-step-idle", Level.FAULT)],
)
def test_a_step_of_another_loss_or_of_none_is_told(changes: dict, finding: str, level: Level) -> None:
    found = wrong(seen_by(look_at_training, working(ll_step=partial(own_step, **changes))))
    assert found[finding] == level
