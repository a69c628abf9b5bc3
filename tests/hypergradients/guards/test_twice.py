import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.function import once_differentiable
from torch.backends import cuda, cudnn
from torch.nn.functional import hardsigmoid, scaled_dot_product_attention
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.support.problems import F64, generator
from tune_implicit.errors import DerivativeError
from tune_implicit.hypergradients.guards.losses import Loss
from tune_implicit.hypergradients.guards.twice import (
    check_derivatives,
    check_twice_differentiable,
    named_derivatives,
    twice_differentiable_kernels,
)

# ---- modules


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        r"'0\.parametrizations\.weight' uses weight_norm.* g \* v / v\.norm",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        r"'0\.parametrizations\.weight' uses spectral_norm.* matrix_norm",
    ),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "'0' uses spectral_norm"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4), "'0' uses EmbeddingBag.* Use an Embedding and a sum"),
    "scale_grad_by_freq": (
        lambda: nn.Embedding(7, 4, scale_grad_by_freq=True),
        "'0' uses Embedding with scale_grad_by_freq or sparse.* Use neither option",
    ),
    "sparse": (lambda: nn.Embedding(7, 4, sparse=True), "'0' uses Embedding with scale_grad_by_freq or sparse"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED)
def test_module_without_a_right_second_derivative_is_refused_unless_frozen(
    make: Callable[[], nn.Module], named: str
) -> None:
    """The double backward of ``weight_norm`` is not even symmetric in torch 2.13 on a CPU."""
    model = nn.Sequential(make())
    with pytest.raises(DerivativeError, match=f"^`ll_model`'s module {named}"):
        check_twice_differentiable("ll_model", model)
    model.requires_grad_(False)
    check_twice_differentiable("ll_model", nn.Sequential(model, nn.Linear(4, 4)))


def test_other_modules_and_parametrizations_are_right() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 4, padding_idx=0), parametrizations.orthogonal(nn.Linear(4, 4)), nn.LSTM(4, 4), nn.Tanh()
    )
    check_twice_differentiable("ll_model", model)


# ---- functions


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Decorated(Once):
    @staticmethod
    @functools.wraps(Once.backward)
    def backward(ctx, gradient):
        return Once.backward(ctx, gradient)


class Twice(Once):
    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def weights() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, generator=generator(), dtype=F64))


@pytest.mark.parametrize("function", [Once, Decorated])
def test_function_whose_backward_is_marked_once_differentiable_is_refused(
    function: type[torch.autograd.Function],
) -> None:
    # torch takes its second derivative for zero, without a word.
    loss = Loss((function.apply(weights().sin()) + 1).sum())
    with pytest.raises(
        DerivativeError, match=f"`ll_objective` uses {function.__name__}, .* marked once_differentiable"
    ):
        check_derivatives(loss, loss)


def test_weight_norm_as_a_function_is_refused() -> None:
    loss = Loss(torch._weight_norm(weights()[:, None], torch.ones(4, 1, dtype=F64), 0).sin().sum())
    with pytest.raises(DerivativeError, match="`ll_objective` uses weight_norm, whose second derivative"):
        check_derivatives(loss, loss)


@pytest.mark.parametrize("objective", ["ul_objective", "ll_objective"])
def test_reentrant_checkpointing_is_refused_in_both_objectives(objective: str) -> None:
    # What it computes once more is hidden from `torch.autograd.grad`, without a word where its input needs a gradient.
    hiding = Loss(checkpoint(nn.Linear(4, 1, dtype=F64), weights(), use_reentrant=True).sum())
    plain = Loss(weights().square().sum())
    with pytest.raises(DerivativeError, match=f"`{objective}` uses reentrant checkpointing.*use_reentrant=False"):
        check_derivatives(*((hiding, plain) if objective == "ul_objective" else (plain, hiding)))


@pytest.mark.parametrize("function", [Twice.apply, torch.sin, torch.nn.functional.hardswish, nn.Linear(4, 4).double()])
def test_other_functions_are_right(function: Callable[[Tensor], Tensor]) -> None:
    loss = Loss(function(weights()).square().sum())
    check_derivatives(loss, loss)


# ---- what torch says


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 4), nn.Tanh())
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.layers(x)


def twice(model: nn.Module) -> None:
    params = list(model.parameters())
    loss = model(torch.ones(2, 4)).square().sum()
    gradients = grad(loss, params, create_graph=True)
    grad(gradients, params, [torch.ones_like(g) for g in gradients])


