import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.support.byhand import PLAIN, by_hand, loss_and_gradient, net, optimizer_of, regression, shuffled, trained
from tests.support.noisy import assert_same_bits
from tests.support.systems import saved_and_loaded
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.trials.optimizers import takes_closure
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.trainer import BilevelTrainer
from tune_implicit.trials.trial import Trial

STEPS = 10

# ---- optimizers


class NoClosure(torch.optim.Optimizer):
    """Gradient descent with a memory; its step takes nothing."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                memory = self.state[param].setdefault("memory", torch.zeros_like(param))
                memory.mul_(0.5).add_(param.grad)
                param.sub_(group["lr"] * memory)


class Needy(NoClosure):
    """One whose step has to be given a closure, under no_grad as torch's have it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = closure()
        super().step()
        return loss


def hooked(params: Any, lr: float) -> torch.optim.Optimizer:
    """Adam whose hooks need the gradient before a step, and count in its options after it."""
    optimizer = torch.optim.Adam(params, lr=lr)

    def normalize(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad.div_(param.grad.norm() + 1e-8)

    def count(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        optimizer.param_groups[0]["steps"] = optimizer.param_groups[0].get("steps", 0) + 1

    optimizer.register_step_pre_hook(normalize)
    optimizer.register_step_post_hook(count)
    return optimizer


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": torch.optim.Adam,
    "AMSGrad": partial(torch.optim.Adam, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "fused AdamW": partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "LBFGS": partial(torch.optim.LBFGS, max_iter=3),
    "LBFGS with a line search": partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": torch.optim.Muon,
    "no closure": NoClosure,
    "hooked": hooked,
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def model_for(name: str) -> nn.Module:
    return net(bias=name != "Muon")  # which takes matrices alone


@each_optimizer
def test_ll_steps_are_those_of_a_loop_by_hand(name: str) -> None:
    make = OPTIMIZERS[name]
    trainer, losses = trained(regression(ll_model=model_for(name), ll_optimizer=make), PLAIN, STEPS)
    problem = regression(ll_model=model_for(name))
    optimizer = make(problem.ll_model.parameters(), lr=PLAIN.ll_learning_rate)
    assert losses == by_hand(problem, optimizer, STEPS)
    assert losses[-1] < losses[0]
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert_same_bits(optimizer_of(trainer).state_dict(), optimizer.state_dict())


@each_optimizer
def test_optimizer_goes_on_from_a_checkpoint_in_the_same_bits(name: str) -> None:
    settings = replace(PLAIN, ul_learning_rate=0.05, ll_steps=2)

    def make() -> BilevelProblem:
        return regression(ll_model=model_for(name), ll_optimizer=OPTIMIZERS[name])

    trainer, _ = trained(make(), settings, 3)
    saved = saved_and_loaded(trainer.state_dict())
    expected = [trainer.step().train_loss for _ in range(3)]
    resumed, _ = trained(make(), settings, 1)
    resumed.load_state_dict(saved)
    assert [resumed.step().train_loss for _ in range(3)] == expected
    assert_same_bits(resumed.state_dict(), trainer.state_dict())


def test_step_that_has_to_be_given_a_closure_is_given_one() -> None:
    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        return Needy(params, lr)

    trainer, losses = trained(regression(ll_optimizer=make), PLAIN, STEPS)
    problem = regression()
    assert losses == by_hand(problem, NoClosure(problem.ll_model.parameters(), 0.05), STEPS)
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())


@pytest.mark.parametrize("scheduled", [False, True])
def test_which_steps_have_to_be_given_a_closure(scheduled: bool) -> None:
    params = list(net().parameters())
    for make, takes in ((torch.optim.LBFGS, True), (Needy, True), (NoClosure, False), (torch.optim.Adam, False)):
        optimizer = make(params, lr=0.1)
        if scheduled:
            ExponentialLR(optimizer, 0.9)  # it puts a step of its own in place
        assert takes_closure(optimizer) == takes


# ---- named parameters


def decayed(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    """Weights are decayed and biases are not, which have a rate of their own."""
    weights = [(name, param) for name, param in named_parameters if name.endswith("weight")]
    biases = [(name, param) for name, param in named_parameters if name.endswith("bias")]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.2}, {"params": biases, "weight_decay": 0.0, "lr": lr / 10}], lr=lr
    )


