import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.byhand import PLAIN, by_hand, loss_and_gradient, net, regression, shuffled, trained
from tests.support.noisy import assert_same_bits
from tests.support.problems import F64, compute
from tests.support.systems import saved_and_loaded
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.trials.averaging import Averaging
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer
from tune_implicit.trials.trial import Trial


def ema_of(ll_model: nn.Module) -> AveragedModel:
    return AveragedModel(ll_model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)


EMA, SWA = Averaging(model=ema_of), Averaging(model=AveragedModel, interval="epoch", start=2)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("start", [0, 3])
def test_average_of_each_step_is_that_of_a_loop_by_hand(start: int) -> None:
    averaging = replace(EMA, start=start)
    problem = regression()
    optimizer = torch.optim.Adam(problem.ll_model.parameters(), lr=PLAIN.ll_learning_rate)
    average, seen, expected = ema_of(problem.ll_model), [], []

    def after() -> None:
        seen.append(None)
        if len(seen) > start:
            average.update_parameters(problem.ll_model)
        expected.append(weights_of(average.module if len(seen) > start else problem.ll_model))

    losses = by_hand(problem, optimizer, 8, after=after)
    trainer, got = trained(regression(ll_average=averaging), PLAIN, 0)
    assert trainer.ll_models == [trainer.problem.ll_model]  # there is none before the first step
    for one in expected:
        got.append(trainer.step().train_loss)
        assert_same_bits(weights_of(trainer.ll_models[0]), one)
    assert got == losses
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())  # which goes its own way
    assert trainer.ll_models[0] is not trainer.problem.ll_model


def test_average_of_each_epoch_is_that_of_a_loop_by_hand() -> None:
    """In random order, and the first two passes are left out."""
    problem = regression(ll_model=net(dropout=0.2), train_data=shuffled())
    seed_everything(1)
    optimizer = torch.optim.Adam(problem.ll_model.parameters(), lr=PLAIN.ll_learning_rate)
    average, losses, expected = AveragedModel(problem.ll_model), [], []
    for epoch in range(6):
        for index, batch in enumerate(problem.train_data):
            losses.append(loss_and_gradient(problem, optimizer, batch).item())
            optimizer.step()
            if index == len(problem.train_data) - 1 and epoch > 1:
                average.update_parameters(problem.ll_model)
            expected.append(weights_of(average.module if average.n_averaged else problem.ll_model))
    trainer, got = trained(regression(ll_model=net(dropout=0.2), train_data=shuffled(), ll_average=SWA), PLAIN, 0)
    for one in expected:
        got.append(trainer.step().train_loss)
        assert_same_bits(weights_of(trainer.ll_models[0]), one)
    assert got == losses
    assert int(average.n_averaged) == 4


# ---- in a trial

CONFIG = {"ll_steps": 2, "ul_steps": 6, "ul_steps_per_report": 2, "ll_learning_rate": 0.05, "k": 3, "patience": 0}


def mae(state: Any) -> torch.Tensor:
    return (state.ll_model(state.data) - state.target).abs().mean()


@pytest.mark.parametrize("averaging", [EMA, Averaging(model=AveragedModel, interval="epoch")], ids=["EMA", "SWA"])
def test_what_a_trial_measures_and_keeps_is_the_average(averaging: Averaging, tmp_path: Path) -> None:
    trial = Trial(lambda config: regression(ll_average=averaging, metrics={"mae": mae}), CONFIG)
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    ((x, y),) = trial.problem.select_data
    while not trial.completed:
        record = trial.advance()
        (average,) = trial.trainer.ll_models
        assert average is not trial.problem.ll_model
        if not trial.completed:
            with torch.no_grad():
                assert record["select_loss"] == pytest.approx(mse_loss(average(x), y).item(), rel=1e-12)
                assert record["mae"] == pytest.approx((average(x) - y).abs().mean().item(), rel=1e-12)
                assert record["select_loss"] != pytest.approx(mse_loss(trial.problem.ll_model(x), y).item(), rel=1e-6)
        loss = trial.history[-1]["select_loss"]
        if best is None or loss < best[0]:
            best = loss, copy.deepcopy(average.state_dict())
    trial.save(tmp_path / "trial.pt")
    kept = read_checkpoint(tmp_path / "trial.pt")["kept"]["ll_model"]
    assert_same_bits(kept, best[1])
    assert record["kept_value"] == best[0]


def test_last_report_keeps_the_average_as_well(tmp_path: Path) -> None:
    trial = Trial(lambda config: regression(ll_average=EMA), CONFIG | {"keep": "last"})
    while not trial.completed:
        trial.advance()
    trial.save(tmp_path / "trial.pt")
    kept = read_checkpoint(tmp_path / "trial.pt")["kept"]["ll_model"]
    assert_same_bits(kept, trial.trainer.ll_models[0].state_dict())


def test_losses_without_ul_steps_are_those_of_the_average() -> None:
    trial = Trial(lambda config: regression(ll_average=EMA), CONFIG | {"ul_learning_rate": 0.0})
    record = trial.advance()
    ((x, y),) = trial.problem.validate_data
    with torch.no_grad():
        assert record["validate_loss"] == pytest.approx(mse_loss(trial.trainer.ll_models[0](x), y).item(), rel=1e-12)


