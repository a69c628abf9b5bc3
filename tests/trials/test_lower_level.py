import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.byhand import (
    PLAIN,
    Pair,
    by_hand,
    ll_objective,
    loss_and_gradient,
    net,
    optimizer_of,
    pairs,
    regression,
    shuffled,
    trained,
)
from tests.support.noisy import assert_same_bits
from tests.support.problems import compute
from tests.support.systems import saved_and_loaded
from tune_implicit.errors import DivergedError, InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.averaging import Averaging
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import LEARNING
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer
from tune_implicit.trials.trial import Trial

STEPS = 8


def weights_of(trainer: BilevelTrainer) -> list[Tensor]:
    return [param.detach().clone() for param in trainer.problem.ll_model.parameters()]


def assert_resumes(make: Callable[[], BilevelProblem], settings: ImplicitSettings, steps: int = STEPS) -> None:
    """Check that from a checkpoint after each step a fresh trainer comes to the same bits."""
    trainer, saved, losses = BilevelTrainer(make(), settings), [], []
    for _ in range(steps):
        saved.append(saved_and_loaded(trainer.state_dict()))
        losses.append(trainer.step().train_loss)
    for step, state in enumerate(saved):
        resumed = BilevelTrainer(make(), settings)
        torch.randn(17)  # its random state is elsewhere
        resumed.load_state_dict(state)
        assert [resumed.step().train_loss for _ in range(steps - step)] == losses[step:]
        assert_same_bits(resumed.state_dict(), trainer.state_dict(), f"from step {step}")


# ---- clipping


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", [1e-3, 0.05])
def test_clipped_step_has_the_length_of_the_rate_times_the_norm(norm: float, accumulate: int) -> None:
    settings = replace(PLAIN, max_ll_gradient_norm=norm, accumulate=accumulate)
    trainer, _ = trained(regression(ll_optimizer=torch.optim.SGD), settings, 0)
    for step in range(STEPS):
        before = weights_of(trainer)
        batches = [trainer.problem.train_data[(step * accumulate + part) % 3] for part in range(accumulate)]
        states = [State(*batch, trainer.problem.ul_model, trainer.problem.ll_model) for batch in batches]
        loss = sum(ll_objective(state) for state in states) / accumulate
        length = length_of(torch.autograd.grad(loss, list(trainer.problem.ll_model.parameters())))
        assert length > norm
        trainer.step()
        moved = length_of([after - old for after, old in zip(weights_of(trainer), before, strict=True)])
        # torch divides by the length plus 1e-6.
        assert moved == pytest.approx(0.05 * norm * length / (length + 1e-6), rel=1e-12)


def length_of(tensors: Any) -> float:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).norm().item()


@pytest.mark.parametrize("norm", [0.05, 1.0, 1e6])
@pytest.mark.parametrize(
    "make",
    [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam, partial(torch.optim.LBFGS, max_iter=3)],
    ids=["SGD", "Adam", "LBFGS"],
)
def test_clipped_steps_are_those_of_a_loop_by_hand(make: Any, norm: float) -> None:
    trainer, losses = trained(regression(ll_optimizer=make), replace(PLAIN, max_ll_gradient_norm=norm), STEPS)
    problem = regression()
    optimizer = make(problem.ll_model.parameters(), lr=PLAIN.ll_learning_rate)
    assert losses == by_hand(problem, optimizer, STEPS, clip=norm)
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert_same_bits(optimizer_of(trainer).state_dict(), optimizer.state_dict())
    unclipped = trained(regression(ll_optimizer=make), PLAIN, STEPS)[1]
    assert (losses == unclipped) == (norm == 1e6)


def test_clipping_hides_nothing_from_what_follows_a_ul_step() -> None:
    """What is left of the disturbance is seen in the gradient as it is, so that a short step is not taken for it."""
    lags = []
    for norm in (None, 1e-9):
        settings = ImplicitSettings(ll_steps=4, ll_learning_rate=1e-9, max_ll_gradient_norm=norm)
        problem = regression(ll_optimizer=torch.optim.SGD, train_data=pairs(0, (24,)))
        lags.append(trained(problem, settings, 2)[0].ll_lag)
    assert lags[0] == pytest.approx(lags[1], rel=1e-4)
    assert lags[0] > 0


# ---- accumulation


