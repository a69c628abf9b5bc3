import pytest
import torch
from torch import Tensor, nn

from tests.support.problems import F64, generator
from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.first_order import FirstDerivatives, coarsest


def batches(n: int, size: int = 4) -> list[Batch]:
    random = generator()
    return [tuple(torch.randn(size, 2, generator=random, dtype=F64) for _ in range(2)) for _ in range(n)]


@pytest.fixture
def w() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))


@pytest.fixture
def ul() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.5], dtype=F64))


def derivatives(w: nn.Parameter, ul: nn.Parameter, data: list[Batch]) -> FirstDerivatives:
    def loss_of(batch: Batch) -> Tensor:
        x, y = batch
        return (ul.exp() * (x * w - y).square()).mean()

    unused = nn.Parameter(torch.ones(3, dtype=F64))
    return FirstDerivatives(loss_of, data, [w, unused], [ul, nn.Parameter(torch.ones(1, dtype=F64))])


def test_they_are_those_of_the_mean_over_batches(w: nn.Parameter, ul: nn.Parameter) -> None:
    data = batches(3)
    got, expected = derivatives(w, ul, data), derivatives(w, ul, [tuple(map(torch.cat, zip(*data, strict=True)))])
    torch.testing.assert_close(got.b, expected.b)
    torch.testing.assert_close(got.direct[0], expected.direct[0])
    assert got.direct[1] is None
    assert torch.equal(got.b[2:], torch.zeros(3, dtype=F64))
    assert len(got.losses) == 3


def test_the_error_is_the_spread_of_the_batches_or_of_two_halves(w: nn.Parameter, ul: nn.Parameter) -> None:
    data = batches(2)
    whole = [tuple(map(torch.cat, zip(*data, strict=True)))]
    assert derivatives(w, ul, data).error() == pytest.approx(derivatives(w, ul, whole).error())


def test_the_error_falls_with_the_number_of_batches(w: nn.Parameter, ul: nn.Parameter) -> None:
    few, many = (derivatives(w, ul, batches(n)).error() for n in (10, 1000))
    assert 5 < few / many < 20


def test_one_example_has_no_error(w: nn.Parameter, ul: nn.Parameter) -> None:
    with pytest.raises(InvalidValueError, match="must hold 2 or more examples, got 1"):
        derivatives(w, ul, batches(1, size=1)).error()


def test_half_precision_is_the_coarsest_and_gives_float32(w: nn.Parameter) -> None:
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert coarsest([w, half]) is torch.bfloat16
    first = FirstDerivatives(lambda batch: half.square().sum(), [(None, None)], [half], [])
    assert first.b.dtype is torch.float32
