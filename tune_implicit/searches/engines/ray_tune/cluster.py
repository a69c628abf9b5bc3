"""The Ray at hand."""

import logging
import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import cloudpickle
from ray.exceptions import NodeDiedError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_implicit.errors import InvalidValueError, StorageError
from tune_implicit.searches.engines.ray_tune.borrowed import is_client
from tune_implicit.searches.quiet import environment

__all__ = ["connected", "places", "probe", "ship_by_value"]

logger = logging.getLogger(__name__)

# What Ray itself calls a Ray that is started anew, and one that it looks for.
LOCAL = "local"
AUTO = "auto"

# How long a machine may take to answer. Ray itself would ask one that does not for minutes.
CONNECT_S = 10.0
PROBE_S = 120.0

# How long a file that is there may stay unseen on another machine: NFS remembers for a while what was not there.
PATIENCE_S = 5.0


@contextmanager
def connected(cpus_per_trial: float, gpus_per_trial: float, address: str | None = None) -> Iterator[None]:
    """Use the Ray that one is told of, else start one on this machine and shut it down afterwards.

    Told of is the one that this process is connected to, or that of ``address``, or that of the environment variable
    RAY_ADDRESS. One that merely runs on this machine is left alone: it is another's, or about to die since its driver
    was killed.

    Parameters
    ----------
    cpus_per_trial, gpus_per_trial : float
        What a trial occupies.
    address : str, optional
        That of a running Ray, ``"auto"`` for the one that Ray finds on this machine, or ``"local"`` for a new one.

    Raises
    ------
    InvalidValueError
        If no Ray answers at the address, if it is another than that of the Ray that this process is connected to, or if
        a trial needs more than the machine of a Ray started here has.
    """
    if ray.is_initialized():
        _check_same(address)
        logger.info("Trials run on the Ray that this process is connected to.")
        yield
        return
    told = _told(address)
    if told == LOCAL:
        _start()
        logger.info("Trials run on a Ray started for them on this machine.")
    else:
        _join(told)
        logger.info("Trials run on the Ray at %s.", told)
    try:
        if told == LOCAL:
            _check_fits(cpus_per_trial, gpus_per_trial)
        yield
    finally:
        # Leaves one that was joined running.
        ray.shutdown()


def _check_same(address: str | None) -> None:
    """Check that the Ray that this process is connected to is the one asked for.

    Raises
    ------
    InvalidValueError
        If it is another.
    """
    if address in (None, AUTO):
        return
    at_hand = ray.get_runtime_context().gcs_address
    if address != at_hand:
        raise InvalidValueError(
            f"`address` must be that of the Ray that this process is connected to, {at_hand}, got {address!r}. Leave "
            "it out, or call ray.shutdown() before."
        )


def _told(address: str | None) -> str:
    """Return the address to use, :data:`LOCAL` where there is none."""
    if address in (None, AUTO):
        # To Ray as well, the variable is what "auto" means.
        return os.environ.get("RAY_ADDRESS") or address or LOCAL
    return address


def _start() -> None:
    """Start a Ray on this machine."""
    # Its workers can import what this process can, such as a module next to the script or the task file.
    with environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        _init(address=LOCAL, include_dashboard=False)


def _init(**arguments: Any) -> None:
    with warnings.catch_warnings():
        # Ray before 2.60 tells each process that has no GPU what it will do in future versions.
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        ray.init(log_to_driver=False, logging_level="error", **arguments)


def _join(address: str) -> None:
    """Connect to the Ray at ``address``.

    Raises
    ------
    InvalidValueError
        If none answers there.
    """
    try:
        if address != AUTO:
            _knock(address)
        _init(address=address)
    except (OSError, RuntimeError, ValueError) as error:
        by = "" if os.environ.get("RAY_ADDRESS") != address else ", by the environment variable RAY_ADDRESS"
        raise InvalidValueError(
            f"`address` must be that of a Ray that answers, got {address!r}{by}: {error}. Correct it, start that Ray "
            "(ray start --head), or leave both `address` and RAY_ADDRESS out, and a Ray is started on this machine."
        ) from error


