import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.support.noisy import assert_same_bits
from tests.support.problems import F64
from tests.support.systems import saved_and_loaded
from tune_implicit.errors import InvalidValueError
from tune_implicit.trials.optimizers import OptimizerFactory, quick_adam
from tune_implicit.trials.rate import UlRate

# So large that no step promises much of it.
HIGH = 1e9

OPTIMIZERS = {"sgd": torch.optim.SGD, "momentum": lambda p, lr: torch.optim.SGD(p, lr, 0.9), "adam": quick_adam}

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


class Walk:
    """ul values, an optimizer of theirs, and its rate."""

    def __init__(
        self,
        *starts: Tensor,
        optimizer: OptimizerFactory = torch.optim.SGD,
        lr: float = 0.01,
        adapts: bool = True,
        project: Callable[[], object] | None = None,
    ) -> None:
        self.params = [nn.Parameter(start.clone()) for start in starts]
        self.optimizer = optimizer(self.params, lr=lr)
        self.rate = UlRate(self.optimizer, self.params, adapts)
        self.project = project
        self.loss = HIGH

    def step(self, *gradients: Tensor, loss: float | None = None) -> float:
        """Take a step and return the decrease that the gradients predict of it, which the loss does by default."""
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.clone()
        moved = self.rate.step(self.loss if loss is None else loss, self.project)
        predicted = -sum((g * m).sum().item() for g, m in zip(gradients, moved, strict=True))
        self.loss -= predicted
        return predicted

    def move(self, *gradients: Tensor, loss: float | None = None) -> Tensor:
        """Take a step and return how far the ul values went."""
        before = self.point()
        self.step(*gradients, loss=loss)
        return self.point() - before

    def down(self, f: Callable[..., Tensor], steps: int) -> float:
        """Take steps down ``f``, and return where they end."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = f(*self.params)
            loss.backward()
            self.rate.step(loss.item(), self.project)
        return f(*self.params).item()

    def point(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    def lrs(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state(self) -> dict:
        return saved_and_loaded({"rate": self.rate.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])


def factors(walk: Walk, gradients: Iterable[Tensor]) -> list[float]:
    """The rate's factor after each step."""
    seen = []
    for gradient in gradients:
        walk.step(*(gradient if isinstance(gradient, tuple) else (gradient,)))
        seen.append(walk.rate.factor)
    return seen


def valley(x: Tensor) -> Tensor:
    """Steep across, flat along: 0.5 (x0^2 + 0.01 x1^2), on top of 1."""
    return 1 + (x[0] ** 2 + 0.01 * x[1] ** 2) / 2


# ---- where the rate goes


@every_optimizer
def test_rate_grows_while_hypergradients_stay_as_they_are(optimizer: OptimizerFactory) -> None:
    walk = Walk(tensor(0, 0, 0), optimizer=optimizer)
    seen = factors(walk, itertools.repeat(tensor(1, -2, 3), 10))
    assert seen[0] == 1  # the first hypergradient has no step to be compared with
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    assert seen[-1] > 2
    assert walk.lrs() == [pytest.approx(0.01 * seen[-1])]


@every_optimizer
def test_rate_that_is_too_small_gets_further_down_a_long_valley(optimizer: OptimizerFactory) -> None:
    adapted, constant = (
        Walk(tensor(0.1, 10), optimizer=optimizer, lr=0.01, adapts=adapts).down(valley, 40) for adapts in (True, False)
    )
    assert adapted - 1 < 0.9 * (constant - 1)


@every_optimizer
def test_rate_shrinks_while_hypergradients_turn_around(optimizer: OptimizerFactory) -> None:
    walk = Walk(tensor(0, 0), optimizer=optimizer)
    seen = factors(walk, [(-1) ** step * tensor(1, 2) for step in range(12)])
    assert seen[-1] < 0.5
    assert seen[-1] < seen[5] < 1


def test_rate_that_is_too_large_stops_to_overshoot() -> None:
    """Each constant step is over the minimum and almost as far up on the other side."""
    steep = {"lr": 1.95, "optimizer": torch.optim.SGD}
    adapted, constant = (
        Walk(tensor(1), adapts=adapts, **steep).down(lambda x: 100 + x.square().sum() / 2, 20)
        for adapts in (True, False)
    )
    assert adapted - 100 < 0.1 * (constant - 100)


