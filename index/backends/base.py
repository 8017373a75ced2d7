"""What a backend is: it proposes the k nearest slots of one vector table for a batch of queries.

Backends only propose. `index.store` rescores every proposal with `VectorTable.scores`, checks it against the mask and
sorts, so answers are comparable and a backend that ignored a filter could not leak a row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Backend", "Mask", "Slots", "Vectors"]

Vectors = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Backend(Protocol):
    """`name` goes into the search report as its mode; `filters` says whether masks are honoured inside the search."""

    name: str
    filters: bool

    def search(self, queries: Vectors, k: int, mask: Mask | None = None) -> Slots:
        """(Q, m) int64 slots, about the k best, in any order, padded with -1.

        queries: (Q, D) float32 of unit norm; mask: (n,) True = allowed.
        """
        ...
