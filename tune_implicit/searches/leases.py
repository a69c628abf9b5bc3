"""Who runs which trial: a lease in the study, renewed while its worker lives.

A lease counts as expired when another worker has seen it unrenewed for its whole length, by that worker's own clock:
clocks of different machines are never compared.
"""

import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from tune_implicit.searches import workers
from tune_implicit.searches.borrowed import put_back, running_trial, stored
from tune_implicit.searches.patience import STORAGE_FAILURES

__all__ = ["LEASE_ATTR", "LEASE_S", "Lease", "LeaseLostError", "Leases", "Watch", "lease_of", "put_back_abandoned"]

LEASE_S = 60.0
LEASE_ATTR = "lease"
CLAIM_ATTR = "claim"

# Between a claim and a look at whether it still stands; any storage writes faster.
SETTLE_S = 1.0


class LeaseLostError(Exception):
    """Another worker has taken over the trial, since this one was not heard of for too long."""


@dataclass(frozen=True)
class Lease:
    """What a trial says of who runs it.

    Parameters
    ----------
    worker : str
        See :func:`~tune_implicit.searches.workers.new_worker`.
    runs : tuple of str
        What the trial has been saved under, the newest name last.
    lease_s : float
        Seconds without a renewal after which others may take the trial over.
    beat : int
        How often it was renewed.
    """

    worker: str
    runs: tuple[str, ...]
    lease_s: float = LEASE_S
    beat: int = 0

    def write(self, trial: optuna.Trial) -> None:
        """Write it into the trial's study."""
        trial.set_user_attr(LEASE_ATTR, self.plain)

    @property
    def plain(self) -> dict[str, Any]:
        """It in what JSON can hold."""
        return asdict(self) | {"runs": list(self.runs)}


def lease_of(trial: FrozenTrial) -> Lease | None:
    """Return the lease of a trial, as it was read from its study."""
    plain = trial.user_attrs.get(LEASE_ATTR)
    return None if plain is None else Lease(**plain | {"runs": tuple(plain["runs"])})


class Leases:
    """The trials that one worker runs; a thread renews their leases each third of their length.

    Parameters
    ----------
    study : optuna.Study
        Theirs.
    lease_s : float
        Seconds without a renewal after which others may take a trial over.
    """

    def __init__(self, study: optuna.Study, lease_s: float = LEASE_S) -> None:
        self._study = study
        self._lease_s = lease_s
        self._held: dict[int, tuple[optuna.Trial, Lease, float]] = {}  # by number, and when last written
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.worker = ""

    def __enter__(self) -> "Leases":
        self.worker = workers.new_worker()
        self._over.clear()
        threading.Thread(target=self._renew, name="leases", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        workers.end(self.worker)

    def new(self, *runs: str) -> Lease:
        """Return a lease for a trial that is saved under the last of ``runs``, by default under a new name."""
        return Lease(self.worker, runs or (uuid.uuid4().hex,), self._lease_s)

    def take(self, trial: optuna.Trial, lease: Lease) -> None:
        """Write the ``lease`` of ``trial`` into its study, and hold it from now on."""
        lease.write(trial)
        self.hold(trial, lease)

    def hold(self, trial: optuna.Trial, lease: Lease) -> None:
        """Hold ``trial`` from now on, whose study has its ``lease``."""
        with self._lock:
            self._held[trial.number] = (trial, lease, time.monotonic())

    def runs(self, trial: optuna.Trial) -> tuple[str, ...]:
        """Return the names that a trial which is held has been saved under, the newest last.

        Raises
        ------
        LeaseLostError
            If another worker has taken it over.
        """
        with self._lock:
            if trial.number not in self._held:
                raise LeaseLostError(f"Trial {trial.number} was taken over by another worker.")
            return self._held[trial.number][1].runs

    def drop(self, trial: optuna.Trial) -> None:
        """Hold ``trial`` no longer."""
        with self._lock:
            self._held.pop(trial.number, None)

    def check(self, trial: optuna.Trial, *, surely: bool = False) -> None:
        """Check that ``trial`` is still this worker's; the study is asked only where it might not be, or ``surely``.

        Raises
        ------
        LeaseLostError
            If another has it.
        """
        with self._lock:
            held = self._held.get(trial.number)
        late = held is not None and time.monotonic() - held[2] > self._lease_s * 2 / 3
        if held is None or ((late or surely) and not self._is_ours(trial)):
            self.drop(trial)
            raise LeaseLostError(f"Trial {trial.number} was taken over by another worker.")

    def _is_ours(self, trial: optuna.Trial) -> bool:
        now = stored(self._study, trial)
        lease = lease_of(now)
        return now.state is TrialState.RUNNING and lease is not None and lease.worker == self.worker

    def _renew(self) -> None:
        while not self._over.wait(self._lease_s / 3):
            with self._lock:
                held = list(self._held.values())
            for trial, lease, _ in held:
                try:
                    ours = self._is_ours(trial)
                    newer = replace(lease, beat=lease.beat + 1)
                    written = time.monotonic()
                    if ours:
                        newer.write(trial)
                except UpdateFinishedTrialError:
                    ours = False
                except STORAGE_FAILURES:
                    continue  # the next turn tries again; `check` asks before anything is told
                with self._lock:
                    if trial.number in self._held and ours:
                        self._held[trial.number] = (trial, newer, written)
                    elif not ours:
                        self._held.pop(trial.number, None)


class Watch:
    """What one worker has seen of the others' leases, by its own clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, float]] = {}

    def abandoned(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Return those of ``trials`` that run, but whose worker has ended, or has let their lease expire."""
        return [trial for trial in trials if trial.state is TrialState.RUNNING and self._expired(trial)]

    def _expired(self, trial: FrozenTrial) -> bool:
        lease = lease_of(trial)
        if lease is not None and workers.has_ended(lease.worker):
            return True
        mark, now = (lease, len(trial.params), len(trial.intermediate_values)), time.monotonic()
        known, since = self._seen.get(trial.number, (None, now))
        if known != mark:
            since = now
        self._seen[trial.number] = (mark, since)
        return now - since > (LEASE_S if lease is None else lease.lease_s)


def put_back_abandoned(study: optuna.Study, abandoned: list[FrozenTrial]) -> None:
    """Put trials that nobody runs back into the queue of ``study``: the next that asks for a trial takes them up.

    Of several workers that see so at once, one does it: each writes its claim, waits longer than a write takes, and
    goes on if it was the last (Lamport, A fast mutual exclusion algorithm, 1987, after Fischer).
    """
    if not abandoned:
        return
    claim = uuid.uuid4().hex
    handles = [running_trial(study, trial) for trial in abandoned]
    for handle in handles:
        with suppress(UpdateFinishedTrialError):  # it lived, after all
            handle.set_user_attr(CLAIM_ATTR, claim)
    time.sleep(SETTLE_S)
    for handle, before in zip(handles, abandoned, strict=True):
        now = stored(study, handle)
        same = now.state is TrialState.RUNNING and lease_of(now) == lease_of(before)
        if same and now.user_attrs.get(CLAIM_ATTR) == claim:
            with suppress(UpdateFinishedTrialError):
                put_back(study, handle)