def test_hypergradients_at_right_angles_leave_the_rate_alone() -> None:
    turns = itertools.cycle([tensor(1, 0), tensor(0, 1)])
    # Each value is touched by every second hypergradient, which agrees with its own last update: that is growth.
    assert factors(Walk(tensor(0, 0)), itertools.islice(turns, 6))[-1] > 1
    # All are touched, and half of each hypergradient agrees with the step before it, and half is against it.
    turns = itertools.cycle([tensor(1, 1), tensor(1, -1)])
    assert factors(Walk(tensor(0, 0)), itertools.islice(turns, 6)) == pytest.approx([1.0] * 6)


# ---- values that a step does not touch


def test_values_of_two_halves_in_turn_are_each_compared_with_their_own_last_update() -> None:
    """As the weights of training samples are, with minibatches."""
    one, other, nothing = tensor(1, 2), tensor(3, -1), tensor(0, 0)
    steady = itertools.cycle([(one, nothing), (nothing, other)])
    assert factors(Walk(nothing, nothing), itertools.islice(steady, 12))[-1] > 2
    turning = itertools.cycle([(one, nothing), (nothing, other), (-one, nothing), (nothing, -other)])
    assert factors(Walk(nothing, nothing), itertools.islice(turning, 12))[-1] < 0.5


def test_value_that_is_not_touched_has_no_part_in_the_agreement() -> None:
    turning = [(-1) ** step * tensor(1, 2) for step in range(8)]
    alone, joined = Walk(tensor(0, 0)), Walk(tensor(0, 0), tensor(*[0] * 50))
    expected = factors(alone, [turning[0], *turning])
    got = factors(joined, [(turning[0], tensor(*[1] * 50)), *((g, tensor(*[0] * 50)) for g in turning)])
    # The first step touched all; only from the third on has the last one touched the two alone.
    ratios = [later / earlier for earlier, later in itertools.pairwise(got[2:])]
    assert max(ratios) < 1
    assert ratios[-1] == pytest.approx(expected[-1] / expected[-2], rel=0.05)


def test_value_that_is_touched_for_the_first_time_has_no_part_in_the_agreement() -> None:
    alone, joined = Walk(tensor(0, 0)), Walk(tensor(0, 0), tensor(0))
    steady, later = tensor(1, 2), [0, 0, 5]
    expected = factors(alone, [steady] * 3)
    assert factors(joined, [(steady, tensor(size)) for size in later]) == pytest.approx(expected)


# ---- a constant rate


@every_optimizer
def test_constant_rate_is_the_plain_optimizer(optimizer: OptimizerFactory) -> None:
    walk, plain = Walk(tensor(1, 2), optimizer=optimizer, lr=0.3, adapts=False), nn.Parameter(tensor(1, 2))
    alone = optimizer([plain], lr=0.3)
    for gradient in [tensor(1, -1), tensor(-3, 0), tensor(1e9, 1e-9), tensor(0, 0), tensor(2, 2)]:
        plain.grad = gradient.clone()
        alone.step()
        walk.step(gradient, loss=1e-3)  # of which each step promises more
        assert torch.equal(walk.point(), plain.detach())
        assert torch.equal(walk.params[0].grad, gradient)
    assert walk.lrs() == [0.3]
    assert walk.rate.factor == 1.0


# ---- what a step promises


@pytest.mark.parametrize("adapts", [True, False])
@every_optimizer
def test_step_returns_how_far_it_went(optimizer: OptimizerFactory, adapts: bool) -> None:
    walk = Walk(tensor(1, 2), tensor(3), optimizer=optimizer, adapts=adapts)
    for gradients in [(tensor(1, -1), tensor(2)), (tensor(1, 1), tensor(-1)), (tensor(0, 2), tensor(0))]:
        before = walk.point()
        predicted = walk.step(*gradients)
        along = torch.cat(gradients) @ (walk.point() - before)
        assert predicted == pytest.approx(-along.item())


def test_step_against_the_hypergradient_predicts_an_increase() -> None:
    walk = Walk(tensor(0), optimizer=OPTIMIZERS["momentum"])
    assert walk.step(tensor(3)) > 0
    assert walk.step(tensor(-1)) < 0  # the momentum goes on


@every_optimizer
def test_step_that_promises_too_much_of_the_loss_is_shortened(optimizer: OptimizerFactory) -> None:
    walk, plain = (Walk(tensor(0, 0), optimizer=optimizer, lr=10.0, adapts=adapts) for adapts in (True, False))
    gradient = tensor(3, 4)
    predicted, unbounded = walk.step(gradient, loss=2.0), plain.step(gradient, loss=2.0)
    assert unbounded > 2.0
    assert 0 < predicted < 1.0
    # It keeps its direction, and the rate goes down with it.
    torch.testing.assert_close(walk.point() / predicted, plain.point() / unbounded)
    assert walk.rate.factor < 1
    assert walk.lrs() == [10.0 * walk.rate.factor]