# ---- hypergradients

OF_AVERAGE = ImplicitSettings(ll_steps=3, ll_learning_rate=0.05, solver="dense", damping=0.5, warm_start=False)


@pytest.mark.parametrize("hypergradients", [False, True])
def test_hypergradient_is_taken_at_the_weights_that_are_asked_for(hypergradients: bool) -> None:
    data = regression().train_data[:1]
    trainer = BilevelTrainer(
        regression(train_data=data, ll_average=replace(EMA, hypergradients=hypergradients)), OF_AVERAGE
    )
    for _ in range(3):
        ul_values = copy.deepcopy(trainer.problem.ul_model)
        got = trainer.step().hypergradient
        at = trainer.ll_models[0] if hypergradients else trainer.problem.ll_model
        problem = regression(train_data=data, ul_model=ul_values, ll_model=copy.deepcopy(at))
        expected = compute(problem.implicit(**OF_AVERAGE.of_a_solve), problem)
        torch.testing.assert_close(got.gradients, expected.gradients, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.v, expected.v, rtol=1e-12, atol=0)
        assert got.ul_loss == pytest.approx(expected.ul_loss, rel=1e-12)
        other = trainer.problem.ll_model if hypergradients else trainer.ll_models[0]
        ((x, y),) = problem.validate_data
        assert got.ul_loss != pytest.approx(mse_loss(other(x), y).item(), rel=1e-6)


def test_hypergradient_before_there_is_an_average_is_that_of_the_ll_model() -> None:
    late = replace(EMA, start=100, hypergradients=True)
    without, with_one = (BilevelTrainer(regression(ll_average=one), OF_AVERAGE) for one in (None, late))
    for _ in range(3):
        assert torch.equal(without.step().hypergradient.v, with_one.step().hypergradient.v)


@pytest.mark.parametrize("averaging", [EMA, SWA, replace(EMA, hypergradients=True), replace(SWA, hypergradients=True)])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_average_goes_on_from_a_checkpoint_in_the_same_bits(averaging: Averaging, steps: int) -> None:
    settings = replace(OF_AVERAGE, solver="minres", ll_steps="auto", min_ll_steps=2, max_ll_steps=6)

    def make() -> BilevelProblem:
        model = net(dropout=0.2)
        model.insert(1, nn.BatchNorm1d(4).to(F64))
        averaged = averaging if averaging.interval == "step" else replace(averaging, model=with_buffers)
        return regression(
            ll_model=model, train_data=shuffled(), ll_average=averaged, ll_objective=lambda s: decayed_loss(s)
        )

    trainer, _ = trained(make(), settings, steps)
    saved = saved_and_loaded(trainer.state_dict())
    expected = [trainer.step().train_loss for _ in range(4)]
    resumed, _ = trained(make(), settings, 2)
    resumed.load_state_dict(saved)
    assert [resumed.step().train_loss for _ in range(4)] == expected
    assert_same_bits(resumed.state_dict(), trainer.state_dict())
    assert_same_bits(resumed.ll_models[0].state_dict(), trainer.ll_models[0].state_dict())
    assert resumed.ll_models[0] is not resumed.problem.ll_model


with_buffers = partial(AveragedModel, use_buffers=True)


def decayed_loss(state: Any) -> torch.Tensor:
    penalty = state.ul_model.log_l2.exp().sum() * state.ll_model[0].weight.square().sum()
    return mse_loss(state.ll_model(state.data), state.target) + penalty


# ---- messages


def with_batch_norm(**changes: Any) -> BilevelProblem:
    model = net()
    model.insert(1, nn.BatchNorm1d(4, **changes).to(F64))
    return regression(ll_model=model)


def test_running_statistics_must_be_averaged_as_well() -> None:
    message = r"`model` of Averaging must average buffers .* got '1\.running_mean' and use_buffers=False\. Make it"
    with pytest.raises(InvalidValueError, match=message):
        BilevelTrainer(replace(with_batch_norm(), ll_average=SWA), PLAIN)
    for problem, averaging in (
        (with_batch_norm(), EMA),
        (with_batch_norm(track_running_stats=False), SWA),
    ):
        BilevelTrainer(replace(problem, ll_average=averaging), PLAIN)


def test_average_must_be_one_of_torch() -> None:
    with pytest.raises(InvalidTypeError, match=r"`model` of Averaging must return a .*AveragedModel, got Sequential"):
        BilevelTrainer(regression(ll_average=Averaging(model=copy.deepcopy)), PLAIN)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "ema"}, TypeError, "`model` must be callable, got str"),
        ({"interval": "batch"}, ValueError, "`interval` must be one of step, epoch, got 'batch'"),
        ({"start": -1}, ValueError, "`start` must be 0 or more, got -1"),
        ({"start": "late"}, TypeError, "`start` must be an integer, got 'late'"),
        ({"hypergradients": 1}, TypeError, "`hypergradients` must be True or False, got 1"),
    ],
)
def test_messages(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Averaging(**{"model": AveragedModel} | arguments)


def test_problem_takes_an_averaging_and_nothing_else() -> None:
    with pytest.raises(InvalidTypeError, match=r"`ll_average` must be None or an Averaging, .*, got <class"):
        regression(ll_average=AveragedModel)