def decayed_too(named_params: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    return decayed(named_params, lr)


@pytest.mark.parametrize("make", [decayed, decayed_too, partial(decayed)])
def test_factory_that_asks_for_names_gets_them(make: Any) -> None:
    trainer, losses = trained(regression(ll_optimizer=make), PLAIN, STEPS)
    problem = regression()
    optimizer = decayed(list(problem.ll_model.named_parameters()), lr=0.05)
    assert losses == by_hand(problem, optimizer, STEPS)
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert [group["lr"] for group in optimizer_of(trainer).param_groups] == [0.05, 0.005]
    assert optimizer_of(trainer).param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    resumed = BilevelTrainer(regression(ll_optimizer=make), PLAIN)
    resumed.load_state_dict(saved_and_loaded(trainer.state_dict()))
    assert resumed.step().train_loss == trainer.step().train_loss
    assert_same_bits(resumed.state_dict(), trainer.state_dict())


def test_ul_optimizer_gets_names_as_well() -> None:
    seen = []

    def make(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
        seen.extend(name for name, _ in named_parameters)
        return torch.optim.SGD(named_parameters, lr=lr)

    BilevelTrainer(regression(ul_optimizer=make), PLAIN)
    assert seen == ["log_l2"]


def test_groups_of_another_trial_keep_their_own_rates_each() -> None:
    donor, _ = trained(regression(ll_optimizer=decayed), PLAIN, 2)
    own = BilevelTrainer(regression(ll_optimizer=decayed), replace(PLAIN, ll_learning_rate=0.5))
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    assert [group["lr"] for group in optimizer_of(own).param_groups] == [0.5, 0.05]


@pytest.mark.parametrize("level", ["ll", "ul"])
def test_optimizer_that_leaves_out_what_is_to_be_trained(level: str) -> None:
    def make(named_parameters: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
        chosen = [param for name, param in named_parameters if name.endswith("weight")]
        return torch.optim.SGD(chosen or [torch.zeros(1, requires_grad=True)], lr=lr)

    left_out = "'0.bias', '2.bias'" if level == "ll" else "'log_l2'"
    message = rf"`{level}_optimizer` must take every .* without {left_out}\. Put them in a group, or freeze them"
    with pytest.raises(InvalidValueError, match=message):
        BilevelTrainer(regression(**{f"{level}_optimizer": make}), PLAIN)


def test_optimizer_may_leave_out_what_is_frozen() -> None:
    model = net()
    model[0].requires_grad_(False)

    def make(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        assert len(params) == 4  # it is offered all
        return torch.optim.SGD([param for param in params if param.requires_grad], lr=lr)

    before = model[0].weight.clone()
    trained(regression(ll_model=model, ll_optimizer=make), PLAIN, 2)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("level", ["ll", "ul"])
def test_factories_must_return_what_they_are_to_make(level: str) -> None:
    with pytest.raises(InvalidTypeError, match=rf"`{level}_optimizer` must return a torch.optim.Optimizer, got list"):
        BilevelTrainer(regression(**{f"{level}_optimizer": lambda params, lr: []}), PLAIN)
    settings = replace(PLAIN, adapt_ul_learning_rate=False)
    with pytest.raises(InvalidTypeError, match=rf"`{level}_scheduler` must return a scheduler of .* got float"):
        BilevelTrainer(regression(**{f"{level}_scheduler": lambda optimizer: 0.1}), settings)


# ---- schedules


def warm_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    warm = LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, steps - 3)], milestones=[3])


def chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return ChainedScheduler([ConstantLR(optimizer, 0.5, total_iters=4), ExponentialLR(optimizer, 0.9)])


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=4 * optimizer.param_groups[0]["lr"], total_steps=steps)


SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5)),
    "LambdaLR from 0": lambda optimizer, steps: LambdaLR(optimizer, lambda step: step / steps),
    "MultiplicativeLR": lambda optimizer: MultiplicativeLR(optimizer, lambda step: 0.95),
    "StepLR": partial(StepLR, step_size=3, gamma=0.5),
    "MultiStepLR": lambda optimizer: MultiStepLR(optimizer, [2, 5], gamma=0.3),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer, steps: PolynomialLR(optimizer, steps, power=2.0),
    "CosineAnnealingLR": CosineAnnealingLR,  # whose required second argument is the number of steps
    "CosineAnnealingWarmRestarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 4),
    "OneCycleLR": one_cycle,
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "SequentialLR": warm_then_cosine,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.2),
}
WANT_STEPS = ("LambdaLR from 0", "PolynomialLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR")
each_schedule = pytest.mark.parametrize("name", SCHEDULES)

CONFIG = {
    "ll_steps": 1,
    "ul_steps": STEPS,
    "ul_steps_per_report": 1,
    "ll_learning_rate": 0.05,
    "ul_learning_rate": 0.0,
    "patience": 0,
}


