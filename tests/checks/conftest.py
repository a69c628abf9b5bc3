import math

import pytest

from tune_implicit.hypergradients.rng import seed_everything


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make the network that a test builds the same whichever test ran before it."""
    seed_everything(0)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no check run out of time on a busy machine, where a test does not ask for it."""
    monkeypatch.setattr("tune_implicit.checks.check._BUDGET_S", math.inf)