def cut(parts: int) -> BilevelProblem:
    """The same 24 examples in so many batches."""
    sgd = {"ll_optimizer": partial(torch.optim.SGD, momentum=0.9), "ul_optimizer": torch.optim.SGD}
    return regression(train_data=pairs(0, (24 // parts,) * parts), **sgd)


@pytest.mark.parametrize("retain_graphs", [True, False])
@pytest.mark.parametrize("solver", ["dense", "cg", "minres", "neumann"])
def test_micro_batches_are_the_full_batch(solver: str, retain_graphs: bool) -> None:
    whole = ImplicitSettings(
        ll_steps=3, solver=solver, damping=2.0, k=4, ul_learning_rate=0.1, adapt_ul_learning_rate=False, step_size=0.1
    )
    one = BilevelTrainer(cut(1), whole)
    four = BilevelTrainer(cut(4), replace(whole, accumulate=4, retain_graphs=retain_graphs))
    exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    for _ in range(4):
        expected, got = one.step(), four.step()
        assert got.train_loss == pytest.approx(expected.train_loss, abs=1e-12)
        exactly(weights_of(four), weights_of(one))
        exactly(got.hypergradient.gradients, expected.hypergradient.gradients)
        exactly(got.hypergradient.v, expected.hypergradient.v)
        exactly(four.problem.ul_model.log_l2, one.problem.ul_model.log_l2)
        assert got.hypergradient.ll_loss == pytest.approx(expected.hypergradient.ll_loss, abs=1e-12)
        assert got.hypergradient.hvps == 4 * expected.hypergradient.hvps
    assert (four.ll_step, four.ul_step) == (one.ll_step, one.ul_step) == (12, 4)


@pytest.mark.parametrize("retain_graphs", [True, False])
@pytest.mark.parametrize("ul_batches", [1, 2])
def test_costs_of_micro_batches_are_counted(ul_batches: int, retain_graphs: bool) -> None:
    calls = 0

    def counted(state: State) -> Tensor:
        nonlocal calls
        calls += 1
        return ll_objective(state)

    settings = ImplicitSettings(
        ll_steps=3, accumulate=4, solver="cg", k=3, ul_batches=ul_batches, retain_graphs=retain_graphs
    )
    trainer = BilevelTrainer(replace(cut(4), ll_objective=counted), settings)
    hypergradient = trainer.step().hypergradient
    assert trainer.hvps == hypergradient.hvps
    # A gradient of the ll loss for each call; the ul loss's; two for each product.
    products = 2 * hypergradient.hvps + 2 * 4 * ul_batches
    assert trainer.gradient_evaluations == calls + ul_batches + products
    assert (calls == 3 * 4 + 4 * ul_batches) == retain_graphs


def test_micro_batches_that_evaluate_several_times_are_the_full_batch() -> None:
    lbfgs = partial(torch.optim.LBFGS, max_iter=3)
    one = trained(replace(cut(1), ll_optimizer=lbfgs), PLAIN, 3)
    four = trained(replace(cut(4), ll_optimizer=lbfgs), replace(PLAIN, accumulate=4), 3)
    assert four[1] == pytest.approx(one[1], abs=1e-12)
    assert four[0].gradient_evaluations == 4 * one[0].gradient_evaluations > 4 * 3


def test_micro_batches_go_on_from_a_checkpoint_in_the_same_bits() -> None:
    """Five batches a pass, so that steps and hypergradients are cut by its end."""
    settings = ImplicitSettings(ll_steps=1, accumulate=3, ul_batches=2, k=2, max_ll_gradient_norm=0.5)
    assert_resumes(lambda: regression(ll_model=net(dropout=0.2), train_data=shuffled(5)), settings)


# ---- a backbone that is thawed


def backbone(**changes: Any) -> BilevelProblem:
    model = net(dropout=0.2)
    model[0].requires_grad_(False)

    def thaw(ll_model: nn.Module, epoch: int) -> None:
        if epoch == 2:
            ll_model[0].requires_grad_(True)

    def penalized(state: State) -> Tensor:
        decay = state.ul_model.log_l2.exp().sum() * state.ll_model[2].weight.square().sum()
        return mse_loss(state.ll_model(state.data), state.target) + decay

    parts: dict[str, Any] = {"ll_model": model, "train_data": shuffled(), "on_epoch": thaw, "ll_objective": penalized}
    return regression(**parts | changes)


def test_thawed_backbone_is_trained_as_in_a_loop_by_hand() -> None:
    make = partial(torch.optim.AdamW, weight_decay=0.1)
    trainer, losses = trained(backbone(ll_optimizer=make), PLAIN, 0)
    frozen = weights_of(trainer)[:2]
    for step in range(12):
        assert torch.equal(trainer.problem.ll_model[0].weight, frozen[0]) == (step < 7)
        losses.append(trainer.step().train_loss)

    problem, expected = backbone(), []
    seed_everything(1)
    optimizer = make(problem.ll_model.parameters(), lr=PLAIN.ll_learning_rate)
    for epoch in range(4):
        if epoch == 2:
            problem.ll_model[0].requires_grad_(True)
        for batch in problem.train_data:
            expected.append(loss_and_gradient(problem, optimizer, batch).item())
            optimizer.step()
    assert losses == expected
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert_same_bits(optimizer_of(trainer).state_dict(), optimizer.state_dict())


def test_on_epoch_is_called_before_the_first_step_of_each_pass() -> None:
    called, steps = [], []

    def on_epoch(ll_model: nn.Module, epoch: int) -> None:
        called.append((epoch, len(steps)))

    def counted(state: State) -> Tensor:
        steps.append(None)
        return ll_objective(state)

    problem = regression(on_epoch=on_epoch, ll_objective=counted)
    trained(problem, PLAIN, 8)
    assert called == [(0, 0), (1, 3), (2, 6)]


def test_hypergradient_follows_what_is_trained() -> None:
    data = pairs(0, (24,))  # each ll step is a pass, and so is each hypergradient

    def thaw(ll_model: nn.Module, epoch: int) -> None:
        ll_model[0].requires_grad_(epoch >= 2)

    settings = ImplicitSettings(solver="dense", damping=2.0, ll_learning_rate=0.05, warm_start=False)
    model = net()
    model[0].requires_grad_(False)
    trainer = BilevelTrainer(backbone(ll_model=model, train_data=data, on_epoch=thaw), settings)
    for steps, size in ((2, 5), (2, 21)):
        trainer.train_ll(steps)
        got = trainer.levels[0].add_hypergradient()
        assert got.v.shape == (size,)
        problem = backbone(ll_model=copy.deepcopy(model), train_data=data)
        expected = compute(problem.implicit(**settings.of_a_solve), problem)
        torch.testing.assert_close(got.gradients, expected.gradients, rtol=1e-12, atol=0)
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    problem = backbone(ll_model=frozen, train_data=data)
    without = compute(problem.implicit(**settings.of_a_solve), problem)
    assert (without.gradients["log_l2"] - got.gradients["log_l2"]).norm() > 1e-3 * without.norm


def test_thawed_backbone_goes_on_from_a_checkpoint_in_the_same_bits() -> None:
    settings = ImplicitSettings(ll_steps="auto", min_ll_steps=1, max_ll_steps=4, k=2, ll_learning_rate=0.05)
    assert_resumes(backbone, settings)
    trainer = BilevelTrainer(backbone(), settings)
    seen = [trainer.step() and trainer.problem.ll_model[0].weight.requires_grad for _ in range(STEPS)]
    assert set(seen) == {False, True}


@pytest.mark.parametrize("hypergradients", [False, True])
def test_average_is_thawed_with_its_model(hypergradients: bool) -> None:
    averaging = Averaging(model=torch.optim.swa_utils.AveragedModel, hypergradients=hypergradients)
    settings = ImplicitSettings(ll_steps=2, k=2, ll_learning_rate=0.05)
    trainer = BilevelTrainer(backbone(ll_average=averaging), settings)
    sizes = [len(trainer.step().hypergradient.v) for _ in range(STEPS)]
    assert sorted(set(sizes)) == [5, 21]
    (average,) = trainer.ll_models
    assert average[0].weight.requires_grad == hypergradients
    assert not torch.equal(average[0].weight, backbone().ll_model[0].weight)
    assert_resumes(lambda: backbone(ll_average=averaging), settings)


def test_thawed_trainer_goes_back_to_a_state_in_which_it_was_frozen() -> None:
    trainer = BilevelTrainer(backbone(), PLAIN)
    trainer.train_ll(2)
    saved = saved_and_loaded(trainer.state_dict())
    trainer.train_ll(8)
    assert trainer.problem.ll_model[0].weight.requires_grad
    trainer.load_state_dict(saved)
    assert not trainer.problem.ll_model[0].weight.requires_grad
    before = trainer.problem.ll_model[0].weight.clone()
    trainer.train_ll(4)
    assert torch.equal(trainer.problem.ll_model[0].weight, before)


def test_layer_that_is_frozen_on_the_way_stays_where_it_is() -> None:
    def freeze(ll_model: nn.Module, epoch: int) -> None:
        ll_model[0].requires_grad_(epoch < 1)

    trainer, _ = trained(backbone(ll_model=net(), on_epoch=freeze), PLAIN, 3)
    before = weights_of(trainer)
    for _ in range(3):
        trainer.step()
    assert_same_bits(weights_of(trainer)[:2], before[:2])
    assert not torch.equal(trainer.problem.ll_model[2].weight, before[2])


def test_thawed_layer_that_the_optimizer_does_not_know() -> None:
    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([param for param in params if param.requires_grad], lr=lr)

    trainer = BilevelTrainer(backbone(ll_optimizer=make), PLAIN)
    trainer.train_ll(6)
    with pytest.raises(InvalidValueError, match=r"`ll_optimizer` must take every .* without '0\.weight', '0\.bias'"):
        trainer.train_ll(1)


# ---- a step of one's own


def own_step(problem: BilevelProblem) -> Callable[[State, torch.optim.Optimizer], Tensor]:
    def step(state: State, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = problem.ll_objective(state)
        loss.backward()
        optimizer.step()
        return loss

    return step


FOLLOWING = ImplicitSettings(
    ll_steps="auto", min_ll_steps=2, max_ll_steps=9, warmup_ll_steps=2, ul_learning_rate=0.1, k=3, ll_learning_rate=0.02
)


def seen_in(problem: BilevelProblem, steps: int = 6) -> tuple[BilevelTrainer, list[list[object]]]:
    trainer, _ = trained(problem, FOLLOWING, 0)
    seen = []
    for _ in range(steps):
        step = trainer.step()
        learning = [repr(getattr(trainer, name)) for name in LEARNING]  # NaN is NaN
        seen.append([step.train_loss, step.hypergradient.gradients, step.hypergradient.v, *learning])
    return trainer, seen


def test_own_step_that_repeats_the_built_in_one_gives_the_same_bits() -> None:
    def make() -> BilevelProblem:
        return regression(ll_model=net(dropout=0.2), train_data=shuffled())

    built_in, expected = seen_in(make())
    own, got = seen_in(replace(make(), ll_step=own_step(make())))
    assert_same_bits(got, expected)
    assert own.ll_lag >= 0
    assert own.ll_step > 2 + 6 * 2
    assert own.gradient_evaluations == built_in.gradient_evaluations
    assert_same_bits(own.state_dict(), built_in.state_dict())


def test_own_step_of_another_kind_trains() -> None:
    """Sharpness-aware: two gradients, and a step of the optimizer with the second."""

    def sharp(state: State, optimizer: torch.optim.Optimizer) -> float:
        params = list(state.ll_model.parameters())
        ascent = torch.autograd.grad(ll_objective(state), params)
        with torch.no_grad():
            for param, step in zip(params, ascent, strict=True):
                param += 0.05 * step
        optimizer.zero_grad()
        loss = ll_objective(state)
        loss.backward()
        with torch.no_grad():
            for param, step in zip(params, ascent, strict=True):
                param -= 0.05 * step
        optimizer.step()
        return loss.item()

    trainer, losses = trained(regression(ll_step=sharp), replace(FOLLOWING, ll_steps=5), 10)
    assert losses[-1] < losses[0]
    assert trainer.skipped_ul_steps == 0
    assert trainer.ll_lag >= 0


def test_own_step_with_dropout_goes_on_from_a_checkpoint_in_the_same_bits() -> None:
    def make() -> BilevelProblem:
        problem = regression(ll_model=net(dropout=0.3), train_data=shuffled())
        return replace(problem, ll_step=own_step(problem))

    assert_resumes(make, FOLLOWING)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (None, "NoneType"),
        ("0.5", "str"),
        ((0.5,), "tuple"),
        (torch.ones(2), r"a tensor of shape \(2,\)"),
        (torch.ones(2, 0), r"a tensor of shape \(2, 0\)"),
    ],
)
def test_own_step_must_return_a_number(returned: object, got: str) -> None:
    trainer = BilevelTrainer(regression(ll_step=lambda state, optimizer: returned), PLAIN)
    with pytest.raises(InvalidTypeError, match=rf"`ll_step` must return the loss of its step, a number, got {got}\."):
        trainer.step()


@pytest.mark.parametrize("returned", [2, 2.0, torch.tensor(2.0), torch.full((1, 1), 2.0), torch.tensor(2)], ids=repr)
def test_own_step_may_return_a_number_of_any_kind(returned: object) -> None:
    assert trained(regression(ll_step=lambda state, optimizer: returned), PLAIN, 1)[1] == [2.0]


def test_own_step_that_diverges_is_told_of() -> None:
    trainer = BilevelTrainer(regression(ll_step=lambda state, optimizer: float("inf")), PLAIN)
    with pytest.raises(DivergedError, match="The ll loss became inf within ll steps 1 to 1"):
        trainer.step()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"accumulate": 3}, "`accumulate` must be 1 beside a problem's own `ll_step`, got 3. It is for the built-in"),
        ({"max_ll_gradient_norm": 0.5}, "`max_ll_gradient_norm` must be None beside .* `ll_step`, got 0.5"),
    ],
    ids=str,
)
def test_own_step_leaves_no_room_for_what_the_built_in_one_does(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        BilevelTrainer(regression(ll_step=lambda state, optimizer: 1.0), replace(PLAIN, **setting))


def test_own_step_must_be_callable() -> None:
    for name in ("ll_step", "on_epoch", "ll_scheduler", "ul_scheduler"):
        with pytest.raises(InvalidTypeError, match=f"`{name}` must be callable, got int"):
            regression(**{name: 3})


# ---- metrics of a whole split


def f1(states: Iterator[State]) -> dict[str, Tensor]:
    hits = found = wanted = torch.zeros(())
    for state in states:
        assert not state.ll_model.training
        assert not torch.is_grad_enabled()
        said, true = state.ll_model(state.data) > 0, state.target > 0
        hits, found, wanted = hits + (said & true).sum(), found + said.sum(), wanted + true.sum()
    return {"f1": 2 * hits / (found + wanted), "found": found}


SELECT = pairs(7, (50, 3, 11))
CONFIG = {"ll_steps": 1, "ul_steps": 8, "ul_steps_per_report": 1, "ll_learning_rate": 0.1, "k": 2, "patience": 0}


def f1_of(ll_model: nn.Module, split: list[Pair] = SELECT) -> float:
    with torch.no_grad():
        said = torch.cat([ll_model(x) > 0 for x, _ in split])
        true = torch.cat([y > 0 for _, y in split])
    return (2 * (said & true).sum() / (said.sum() + true.sum())).item()


def test_metrics_of_a_whole_split_are_no_means_over_batches() -> None:
    trial = Trial(lambda config: regression(metrics=f1, select_data=SELECT), CONFIG | {"keep": "last"})
    while not trial.completed:
        record = trial.advance()
        assert record["f1"] == pytest.approx(f1_of(trial.problem.ll_model))
        assert isinstance(record["found"], float)
    parts = [f1_of(trial.problem.ll_model, [batch]) * len(batch[0]) / 64 for batch in SELECT]
    assert record["f1"] != pytest.approx(sum(parts), rel=1e-3)
    assert trial.failure_record("why")["f1"] == float("inf")


def test_the_best_is_kept_by_a_metric_of_a_whole_split(tmp_path: Path) -> None:
    def make() -> Trial:
        # Ever longer steps: it trains well at first, and then badly.
        longer = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=3.0)
        parts = {"metrics": f1, "select_data": SELECT, "ll_scheduler": longer}
        return Trial(lambda config: regression(**parts), CONFIG, metric="f1", mode="max")

    trial, states = make(), []
    while not trial.completed:
        trial.advance()
        states.append(copy.deepcopy(trial.problem.ll_model.state_dict()))
        trial.save(tmp_path / f"{len(states)}.pt")
    record = trial.record
    values = [entry["f1"] for entry in trial.history]
    best = max(range(len(values)), key=values.__getitem__)
    assert values[-1] < values[best] > values[0]
    assert record["f1"] == record["kept_value"] == values[best]
    assert (record["kept_ul_step"], record["last_value"]) == (best + 1, values[-1])
    assert_same_bits(read_checkpoint(tmp_path / "8.pt")["kept"]["ll_model"], states[best])
    resumed = make()
    resumed.load(tmp_path / "5.pt")
    while not resumed.completed:
        resumed.advance()
    assert resumed.record == trial.record
    assert resumed.history == trial.history


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ({"mine": 1.0, "hvps": 1, "ul_step": 1}, ValueError, "itself reports, got hvps, ul_step. Rename them"),
        ({"select_loss": 1.0}, ValueError, "itself reports, got select_loss"),
        (0.5, TypeError, "`metrics` must return a mapping of names to numbers, got float. Return e.g."),
        ([("f1", 0.5)], TypeError, "`metrics` must return a mapping .* got list"),
        ({"f1": torch.ones(2)}, TypeError, r"`f1` must return a number, got a tensor of shape \(2,\)"),
        ({"f1": None}, TypeError, "`f1` must return a number, got NoneType"),
    ],
)
def test_messages_of_metrics_of_a_whole_split(returned: object, error: type[Exception], message: str) -> None:
    trial = Trial(lambda config: regression(metrics=lambda states: returned), CONFIG)
    with pytest.raises(error, match=message):
        trial.advance()


