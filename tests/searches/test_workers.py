"""Workers: which are known to have ended."""

import os
import subprocess
import sys

import pytest

from tune_implicit.searches import workers

NAME = "from tune_implicit.searches.workers import new_worker; print(new_worker(), flush=True); input()"


def test_one_of_this_process_ends_when_it_is_said_to() -> None:
    worker = workers.new_worker()
    assert not workers.has_ended(worker)
    workers.end(worker)
    assert workers.has_ended(worker)


def test_one_of_another_process_ends_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = process.stdout.readline().decode().strip()
        assert not workers.has_ended(worker)
        process.kill()
        # It need not be waited for by its parent: a zombie has ended.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert workers.has_ended(worker)
    assert workers.has_ended(worker)


def test_a_process_id_that_was_given_out_again_is_another_process() -> None:
    machine, pid, start, token = workers.new_worker().split("/")
    assert workers.has_ended(f"{machine}/{pid}/1{start}/{token}")


def test_of_another_machine_nothing_is_known() -> None:
    _, pid, start, token = workers.new_worker().split("/")
    assert not workers.has_ended(f"another/{pid}/{start}/{token}")


def test_without_proc_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_start", lambda pid: "")
    worker = workers.new_worker()
    workers.end(worker)
    assert not workers.has_ended(worker)