def scheduled(name: str, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> LRScheduler:
    """What a script of one's own would make."""
    return SCHEDULES[name](*(optimizer, steps) if name in WANT_STEPS else (optimizer,))


def momentum(params: Any, lr: float, seen: list[list[float]] | None = None) -> torch.optim.Optimizer:
    """SGD in two groups that notes with which rate and momentum each step is taken."""
    head, rest = params[-1:], params[:-1]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": head, "lr": lr / 2}], lr=lr, momentum=0.9)

    def note(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        seen.append([group[key] for group in optimizer.param_groups for key in ("lr", "momentum")])

    if seen is not None:
        optimizer.register_step_pre_hook(note)
    return optimizer


@each_schedule
def test_each_step_has_the_rate_of_a_loop_by_hand(name: str) -> None:
    seen, expected = [], []
    of_trial = {"ll_optimizer": partial(momentum, seen=seen), "ll_scheduler": SCHEDULES[name]}
    trial = Trial(lambda config: regression(**of_trial), CONFIG)
    records = [trial.advance() for _ in range(STEPS)]

    problem = regression()
    optimizer = momentum(list(problem.ll_model.parameters()), 0.05, expected)
    schedule = scheduled(name, optimizer)

    def after() -> None:
        with torch.no_grad():
            ((x, y),) = problem.validate_data
            plateau = isinstance(schedule, ReduceLROnPlateau)
            schedule.step(*[mse_loss(problem.ll_model(x), y).item()] * plateau)

    losses = by_hand(problem, optimizer, STEPS, after=after)
    assert seen == expected
    assert len({rates[0] for rates in seen}) > 1
    assert [record["train_loss"] for record in records] == losses
    assert records[-1]["ll_rate"] == optimizer.param_groups[0]["lr"]
    assert_same_bits(trial.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert_same_bits(trial.trainer.levels[0]._scheduled.state_dict()["scheduler"], schedule.state_dict())


def scheduled_trial(name: str) -> Trial:
    """A schedule at each level, ul steps, and batches in random order."""
    ul_schedule = {} if name == "CyclicLR" else {"ul_scheduler": SCHEDULES[name]}
    ul_optimizer = partial(torch.optim.SGD, momentum=0.9)
    parts = {"train_data": shuffled(), "ll_optimizer": momentum, "ll_scheduler": SCHEDULES[name]}
    parts |= {"ul_optimizer": ul_optimizer, **ul_schedule}
    config = CONFIG | {"ul_learning_rate": 0.02, "adapt_ul_learning_rate": False, "k": 2}
    return Trial(lambda config: regression(**parts), config)


def go_on(folder: Path) -> None:
    """What the other process runs: each trial from each of its steps to its end."""
    torch.set_num_threads(1)
    ends = {}
    for name in SCHEDULES:
        for step in range(STEPS):
            trial = scheduled_trial(name)
            torch.randn(17)  # its random state is elsewhere
            trial.load(folder / f"{name} {step}.pt")
            while not trial.completed:
                trial.advance()
            ends[f"{name} {step}"] = trial.trainer.state_dict(), trial.history
    torch.save(ends, folder / "ends.pt")


def test_schedules_go_on_in_a_new_process_to_the_same_bits(tmp_path: Path) -> None:
    ends = {}
    for name in SCHEDULES:
        trial = scheduled_trial(name)
        for step in range(STEPS):
            trial.save(tmp_path / f"{name} {step}.pt")
            trial.advance()
        assert trial.completed
        ends[name] = trial.trainer.state_dict(), trial.history
    code = f"from pathlib import Path; from {__name__} import go_on; go_on(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    resumed = torch.load(tmp_path / "ends.pt", weights_only=True)
    for name in SCHEDULES:
        for step in range(STEPS):
            assert_same_bits(resumed[f"{name} {step}"], ends[name], f"{name} from step {step}")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "ReduceLROnPlateau"])
def test_schedule_of_epochs_is_that_of_a_loop_by_hand(name: str) -> None:
    """With batches in random order and dropout: the last batch of a pass is a smaller one."""
    seen, expected = [], []
    parts = {"ll_model": net(dropout=0.2), "train_data": shuffled(10), "ll_scheduler_interval": "epoch"}
    parts |= {"ll_optimizer": partial(momentum, seen=seen), "ll_scheduler": SCHEDULES[name]}
    trainer, losses = trained(regression(**parts), replace(PLAIN, ul_steps=3 * 6), 3 * 5 + 1)

    problem = regression(ll_model=net(dropout=0.2), train_data=shuffled(10))
    seed_everything(1)
    optimizer = momentum(list(problem.ll_model.parameters()), 0.05, expected)
    schedule = scheduled(name, optimizer, steps=6)
    by_loop = []
    for epoch in range(6):
        for batch in problem.train_data:
            by_loop.append(loss_and_gradient(problem, optimizer, batch).item())
            optimizer.step()
            if epoch == 5:
                break
        else:
            schedule.step()
    assert losses == by_loop
    assert seen == expected
    assert_same_bits(trainer.problem.ll_model.state_dict(), problem.ll_model.state_dict())
    assert_same_bits(optimizer_of(trainer).state_dict(), optimizer.state_dict())


def test_schedule_of_epochs_goes_on_from_the_middle_of_one() -> None:
    def make() -> BilevelTrainer:
        parts = {"ll_scheduler": SCHEDULES["ExponentialLR"], "ll_scheduler_interval": "epoch"}
        return BilevelTrainer(regression(train_data=shuffled(), **parts), replace(PLAIN, ul_learning_rate=0.01))

    trainer, saved = make(), []
    for _ in range(8):
        saved.append(saved_and_loaded(trainer.state_dict()))
        trainer.step()
    assert trainer.ll_rate < 0.05 * 0.9**2
    for state in saved:
        resumed = make()
        resumed.load_state_dict(state)
        while resumed.ul_step < 8:
            resumed.step()
        assert_same_bits(resumed.state_dict(), trainer.state_dict())


def test_interval_is_one_of_two() -> None:
    with pytest.raises(InvalidValueError, match="`ll_scheduler_interval` must be one of step, epoch, got 'batch'"):
        regression(ll_scheduler_interval="batch")


# ---- the ul schedule

UL = replace(PLAIN, ul_learning_rate=0.1, adapt_ul_learning_rate=False, k=3)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "ReduceLROnPlateau"])
def test_ul_steps_have_the_rates_of_a_loop_by_hand(name: str) -> None:
    parts = {"ul_optimizer": partial(torch.optim.SGD, momentum=0.9), "ul_scheduler": SCHEDULES[name]}
    trainer, _ = trained(regression(**parts), UL, 0)
    values = [nn.Parameter(param.detach().clone()) for param in trainer.problem.ul_model.parameters()]
    optimizer = torch.optim.SGD(values, lr=0.1, momentum=0.9)
    schedule = scheduled(name, optimizer)
    for _ in range(STEPS):
        assert trainer.ul_rate == optimizer.param_groups[0]["lr"]
        gradients = trainer.step().hypergradient.gradients
        values[0].grad = gradients["log_l2"].clone()
        optimizer.step()
        schedule.step()
        assert torch.equal(trainer.problem.ul_model.log_l2, values[0])