def test_metric_of_a_whole_split_that_is_not_finite_ends_the_trial() -> None:
    trial = Trial(lambda config: regression(metrics=lambda states: {"f1": float("nan")}), CONFIG)
    with pytest.raises(DivergedError, match="`f1` became nan by ul step 1"):
        trial.advance()


# ---- several ll problems


def folds(count: int = 3, shuffle: bool = False, **changes: Any) -> BilevelProblem:
    """As many ll models as folds: each is validated and compared on its own part."""
    parts: dict[str, Any] = {
        "ll_model": [net(dropout=0.2 if shuffle else 0.0, seed=fold) for fold in range(count)],
        "train_data": [shuffled(7) if shuffle else pairs(10 + fold, (8, 8)) for fold in range(count)],
        "validate_data": [pairs(20 + fold, (8,)) for fold in range(count)],
        "select_data": [pairs(30 + fold, (8, 5)) for fold in range(count)],
        "ul_optimizer": torch.optim.SGD,
    }
    return regression(**parts | changes)


def single(fold: int, problem: BilevelProblem) -> BilevelProblem:
    part = folds().parts[fold]
    return replace(part, ul_model=copy.deepcopy(problem.ul_model), ll_model=copy.deepcopy(problem.ll_model[fold]))


OF_FOLDS = ImplicitSettings(
    ll_steps=3, k=3, solver="cg", ul_learning_rate=0.1, adapt_ul_learning_rate=False, warm_start=False
)