def _knock(address: str) -> None:
    """Check that anyone is there at ``address``, for whom Ray would wait for minutes.

    Raises
    ------
    OSError
        If no one is.
    ValueError
        If it is not an address.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "ray"):
        return  # a provider of clusters, who knows how to find them
    parts = urlsplit(f"//{rest}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("it must have the form host:port or ray://host:port")
    socket.create_connection((parts.hostname, parts.port), CONNECT_S).close()


def _check_fits(cpus_per_trial: float, gpus_per_trial: float) -> None:
    """Check that a trial fits onto this machine. A cluster may grow; this machine will not.

    Raises
    ------
    InvalidValueError
        If it does not: the search would wait for ever.
    """
    has = ray.cluster_resources()
    for name, kind, needed in (("cpus", "CPU", cpus_per_trial), ("gpus", "GPU", gpus_per_trial)):
        if needed > has.get(kind, 0):
            raise InvalidValueError(
                f"`{name}_per_trial` must be at most the {has.get(kind, 0):g} {kind} that Ray found on this "
                f"machine, got {needed:g}. Ask for less, or connect to a cluster first, by ray.init(address=...)."
            )


def places(cpus_per_trial: float, gpus_per_trial: float) -> int:
    """Return how many trials fit into the cluster at once; of those that need nothing, as many as it has CPUs."""
    cluster = ray.cluster_resources()
    needs = (("CPU", cpus_per_trial), ("GPU", gpus_per_trial))
    fit = [int(cluster.get(kind, 0) // need) for kind, need in needs if need > 0]
    return max(1, min(fit, default=int(cluster.get("CPU", 0))))


def probe(folder: Path) -> None:
    """Check that each machine of the cluster sees ``folder``, as this process does, and can write there.

    A search on an unshared one would run till its first trial is saved, and lose that.

    Parameters
    ----------
    folder : path
        Made where there is none.

    Raises
    ------
    StorageError
        If some do not; they are named.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2 and not is_client():
        return  # this process is on it
    folder.mkdir(parents=True, exist_ok=True)
    name, token = f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    (folder / name).write_text(token)
    try:
        found = _ask(list(nodes), str(folder.absolute()), name, token)
        for node, what in found.items():
            if not what and not _holds(folder / f"{name}-{node}", token):
                found[node] = "it writes to another folder"
    finally:
        for path in folder.glob(f"{name}*"):
            path.unlink(missing_ok=True)
    wrong = [f"{nodes[node]} ({what})" for node, what in found.items() if what]
    if wrong:
        raise StorageError(
            f"`output` must be a folder that all machines of the cluster share, got {str(folder)!r}, which is not the "
            f"same on {len(wrong)} of {len(nodes)}: {', '.join(wrong)}. Take a folder that all share, e.g. by NFS, at "
            "the same path on each."
        )


def _ask(nodes: list[str], folder: str, name: str, token: str) -> dict[str, str]:
    """Return what is wrong with ``folder`` on each of ``nodes``, empty where nothing is; one that is gone is left out.

    Raises
    ------
    RayError
        If a task could not run for a reason of its own.
    """
    here = sys.modules[__name__]
    # By value: importing this module, a worker would load all of the package first.
    ship_by_value(here)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(_seen_from_here)
        on_each = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = {
            task.options(scheduling_strategy=on_it).remote(folder, name, token, f"{name}-{node}"): node
            for node, on_it in zip(nodes, on_each, strict=True)
        }
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
    found = {asked[ref]: f"no answer within {PROBE_S:g} s" for ref in silent}
    for ref in done:
        try:
            found[asked[ref]] = ray.get(ref)
        except (NodeDiedError, TaskUnschedulableError):
            continue  # no trial runs there either
    return found


def _seen_from_here(folder: str, name: str, token: str, answer: str) -> str:
    """Return what is wrong with ``folder`` on this machine, empty where nothing is, and answer by a file."""
    try:
        if not Path(folder).is_dir():
            return "no such folder there"
        if not _holds(Path(folder, name), token):
            return "another folder there"
        Path(folder, answer).write_text(token)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    return ""


def _holds(path: Path, token: str) -> bool:
    """Return whether a file holds ``token``, or comes to within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if path.exists() and path.read_text() == token:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def ship_by_value(module: ModuleType) -> None:
    """Pickle what ``module`` defines by value: by reference, a worker on another machine would look for its file."""
    cloudpickle.register_pickle_by_value(module)
