"""The Ray at hand: joined where there is one, else started and shut down."""

import logging
import os
import pickle
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray

from tune_implicit import InvalidValueError, StorageError
from tune_implicit.searches.engines.ray_tune import cluster
from tune_implicit.searches.engines.ray_tune.cluster import connected, places, probe, ship_by_value


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
        self.running, self.started_with, self.path = True, arguments, os.environ.get("PYTHONPATH", "")

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        assert self.running
        return {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}


def fake(monkeypatch: pytest.MonkeyPatch, running: bool = False) -> FakeRay:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
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
    # A Ray that merely runs on this machine is not joined.
    assert started.started_with == {
        "address": "local",
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "error",
    }


@pytest.fixture
def door() -> Iterator[str]:
    """An address where someone answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("by", ["argument", "variable", "both", "auto and variable"])
def test_a_ray_that_one_is_told_of_is_joined_and_left_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, door: str, by: str
) -> None:
    joined = fake(monkeypatch)
    if by != "argument":
        monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:9" if by == "both" else door)
    address = {"variable": None, "auto and variable": "auto"}.get(by, door)
    # A cluster may grow: no trial is too large for it.
    with caplog.at_level(logging.INFO), connected(100, 0, address):
        assert joined.running
    assert joined.calls == ["init", "shutdown"]  # which leaves what was not started here
    assert joined.started_with == {"address": door, "log_to_driver": False, "logging_level": "error"}
    assert caplog.messages == [f"Trials run on the Ray at {door}."]


@pytest.mark.parametrize("variable", [None, "", "192.0.2.1:9"])
def test_a_new_ray_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str | None
) -> None:
    started = fake(monkeypatch)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with caplog.at_level(logging.INFO), connected(1, 0, "local" if variable else None):
        pass
    assert started.started_with["address"] == "local"
    assert caplog.messages == ["Trials run on a Ray started for them on this machine."]


@pytest.mark.parametrize("address", ["auto", "provider://mine"])
def test_an_address_that_ray_itself_finds_is_left_to_it(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    joined = fake(monkeypatch)
    with connected(1, 0, address):
        assert joined.started_with["address"] == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("nonsense", "it must have the form host:port or ray://host:port"),
        ("host:port", "Port could not be cast"),
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_an_address_without_a_ray_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, why: str, by_variable: bool
) -> None:
    none = fake(monkeypatch)
    if by_variable:
        monkeypatch.setenv("RAY_ADDRESS", address)
    told = re.escape(repr(address) + (", by the environment variable RAY_ADDRESS" if by_variable else ""))
    began = time.monotonic()
    with (
        pytest.raises(InvalidValueError, match=rf"`address` must be that of a Ray .*got {told}: .*{why}.*start that"),
        connected(1, 0, None if by_variable else address),
    ):
        pass
    assert time.monotonic() - began < 5
    assert none.calls == []


def test_a_ray_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch, door: str) -> None:
    fake(monkeypatch)

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: the cluster has Ray 1.0")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InvalidValueError, match=rf"got '{door}': Version mismatch"), connected(1, 0, door):
        pass


@pytest.mark.usefixtures("ray_session")
def test_another_address_than_that_of_the_ray_at_hand_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    address = ray.get_runtime_context().gcs_address
    for same in (address, "auto", None):
        with caplog.at_level(logging.INFO), connected(1, 0, same):
            pass
    assert set(caplog.messages) == {"Trials run on the Ray that this process is connected to."}
    with (
        pytest.raises(InvalidValueError, match=rf"`address` must be .*{address}, got '192\.0\.2\.1:9'\. Leave it out"),
        connected(1, 0, "192.0.2.1:9"),
    ):
        pass


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
    ("cpus", "gpus", "count"),
    [(1, 0, 4), (0.5, 0, 8), (3, 0, 1), (1, 0.25, 4), (0, 0.5, 2), (1, 1, 1), (5, 0, 1), (0, 0, 4)],
)
def test_as_many_trials_fit_as_what_is_scarcest_allows_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, count: int
) -> None:
    fake(monkeypatch, running=True)
    assert places(cpus, gpus) == count


# ---- probe


@pytest.fixture
def others(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's one machine, seen as another's."""
    monkeypatch.setattr(cluster, "is_client", lambda: True)


def seen(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Let a machine answer ``what`` of the folder."""
    monkeypatch.setattr(cluster, "_seen_from_here", lambda *_: what)


@pytest.mark.usefixtures("others")
def test_a_folder_that_all_machines_share_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    probe(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    probe(tmp_path / "not" / "there")
    assert list((tmp_path / "not" / "there").iterdir()) == []


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("what", ["another folder there", ""])
def test_a_folder_that_a_machine_has_not_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 0)
    seen(monkeypatch, what)
    (node,) = ray.nodes()
    told = re.escape(f"{node['NodeManagerAddress']} ({what or 'it writes to another folder'})")
    with pytest.raises(StorageError, match=rf"`output` must be .*'{tmp_path}'.* 1 of 1: {told}\. .*by NFS"):
        probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_on_one_machine_no_task_is_started(monkeypatch: pytest.MonkeyPatch, ray_session: None, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "_ask", None)
    probe(tmp_path)


def test_what_a_machine_says_of_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 0)
    (tmp_path / "name").write_text("token")

    def said(token: str = "token", folder: Path = tmp_path, answer: str = "answer") -> str:
        return cluster._seen_from_here(str(folder), "name", token, answer)

    assert said() == ""
    assert (tmp_path / "answer").read_text() == "token"
    assert said(token="another") == "another folder there"
    assert said(folder=tmp_path / "none") == "no such folder there"
    assert said(answer="no/such") == "FileNotFoundError: No such file or directory"


@pytest.mark.usefixtures("others")
def test_a_machine_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "PROBE_S", 0)
    seen(monkeypatch, "")
    with pytest.raises(StorageError, match=r"\(no answer within 0 s\)"):
        probe(tmp_path)


@pytest.mark.usefixtures("ray_session")
def test_a_machine_that_is_gone_is_left_out() -> None:
    assert cluster._ask(["0" * 56], "/", "name", "token") == {}


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
