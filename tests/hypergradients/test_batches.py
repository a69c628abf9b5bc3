from collections import OrderedDict, namedtuple

import pytest
import torch

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.batches import Batch, halves, tensors_of

# ---- what a batch holds


def test_tensors_of_any_nesting() -> None:
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(())
    pair = namedtuple("pair", ["left", "right"])
    nested = ({"x": [x, "text"], "none": None}, pair(y, (3, z)))
    assert [id(tensor) for tensor in tensors_of(nested)] == [id(tensor) for tensor in (x, y, z)]
    assert tensors_of(x) == [x]
    assert tensors_of((None, "text")) == []


# ---- the two halves of a batch


def test_examples_are_cut_in_the_middle() -> None:
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    (x_one, y_one), (x_other, y_other) = halves((x, y))
    assert torch.equal(x_one, x[:2])
    assert torch.equal(x_other, x[2:])
    assert (y_one.tolist(), y_other.tolist()) == ([0, 1], [2, 3, 4])


def test_batches_may_be_nested_and_stay_of_their_kind() -> None:
    pair = namedtuple("pair", ["left", "right"])
    x = torch.arange(4)
    for part, expected in zip(
        halves((OrderedDict(x=[x]), pair({"y": x}, (x,)))), (torch.tensor([0, 1]), torch.tensor([2, 3])), strict=True
    ):
        data, target = part
        assert isinstance(data, OrderedDict)
        assert isinstance(target, pair)
        for tensor in (data["x"][0], target.left["y"], target.right[0]):
            assert torch.equal(tensor, expected)


def test_what_is_not_of_the_batch_s_length_is_in_both_halves() -> None:
    scale, weights = torch.tensor(2.0), torch.ones(3)
    for (x, got_scale, got_weights, name), none in halves(((torch.ones(4), scale, weights, "text"), None)):
        assert len(x) == 2
        assert got_scale is scale
        assert got_weights is weights
        assert (name, none) == ("text", None)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.ones(1, 3), torch.ones(1)), 1),
        ((torch.ones(0, 3), None), 0),
        ((None, None), 0),
        (("text", torch.tensor(1.0)), 0),
    ],
    ids=["one example", "none", "no tensor", "a scalar"],
)
def test_message_of_a_batch_that_cannot_be_halved(batch: Batch, size: int) -> None:
    with pytest.raises(
        InvalidValueError,
        match=rf"halves the validation batch.* 2 or more examples, got {size}\. Use larger batches, `ul_batches` of 2",
    ):
        halves(batch)