def test_step_that_promises_little_is_taken_as_it_is() -> None:
    walk, plain = (Walk(tensor(0, 0), adapts=adapts) for adapts in (True, False))
    assert torch.equal(walk.move(tensor(3, 4), loss=100.0), plain.move(tensor(3, 4), loss=100.0))
    assert walk.rate.factor == 1


@pytest.mark.parametrize("loss", [-2.0, 2.0])
def test_loss_may_have_either_sign(loss: float) -> None:
    assert 0 < Walk(tensor(0), lr=10.0).step(tensor(3), loss=loss) < 1.0


# ---- outliers, and sizes that are none


@pytest.mark.parametrize("size", [1e3, 1e9])
def test_hypergradient_far_longer_than_those_before_it_is_shortened(size: float) -> None:
    walk, usual = Walk(tensor(0, 0)), tensor(3, 4)
    before = max(walk.move(usual).norm().item() for _ in range(4))
    moved = walk.move(size * usual, loss=1e30)
    assert moved.norm().item() < 20 * before
    torch.testing.assert_close(moved / moved.norm(), -usual / usual.norm())


def test_optimizer_does_not_remember_an_outlier_for_long() -> None:
    """Adam divides by the mean square of what it has seen."""
    walk, plain = (Walk(tensor(0.0), optimizer=torch.optim.Adam, adapts=adapts) for adapts in (True, False))
    for each in (walk, plain):
        for gradient in (1, 1, 1, 1e6):
            each.step(tensor(gradient), loss=1e30)
    after = [[each.move(tensor(1.0)).abs().item() for _ in range(30)][-1] for each in (walk, plain)]
    assert after[0] > 3 * after[1]


def test_hypergradients_of_the_usual_lengths_are_left_alone() -> None:
    walk = Walk(tensor(0, 0))
    for length in (1.0, 1.5, 0.7, 1.2, 0.5, 1.0):
        walk.step(length * tensor(3, 4))
        torch.testing.assert_close(walk.params[0].grad, length * tensor(3, 4))


@every_optimizer
def test_no_hypergradient_is_no_harm(optimizer: OptimizerFactory) -> None:
    walk = Walk(tensor(1, 2), optimizer=optimizer)
    for loss in (0.0, 1.0, 0.0):
        assert walk.step(tensor(0, 0), loss=loss) == 0
    assert torch.equal(walk.point(), tensor(1, 2))
    assert walk.rate.factor == 1
    assert walk.step(tensor(1, 1)) > 0
    walk.step(tensor(0, 0))
    before = walk.rate.factor
    assert walk.step(tensor(1, 1)) > 0
    assert 0.5 * before <= walk.rate.factor <= 2 * before


def test_value_without_a_gradient_stays_where_it_is() -> None:
    walk = Walk(tensor(1), tensor(2))
    for _ in range(4):
        walk.params[0].grad = tensor(1)
        walk.rate.step(HIGH)
    assert walk.params[1].item() == 2
    assert walk.rate.factor > 1


@pytest.mark.parametrize("size", [1e-30, 1e25, 1e38])
@every_optimizer
def test_size_that_is_no_number_of_its_dtype_is_no_harm(optimizer: OptimizerFactory, size: float) -> None:
    """In float32 the square of each is 0 or infinite."""
    walk = Walk(torch.zeros(2), optimizer=optimizer)
    walk.step(torch.tensor([1.0, 2.0]))
    for _ in range(3):
        walk.step(torch.tensor([size, -size]))
        assert walk.point().isfinite().all()
        assert 0 < walk.rate.factor < math.inf
    for _ in range(20):
        assert math.isfinite(walk.step(torch.tensor([1.0, 2.0])))
    assert walk.point().isfinite().all()
    assert 0 < walk.rate.factor < math.inf


# ---- parameter groups, constraints