def test_ul_step_goes_along_the_mean_hypergradient_of_all_folds() -> None:
    trainer = BilevelTrainer(folds(), OF_FOLDS)
    singles = [BilevelTrainer(single(fold, trainer.problem), OF_FOLDS) for fold in range(3)]
    exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    for _ in range(4):
        before = trainer.problem.ul_model.log_l2.detach().clone()
        for one in singles:
            one.problem.ul_model.load_state_dict(trainer.problem.ul_model.state_dict())
        expected, got = [one.step() for one in singles], trainer.step()
        mean = sum(one.hypergradient.gradients["log_l2"] for one in expected) / 3
        exactly(got.hypergradient.gradients["log_l2"], mean)
        exactly(trainer.problem.ul_model.log_l2.grad, mean)
        exactly(trainer.problem.ul_model.log_l2.detach(), before - 0.1 * mean)
        assert got.train_loss == pytest.approx(sum(one.train_loss for one in expected) / 3, abs=1e-12)
        ul_losses = [one.hypergradient.ul_loss for one in expected]
        assert got.hypergradient.ul_loss == pytest.approx(sum(ul_losses) / 3, abs=1e-12)
        assert got.hypergradient.norm == pytest.approx(mean.norm().item(), abs=1e-12)
    for model, one in zip(trainer.problem.ll_model, singles, strict=True):
        exactly(list(model.parameters()), list(one.problem.ll_model.parameters()))
    assert trainer.ll_step == singles[0].ll_step
    for name in ("hvps", "gradient_evaluations"):
        assert getattr(trainer, name) == sum(getattr(one, name) for one in singles)


