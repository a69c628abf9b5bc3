"""Memory that ran out, told alike on every device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["memory_told"]

# What torch's allocator for the CPU says, in a bare RuntimeError, and what that of other systems does.
_FULL = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")


@contextmanager
def memory_told() -> Iterator[None]:
    """Raise what runs out of the memory of the CPU as the error that tells of a GPU's.

    Raises
    ------
    torch.OutOfMemoryError
        If memory ran out: in Python or NumPy, as a MemoryError, or in torch on the CPU.
    RuntimeError
        Any other, as it is.
    """
    try:
        yield
    except MemoryError as error:
        raise torch.OutOfMemoryError(_message(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(words in str(error) for words in _FULL):
            raise
        raise torch.OutOfMemoryError(_message(error)) from error


def _message(error: Exception) -> str:
    return (
        f"The memory of the CPU ran out: {str(error) or type(error).__name__}. Take smaller batches or a smaller "
        "model, or run fewer trials at a time."
    )
