"""What an argument must be, each rule with its message."""

import numbers

from tune_implicit.errors import InvalidTypeError

__all__ = ["check_callable", "check_number"]


def check_number(name: str, value: object, kind: type = numbers.Real) -> None:
    """Check that ``value`` is a number of the abstract ``kind``, which NumPy's are as well.

    Raises
    ------
    InvalidTypeError
        If not.
    """
    if isinstance(value, bool) or not isinstance(value, kind):
        rule = "an integer" if kind is numbers.Integral else "a number"
        raise InvalidTypeError(f"`{name}` must be {rule}, got {value!r}.")


def check_callable(name: str, value: object) -> None:
    """Check that ``value`` can be called.

    Raises
    ------
    InvalidTypeError
        If not.
    """
    if not callable(value):
        raise InvalidTypeError(f"`{name}` must be callable, got {type(value).__name__}.")
