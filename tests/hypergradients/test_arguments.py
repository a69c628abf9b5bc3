import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pytest
import torch

from tests.support.problems import Values
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.arguments import (
    NON_NEGATIVE,
    POSITIVE,
    Rule,
    at_least,
    check_argument,
    check_callable,
    check_fields,
    one_of,
    ruled,
)

# ---- its type


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3.0, int, 3),
        (np.int64(3), int, 3),
        (np.float32(3), int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (np.float64(0.5), float, 0.5),
        (np.int8(3), float, 3.0),
        (math.inf, float, math.inf),
        ("cg", str, "cg"),
        (np.str_("cg"), str, "cg"),
        (True, bool, True),
        (np.True_, bool, True),
        (None, float | None, None),
        (3, int | str, 3),
        ("auto", float | str | None, "auto"),
        (3, float | str | None, 3.0),
    ],
)
def test_a_value_is_made_a_plain_one_of_its_type(value: object, kind: Any, expected: object) -> None:
    got = check_argument("k", value, kind)
    assert got == expected
    assert type(got) is type(expected)


def test_what_is_no_plain_value_stays_the_object_it_is() -> None:
    model, path = Values(w=torch.ones(1)), Path("folder")
    assert check_argument("model", model, torch.nn.Module) is model
    assert check_argument("path", path, Path | None) is path


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (1.5, int, "an integer, got 1.5"),
        (math.nan, int, "an integer, got nan"),
        (math.inf, int, "an integer, got inf"),
        (True, int, "an integer, got True"),
        ("3", int, "an integer, got '3'"),
        (None, int, "an integer, got None"),
        (False, float, "a number, got False"),
        (1j, float, r"a number, got 1j"),
        ("1e-3", float, "a number, got '1e-3'"),
        (torch.tensor(1.0), float, r"a number, got tensor\(1.\)"),
        (1, bool, "True or False, got 1"),
        ("no", bool, "True or False, got 'no'"),
        (b"cg", str, "a string, got b'cg'"),
        ("cg", int | None, "an integer or None, got 'cg'"),
        (True, float | str | None, "a number or a string or None, got True"),
        ("folder", Path, "a Path, got 'folder'"),
        (float, SupportsFloat, "a SupportsFloat, got <class 'float'>"),  # which a class has the methods for
    ],
)
def test_message_of_another_type(value: object, kind: Any, words: str) -> None:
    with pytest.raises(InvalidTypeError, match=f"^`k` must be {words}"):
        check_argument("k", value, kind)


def test_words_of_the_rule_stand_for_a_choice_of_types() -> None:
    with pytest.raises(InvalidTypeError, match=r"^`step` must be positive and finite, got \[\]\.$"):
        check_argument("step", [], float | str, POSITIVE)


# ---- its rule


@pytest.mark.parametrize(
    ("rule", "good", "bad", "words"),
    [
        (POSITIVE, (1e-300, 1, 1e300), (0, -1.0, math.inf, math.nan), "positive and finite"),
        (NON_NEGATIVE, (0, 0.0, 1e300), (-1e-300, math.inf, -math.inf, math.nan), "0 or more and finite"),
        (at_least(0), (0, 3, math.inf), (-1, -1e-300, math.nan), "0 or more"),
        (at_least(2), (2, 2.5), (1, math.nan), "2 or more"),
        (one_of(("cg", "dense")), ("cg", "dense"), ("CG", "", "c"), "one of cg, dense"),
        (one_of({"cg": 1, "dense": 2}), ("cg",), ("neumann",), "one of cg, dense"),
    ],
)
def test_a_rule_and_its_words(rule: Rule, good: tuple, bad: tuple, words: str) -> None:
    kind = str if isinstance(good[0], str) else float
    for value in good:
        assert check_argument("k", value, kind, rule) == value
    for value in bad:
        with pytest.raises(InvalidValueError, match=f"^`k` must be {words}, got "):
            check_argument("k", value, kind, rule)


def test_message_shows_the_value_as_it_is_written() -> None:
    with pytest.raises(InvalidValueError, match=r"^`solver` must be one of cg, got 'sgd'\.$"):
        check_argument("solver", "sgd", str, one_of(["cg"]))
    with pytest.raises(InvalidValueError, match=r"^`k` must be 1 or more, got 0\.$"):
        check_argument("k", np.int64(0), int, at_least(1))


# ---- the fields of a dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    k: int = ruled(at_least(0))
    rate: float = ruled(POSITIVE, 0.1)
    name: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def test_fields_become_plain_values_and_stay_frozen() -> None:
    got = Settings(k=np.float64(3), rate=1)
    assert got == Settings(k=3, rate=1.0)
    assert [type(value) for value in (got.k, got.rate)] == [int, float]
    with pytest.raises(FrozenInstanceError):
        got.k = 4


def test_a_field_has_its_default_or_none() -> None:
    assert Settings(k=0).rate == 0.1
    with pytest.raises(TypeError, match="k"):
        Settings()


def test_values_that_break_their_rules_are_told_in_one_error() -> None:
    with pytest.raises(
        InvalidValueError, match=r"^`k` must be 0 or more, got -1\. `rate` must be positive .* got nan\.$"
    ):
        Settings(k=-1, rate=math.nan)


def test_a_default_keeps_to_its_rule_too() -> None:
    @dataclass(frozen=True)
    class Wrong:
        rate: float = ruled(POSITIVE, 0.0)

        def __post_init__(self) -> None:
            check_fields(self)

    with pytest.raises(InvalidValueError, match=r"`rate` must be positive and finite, got 0\.0"):
        Wrong()


def test_a_wrong_type_is_told_before_any_rule() -> None:
    with pytest.raises(InvalidTypeError, match="`rate` must be a number, got 'fast'"):
        Settings(k=-1, rate="fast")


# ---- functions


def test_what_can_be_called() -> None:
    check_callable("objective", len)
    check_callable("objective", Values)


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (1, "int"), ("len", "str")])
def test_message_of_what_cannot_be_called(value: object, kind: str) -> None:
    with pytest.raises(InvalidTypeError, match=rf"^`objective` must be callable, got {kind}\.$"):
        check_callable("objective", value)
