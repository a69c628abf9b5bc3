"""A journal file of whole lines, whatever ends the processes that write it."""

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

__all__ = ["WholeLines"]


class WholeLines(JournalFileBackend):
    """Optuna's journal file, without the half line that a writer may leave which was killed, or whose disk was full.

    Optuna appends to it, and no one can read the journal any more.

    Parameters
    ----------
    path : str
        Of the file.
    """

    def __init__(self, path: str) -> None:
        self._own_lock = JournalFileSymlinkLock(path)
        self._path = Path(path)
        super().__init__(path, lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append ``logs``, one JSON object a line."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._own_lock.acquire()
        try:
            with self._path.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":
                        file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._own_lock.release()
