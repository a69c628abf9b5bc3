from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import ray

from tests.support import problems, toy


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder for a search, not there yet."""
    return tmp_path / "found"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that a test itself runs, kept off the terminal."""
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests; its workers get the toy by value, wherever pytest was started."""
    for module in (problems, toy):
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    for module in (problems, toy):
        ray.cloudpickle.unregister_pickle_by_value(module)
