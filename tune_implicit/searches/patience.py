"""A storage that waits where another would fail: a database that restarts, a locked file, a network that is away."""

import time
from collections.abc import Callable
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage

from tune_implicit.searches.borrowed import cached

__all__ = ["STORAGE_FAILURES", "PatientStorage", "patient", "patiently"]

PATIENCE_S = 120.0

# What a storage raises that cannot be reached for now.
STORAGE_FAILURES: tuple[type[Exception], ...] = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    StorageInternalError,
    OSError,
)
try:
    from grpc import RpcError
except ImportError:  # an extra of Optuna's
    pass
else:
    STORAGE_FAILURES += (RpcError,)


def patient(storage: BaseStorage) -> BaseStorage:
    """Return ``storage`` with patience; one in memory needs none."""
    if isinstance(storage, InMemoryStorage | _Patient):
        return storage
    wrapped: BaseStorage = PatientStorage(cached(storage))
    return wrapped


def patiently(
    call: Callable[[int], Any],
    patience_s: float = PATIENCE_S,
    failures: tuple[type[Exception], ...] = STORAGE_FAILURES,
) -> Any:
    """Return what ``call`` returns, which gets the number of failures before it; try again for ``patience_s``."""
    end, failed = time.monotonic() + patience_s, 0
    while True:
        try:
            return call(failed)
        except failures:
            failed += 1
            pause = min(0.05 * 2**failed, 5.0)
            if time.monotonic() + pause > end:
                raise
            time.sleep(pause)


class _Patient:
    """A storage whose operations are tried again where it cannot be reached, before they fail.

    Parameters
    ----------
    storage : BaseStorage
        What is asked.
    patience_s : float
        Seconds after which a failure is passed on.
    """

    def __init__(self, storage: BaseStorage, patience_s: float = PATIENCE_S) -> None:
        self.storage = storage
        self.patience_s = patience_s

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        def call(failed: int) -> Any:
            try:
                return getattr(self.storage, name)(*args, **kwargs)
            except UpdateFinishedTrialError:
                # The failed write may have arrived after all.
                if failed and name == "set_trial_state_values":
                    return True
                raise

        return patiently(call, self.patience_s)


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: _Patient, *args: Any, **kwargs: Any) -> Any:
        return self._ask(name, *args, **kwargs)

    return method


# Each operation of a storage, those with a body in the base class included.
_OPERATIONS = [name for name in dir(BaseStorage) if not name.startswith("_") and callable(getattr(BaseStorage, name))]
PatientStorage: type[Any] = type(
    "PatientStorage",
    (_Patient, BaseStorage),
    {name: _forwarded(name) for name in _OPERATIONS} | {"__module__": __name__},
)
