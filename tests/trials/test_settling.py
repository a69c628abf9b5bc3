import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from tests.support.problems import F64, symmetric
from tests.support.systems import saved_and_loaded, vector
from tune_implicit.trials.settling import Settling

CPU = torch.device("cpu")

# f = w'Hw/2 - w'c, of which a ul step moves c; and F = b'w. So F is linear, and all that is first order is exact.
H, B, C, MOVED = symmetric(torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=F64)), vector(4), vector(4, 1), vector(4, 2)
V = torch.linalg.solve(H, B)

# As a ul step that the ul loss falls by: its ll model still is at the minimum of before.
STEP = MOVED * -torch.sign(V @ MOVED)
PROMISED = -(V @ STEP).item()


class Lower:
    """The ll problem, at its minimum before the ul step."""

    def __init__(self) -> None:
        start = torch.linalg.solve(H, C)
        self.params = [nn.Parameter(start[:1].clone()), nn.Parameter(start[1:].view(1, 3).clone())]
        self.settling = Settling(self.params)

    def w(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    def look(self, noise: float = 0.0) -> None:
        gradient = H @ self.w() - (C + STEP) + noise * V / (V @ V)
        for param, piece in zip(self.params, gradient.split([1, 3]), strict=True):
            param.grad = piece.view_as(param)
        self.settling.see()

    def train(self, steps: int, noise: Iterable[float] = itertools.repeat(0.0), lr: float = 0.2) -> None:
        """Take gradient steps; ``noise`` is what each batch adds to what is left."""
        for _, added in zip(range(steps), noise, strict=False):
            self.look(added)
            for param in self.params:
                param.data -= lr * param.grad


@pytest.fixture
def lower() -> Lower:
    lower = Lower()
    lower.settling.begin(V, PROMISED)
    return lower


def test_right_after_a_ul_step_what_is_left_is_what_it_promised(lower: Lower) -> None:
    lower.look()
    assert math.isnan(lower.settling.lag)  # it may be noise
    lower.look()
    assert lower.settling.lag == pytest.approx(1.0)
    assert not lower.settling.settled


def test_what_is_left_is_what_the_ul_loss_will_still_fall_by(lower: Lower) -> None:
    end = torch.linalg.solve(H, C + STEP)
    for _ in range(10):
        lower.settling.begin(V, PROMISED)  # anew, so that it looks at one point
        lower.train(2, lr=0.0)
        still = (B @ (lower.w() - end)).item()
        assert lower.settling.lag * PROMISED == pytest.approx(abs(still))
        lower.train(2)


def test_it_falls_as_the_ll_model_follows_until_it_has_settled(lower: Lower) -> None:
    lags = []
    for _ in range(10):
        lower.train(5)
        lags.append((lower.settling.lag, lower.settling.settled))
    assert lags[0][0] > lags[-1][0]
    assert lags[-1][0] < 0.01
    assert lags[-1][1]


def test_ll_model_that_does_not_move_does_not_settle(lower: Lower) -> None:
    lower.train(30, lr=0.0)
    assert not lower.settling.settled
    assert lower.settling.lag == pytest.approx(1.0)


def test_several_ul_steps_that_are_not_followed_leave_more_than_one_promised() -> None:
    lower = Lower()
    lower.settling.begin(V, PROMISED / 3)  # the last one of three alike
    lower.train(10, lr=0.0)
    assert lower.settling.lag == pytest.approx(3.0)
    assert not lower.settling.settled


def test_where_steps_become_small_what_larger_ones_have_left_is_not_theirs(lower: Lower) -> None:
    lags = []
    # A step like the one before, one that promises next to nothing, and many more of those.
    for promised, steps in [(PROMISED, 1), (1e-6 * PROMISED, 1), (1e-6 * PROMISED, 40)]:
        for _ in range(steps):
            lower.settling.begin(V, promised)
        lower.train(2, lr=0.0)
        lags.append(lower.settling.lag)
    assert lags[0] <= lags[1] < 2 * lags[0]
    assert lags[2] > 1000 * lags[0]


@pytest.mark.parametrize(("v", "promised"), [(None, 0.0), (V, 0.0), (V, -1.0)], ids=["skipped", "no step", "uphill"])
def test_where_nothing_was_disturbed_it_has_settled(v: Tensor | None, promised: float) -> None:
    lower = Lower()
    lower.settling.begin(V, PROMISED)
    lower.look()
    lower.settling.begin(v, promised)
    lower.train(3, lr=0.0)
    assert lower.settling.settled
    assert math.isnan(lower.settling.lag)


def test_before_the_first_ul_step_nothing_is_disturbed() -> None:
    lower = Lower()
    lower.train(3)
    assert lower.settling.settled
    assert math.isnan(lower.settling.lag)


def test_what_was_not_looked_at_does_not_keep_it_from_settling(lower: Lower) -> None:
    assert lower.settling.settled
    for param in lower.params:
        param.grad = None
    lower.settling.see()
    assert lower.settling.settled


def test_what_was_not_looked_at_is_not_told(lower: Lower) -> None:
    assert math.isnan(lower.settling.lag)


def test_parameter_without_a_gradient_has_no_part_in_it(lower: Lower) -> None:
    lower.params[0].grad, lower.params[1].grad = None, torch.ones(1, 3, dtype=F64)
    lower.settling.see()
    lower.settling.see()
    assert lower.settling.lag == pytest.approx(abs(V[1:].sum().item()) / PROMISED)


def test_noise_between_batches_hides_what_is_left(lower: Lower) -> None:
    sizes = (30 * PROMISED * sign for sign in itertools.cycle([1, -1]))
    lower.train(10, sizes, lr=0.0)
    assert lower.settling.settled
    assert lower.settling.lag == 0


def test_little_noise_does_not(lower: Lower) -> None:
    sizes = (0.01 * PROMISED * sign for sign in itertools.cycle([1, -1]))
    lower.train(10, sizes, lr=0.0)
    assert not lower.settling.settled
    assert lower.settling.lag == pytest.approx(1.0, rel=0.1)


def test_only_the_last_ll_steps_count(lower: Lower) -> None:
    lower.train(60)
    fresh = Lower()
    fresh.settling.begin(V, PROMISED)
    for fresh_param, param in zip(fresh.params, lower.params, strict=True):
        fresh_param.data.copy_(param)
    for each in (lower, fresh):
        each.train(20)
    assert lower.settling.lag == pytest.approx(fresh.settling.lag, abs=1e-12)


# ---- its state


def test_loaded_state_goes_on_the_same(lower: Lower) -> None:
    other = Lower()
    other.settling.load_state_dict(saved_and_loaded(lower.settling.state_dict()), CPU)
    for each in (lower, other):
        each.train(7)
    assert other.settling.lag == lower.settling.lag
    assert other.settling.settled == lower.settling.settled


def test_loaded_state_forgets_what_was_looked_at(lower: Lower) -> None:
    lower.look()
    lower.settling.load_state_dict(Lower().settling.state_dict(), CPU)
    assert math.isnan(lower.settling.lag)


@pytest.mark.parametrize("n", [3, 5])
def test_inverse_hvp_of_another_length_is_not_used(lower: Lower, n: int) -> None:
    lower.settling.load_state_dict({"v": torch.ones(n, dtype=F64), "promised": 1.0}, CPU)
    lower.look()
    assert lower.settling.settled
    assert math.isnan(lower.settling.lag)
