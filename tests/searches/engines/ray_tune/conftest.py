from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support import toy
from tune_implicit import ImplicitTrainable


@pytest.fixture(autouse=True)
def nothing_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Trainable made without a Tuner writes here."""
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"))


@pytest.fixture
def tuned(ray_session: None, quiet: None, tmp_path: Path) -> Callable[..., Any]:
    """Run the toy in an ordinary Tuner, with arguments of its ``TuneConfig``, and return what that returns."""

    def run_tuner(search_alg: Any = None, space: Any = None, **arguments: Any) -> Any:
        trainable = tune.with_parameters(ImplicitTrainable, problem=toy.problem, mode=arguments.get("mode", "min"))
        arguments = {"metric": "select_loss", "mode": "min", "num_samples": 4, "reuse_actors": True} | arguments
        return tune.Tuner(
            trainable,
            param_space=toy.SETTINGS | (space or {}),
            tune_config=tune.TuneConfig(search_alg=search_alg, max_concurrent_trials=2, **arguments),
            run_config=tune.RunConfig(storage_path=str(tmp_path), name="ray", verbose=0),
        ).fit()

    return run_tuner
