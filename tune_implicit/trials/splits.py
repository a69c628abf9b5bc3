"""Splits of batches: one pass over them, and an endless stream that can be resumed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tune_implicit.errors import CheckpointError, InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import Batch, described
from tune_implicit.hypergradients.rng import (
    get_rng_state,
    preserved_rng,
    same_rng_state,
    seed_everything,
    set_rng_state,
)

__all__ = ["BatchStream", "batches_of", "check_split"]

_EMPTY = (
    "`{name}` must hold at least one batch, got none. "
    "Check the split's size against the loader's `batch_size` and `drop_last`."
)

# What comes after the last batch of a pass.
_END: Any = object()

# A pass of so many in which a split is looked at anew.
_LOOKS_AGAIN = 16

# These draw the whole order of a pass at its start.
_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_BATCH_SAMPLERS = (BatchSampler, type(None))


def check_split(name: str, data: Any) -> None:
    """Check that ``data`` can be read more than once and is not known to be empty.

    Raises
    ------
    InvalidTypeError
        If ``data`` is not iterable, an iterator that is used up by reading it, or one batch instead of several.
    InvalidValueError
        If ``data`` has a length, and that is 0.
    """
    if isinstance(data, Iterator) or not isinstance(data, Iterable | Sequence):
        raise InvalidTypeError(
            f"`{name}` must be a re-iterable of batches, got {type(data).__name__}. Pass a list of batches, such as "
            "(data, target) pairs, or a DataLoader."
        )
    one = isinstance(data, Tensor | Mapping | str)
    if one or (isinstance(data, tuple | list) and len(data) > 1 and all(isinstance(part, Tensor) for part in data)):
        raise InvalidTypeError(
            f"`{name}` must be a re-iterable of batches, got {described(data)}{'' if one else ' tensors'}. For one "
            "batch that is all the data, pass [(data, target)]; for batches that are tensors, pass [[x] for x in ...]."
        )
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an iterable data set has the method, but no answer
        return
    if length == 0:
        raise InvalidValueError(_EMPTY.format(name=name))


def batches_of(name: str, data: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of one pass over ``data``.

    Raises
    ------
    InvalidValueError
        If there are none.
    """
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise InvalidValueError(_EMPTY.format(name=name))


class BatchStream:
    """The batches of a split, pass after pass, without end.

    Its state is the position in the present pass and the random state at the start of that pass. Loading it reads the
    pass again up to there, so that the order of a shuffling loader is the same as before.

    Parameters
    ----------
    name : str
        What messages call the split.
    data : iterable of Batch
        Read anew for each pass. Random choices it makes must come from the global generators of Python, NumPy and
        torch, or from the ``generator`` of a DataLoader or its sampler. One that may remember what it drew between
        batches, as a shuffle buffer does, draws from a random state of its own, so that it can be read again without
        the draws that training makes in between. Whether it draws after the first batch of a pass is learned in the
        first one, and looked at again every 16 passes: to change the random state at each batch takes a tenth of a
        millisecond.
    """

    def __init__(self, name: str, data: Iterable[Batch]) -> None:
        self._name = name
        self._data = data
        self._batches: Iterator[Batch] | None = None
        self._position = self._passes = 0
        self._start: dict[str, Any] | None = None
        # The random state of its own, where it needs one; and whether it draws after the first batch of a pass, as it
        # is taken to until the end of a pass in which it did not.
        self._own: dict[str, Any] | None = None
        self._draws_later: bool | None = None

    def next(self) -> Batch:
        """Return the next batch."""
        batch = _END if self._batches is None else self._later()
        if batch is _END:
            with self._drawing():
                self._start, self._position, self._passes = self._random_state(), 0, self._passes + 1
                self._batches = batches_of(self._name, self._data)
                batch = next(self._batches)
        self._position += 1
        return batch

    def _later(self) -> Batch:
        """Return the next batch of the present pass, ``_END`` at its end."""
        assert self._batches is not None
        looks = self._position == 1 and self._passes % _LOOKS_AGAIN == 0
        if not self._may_remember_draws() or (self._draws_later is False and not looks):
            return next(self._batches, _END)
        before = self._own
        with self._drawing():
            batch = next(self._batches, _END)
        if self._draws_later is not True and not same_rng_state(before, self._own):
            self._draws_later = True
        elif self._draws_later is None and batch is _END:
            self._draws_later = False
        return batch

    @property
    def at_end(self) -> bool:
        """Whether the last batch of a pass has been read, as far as the data tell how many there are."""
        try:
            return self._position == len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return False

    @property
    def passes(self) -> int:
        """How many passes over the data have begun."""
        return self._passes

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is, as plain data."""
        return {
            "position": self._position,
            "start": self._start,
            "now": self._random_state(),
            "own": self._own,
            "passes": self._passes,
            "draws_later": self._draws_later,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` was taken; this moves the global random state, which the caller sets afterwards.

        Raises
        ------
        CheckpointError
            If the split is shorter than it was.
        """
        self._batches, self._position, self._start = None, state["position"], state["start"]
        if self._start is not None:
            self._set_random_state(self._start)
            self._batches = batches_of(self._name, self._data)
            for batch in range(self._position):
                if next(self._batches, _END) is _END:
                    raise CheckpointError(
                        f"The state was saved after batch {self._position} of `{self._name}`, which now ends after "
                        f"{batch}. Load it with the data it was saved with."
                    )
        self._set_random_state(state["now"])
        self._own, self._passes, self._draws_later = state["own"], state["passes"], state["draws_later"]

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draw from a random state of its own where the data may remember draws."""
        if not self._may_remember_draws():
            yield
            return
        if self._own is None:
            seed = int(torch.randint(2**31, ()))
        with preserved_rng():
            if self._own is None:
                seed_everything(seed)
            else:
                set_rng_state(self._own)
            yield
            self._own = get_rng_state()

    def _may_remember_draws(self) -> bool:
        """Return whether what a pass yields depends on more than the random state at its start and at each batch."""
        if isinstance(self._data, DataLoader):
            if isinstance(self._data.dataset, IterableDataset):
                return True
            return type(self._data.sampler) not in _SAMPLERS or type(self._data.batch_sampler) not in _BATCH_SAMPLERS
        return not isinstance(self._data, list | tuple)

    def _random_state(self) -> dict[str, Any] | None:
        """Return what decides the order of a pass; a list has only one."""
        if isinstance(self._data, list | tuple):
            return {}
        return {"global": get_rng_state(), "loader": [generator.get_state() for generator in self._generators()]}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        if not state:
            return
        set_rng_state(state["global"])
        for generator, generator_state in zip(self._generators(), state["loader"], strict=True):
            generator.set_state(generator_state)

    def _generators(self) -> list[torch.Generator]:
        if not isinstance(self._data, DataLoader):
            return []
        found = (self._data.generator, getattr(self._data.sampler, "generator", None))
        return [generator for generator in found if generator is not None]
