"""Searching one table: planned, proposed by a backend, widened where a filter was adverse, checked, rescored, sorted.

    plan -> proposals -> too few behind the filter? wider, then exact -> mask, exclusions, threshold -> order

Whatever proposed a slot, its score is `VectorTable.scores`, and no row outside the mask leaves this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from index.backends import ExactBackend, FaissBackend
from index.backends.base import Backend, Capabilities, Slots, Vectors
from index.examples import Examples
from index.planner import MAX_FETCH, MeasuredSearch, Plan, plan
from index.vectors import VectorTable

__all__ = ["Ask", "Found", "Order", "TableSearch"]

Order = Literal["most_similar", "least_similar"]
Rows = npt.NDArray[np.int64]

_WIDER = 8  # how much more broadly a query is searched again of which too few passed the filter


@dataclass(frozen=True)
class Ask:
    """What is asked of a table.

    mask: (N,) bool over catalogue rows, True = allowed. excluded: rows never returned, ascending; excluded_each:
    besides, those of each query alone. order: nearest or farthest first. score_threshold: cosine below which
    (least_similar: above which) nothing is returned. force: mode that overrides the planner.
    """

    k: int
    query_modality: str | None = None
    mask: npt.NDArray[np.bool_] | None = None
    excluded: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    order: Order = "most_similar"
    score_threshold: float | None = None
    force: str | None = None
    excluded_each: Sequence[Rows] = ()

    @property
    def wide(self) -> int:
        """How many of the nearest hold k that may be returned: the excluded may all stand in front."""
        return self.k + len(self.excluded) + max(map(len, self.excluded_each), default=0)


@dataclass(frozen=True)
class Found:
    """rows (Q, k') int64, first in the order asked for, -1 where there are no more; scores likewise; and how they were
    found: mode, candidates (vectors compared with a query) and expected_recall."""

    rows: Rows
    scores: npt.NDArray[np.float32]
    mode: str
    candidates: int
    expected_recall: float


class TableSearch:
    """One table, the backend that searches it exactly, and the approximate one it may have."""

    def __init__(
        self,
        table: VectorTable,
        exact: Backend | None = None,
        ann: FaissBackend | None = None,
        measured: MeasuredSearch | None = None,
    ) -> None:
        self.table, self.ann, self.measured = table, ann, measured
        self.exact: Backend = exact or ExactBackend(table)

    def plan(self, ask: Ask, survivors: int | None) -> Plan:
        """How this will be searched; survivors: of the filter, None without one."""
        return plan(
            self.ann.name if self.ann else None,
            self.ann.can if self.ann else Capabilities(),
            self.measured,
            k=min(ask.wide, max(1, len(self.table))),
            size=len(self.table),
            survivors=survivors,
            needs=Capabilities(range_search=ask.score_threshold is not None, farthest=ask.order == "least_similar"),
            query_modality=ask.query_modality,
            force=ask.force,
        )

    def search(self, queries: Vectors, ask: Ask) -> Found:
        """The k nearest (or farthest) rows of each query (Q, D), unit norm."""
        allowed = self._allowed(ask)
        survivors = None if allowed is None else int(np.count_nonzero(allowed))
        wide = min(ask.wide, len(self.table))
        chosen = self.plan(ask, survivors)
        candidates = len(self.table) if survivors is None else survivors
        if self.ann is None or chosen.mode == "exact":
            signed = -queries if ask.order == "least_similar" else queries
            slots = self.exact.search(signed, wide, allowed)
        else:
            chosen, slots = self._approximate(self.ann, queries, wide, allowed, chosen)
            candidates = candidates if chosen.mode == "exact" else self.ann.candidates(chosen.breadth)
        rows, scores = self._checked(slots, self.table.scores(queries, slots), ask)
        return Found(rows, scores, chosen.mode, candidates, chosen.expected_recall)

    def search_examples(self, examples: Examples, ask: Ask) -> Found:
        """As `search` for one query by examples, exact: (1, k') rows and best scores."""
        allowed = self._allowed(ask)
        slots = np.arange(len(self.table)) if allowed is None else np.flatnonzero(allowed)
        near = examples.best(self.table, slots, ask.wide, farthest=ask.order == "least_similar")
        rows, scores = self._checked(near[None], examples.rescored(self.table, near)[None], ask)
        return Found(rows, scores, "exact", len(slots), 1.0)

    def _allowed(self, ask: Ask) -> npt.NDArray[np.bool_] | None:
        """The mask over slots; itself where every object has this modality, which saves a pass over the table."""
        if ask.mask is None or len(ask.mask) == len(self.table):
            return ask.mask
        return ask.mask[self.table.rows]

    def _approximate(
        self, ann: FaissBackend, queries: Vectors, k: int, allowed: npt.NDArray[np.bool_] | None, chosen: Plan
    ) -> tuple[Plan, Slots]:
        """Proposals by the approximate backend; queries of which too few passed are asked wider, then exactly."""
        slots = ann.search(queries, k, allowed, breadth=chosen.breadth, fetch=chosen.fetch)
        if allowed is None:
            return chosen, slots
        enough = min(ann.rerank * k, int(np.count_nonzero(allowed)))  # k alone leave coarse codes nothing to rescore
        passed = np.count_nonzero(slots >= 0, axis=1)
        hopeful = np.flatnonzero((passed < enough) & (passed * _WIDER >= enough))
        if len(hopeful) and chosen.fetch * _WIDER <= MAX_FETCH:
            wider = ann.search(
                queries[hopeful], k, allowed, breadth=chosen.breadth * _WIDER, fetch=chosen.fetch * _WIDER
            )
            slots = _replaced(slots, hopeful, wider)
            passed = np.count_nonzero(slots >= 0, axis=1)
        dry = np.flatnonzero(passed < enough)
        if len(dry):
            slots = _replaced(slots, dry, self.exact.search(queries[dry], k, allowed))
        return (Plan() if len(dry) == len(queries) else chosen), slots

    def _checked(self, slots: Slots, scores: npt.NDArray[np.float32], ask: Ask) -> tuple[Rows, npt.NDArray[np.float32]]:
        """Rows and scores in order, without what must not be returned."""
        rows = np.where(slots >= 0, self.table.rows[slots], -1)
        good = (rows >= 0) & ~np.isin(rows, ask.excluded)
        for query, excluded in enumerate(ask.excluded_each):
            if len(excluded):
                good[query] &= ~np.isin(rows[query], excluded)
        if ask.mask is not None:
            good &= ask.mask[rows]
        scores = np.clip(scores, -1.0, 1.0)  # rounding goes 1e-7 beyond
        sign = -1.0 if ask.order == "most_similar" else 1.0
        if ask.score_threshold is not None:
            good &= sign * scores <= sign * np.float32(ask.score_threshold)
        order = np.lexsort((rows, np.where(good, sign * scores, np.inf)), axis=1)[:, : ask.k]
        return np.take_along_axis(np.where(good, rows, -1), order, axis=1), np.take_along_axis(scores, order, axis=1)


def _replaced(slots: Slots, at: Sequence[int] | Slots, new: Slots) -> Slots:
    """`slots` with the lines `at` replaced, widened with -1 to fit."""
    width = max(slots.shape[1], new.shape[1])
    out = np.full((len(slots), width), -1, np.int64)
    out[:, : slots.shape[1]] = slots
    out[at] = -1
    out[at, : new.shape[1]] = new
    return out
