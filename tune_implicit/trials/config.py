"""A trial's config: the settings that all trials share, under what the search picked; and which keys were read."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from tune_implicit.errors import InvalidValueError
from tune_implicit.trials.settings import SETTINGS

__all__ = ["TrackedConfig", "merged"]


def merged(settings: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's whole config: ``settings``, the same in every trial, under what the search picked."""
    return {**(settings or {}), **config}


class TrackedConfig(dict[str, Any]):
    """A config that remembers which of its keys were read.

    A user's factory gets it in place of a plain dict. Reading it whole, by iteration, ``items`` or ``**``, reads every
    key.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._unread = set(config)

    def check_all_read(self) -> None:
        """Check that every key is a setting, or was read.

        Raises
        ------
        InvalidValueError
            If there is a key that no one reads: the search would vary what has no effect.
        """
        mistakes = []
        for key in sorted(self._unread.difference(SETTINGS)):
            close = difflib.get_close_matches(key, SETTINGS, n=1)
            mistakes.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        if mistakes:
            raise InvalidValueError(
                f"No one reads the config's {', '.join(mistakes)}. Read it in your problem's factory, take it out of "
                f"the space, or use the name of a setting: {', '.join(SETTINGS)}."
            )

    def __getitem__(self, key: str) -> Any:
        self._unread.discard(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._unread.clear()
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default``."""
        self._unread.discard(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its value, or ``default``."""
        self._unread.discard(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, which is ``default`` from now on where there was none."""
        self._unread.discard(key)
        return super().setdefault(key, default)

    def keys(self) -> Any:
        """Return the keys, all of which then count as read."""
        self._unread.clear()
        return super().keys()

    def values(self) -> Any:
        """Return the values, all of which then count as read."""
        self._unread.clear()
        return super().values()

    def items(self) -> Any:
        """Return the items, all of which then count as read."""
        self._unread.clear()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a plain copy; all keys then count as read."""
        return dict(self.items())