def grouped(params: list[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": lr / 100}])


def test_parameter_groups_keep_their_ratio() -> None:
    walk = Walk(tensor(0), tensor(0), optimizer=grouped, lr=0.1)
    factors(walk, itertools.repeat((tensor(1), tensor(2)), 6))
    first, second = walk.lrs()
    assert first > 0.2
    assert second == pytest.approx(first / 100)


def test_constraint_is_kept_by_a_shortened_step_and_counted_in_what_is_promised() -> None:
    walk = Walk(tensor(0.0, 0.0), lr=10.0, project=lambda: walk.params[0].clamp_(min=-0.1))
    predicted = walk.step(tensor(3, 0.01), loss=4.0)
    assert walk.rate.factor < 1
    assert walk.point()[0].item() == pytest.approx(-0.1)
    assert predicted == pytest.approx(-(tensor(3, 0.01) @ walk.point()).item())
    # At the bound it promises only what it may still move by.
    assert walk.step(tensor(3, 0.0), loss=4.0) == pytest.approx(0.0)


# ---- its state

ROAD = [tensor(1, -2), tensor(1, -1), tensor(-1, 3), tensor(1e4, 0), tensor(0, 1), tensor(1, 1), tensor(-2, 0.5)]


@pytest.mark.parametrize("saved_after", [0, 1, 4])
@every_optimizer
def test_loaded_rate_goes_on_in_the_same_bits(optimizer: OptimizerFactory, saved_after: int) -> None:
    walk, resumed = Walk(tensor(0, 0), optimizer=optimizer), Walk(tensor(0, 0), optimizer=optimizer)
    for gradient in ROAD[:saved_after]:
        walk.step(gradient, loss=3.0)
    resumed.load(walk.state())
    resumed.params[0].data.copy_(walk.point())
    for gradient in ROAD[saved_after:]:
        assert resumed.step(gradient, loss=2.0) == walk.step(gradient, loss=2.0)
    assert_same_bits(resumed.state(), walk.state())
    assert torch.equal(resumed.point(), walk.point())


def test_rate_of_another_trial_is_taken_over_as_a_factor_of_ones_own_start() -> None:
    donor, own = Walk(tensor(0), lr=0.01), Walk(tensor(0), lr=0.3)
    found = factors(donor, itertools.repeat(tensor(1), 5))[-1]
    own.load(donor.state())
    assert own.rate.factor == found
    assert own.lrs() == pytest.approx([0.3 * found])
    own.step(tensor(1))
    assert own.lrs() == pytest.approx([0.3 * own.rate.factor])
    assert own.rate.factor > found


def test_constant_rate_stays_its_own_whatever_it_is_given() -> None:
    donor, own = Walk(tensor(0), lr=0.01), Walk(tensor(0), lr=0.3, adapts=False)
    factors(donor, itertools.repeat(tensor(1), 5))
    own.load(donor.state())
    own.step(tensor(1))
    assert own.lrs() == [0.3]
    assert own.point().item() == pytest.approx(-0.3)


def test_rate_that_adapts_takes_over_a_constant_one() -> None:
    donor, own = Walk(tensor(0), lr=0.01, adapts=False), Walk(tensor(0), lr=0.3)
    factors(donor, itertools.repeat(tensor(1), 5))
    own.load(donor.state())
    assert (own.rate.factor, own.lrs()) == (1.0, [0.3])
    assert factors(own, itertools.repeat(tensor(1), 5))[-1] > 1


# ---- what comes of a promise


def test_rate_shrinks_where_nothing_comes_of_what_steps_promise() -> None:
    walk = Walk(tensor(0, 0))
    seen = factors(walk, itertools.repeat(tensor(1, 2), 8))
    for _ in range(20):
        walk.step(tensor(1, 2), loss=walk.loss)
        walk.loss = HIGH  # it has not fallen after all
        seen.append(walk.rate.factor)
    assert max(seen) == pytest.approx(max(seen[:14]))
    assert seen[-1] < 0.2 * max(seen)


def test_noise_between_batches_hides_what_comes_of_a_promise() -> None:
    walk, noise = Walk(tensor(0, 0), lr=1e-4), itertools.cycle([3.0, -3.0, -1.0, 1.0])
    for _ in range(16):
        walk.step(tensor(1, 2), loss=100 + next(noise))
    assert walk.rate.factor > 2


def test_optimizer_without_a_rate_has_none_to_adapt() -> None:
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
            super().__init__(params, {})

        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.data -= 0.1 * param.grad

    with pytest.raises(InvalidValueError, match=r"an `lr`, got Fixed without: .* Take adapt_ul_learning_rate=False"):
        Walk(tensor(0), optimizer=Fixed)
    walk = Walk(tensor(0), optimizer=Fixed, adapts=False)
    walk.step(tensor(1))
    assert walk.point().item() == pytest.approx(-0.1)
    walk.rate.load_state_dict(walk.rate.state_dict())
