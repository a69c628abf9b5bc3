import re

import pytest

from tests.support.working import SETTINGS, working
from tune_implicit import check
from tune_implicit.checks.plainly import first_lines

FIGURES = {"trial_s": 12.3, "ul_values": 4.0, "ll_parameters": 10000.0}


@pytest.mark.parametrize(
    ("faults", "warnings", "verdict"),
    [
        ([], 0, "Ready to search."),
        ([], 2, "Ready to search. Read what is marked warning below first (2)."),
        (
            ["nan-in-data"],
            1,
            "Not ready: 1 thing must be mended first (the data hold values that are no numbers). See FAULT below.",
        ),
        (
            ["objective-raised", "torch-error", "of-another-kind"],
            0,
            "Not ready: 3 things must be mended first (a loss function raises an error; of another kind). See FAULT "
            "below.",
        ),
    ],
)
def test_the_first_line_tells_whether_to_start(faults: list[str], warnings: int, verdict: str) -> None:
    assert first_lines(faults, warnings, FIGURES)[0] == verdict


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0123, "0.012 s"), (12.3, "12 s"), (119.0, "119 s"), (600.0, "10 min"), (9000.0, "2.5 h")]
)
def test_the_second_line_tells_how_long_a_trial_takes(seconds: float, told: str) -> None:
    _, time, _ = first_lines([], 0, FIGURES | {"trial_s": seconds})
    assert time == (
        f"A trial with these settings takes about {told}: it trains the inner model (10,000 weights) and learns 4 "
        "hyperparameters by gradient."
    )


def test_one_is_no_plural_and_what_was_not_measured_is_not_told() -> None:
    assert "1 hyperparameter by" in first_lines([], 0, FIGURES | {"ul_values": 1.0})[1]
    assert first_lines(["data"], 0, {})[1] == "How long a trial takes was not measured."


def test_the_first_lines_use_no_word_of_the_method() -> None:
    lines = check(working(), SETTINGS).summary
    assert 2 <= len(lines.splitlines()) <= 4
    assert not re.search(r"\b(ll|ul|hessian|hypergradient|hvp)\b", lines, re.IGNORECASE)