def test_ul_plateau_follows_the_validation_loss_of_each_report() -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)

    config = CONFIG | {"ul_learning_rate": 0.1, "adapt_ul_learning_rate": False, "ul_steps_per_report": 2}
    trial = Trial(lambda config: regression(ul_scheduler=plateau, ll_scheduler=plateau), config)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = plateau(optimizer)
    for _ in range(4):
        schedule.step(trial.advance()["validate_loss"])
        assert trial.trainer.ul_rate == optimizer.param_groups[0]["lr"]
        assert trial.trainer.ll_rate == pytest.approx(optimizer.param_groups[0]["lr"] / 2)
    assert trial.trainer.ul_rate == 0.1 / 8


def test_ul_schedule_waits_for_a_ul_step_that_is_skipped() -> None:
    problem = regression(ul_scheduler=SCHEDULES["ExponentialLR"])

    def ul_objective(state: Any) -> torch.Tensor:
        return problem.ul_objective(state) * (float("nan") if trainer.ul_step == 1 else 1.0)

    trainer = BilevelTrainer(replace(problem, ul_objective=ul_objective), UL)
    rates = [trainer.step() and trainer.ul_rate for _ in range(3)]
    assert trainer.skipped_ul_steps == 1
    assert rates == pytest.approx([0.09, 0.09, 0.081])


def test_ul_schedule_needs_a_rate_that_does_not_adapt() -> None:
    with pytest.raises(InvalidValueError, match=r"`ul_scheduler` sets the ul rate, .* adapt_ul_learning_rate=False"):
        BilevelTrainer(regression(ul_scheduler=SCHEDULES["StepLR"]), replace(UL, adapt_ul_learning_rate=True))


def test_ul_schedule_without_ul_steps_needs_nothing() -> None:
    settings = replace(UL, adapt_ul_learning_rate=True, ul_learning_rate=0.0)
    trainer, _ = trained(regression(ul_scheduler=SCHEDULES["StepLR"]), settings, 2)
    assert trainer.ul_rate == 0


