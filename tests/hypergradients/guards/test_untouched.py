import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.noisy import Worlds
from tests.support.problems import F64, Values
from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.guards.untouched import Fingerprint, preserved_buffers, preserved_modes, untouched


def trample(worlds: Worlds) -> None:
    """Change all that is to come back."""
    for model in (worlds.ul_model, worlds.ll_model):
        model(torch.randn(8, 3, dtype=F64))
        model.train(not model.training)
        model.layers[3].train()
        for param in model.parameters():
            param.requires_grad_(not param.requires_grad)
            param.grad = torch.zeros_like(param)
    random.random()
    np.random.rand()  # noqa: NPY002


def assert_same(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- what comes back


@pytest.mark.parametrize("fails", [False, True])
def test_everything_comes_back_at_the_end(fails: bool) -> None:
    worlds = Worlds()
    before = worlds.items()
    try:
        with untouched(worlds.ul_model, worlds.ll_model):
            trample(worlds)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert_same(worlds.items(), before)


def test_all_but_gradients_come_back_when_asked() -> None:
    worlds = Worlds()
    before = worlds.items()
    with untouched(worlds.ul_model, worlds.ll_model) as put_back:
        for _ in range(2):
            trample(worlds)
            put_back()
            after = worlds.items()
            for item in ("requires_grad", "mode", "buffers", "python", "numpy", "cpu"):
                assert_same(after[item], before[item])


def test_gradients_are_out_of_the_way_inside() -> None:
    model = Values(w=torch.ones(3))
    gradient = model.w.grad = torch.ones(3)
    with untouched(model):
        assert model.w.grad is None
        model.w.sum().backward()
    assert model.w.grad is gradient
    assert torch.equal(gradient, torch.ones(3))


def test_hooks_on_parameters_are_off_inside_and_on_afterwards() -> None:
    model = Values(w=torch.ones(3))
    handle = model.w.register_hook(lambda gradient: gradient.clamp(max=0.5))

    def gradient() -> Tensor:
        return torch.autograd.grad(model.w.sum(), model.w)[0]

    with untouched(model):
        assert torch.equal(gradient(), torch.ones(3))
    assert torch.equal(gradient(), torch.full((3,), 0.5))
    handle.remove()
    assert torch.equal(gradient(), torch.ones(3))


def test_a_buffer_that_two_modules_share_stays_shared() -> None:
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean = one.running_mean
    with untouched(nn.Sequential(one, other)):
        one.running_mean = torch.ones(3)
        other(torch.randn(8, 3))
    assert one.running_mean is other.running_mean
    assert torch.equal(one.running_mean, torch.zeros(3))


def test_a_buffer_with_two_names_comes_back_under_both() -> None:
    model, buffer = Values(w=torch.ones(1)), torch.ones(3)
    model.register_buffer("one", buffer)
    model.register_buffer("two", buffer)
    with untouched(model):
        model.one, model.two = torch.zeros(3), torch.zeros(3)
    assert model.one is model.two is buffer


def test_a_buffer_that_shares_the_memory_of_a_parameter_is_no_edit_of_it() -> None:
    model = Values(w=torch.ones(3))
    model.register_buffer("shadow", model.w.detach())
    print_ = Fingerprint([model.w])
    with untouched(model) as put_back:
        put_back()
    print_.check()


@pytest.mark.parametrize("inference", [False, True])
def test_a_buffer_that_cannot_be_written_to_is_left_alone(inference: bool) -> None:
    model = Values(w=torch.ones(3))
    with torch.inference_mode(inference):
        buffer = torch.ones(3) if inference else torch.ones(1).expand(3)
    model.register_buffer("fixed", buffer)
    with untouched(model):
        model.fixed = torch.zeros(3)
    assert model.fixed is buffer


def test_parameters_themselves_are_not_put_back() -> None:
    """Nobody but an objective writes into them, and a :class:`Fingerprint` tells of that."""
    model = Values(w=torch.ones(3))
    with untouched(model), torch.no_grad():
        model.w.zero_()
    assert torch.equal(model.w, torch.zeros(3))


# ---- buffers alone, and modes alone


def test_buffers_come_back_though_a_graph_holds_them() -> None:
    model = nn.BatchNorm1d(3)
    with preserved_buffers(model):
        loss = model(torch.randn(8, 3)).square().sum()
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert model.num_batches_tracked == 0
    loss.backward()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back_module_by_module(fails: bool) -> None:
    model, other = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())), nn.Dropout()
    model[1][0].eval()
    other.eval()
    modes = [module.training for module in model.modules()]
    try:
        with preserved_modes(model, other):
            model.eval()
            other.train()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [module.training for module in model.modules()] == modes == [True, True, True, False, True]
    assert not other.training


# ---- edits


def in_place(w: Tensor) -> None:
    with torch.no_grad():
        w.mul_(2)


def there_and_back(w: Tensor) -> None:
    with torch.no_grad():
        w.add_(1).sub_(1)


def by_data(w: Tensor) -> None:
    w.data.mul_(2)


def by_entry(w: Tensor) -> None:
    with torch.no_grad():
        w[0] = -w[0]


@pytest.mark.parametrize("edit", [in_place, there_and_back, by_data, by_entry])
def test_message_of_an_edit_of_any_parameter(edit: Callable[[Tensor], None]) -> None:
    params = [nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3)]
    taken = Fingerprint(params)
    taken.check()
    edit(params[1])
    with pytest.raises(InvalidValueError, match=r"changed a parameter in place.* Embedding without max_norm"):
        taken.check()


def test_reading_and_differentiating_is_no_edit() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    taken = Fingerprint([w])
    w.exp().sum().backward()
    w.requires_grad_(False)
    taken.check()


def test_parameters_that_are_not_finite_are_not_taken_for_edited() -> None:
    w = nn.Parameter(torch.tensor([1.0, math.nan]))
    taken = Fingerprint([w])
    taken.check()
    in_place(w)
    with pytest.raises(InvalidValueError, match="changed a parameter in place"):
        taken.check()


def test_norm_is_that_of_all_parameters() -> None:
    assert Fingerprint([torch.tensor([3.0]), torch.tensor([[4.0]])]).norm == 5