def test_a_list_of_one_is_one() -> None:
    several, one = BilevelTrainer(folds(1), OF_FOLDS), BilevelTrainer(folds(1).parts[0], OF_FOLDS)
    for _ in range(3):
        assert several.step().train_loss == one.step().train_loss
    assert_same_bits(several.state_dict(), one.state_dict())


@pytest.mark.parametrize("average", [None, Averaging(model=torch.optim.swa_utils.AveragedModel, interval="epoch")])
def test_folds_go_on_from_a_checkpoint_in_the_same_bits(average: Averaging | None) -> None:
    settings = ImplicitSettings(ll_steps="auto", min_ll_steps=1, max_ll_steps=4, k=2, ll_learning_rate=0.05)
    assert_resumes(lambda: folds(shuffle=True, ll_average=average), settings)


def test_state_of_another_number_of_folds_does_not_fit() -> None:
    trainer = BilevelTrainer(folds(2), OF_FOLDS)
    with pytest.raises(ValueError, match="does not fit this problem"):
        trainer.load_state_dict(BilevelTrainer(folds(3), OF_FOLDS).state_dict())


def test_ul_step_is_skipped_where_one_fold_has_no_answer() -> None:
    bad = pairs(21, (8,))
    data = [pairs(20, (8,)), [(x, y / 0) for x, y in bad], pairs(22, (8,))]
    trainer = BilevelTrainer(folds(validate_data=data), OF_FOLDS)
    before = trainer.problem.ul_model.log_l2.detach().clone()
    hypergradient = trainer.step().hypergradient
    assert not hypergradient.answers
    assert trainer.skipped_ul_steps == 1
    assert torch.equal(trainer.problem.ul_model.log_l2, before)


