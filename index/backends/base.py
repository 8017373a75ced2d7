"""What a backend is: it proposes the nearest slots of one vector table for a batch of queries, and says what it can do.

Backends only propose. `index.table_search` rescores every proposal with `VectorTable.scores`, checks it against the
mask and sorts, so answers are comparable and a backend that ignored a filter could not leak a row. `index.planner`
asks nothing of a backend that it does not declare.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Backend", "Capabilities", "Mask", "Slots", "Vectors"]

Vectors = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Capabilities:
    """What a backend declares, and likewise what a search needs of one.

    exact: proposes the true nearest, so that its recall is 1 without being measured.
    filters: answers under a mask, and leaves places empty (-1) rather than filling them with survivors from afar.
    range_search: nothing nearer than what it proposes is missing, so a threshold may end an answer before k.
    farthest: the nearest of the negated query are the least similar ones; graphs and lists are built for near ones.
    append: takes further vectors without being built anew.
    deletion: gives up single vectors. None does: a published version never changes, masks take objects out.
    """

    exact: bool = False
    filters: bool = False
    range_search: bool = False
    farthest: bool = False
    append: bool = False
    deletion: bool = False

    def covers(self, needs: Capabilities) -> bool:
        """Is everything that is needed declared?"""
        return all(getattr(self, f.name) or not getattr(needs, f.name) for f in fields(self))


class Backend(Protocol):
    """`name` is the mode it gives a search report."""

    @property
    def name(self) -> str: ...

    @property
    def can(self) -> Capabilities: ...

    def search(self, queries: Vectors, k: int, mask: Mask | None = None, *, breadth: int = 0, fetch: int = 0) -> Slots:
        """(Q, m) int64 slots, about the k best of each query, in any order, padded with -1; m may be more than k.

        queries: (Q, D) float32 of unit norm; mask: (n,) True = allowed. breadth, fetch: from the planner, for
        approximate backends (`FaissBackend.search`); exact ones need neither.
        """
        ...
