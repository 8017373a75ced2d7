"""Quarantine: inputs that the model cannot take, kept away from it for a while.

A file that makes a pass of the model raise costs its batch more than a second pass (it is halved until the culprit is
alone, `service.batcher`), and a client that gets an error sends the same file again. So the culprit's content is
remembered, and the next time it is refused when it is read, before any batch. Only one that failed where others did
not, or alone where the model then knew its own inputs, or at which the model's process ended twice: when everything
fails, the fault is the device's. Nothing is kept of it but a digest, and not for long.
"""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

import numpy as np

from astroclip.preprocess import GridImage, GridSpectrum

__all__ = ["Quarantine"]


class Quarantine:
    """A set of prepared inputs, at most `most`, each for `seconds`. May be used from any thread."""

    def __init__(self, seconds: float, most: int = 1024) -> None:
        self.seconds, self.most = seconds, most
        self._until: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, grid: Any) -> None:
        """Keep an input away; the oldest goes when there are too many. What is no prepared input is passed over."""
        if not self.seconds or not isinstance(grid, GridImage | GridSpectrum):
            return
        with self._lock:
            self._until.pop(key := _digest(grid), None)
            self._until[key] = time.monotonic() + self.seconds
            while len(self._until) > self.most:
                del self._until[next(iter(self._until))]

    def holds(self, grid: GridImage | GridSpectrum) -> bool:
        """Is it kept away now? Costs nothing while the quarantine is empty, else a tenth of a millisecond."""
        if not self._until:
            return False
        key = _digest(grid)
        with self._lock:
            until = self._until.get(key)
            if until is not None and until <= time.monotonic():
                del self._until[key]
                return False
        return until is not None


def _digest(grid: GridImage | GridSpectrum) -> bytes:
    arrays = (grid.pixels,) if isinstance(grid, GridImage) else (grid.flux, grid.ivar)
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
