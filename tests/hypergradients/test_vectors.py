import pytest
import torch

from tune_implicit.hypergradients.vectors import flatten, inner, norm_of, unflatten

F64 = torch.float64


def test_round_trip_keeps_order_and_shapes() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(6.0), torch.empty(0, 4), torch.arange(7.0, 9.0)]
    vector = flatten(tensors)
    assert torch.equal(vector, torch.arange(9.0))
    for got, expected in zip(unflatten(vector, tensors), tensors, strict=True):
        assert torch.equal(got, expected)
        assert got.shape == expected.shape


@pytest.mark.parametrize("count", [1, 2])
def test_memory_layout_does_not_matter(count: int) -> None:
    # Gradients come transposed, expanded and channels-last, which parameters_to_vector does not take.
    transposed = torch.arange(6.0).view(2, 3).T
    assert torch.equal(flatten([transposed] * count), torch.tensor([0.0, 3, 1, 4, 2, 5] * count))
    assert torch.equal(flatten([torch.ones(()).expand(2, 2)] * count), torch.ones(4 * count))


def test_mixed_dtypes_are_promoted_and_given_back() -> None:
    tensors = [torch.ones(2), torch.ones(1, dtype=F64)]
    vector = flatten(tensors)
    assert vector.dtype == F64
    assert [piece.dtype for piece in unflatten(vector, tensors)] == [torch.float32, F64]


def test_unflatten_does_not_copy() -> None:
    vector = torch.zeros(3)
    unflatten(vector, [torch.empty(2), torch.empty(1)])[1].fill_(1)
    assert torch.equal(vector, torch.tensor([0.0, 0, 1]))


@pytest.mark.parametrize("count", [1, 2])
def test_norm_is_over_all_entries_and_no_square_overflows(count: int) -> None:
    got = norm_of([torch.tensor([[3e30, 4e30]])] * count)
    assert got.dtype == F64
    assert got.item() == pytest.approx(5e30 * count**0.5)


def test_inner_product_over_all_entries_is_accumulated_in_float64() -> None:
    ones = [torch.full((1000, 100), 1 + 2.0**-12), torch.ones(())]
    got = inner(ones, ones)
    assert (got.dtype, got.shape) == (torch.float64, ())
    assert got.item() == pytest.approx(1e5 * (1 + 2.0**-12) ** 2 + 1, rel=1e-7)
    assert inner(ones[1:], ones[1:]).item() == 1