def test_losses_and_metrics_of_a_trial_are_means_over_folds() -> None:
    def mae(state: State) -> Tensor:
        return (state.ll_model(state.data) - state.target).abs().mean()

    def whole(states: Iterator[State]) -> dict[str, float]:
        return {"mae": torch.cat([(s.ll_model(s.data) - s.target).abs() for s in states]).mean().item()}

    for metrics in ({"mae": mae}, whole):
        trial = Trial(lambda config, metrics=metrics: folds(metrics=metrics), CONFIG | {"keep": "last"})
        while not trial.completed:
            record = trial.advance()
            with torch.no_grad():
                whole_splits = [[torch.cat(part) for part in zip(*split, strict=True)] for split in folds().select_data]
                errors = [model(x) - y for model, (x, y) in zip(trial.problem.ll_model, whole_splits, strict=True)]
            assert record["select_loss"] == pytest.approx(sum(e.square().mean().item() for e in errors) / 3, rel=1e-12)
            assert record["mae"] == pytest.approx(sum(e.abs().mean().item() for e in errors) / 3, rel=1e-12)


def test_trial_keeps_each_fold(tmp_path: Path) -> None:
    trial = Trial(lambda config: folds(), CONFIG | {"ul_steps": 2, "keep": "last"})
    while not trial.completed:
        trial.advance()
    trial.save(tmp_path / "trial.pt")
    kept = read_checkpoint(tmp_path / "trial.pt")["kept"]["ll_model"]
    assert_same_bits(kept, [model.state_dict() for model in trial.problem.ll_model])


