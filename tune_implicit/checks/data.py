"""A look at the splits: how much they hold, whether they are three, and whether all their values are numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem, raised_by
from tune_implicit.errors import TuneImplicitError
from tune_implicit.hypergradients.batches import Batch, is_pair, moved, size_of, tensors_of
from tune_implicit.trials.problem import NO_SELECT_DATA
from tune_implicit.trials.splits import batches_of

__all__ = ["look_at_data"]

# As many batches of a split are read to count its examples, and what they hold.
_MOST_BATCHES = 1000

_LEVELS = {"train_data": "ll", "validate_data": "ul", "select_data": "ul"}


@dataclass
class _NoNumbers:
    """The values of one part of a split that are no numbers: how many, of how many, and the first batch of them."""

    nan: int = 0
    infinite: int = 0
    values: int = 0
    first: int = 0
    batch: Batch | None = None

    def count(self, number: int, batch: Batch, part: Batch) -> None:
        """Take in a part of batch ``number``."""
        for tensor in tensors_of(part):
            self.values += tensor.numel()
            if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.isfinite().all():
                continue
            nan = int(tensor.isnan().sum())
            self.nan += nan
            self.infinite += int((~tensor.isfinite()).sum()) - nan
            if self.batch is None:
                self.first, self.batch = number, batch

    def __str__(self) -> str:
        kinds = {"NaN": self.nan, "infinite": self.infinite}
        told = " and ".join(f"{n:,} that {'is' if n == 1 else 'are'} {kind}" for kind, n in kinds.items() if n)
        return f"{told}, of {self.values:,} values, first in batch {self.first}"


def look_at_data(fixed: FixedProblem, report: CheckReport) -> None:
    """Look at the first batches, at how much data each split holds, and for values that are no numbers."""
    first: dict[str, Batch] = {}
    sizes: dict[str, int] = {}
    no_numbers: dict[tuple[str, str], _NoNumbers] = {}
    for name in _LEVELS:
        data = getattr(fixed.problem, name)
        if data is None:
            report.warn("no-select-data", NO_SELECT_DATA)
            continue
        sizes[name] = 0
        try:
            for number, batch in enumerate(islice(batches_of(name, data), _MOST_BATCHES), 1):
                first.setdefault(name, batch)
                sizes[name] += size_of(batch) or 1
                for part, held in _parts_of(batch).items():
                    no_numbers.setdefault((name, part), _NoNumbers()).count(number, batch, held)
                if fixed.budget.spent:
                    report.no_time(f"What `{name}` holds after batch {number}")
                    break
        except TuneImplicitError as error:
            report.stop("data", str(error))
    _numbers(fixed, no_numbers, report)
    _splits(first, sizes, report)


def _numbers(fixed: FixedProblem, no_numbers: dict[tuple[str, str], _NoNumbers], report: CheckReport) -> None:
    """Tell of values that are no numbers, before an objective is blamed for what it makes of them.

    Raises
    ------
    StopCheckError
        If a loss is not finite there.
    """
    faults = []
    for (name, part), found in no_numbers.items():
        if found.batch is None:
            continue
        level = _LEVELS[name]
        if _is_finite(fixed, level, found.batch):
            report.warn(
                "nan-in-data",
                f"The {part} of `{name}` holds {found}. `{level}_objective` is finite there all the same: make sure "
                "that it leaves them out, and does not replace them by chance.",
            )
        else:
            faults.append(
                f"The {part} of `{name}` holds {found}. Drop or impute them where the data are read, or leave them out "
                f"in `{level}_objective`, which is not finite there."
            )
    for fault in faults[:-1]:
        report.fault("nan-in-data", fault)
    if faults:
        report.stop("nan-in-data", faults[-1])


def _is_finite(fixed: FixedProblem, level: str, batch: Batch) -> bool:
    """Return whether a loss and its gradient are finite on a batch."""
    params = fixed.ll_params()
    try:
        loss = fixed.value(level, moved(batch, params[0].device))
        gradient = fixed.gradient(level, params, moved(batch, params[0].device))
    except Exception as error:
        # Whatever the objective makes of no numbers, they are what is wrong first; mistakes not its own are not.
        its_own = raised_by(error) is not None or isinstance(error, TuneImplicitError | RuntimeError)
        if not its_own or isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return bool(torch.tensor(loss).isfinite()) and bool(gradient.isfinite().all())


def _splits(first: dict[str, Batch], sizes: dict[str, int], report: CheckReport) -> None:
    """Look at whether the splits are three, and each the one it is said to be."""
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


def _parts_of(batch: Batch) -> dict[str, Batch]:
    """Return what to tell apart in a batch, by name."""
    if is_pair(batch):
        return {"data": batch[0], "target": batch[1]}
    if isinstance(batch, Mapping):
        return {f"{key!r}": part for key, part in batch.items()}
    return {"batch": batch}


def _same(one: Batch, other: Batch) -> bool:
    pairs = tensors_of(one), tensors_of(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*pairs, strict=True)
    )
