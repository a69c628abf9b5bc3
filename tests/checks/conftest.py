import pytest

from tune_implicit.hypergradients.rng import seed_everything


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make the network that a test builds the same whichever test ran before it."""
    seed_everything(0)