def test_operation_and_module_are_named_with_what_to_write_instead() -> None:
    model = Gated()
    with (
        pytest.raises(
            DerivativeError,
            match=r"cannot differentiate hardsigmoid\w* twice, which `ll_objective` needs "
            r"\(in 'layers\.1', Hardsigmoid\): write nn\.ReLU6\(\)\(x \+ 3\) / 6, or freeze",
        ) as raised,
        named_derivatives("ll_objective", model, lambda: model(torch.ones(2, 4))),
    ):
        twice(model)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert model.seen == 2


def test_modules_are_not_looked_for_where_the_loss_cannot_be_computed_again() -> None:
    def run() -> None:
        raise RuntimeError("the data are gone")

    model = Gated()
    with (
        pytest.raises(DerivativeError, match=r"which `ll_objective` needs: write nn\.ReLU6"),
        named_derivatives("ll_objective", model, run),
    ):
        twice(model)


def test_nothing_listens_to_the_modules_afterwards() -> None:
    model = Gated()
    with (
        pytest.raises(DerivativeError),
        named_derivatives("ll_objective", model, lambda: model(torch.ones(2, 4))),
    ):
        twice(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_operation_outside_of_any_module_is_named_alone() -> None:
    w = weights()
    with (
        pytest.raises(DerivativeError, match=r"hardsigmoid\w* twice, which `ll_objective` needs: write"),
        named_derivatives("ll_objective", nn.Tanh(), lambda: None),
    ):
        grad(grad(hardsigmoid(w).square().sum(), w, create_graph=True)[0].sum(), w)


def test_operation_that_we_know_no_other_for_is_named_all_the_same() -> None:
    with (
        pytest.raises(DerivativeError, match=r"some_kernel twice, .* write it from functions that torch can diff"),
        named_derivatives("ll_objective", nn.Tanh(), lambda: None),
    ):
        raise RuntimeError("derivative for aten::some_kernel is not implemented")


def test_argument_that_has_no_derivative_is_named() -> None:
    w, weight = weights().reshape(2, 2), nn.Parameter(torch.ones(2, dtype=F64))
    with (
        pytest.raises(
            DerivativeError,
            match=r"differentiate nll_loss\w* in its 'weight', which `ul_objective` needs: write reduction=\"none\"",
        ),
        named_derivatives("ul_objective", nn.Tanh(), lambda: None),
    ):
        nn.functional.cross_entropy(w, torch.arange(2), weight=weight).backward()


def test_other_errors_are_left_as_they_are() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised, named_derivatives("ll_objective", nn.Tanh(), lambda: None):
        raise error
    assert raised.value is error


# ---- kernels


def switches() -> tuple[bool, ...]:
    attention = cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return (*attention, cuda.cudnn_sdp_enabled(), cudnn.enabled)


@contextmanager
def flash_attention_off() -> Iterator[None]:
    before = cuda.flash_sdp_enabled()
    cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(before)


def test_attention_is_twice_differentiable_inside() -> None:
    w = nn.Parameter(torch.randn(1, 3, 4, generator=generator()))
    with twice_differentiable_kernels(nn.Linear(1, 1)):
        (gradient,) = grad(scaled_dot_product_attention(w, w, w).sum(), w, create_graph=True)
        (second,) = grad(gradient.square().sum(), w)
    assert second.abs().max() > 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("model", [nn.Linear(1, 1), nn.GRU(1, 1)], ids=["Linear", "GRU"])
def test_switches_are_afterwards_as_they_were(model: nn.Module, fails: bool) -> None:
    with flash_attention_off():
        before = switches()
        try:
            with twice_differentiable_kernels(model):
                assert switches()[:4] == (True, False, False, False)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert switches() == before
        assert not cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.Linear])
def test_cudnn_is_off_for_recurrent_networks_alone(kind: type[nn.Module]) -> None:
    before = cudnn.enabled
    with twice_differentiable_kernels(nn.Sequential(kind(2, 2))):
        assert cudnn.enabled is (before and kind is nn.Linear)


def test_autocast_around_is_off_inside() -> None:
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with twice_differentiable_kernels(model):
            assert model(x).dtype == torch.float32
        assert model(x).dtype == torch.bfloat16


def test_compiled_code_is_not_run_inside() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    with twice_differentiable_kernels(model):
        model(torch.ones(1, 2))
    assert not compiled
    model(torch.ones(1, 2))
    assert len(compiled) == 1