def test_ul_optimizer_that_evaluates_its_loss_itself_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"`ul_optimizer` must step along a gradient .* got .*, LBFGS\. Take"):
        BilevelTrainer(regression(ul_optimizer=torch.optim.LBFGS), UL)


# ---- the schedule of another trial

IN_UNITS = (
    "LambdaLR",
    "LambdaLR from 0",
    "MultiplicativeLR",
    "StepLR",
    "MultiStepLR",
    "ExponentialLR",
    "PolynomialLR",
    "CosineAnnealingLR",
)
IN_UNITS += ("CosineAnnealingWarmRestarts", "OneCycleLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")


@pytest.mark.parametrize("level", ["ll", "ul"])
@pytest.mark.parametrize("name", IN_UNITS)
def test_schedule_of_another_trial_goes_on_in_units_of_its_own_start(name: str, level: str) -> None:
    factor, rate = 3.0, f"{level}_rate"

    def make(times: float) -> BilevelTrainer:
        parts = {f"{level}_optimizer": partial(torch.optim.SGD, momentum=0.9), f"{level}_scheduler": SCHEDULES[name]}
        start = getattr(UL, f"{level}_learning_rate")
        return BilevelTrainer(regression(**parts), replace(UL, **{f"{level}_learning_rate": times * start}))

    donor, own = make(1.0), make(factor)
    for _ in range(4):
        donor.step()
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    for _ in range(5):
        assert getattr(own, rate) == pytest.approx(factor * getattr(donor, rate), rel=1e-12)
        for trainer in (donor, own):
            trainer.step()


def test_a_schedule_keeps_its_own_constants() -> None:
    """A donor's state has what its schedule has come to, not what it was made with."""

    def make(rate: float, gamma: float) -> BilevelTrainer:
        parts = {"ll_scheduler": lambda optimizer: ExponentialLR(optimizer, gamma)}
        return BilevelTrainer(regression(**parts), replace(PLAIN, ll_learning_rate=rate))

    donor, own = make(0.1, 0.5), make(0.01, 0.9)
    for _ in range(2):
        donor.step()
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    own.step()
    assert own.ll_rate == pytest.approx(0.01 * 0.5**2 * 0.9, rel=1e-12)


def test_bounds_of_a_schedule_are_its_own() -> None:
    def make(rate: float) -> BilevelTrainer:
        parts = {"ll_scheduler": lambda optimizer: CyclicLR(optimizer, rate / 10, rate, step_size_up=3)}
        parts["ll_optimizer"] = partial(torch.optim.SGD, momentum=0.9)
        return BilevelTrainer(regression(**parts), replace(PLAIN, ll_learning_rate=rate))

    donor, own = make(0.1), make(0.02)
    for _ in range(4):
        donor.step()
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    for _ in range(4):
        donor.step(), own.step()
        assert own.ll_rate == pytest.approx(0.2 * donor.ll_rate, rel=1e-12)


def test_without_a_schedule_the_rate_is_ones_own() -> None:
    donor = BilevelTrainer(regression(ll_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5)), PLAIN)
    own = BilevelTrainer(regression(), PLAIN)
    for _ in range(3):
        donor.step()
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    assert own.ll_rate == PLAIN.ll_learning_rate


def test_a_learning_rate_that_is_a_tensor_goes_on() -> None:
    def make() -> BilevelTrainer:
        return BilevelTrainer(
            regression(
                ll_optimizer=lambda params, lr: torch.optim.Adam(params, lr=torch.tensor(lr, dtype=torch.float64)),
                ll_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
            ),
            PLAIN,
        )

    trainer, resumed = make(), make()
    for _ in range(4):
        trainer.step()
    resumed.load_state_dict(saved_and_loaded(trainer.state_dict()))
    for one in (trainer, resumed):
        one.step()
    assert_same_bits(resumed.state_dict(), trainer.state_dict())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ExponentialLR, "got one that requires `gamma`"),
        (
            lambda optimizer: CosineAnnealingLR(optimizer, 9, eta_min=np.float64(1e-4)),
            "must hold what a checkpoint can",
        ),
    ],
)
def test_message_of_a_schedule_that_would_be_found_wrong_late(schedule: Any, message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        BilevelTrainer(regression(ll_scheduler=schedule), PLAIN)


def test_message_of_epochs_that_are_not_known() -> None:
    class NoLength:
        def __iter__(self) -> Any:
            return iter(shuffled())

    problem = regression(train_data=NoLength(), ll_scheduler=CosineAnnealingLR, ll_scheduler_interval="epoch")
    with pytest.raises(InvalidValueError, match="requires the epochs of a trial, which are not known"):
        BilevelTrainer(problem, PLAIN)
