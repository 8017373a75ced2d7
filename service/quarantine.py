"""Quarantine: inputs that the model cannot take, kept away from it for a while.

A file that makes a pass of the model raise costs its batch more than a second pass (it is halved until the culprit is
alone, `service.batcher`), and a client that gets an error sends the same file again. So the culprit's content is
remembered, and the next time it is refused when it is read, before any batch. Only one that failed where others did
not, or alone where the model then knew its own inputs: when everything fails, the fault is the device's.

At the first time that the model's process ends, nobody can tell: memory of the machine may have run out. What it was at
is suspected, and from then on it is asked about alone. If it works then, it is forgotten; if the process ends at it
alone for the second time, and the model has worked on something else meanwhile or knows its own inputs, it was the
input.

Nothing is kept of either but a digest, and not for long.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from astroclip.preprocess import GridImage, GridSpectrum

__all__ = ["Quarantine", "Suspects"]

MOST = 1024  # remembered


class Quarantine:
    """A set of prepared inputs, at most `most`, each for `seconds` (0: none). May be used from any thread."""

    def __init__(self, seconds: float, most: int = MOST) -> None:
        self._known = _Memory(seconds, most)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, grid: Any) -> None:
        """Keep an input away; the oldest goes when there are too many. What is no prepared input is passed over."""
        self._known.note(grid)

    def holds(self, grid: Any) -> bool:
        """Is it kept away now? Costs nothing while the quarantine is empty, else a tenth of a millisecond."""
        return self._known.get(grid) is not None


class Suspects:
    """Inputs that the model's process was at when it ended, remembered as those of `Quarantine`."""

    def __init__(self, seconds: float, most: int = MOST) -> None:
        self._known = _Memory(seconds, most)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, grid: Any, alone: bool, succeeded: int) -> bool:
        """Once more; whether that convicts it: it was alone, not for the first time, and the model is otherwise well.
        succeeded: batches the model has worked so far."""
        before = self._known.get(grid) or _Entry()
        self._known.note(grid, succeeded if alone else before.succeeded, times=before.times + alone)
        return alone and before.times > 0 and succeeded > before.succeeded

    def forget(self, grid: Any) -> None:
        """It works."""
        self._known.forget(grid)

    def holds(self, grid: Any) -> bool:
        """Costs as much as that of `Quarantine`."""
        return self._known.get(grid) is not None

    def times(self, grid: Any) -> int:
        """How often it was alone when the process ended."""
        return (self._known.get(grid) or _Entry()).times


@dataclass(frozen=True, slots=True)
class _Entry:
    until: float = 0.0
    succeeded: int = 0
    times: int = 0


class _Memory:
    """Digests of prepared inputs, the latest `most`, each for `seconds` after it was last noted; so the first is the
    next to be forgotten."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._entries: dict[bytes, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, grid: Any, succeeded: int = 0, times: int = 0) -> None:
        if not self._seconds or not isinstance(grid, GridImage | GridSpectrum):
            return
        with self._lock:
            self._entries.pop(key := _digest(grid), None)
            self._entries[key] = _Entry(time.monotonic() + self._seconds, succeeded, times)
            while len(self._entries) > self._most:
                del self._entries[next(iter(self._entries))]

    def get(self, grid: Any) -> _Entry | None:
        if not self._entries or not isinstance(grid, GridImage | GridSpectrum):
            return None
        key = _digest(grid)
        with self._lock:
            now = time.monotonic()
            while self._entries and next(iter(self._entries.values())).until <= now:
                del self._entries[next(iter(self._entries))]
            return self._entries.get(key)

    def forget(self, grid: Any) -> None:
        with self._lock:
            self._entries.pop(_digest(grid), None)


def _digest(grid: GridImage | GridSpectrum) -> bytes:
    arrays = (grid.pixels,) if isinstance(grid, GridImage) else (grid.flux, grid.ivar)
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
