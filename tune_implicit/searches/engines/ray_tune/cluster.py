"""The Ray at hand."""

from types import ModuleType

from ray import cloudpickle

__all__ = ["ship_by_value"]


def ship_by_value(module: ModuleType) -> None:
    """Pickle what ``module`` defines by value: by reference, a worker on another machine would look for its file."""
    cloudpickle.register_pickle_by_value(module)
