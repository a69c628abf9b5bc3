"""Which process runs a trial, and whether it is known to have ended."""

import os
import uuid
from pathlib import Path

__all__ = ["end", "has_ended", "new_worker"]

# The workers of this process that have not ended.
_ALIVE: set[str] = set()


def new_worker() -> str:
    """Return a name for a worker in this process: its machine, process, start and a random part.

    The machine is that of this boot and, as containers may share it, the namespace that process ids are of.
    """
    worker = f"{_machine()}/{os.getpid()}/{_start(os.getpid())}/{uuid.uuid4().hex[:8]}"
    _ALIVE.add(worker)
    return worker


def end(worker: str) -> None:
    """Note that a worker of this process has ended."""
    _ALIVE.discard(worker)


def has_ended(worker: str) -> bool:
    """Return whether ``worker`` is surely over; False where that cannot be known from here, as of other machines."""
    machine, pid, start, _ = worker.split("/")
    if machine != _machine() or not start:
        return False
    if int(pid) == os.getpid() and start == _start(os.getpid()):
        return worker not in _ALIVE
    return _start(int(pid)) != start


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not on Linux: nothing is known of other processes
        return f"unknown-{uuid.getnode():x}"


def _start(pid: int) -> str:
    """Return when the process began, in ticks since the boot; "" where it has ended, or there is no telling."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start = fields[0], fields[19]
    return "" if state in "ZX" else start
