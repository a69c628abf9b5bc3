"""What an argument must be: its type, its rule, and the message where it is not."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection
from types import NoneType, UnionType
from typing import Any, get_args

import numpy as np

from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = [
    "NON_NEGATIVE",
    "POSITIVE",
    "Rule",
    "at_least",
    "check_argument",
    "check_callable",
    "check_fields",
    "one_of",
    "ruled",
]

# What a value must be, in words, and whether it is.
Rule = tuple[str, Callable[[Any], bool]]

POSITIVE: Rule = ("positive and finite", lambda value: 0 < value < math.inf)
NON_NEGATIVE: Rule = ("0 or more and finite", lambda value: 0 <= value < math.inf)

_ANY: Rule = ("", lambda value: True)
_TYPES = {int: "an integer", float: "a number", str: "a string", bool: "True or False", NoneType: "None"}


def at_least(low: int) -> Rule:
    """Return the rule that a number is ``low`` or more, which NaN is not."""
    return f"{low} or more", lambda value: value >= low


def one_of(names: Collection[str]) -> Rule:
    """Return the rule that a string is one of ``names``."""
    return f"one of {', '.join(names)}", lambda value: value in names


def ruled(rule: Rule, default: Any = dataclasses.MISSING) -> Any:
    """Return a field of a dataclass whose values :func:`check_fields` holds to ``rule``."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def check_fields(checked: Any) -> None:
    """Check that each field of a frozen dataclass is of its type and keeps to its rule, and make it a plain value.

    Raises
    ------
    InvalidTypeError
        If a value is of another type.
    InvalidValueError
        If values break their rules; one error tells all.
    """
    mistakes = []
    for field in dataclasses.fields(checked):
        rule = field.metadata.get("rule", _ANY)
        value = _plain(field.name, getattr(checked, field.name), field.type, rule)
        object.__setattr__(checked, field.name, value)
        mistakes += _mistakes(field.name, value, rule)
    if mistakes:
        raise InvalidValueError(" ".join(mistakes))


def check_argument(name: str, value: Any, kind: Any, rule: Rule = _ANY) -> Any:
    """Return the argument ``name`` as a plain value of the type ``kind`` that keeps to ``rule``.

    Raises
    ------
    InvalidTypeError
        If it is of another type.
    InvalidValueError
        If it breaks the rule.
    """
    value = _plain(name, value, kind, rule)
    for mistake in _mistakes(name, value, rule):
        raise InvalidValueError(mistake)
    return value


def check_callable(name: str, value: object) -> None:
    """Check that ``value`` can be called.

    Raises
    ------
    InvalidTypeError
        If not.
    """
    if not callable(value):
        raise InvalidTypeError(f"`{name}` must be callable, got {type(value).__name__}.")


def _mistakes(name: str, value: Any, rule: Rule) -> list[str]:
    words, holds = rule
    return [] if holds(value) else [f"`{name}` must be {words}, got {value!r}."]


def _plain(name: str, value: Any, kind: Any, rule: Rule) -> Any:
    """Return ``value`` in Python's own type; search engines also sample NumPy's numbers, and whole floats for ints.

    Raises
    ------
    InvalidTypeError
        If it is of another type than ``kind``, or of none in it.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for one in kinds:
        if _is(one, value):
            return one(value) if one in (int, float, str, bool) else value
    words = _TYPES.get(kind) or rule[0] or " or ".join(_TYPES.get(one, f"a {one.__name__}") for one in kinds)
    raise InvalidTypeError(f"`{name}` must be {words}, got {value!r}.")


def _is(kind: type, value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int:
        return number and (isinstance(value, numbers.Integral) or float(value).is_integer())
    if kind is float:
        return number
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    return isinstance(value, kind) and not isinstance(value, type)
