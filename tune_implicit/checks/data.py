"""A look at the splits: how much they hold, and whether they are three."""

from itertools import islice

import torch

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import TuneImplicitError
from tune_implicit.hypergradients.state import Batch, tensors_of
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.splits import batches_of

__all__ = ["look_at_data"]

# As many batches of a split are read to count its examples.
_MOST_BATCHES = 1000


def look_at_data(fixed: FixedProblem, report: CheckReport) -> None:
    """Look at the first batches, and at how much data each split holds."""
    first: dict[str, Batch] = {}
    sizes: dict[str, int] = {}
    for name in ("train_data", "validate_data", "select_data"):
        data = getattr(fixed.problem, name)
        if data is None:
            report.warn("no-select-data", NO_SELECT_DATA)
            continue
        sizes[name] = 0
        try:
            for batch in islice(batches_of(name, data), _MOST_BATCHES):
                first.setdefault(name, batch)
                sizes[name] += next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 1)
        except TuneImplicitError as error:
            report.stop("data", str(error))
    for one, other in (("train_data", "validate_data"), ("validate_data", "select_data")):
        if one in first and other in first and _same(first[one], first[other]):
            report.warn(
                "same-data",
                f"`{one}` and `{other}` begin with the same batch. Where the splits are the same, ul steps overfit "
                "what they should hold out.",
            )
    if sizes["validate_data"] > sizes["train_data"] > 1:
        report.warn(
            "splits-swapped",
            f"`validate_data` holds {sizes['validate_data']} examples and `train_data` {sizes['train_data']}: are "
            "the two swapped?",
        )


def _same(one: Batch, other: Batch) -> bool:
    pairs = tensors_of(one), tensors_of(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*pairs, strict=True)
    )