def test_each_fold_has_an_optimizer_and_a_schedule_of_its_own() -> None:
    halves = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    trainer = BilevelTrainer(folds(ll_scheduler=halves), replace(OF_FOLDS, ll_learning_rate=0.8))
    trainer.step()
    assert [level.rate for level in trainer.levels] == [0.1] * 3
    assert len({id(level._scheduled.optimizer) for level in trainer.levels}) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ll_model": []}, ValueError, "`ll_model` must be a module or a list of one or more, got an empty list"),
        ({"train_data": pairs(0)[:2]}, ValueError, "`train_data` must be a list of splits, .* 3 ll models, got 2"),
        ({"train_data": shuffled()}, ValueError, "`train_data` must be a list of splits, .* got DataLoader"),
        ({"validate_data": [pairs(0)] * 4}, ValueError, "`validate_data` must be a list .* 3 ll models, got 4"),
        ({"select_data": [pairs(0)] * 2}, ValueError, "`select_data` must be a list .* 3 ll models, got 2"),
        ({"validate_data": [pairs(0), [], pairs(0)]}, ValueError, "`validate_data` must hold at least one batch"),
        ({"train_data": pairs(0)}, TypeError, "`train_data` must be a re-iterable of batches, got a .* tensors"),
        ({"ll_model": [net(), net(), 3]}, TypeError, "`ll_model` must be a torch.nn.Module, got int"),
    ],
)
def test_messages_of_lists(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        folds(**changes)


def test_folds_without_select_data_are_compared_on_validate_data() -> None:
    trial = Trial(lambda config: folds(select_data=None), CONFIG | {"ul_steps": 1})
    record = trial.advance()
    assert record["selected_on"] == "validate_data"
    with torch.no_grad():
        losses = [
            mse_loss(model(x), y).item()
            for model, ((x, y),) in zip(trial.problem.ll_model, trial.problem.validate_data, strict=True)
        ]
    assert record["select_loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_folds_must_not_share_parameters() -> None:
    shared, other = net(), net()
    other[2] = shared[2]
    message = r"must not share parameters, got '2\.weight' in models 0 and 2\. Make each of its own"
    with pytest.raises(InvalidValueError, match=message):
        folds(ll_model=[shared, net(), other])
    with pytest.raises(InvalidValueError, match=r"got '0\.weight' in models 0 and 1"):
        folds(ll_model=[shared] * 3)


def test_every_epoch_is_told_though_hypergradients_take_batches_too() -> None:
    seen: list[int] = []
    problem = regression(train_data=pairs(0, (24,)), on_epoch=lambda model, epoch: seen.append(epoch))
    trainer = BilevelTrainer(problem, ImplicitSettings(ll_steps=2, ll_learning_rate=0.05))
    for _ in range(4):
        trainer.step()
    assert seen == list(range(8))


def test_modes_that_an_epoch_changes_go_on_and_reach_the_average() -> None:
    def make() -> BilevelTrainer:
        averaging = Averaging(model=torch.optim.swa_utils.AveragedModel, hypergradients=True)
        model = net(dropout=0.2)
        problem = regression(
            ll_model=model.eval(), on_epoch=lambda model, epoch: model.train(epoch > 0), ll_average=averaging
        )
        return BilevelTrainer(problem, ImplicitSettings(ll_steps=2, k=2, ll_learning_rate=0.05))

    trainer, resumed = make(), make()
    for _ in range(3):
        trainer.step()
    assert trainer.levels[0]._average.for_hypergradients().training
    saved = saved_and_loaded(trainer.state_dict())
    trainer.step()
    expected = saved_and_loaded(trainer.state_dict())
    resumed.load_state_dict(saved)
    resumed.step()
    assert_same_bits(resumed.state_dict(), expected)


def test_message_of_an_ll_model_that_is_frozen_whole() -> None:
    problem = regression(on_epoch=lambda model, epoch: model.requires_grad_(False))
    with pytest.raises(InvalidValueError, match="must leave something to train, got an ll model that is frozen"):
        BilevelTrainer(problem, PLAIN).step()


class OfEach(nn.Module):
    """A value for each of two ll problems, and one that none uses."""

    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) for _ in range(2))
        if spare:
            self.spare = nn.Parameter(torch.zeros(1, dtype=torch.float64))


