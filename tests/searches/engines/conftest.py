import pytest


@pytest.fixture(scope="module", params=["optuna", "ray"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each engine; Ray starts with its first test."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return str(request.param)
