"""The Ray at hand: joined where there is one, else started and shut down."""

import os
import pickle
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import ray

from tune_implicit import InvalidValueError
from tune_implicit.searches.engines.ray_tune.cluster import connected, places, ship_by_value


class FakeRay:
    """What is asked of Ray, kept; it has 4 CPUs and 1 GPU."""

    def __init__(self, running: bool) -> None:
        self.running = running
        self.calls: list[str] = []
        self.started_with: dict[str, Any] = {}
        self.path = ""

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **arguments: Any) -> None:
        self.calls.append("init")
        self.running, self.started_with, self.path = True, arguments, os.environ["PYTHONPATH"]

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        assert self.running
        return {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}


def fake(monkeypatch: pytest.MonkeyPatch, running: bool = False) -> FakeRay:
    made = FakeRay(running)
    for name in ("is_initialized", "init", "shutdown", "cluster_resources"):
        monkeypatch.setattr(ray, name, getattr(made, name))
    return made


# ---- connected


@pytest.mark.parametrize("cpus", [1, 100])
def test_a_ray_that_runs_is_joined_and_left_running(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    # Were it too small now: a cluster may grow.
    there = fake(monkeypatch, running=True)
    with connected(cpus, 0):
        assert there.running
    assert (there.running, there.calls) == (True, [])


@pytest.mark.usefixtures("ray_session")
def test_the_real_ray_is_joined_and_left_running() -> None:
    address = ray.get_runtime_context().gcs_address
    with connected(1, 0):
        assert ray.get_runtime_context().gcs_address == address
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == address


def test_where_there_is_none_one_is_started_and_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch)
    with connected(4, 1):
        assert started.running
    assert started.calls == ["init", "shutdown"]
    assert started.started_with == {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_ray_started_here_is_shut_down_after_an_error(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    started = fake(monkeypatch)
    with suppress(error), connected(1, 0):
        raise error
    assert started.calls == ["init", "shutdown"]


def test_workers_import_what_this_process_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr(sys, "path", ["", "/next/to/the/script", *sys.path])
    started = fake(monkeypatch)
    with connected(1, 0):
        # The workers have theirs from the start on; what else this process starts keeps its own.
        assert os.environ["PYTHONPATH"] == "/mine"
    assert started.path.split(os.pathsep) == sys.path[1:]


@pytest.mark.parametrize(
    ("cpus", "gpus", "message"),
    [
        (5, 0, "`cpus_per_trial` must be at most the 4 CPU that Ray found on this machine, got 5"),
        (1, 1.5, "`gpus_per_trial` must be at most the 1 GPU that Ray found on this machine, got 1.5"),
    ],
)
def test_a_trial_too_large_for_this_machine_is_an_error(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, message: str
) -> None:
    started = fake(monkeypatch)
    with pytest.raises(InvalidValueError, match=message), connected(cpus, gpus):
        pass
    assert started.calls == ["init", "shutdown"]


# ---- places


@pytest.mark.parametrize(
    ("cpus", "gpus", "count"), [(1, 0, 4), (0.5, 0, 8), (3, 0, 1), (1, 0.25, 4), (0, 0.5, 2), (1, 1, 1), (5, 0, 1)]
)
def test_as_many_trials_fit_as_what_is_scarcest_allows_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, count: int
) -> None:
    fake(monkeypatch, running=True)
    assert places(cpus, gpus) == count


# ---- what a module defines


def test_what_a_module_defines_needs_no_file_of_it_where_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("task_of_the_user")
    exec("def factor(): return 6\ndef answer(): return 7 * factor()", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ship_by_value(module)
    try:
        shipped = ray.cloudpickle.dumps(module.answer)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    by_reference = ray.cloudpickle.dumps(module.answer)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert pickle.loads(shipped)() == 42
    with pytest.raises(ModuleNotFoundError, match="task_of_the_user"):
        pickle.loads(by_reference)
