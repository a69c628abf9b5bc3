"""Storages of Optuna's that lie in a database, each made for a test and gone after it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from optuna.storages import get_storage, run_grpc_proxy_server

__all__ = ["databases", "serve", "why_not"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(answers: Callable[[], object], errors: tuple[type[Exception], ...], most_s: float = 30) -> None:
    end = time.monotonic() + most_s
    while True:
        try:
            answers()
        except errors:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


@contextlib.contextmanager
def grpc_proxy(folder: Path) -> Iterator[str]:
    """Serve an SQLite database in ``folder`` by Optuna's gRPC proxy."""
    port = free_port()
    code = f"from tests.support.databases import serve; serve({str(folder / 'proxied.db')!r}, {port})"
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close(), (OSError,))
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def serve(file: str, port: int) -> None:
    """Serve an SQLite database by Optuna's gRPC proxy, until this process ends."""
    run_grpc_proxy_server(get_storage(f"sqlite:///{file}"), host="127.0.0.1", port=port)


def why_not(kind: str) -> str | None:
    """Return why there can be no storage of a kind here, or ``None`` where there can."""
    if kind == "postgresql" and _postgres_programs() is None:
        return "PostgreSQL's initdb is not installed (apt-get install postgresql)"
    if kind == "postgresql" and find_spec("psycopg2") is None:
        return "its driver is not installed (pip install psycopg2-binary)"
    if kind == "grpc" and (find_spec("grpc") is None or find_spec("google.protobuf") is None):
        return "gRPC is not installed (pip install grpcio protobuf)"
    return None


def _postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    # Debian keeps them off the path.
    candidates = [*([Path(found).resolve()] if found else []), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return candidates[-1].parent if candidates else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start a PostgreSQL of its own; it refuses to run as root, and then runs as Debian's postgres."""
    programs, port = _postgres_programs(), free_port()
    assert programs is not None, "asked before"
    as_root = os.getuid() == 0
    as_user = ["runuser", "-u", "postgres", "--"] if as_root else []
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        data = Path(folder, "data")
        if as_root:
            shutil.chown(folder, "postgres")

        def call(program: str, *arguments: str) -> None:
            command = [*as_user, str(programs / program), "-D", str(data), *arguments]
            subprocess.run(command, cwd="/", check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

        call("initdb", "-A", "trust", "-U", "tester")
        call("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
        try:
            yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def databases(kind: str, folder: Path) -> Iterator[str | None]:
    """Yield the ``storage`` of a search by its kind: journal, sqlite, postgresql or grpc; files go into ``folder``."""
    if kind == "journal":
        yield None
    elif kind == "sqlite":
        yield f"sqlite:///{folder / 'study.db'}"
    elif kind == "postgresql":
        with postgres() as url:
            yield url
    else:
        with grpc_proxy(folder) as url:
            yield url