class Counted(nn.Linear):
    def __init__(self, name: str) -> None:
        super().__init__(3, 1, dtype=torch.float64)
        self.name = name


def penalised(state: State) -> torch.Tensor:
    value = getattr(state.ul_model, state.ll_model.name)
    return mse_loss(state.ll_model(state.data), state.target) + value.exp() * state.ll_model.weight.square().sum()


def of_each(spare: bool = False) -> BilevelProblem:
    parts = {"ul_model": OfEach(spare), "ll_model": [Counted("first"), Counted("second")], "ll_objective": penalised}
    return regression(**parts, train_data=[pairs(0)] * 2, validate_data=[pairs(1)] * 2, select_data=None)


def test_ul_values_that_one_of_several_ll_problems_uses_are_learned() -> None:
    trainer = BilevelTrainer(of_each(), ImplicitSettings(ll_learning_rate=0.05))
    for _ in range(3):
        trainer.step()
    assert all(param.item() != -2.0 for param in trainer.problem.ul_model.parameters())


def test_message_of_a_ul_value_that_none_of_several_ll_problems_uses() -> None:
    trainer = BilevelTrainer(of_each(spare=True), ImplicitSettings(ll_learning_rate=0.05))
    with pytest.raises(InvalidValueError, match="Neither objective uses the ul model's 'spare'"):
        trainer.step()
