"""The Ray at hand."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import ray
from ray import cloudpickle

from tune_implicit.errors import InvalidValueError
from tune_implicit.searches.quiet import environment

__all__ = ["connected", "places", "ship_by_value"]


@contextmanager
def connected(cpus_per_trial: float, gpus_per_trial: float) -> Iterator[None]:
    """Use the Ray that is there; where there is none, start one and shut it down afterwards.

    Raises
    ------
    InvalidValueError
        If a trial needs more than the machine of a Ray started here has.
    """
    if ray.is_initialized():
        yield
        return
    # Its workers can import what this process can, such as a module next to the script or the task file.
    with environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path))), warnings.catch_warnings():
        # Ray before 2.60 tells each process that has no GPU what it will do in future versions.
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        # A cluster may grow; this machine will not, and the search would wait for ever.
        has = ray.cluster_resources()
        for name, kind, needed in (("cpus", "CPU", cpus_per_trial), ("gpus", "GPU", gpus_per_trial)):
            if needed > has.get(kind, 0):
                raise InvalidValueError(
                    f"`{name}_per_trial` must be at most the {has.get(kind, 0):g} {kind} that Ray found on this "
                    f"machine, got {needed:g}. Ask for less, or connect to a cluster first, by ray.init(address=...)."
                )
        yield
    finally:
        ray.shutdown()


def places(cpus_per_trial: float, gpus_per_trial: float) -> int:
    """Return how many trials fit into the cluster at once."""
    cluster = ray.cluster_resources()
    needs = (("CPU", cpus_per_trial), ("GPU", gpus_per_trial))
    return max(1, min(int(cluster.get(kind, 0) // need) for kind, need in needs if need > 0))


def ship_by_value(module: ModuleType) -> None:
    """Pickle what ``module`` defines by value: by reference, a worker on another machine would look for its file."""
    cloudpickle.register_pickle_by_value(module)
