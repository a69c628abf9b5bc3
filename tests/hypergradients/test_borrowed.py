"""The names we borrow are there, and do what we borrow them for; under the oldest and the newest torch promised."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils import parametrizations

from tune_implicit.hypergradients.borrowed import (
    custom_function_of,
    is_spectral_norm,
    is_weight_norm,
    leaves_of,
    map_tensors,
    set_backward_hooks,
    take_backward_hooks,
    version_of,
)

Pair = namedtuple("Pair", ["left", "right"])

# ---- any nesting


def test_leaves_of_any_nesting() -> None:
    x, y = torch.ones(1), torch.ones(2)
    nested = ({"x": x, "rest": [1, None]}, Pair(("text", y), OrderedDict(z=2.5)), ())
    first, *numbers, last, end = leaves_of(nested)
    assert first is x
    assert numbers == [1, None, "text"]
    assert last is y
    assert end == 2.5
    assert leaves_of(x)[0] is x


def test_tensors_of_any_nesting_are_replaced_and_nothing_else() -> None:
    x = torch.ones(2)
    nested = ({"x": x, "rest": [1, None]}, Pair(("text", nn.Parameter(x)), OrderedDict(z=2.5)), ())
    got = map_tensors(lambda tensor: tensor.sum().item(), nested)
    assert got == ({"x": 2.0, "rest": [1, None]}, Pair(("text", 2.0), OrderedDict(z=2.5)), ())
    assert isinstance(got[1], Pair)
    assert isinstance(got[1].right, OrderedDict)
    assert map_tensors(len, x) == 2


# ---- tensors


def test_version_counts_edits_in_place() -> None:
    w = nn.Parameter(torch.ones(3))
    before = version_of(w)
    w + 1
    assert version_of(w) == before
    with torch.no_grad():
        w.add_(1)
        w[0] = 2
    assert version_of(w) == before + 2


def slope(w: nn.Parameter) -> list[float]:
    return grad(w.sum(), w)[0].tolist()


def test_hooks_are_taken_off_and_put_back() -> None:
    w = nn.Parameter(torch.ones(2))
    double = w.register_hook(lambda gradient: 2 * gradient)
    w.register_hook(lambda gradient: gradient + 1)
    hooks = take_backward_hooks(w)
    assert slope(w) == [1, 1]
    set_backward_hooks(w, hooks)
    assert slope(w) == [3, 3]
    double.remove()
    assert slope(w) == [2, 2]


def test_a_parameter_without_hooks_stays_without() -> None:
    w = nn.Parameter(torch.ones(2))
    set_backward_hooks(w, take_backward_hooks(w))
    assert slope(w) == [1, 1]
    w.register_hook(lambda gradient: 2 * gradient)
    assert slope(w) == [2, 2]


# ---- nodes of a graph


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_node_knows_the_function_of_a_user() -> None:
    w = nn.Parameter(torch.ones(2))
    assert custom_function_of(Square.apply(w).grad_fn) is Square


def test_a_node_of_torch_s_own_belongs_to_none() -> None:
    w = nn.Parameter(torch.ones(2))
    node = w.sin().grad_fn
    assert custom_function_of(node) is None
    (accumulate, _), *_ = node.next_functions
    assert custom_function_of(accumulate) is None


# ---- modules


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


WEIGHT_NORMS = {"new": parametrizations.weight_norm, "old": old_weight_norm}
SPECTRAL_NORMS = {"new": parametrizations.spectral_norm, "old": nn.utils.spectral_norm}
Wrapper = Callable[[nn.Module], nn.Module]


def found(is_norm: Callable[[nn.Module], bool], wrap: Wrapper) -> bool:
    return any(is_norm(module) for module in wrap(nn.Linear(2, 2)).modules())


@pytest.mark.parametrize("wrap", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
def test_weight_norms_are_known(wrap: Wrapper) -> None:
    assert found(is_weight_norm, wrap)
    assert not found(is_spectral_norm, wrap)


@pytest.mark.parametrize("wrap", SPECTRAL_NORMS.values(), ids=SPECTRAL_NORMS)
def test_spectral_norms_are_known(wrap: Wrapper) -> None:
    assert found(is_spectral_norm, wrap)
    assert not found(is_weight_norm, wrap)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, inputs: None)
    return module


@pytest.mark.parametrize("wrap", [nn.Sequential, hooked, parametrizations.orthogonal])
def test_other_modules_are_neither(wrap: Wrapper) -> None:
    assert not found(is_weight_norm, wrap)
    assert not found(is_spectral_norm, wrap)


# ---- the random state, which `rng` borrows


def test_the_default_generator_is_the_global_one_and_its_clone_does_not_move() -> None:
    clone = torch.default_generator.clone_state()
    before = torch.get_rng_state()
    drawn = torch.rand(3)
    assert torch.equal(clone.get_state(), before)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(clone.get_state())
    assert torch.equal(torch.rand(3), drawn)
