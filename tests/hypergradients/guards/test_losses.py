import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tune_implicit.errors import DetachedError, InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.guards.losses import Loss, check_devices, check_used, scalar_loss, unused_among

CPU = torch.device("cpu")


def weights(n: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.ones(n))


# ---- what an objective returns


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_of_one_entry_is_a_scalar(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = weights()
    got = scalar_loss("ul_objective", w.sum().to(dtype).reshape(shape))
    assert (got.shape, got.dtype, got.item()) == ((), dtype, 3.0)
    got.backward()
    assert torch.equal(w.grad, torch.ones(3))


@pytest.mark.parametrize("name", ["ul_objective", "ll_objective"])
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            weights() * 1,
            InvalidValueError,
            r"must return a scalar, got a tensor of shape \(3,\)\. Reduce it with .mean",
        ),
        (weights()[:0], InvalidValueError, r"must return a scalar, got a tensor of shape \(0,\)"),
        (1.0, InvalidTypeError, "must return a real floating tensor, got float"),
        (None, InvalidTypeError, "must return a real floating tensor, got NoneType"),
        ((weights().sum(), {}), InvalidTypeError, "must return a real floating tensor, got tuple"),
        (torch.tensor(1), InvalidTypeError, "must return a real floating tensor, got torch.int64"),
        (weights().sum() * 1j, InvalidTypeError, "must return a real floating tensor, got torch.complex64"),
        (weights().sum().detach(), DetachedError, "returned a loss that depends on no parameter. Compute it from"),
    ],
)
def test_messages_of_what_is_no_loss(name: str, returned: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^`{name}` {message}"):
        scalar_loss(name, returned)


# ---- where batches are


def test_batches_on_the_device_or_without_tensors_are_right() -> None:
    check_devices(CPU, validate=({"x": [torch.ones(1)]}, torch.ones(())), train=(None, "text"))


@pytest.mark.parametrize("split", ["validate", "train"])
def test_message_of_a_tensor_on_another_device(split: str) -> None:
    batches = {"validate": (torch.ones(1), None), "train": (torch.ones(1), None)}
    batches[split] = (torch.ones(1), {"y": (1, [torch.ones(1, device="meta")])})
    with pytest.raises(
        InvalidValueError,
        match=rf"^`{split}_data` and `{split}_target` must be on .* cpu, got a tensor on meta.* with .to\('cpu'\)\.$",
    ):
        check_devices(CPU, **batches)


# ---- a loss without its memory


def test_value_is_a_float64_scalar_of_its_own_memory() -> None:
    # `mse_loss` keeps its scalar in a storage as large as all elementwise losses.
    value = Loss(mse_loss(nn.Parameter(torch.ones(1000)), torch.zeros(1000))).value
    assert (value.dtype, value.item(), value.requires_grad) == (torch.float64, 1.0, False)
    assert value.untyped_storage().nbytes() == 8
    w = nn.Parameter(torch.ones((), dtype=torch.float64))
    assert Loss(w).value.data_ptr() != w.data_ptr()


def test_leaves_are_the_parameters_it_was_computed_from() -> None:
    used, twice, unused = weights(), weights(), weights()
    loss = Loss((used * twice).sum() + twice.exp().sum() + unused.detach().sum())
    assert loss.leaves() == {id(used), id(twice)}


def test_nodes_are_those_of_its_graph_each_once() -> None:
    w = weights()
    names = [node.name() for node in Loss(w.sin().sum() + w.sin().sum()).nodes()]
    assert [sum(name.startswith(kind) for name in names) for kind in ("Sin", "Sum", "Add", "torch::")] == [2, 2, 1, 1]


def test_a_graph_too_deep_for_recursion_is_followed_to_its_end() -> None:
    w = weights(1)
    loss: Tensor = w.sum()
    for _ in range(5000):
        loss = loss + 1
    assert Loss(loss).leaves() == {id(w)}


def test_a_graph_with_more_paths_than_nodes_is_followed_node_by_node() -> None:
    w = weights(1)
    loss: Tensor = w.sum()
    for _ in range(100):
        loss = loss + loss
    assert Loss(loss).leaves() == {id(w)}


# ---- what enters neither loss


def test_parameters_that_enter_a_loss_are_used() -> None:
    in_ul, in_ll = weights(), weights()
    assert unused_among({"one": in_ul, "two": in_ll}, [Loss(in_ul.sum()), Loss(in_ll.sum())]) == []
    assert unused_among({}, [Loss(in_ul.sum()), Loss(in_ll.sum())]) == []
    check_used([])


def test_message_of_parameters_that_enter_neither_loss() -> None:
    used = weights()
    params = {"rate": weights(), "used": used, "decay": weights()}
    with pytest.raises(
        InvalidValueError, match=r"^Neither objective uses the ul model's 'rate', 'decay',.* belongs to the search\.$"
    ):
        check_used(unused_among(params, [Loss(used.sum()), Loss(weights().sum())]))
