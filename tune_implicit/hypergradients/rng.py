"""The global random state of Python, NumPy and torch, as plain data."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["get_rng_state", "preserved_rng", "remembered_rng", "same_rng_state", "seed_everything", "set_rng_state"]


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - it is the global generator that user code draws from
    torch.manual_seed(seed)


def get_rng_state() -> dict[str, Any]:
    """Return the global random state, made only of tensors, numbers and strings.

    A checkpoint that holds it therefore loads with ``weights_only=True``.
    """
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the global random state to what :func:`get_rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    # A state of more devices than there are here sets those that are.
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)


def same_rng_state(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Return whether two results of :func:`get_rng_state` are the same, as they are where nothing was drawn between."""
    if one is None or other is None:
        return one is other
    (_, *numpy), (_, *others) = one["numpy"], other["numpy"]
    return (
        one["python"] == other["python"]
        and torch.equal(numpy[0], others[0])
        and numpy[1:] == others[1:]
        and torch.equal(one["cpu"], other["cpu"])
        and all(torch.equal(a, b) for a, b in zip(one["cuda"], other["cuda"], strict=True))
    )


def remembered_rng() -> Callable[[], None]:
    """Return a function that puts the global random state back to what it is now."""
    # Not `get_rng_state`: to make plain data of it takes as long as to get it, and this is part of every hypergradient.
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    cpu = torch.default_generator.clone_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu.get_state())
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the global random state as it was, whatever is drawn inside."""
    put_back = remembered_rng()
    try:
        yield
    finally:
        put_back()
