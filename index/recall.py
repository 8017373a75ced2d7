"""Recall of a graph, measured at build against exact search on the index's own objects, for the planner.

Queries are sampled objects of each modality; the object itself is left out of both answers, since finding oneself is
easy. Filtered recall is measured under a random half of the table. Cross-modal queries lie off the graph's own
distribution and are measured apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from index.backends.exact import ExactBackend
from index.backends.hnsw import EF_LADDER, HnswBackend
from index.calibrate import sample_slots
from index.vectors import VectorTable

__all__ = ["measure_recall", "recall_at_k"]

_KS = (10, 100)
_QUERIES = 256


def recall_at_k(found: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> float:
    """Mean over queries of the fraction of `true` (Q, k) that is in `found` (Q, m); -1 = none, counted nowhere."""
    hit = (true[:, :, None] == found[:, None, :]).any(axis=2) & (true >= 0)
    wanted = np.count_nonzero(true >= 0, axis=1)
    return float(np.mean(hit.sum(axis=1)[wanted > 0] / wanted[wanted > 0])) if wanted.any() else 1.0


def measure_recall(
    graph: HnswBackend, table: VectorTable, queries: Mapping[str, VectorTable], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """[{"query", "filtered", "k", "ef", "recall"}] of searches of `table`, by query modality."""
    half = rng.random(len(table)) < 0.5
    exact = ExactBackend(table)
    out: list[dict[str, Any]] = []
    for modality, source in queries.items():
        if not len(source):
            continue
        picked = sample_slots(len(source), _QUERIES, rng)
        vectors, own = source.take(picked), source.rows[picked]
        for filtered in (False, True):
            mask = half if filtered else None
            for k in _KS:
                true = _others(exact, table, vectors, own, k, mask)
                for ef in (ef for ef in EF_LADDER if ef > k):
                    slots = graph.search(vectors, k + 1, mask, ef=ef)
                    recall = recall_at_k(slots, true)
                    out.append({"query": modality, "filtered": filtered, "k": k, "ef": ef, "recall": round(recall, 5)})
    return out


def _others(
    exact: ExactBackend,
    table: VectorTable,
    vectors: npt.NDArray[np.float32],
    own: npt.NDArray[np.int64],
    k: int,
    mask: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.int64]:
    """True k nearest slots without the query's own object, best first."""
    slots = exact.search(vectors, k + 1, mask)
    slots = np.where(table.rows[slots] == own[:, None], -1, slots)
    order = np.argsort(-table.scores(vectors, slots), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(slots, order, axis=1)
