"""What an approximate backend does, measured at build against exact search on the index's own objects.

Queries are sampled objects of each modality; the object itself is left out of both answers, since finding oneself is
easy. Cross-modal queries lie off the backend's own distribution and are measured apart. Filters are of two kinds, at
several selectivities: random rows, and all that lies nearest to some object, as a cut in redshift or colour does. Half
of the queries are then inside of it; most of the rest see no survivor near them, and count as not answered.

Costs are of single queries, one after the other, as a service has them. They are compared with exact search of the same
survivors, and where the two cross is up to how many survivors the planner searches exactly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from index.backends import ExactBackend, FaissBackend
from index.backends.base import Backend, Mask, Slots, Vectors
from index.calibrate import sample_slots
from index.planner import ANSWERED_WANTED, MAX_FETCH, RECALL_WANTED, fetch_for
from index.vectors import VectorTable

__all__ = ["SHARES", "measure", "recall_at_k"]

SHARES = (0.3, 0.1, 0.03)  # below, exact search over the survivors is the faster one
_KS = (10, 100)
_QUERIES = 256
_TIMED = 12
_ENOUGH = 0.998  # broader searches are not measured beyond this recall: the planner would not choose them


def recall_at_k(found: Slots, true: Slots) -> float:
    """Mean over queries of the fraction of `true` (Q, k) that is in `found` (Q, m); -1 = none, counted nowhere."""
    hit = (true[:, :, None] == found[:, None, :]).any(axis=2) & (true >= 0)
    wanted = np.count_nonzero(true >= 0, axis=1)
    return float(np.mean(hit.sum(axis=1)[wanted > 0] / wanted[wanted > 0])) if wanted.any() else 1.0


def measure(
    backend: FaissBackend, table: VectorTable, queries: Mapping[str, VectorTable], rng: np.random.Generator
) -> dict[str, Any]:
    """{"recall": [..], "cost": [..], "exact_below": n}, see `planner.MeasuredSearch`; queries: tables by modality.

    "cost": {"share", "survivors", "exact_ms", "ann_ms"} of the best 10 under random filters; ann_ms None where no
    breadth reached the recall wanted.
    """
    exact, recall, cost = ExactBackend(table), [], []
    for modality, source in queries.items():
        if not len(source):
            continue
        for share, kind, mask in _filters(table, rng):
            sample = _sample(source, table, mask if kind == "region" else None, rng)
            vectors = source.take(sample)
            truth = _others(exact, table, vectors, source.rows[sample], max(_KS), mask)
            for k in _KS:
                recall += [
                    {"query": modality, "filter": kind, "share": share, "k": k, **entry}
                    for entry in _ladder(backend, vectors, truth[:, :k], k, share, mask)
                ]
            if kind == "random" and mask is not None:
                reached = [e["ms"] for e in recall if _is_good(e, modality, share)]
                survivors = int(np.count_nonzero(mask))
                ann, plain = min(reached, default=None), _ms(exact, vectors, 10, mask)
                cost.append({"share": share, "survivors": survivors, "exact_ms": plain, "ann_ms": ann})
    return {"recall": recall, "cost": cost, "exact_below": _crossover(cost, len(table))}


def _is_good(entry: Mapping[str, Any], modality: str, share: float) -> bool:
    here = entry["query"] == modality and entry["filter"] == "random" and entry["share"] == share and entry["k"] == 10
    return bool(here and entry["recall"] >= RECALL_WANTED and entry["answered"] >= ANSWERED_WANTED)


def _filters(table: VectorTable, rng: np.random.Generator) -> list[tuple[float, str, Mask | None]]:
    """(share, kind, mask) of all that is measured."""
    out: list[tuple[float, str, Mask | None]] = [(1.0, "none", None)]
    for share in SHARES:
        out.append((share, "random", rng.random(len(table)) < share))
        centre = table.take(sample_slots(len(table), 1, rng))
        wanted = max(1, round(share * len(table)))
        mask = np.zeros(len(table), bool)
        mask[ExactBackend(table).search(centre, wanted)[0]] = True
        out.append((share, "region", mask))
    return out


def _sample(source: VectorTable, table: VectorTable, mask: Mask | None, rng: np.random.Generator) -> Slots:
    """Slots of `source` to ask with: at random, or half of them objects that pass the mask."""
    picked = sample_slots(len(source), _QUERIES, rng)
    if mask is None:
        return picked
    inside = np.flatnonzero(np.isin(source.rows, table.rows[mask]))
    if not len(inside):
        return picked
    half = _QUERIES // 2
    return np.concatenate([rng.permutation(picked)[:half], inside[sample_slots(len(inside), half, rng)]])


def _ladder(
    backend: FaissBackend, vectors: Vectors, truth: Slots, k: int, share: float, mask: Mask | None
) -> list[dict[str, Any]]:
    """[{"breadth", "recall", "answered", "ms"}] up the ladder; recall is that of the queries answered."""
    fetch = 0 if mask is None else fetch_for(k + 1, share)
    if fetch > MAX_FETCH:
        return []
    survivors = len(backend) if mask is None else int(np.count_nonzero(mask))
    full = min(backend.rerank * (k + 1), survivors)  # the own object among them
    out: list[dict[str, Any]] = []
    for breadth in backend.ladder(max(k + 1, fetch)):
        found = backend.search(vectors, k + 1, mask, breadth=breadth, fetch=fetch)
        answered = np.count_nonzero(found >= 0, axis=1) >= full
        recall = recall_at_k(found[answered], truth[answered])
        entry = {
            "breadth": breadth,
            "recall": round(recall, 5),
            "answered": round(float(answered.mean()), 4),
            "ms": _ms(backend, vectors, k, mask, breadth=breadth, fetch=fetch),
        }
        out.append(entry)
        if recall >= _ENOUGH and (answered.mean() >= ANSWERED_WANTED or len(out) > 1):
            break
    return out


def _ms(backend: Backend, vectors: Vectors, k: int, mask: Mask | None, **how: int) -> float:
    """Least milliseconds of one query: what it costs when nothing else is at work."""
    times = []
    for i in range(min(_TIMED, len(vectors))):
        start = time.perf_counter()
        backend.search(vectors[i : i + 1], k, mask, **how)
        times.append(1e3 * (time.perf_counter() - start))
    return round(float(np.min(times)), 4)


def _crossover(cost: list[dict[str, Any]], size: int) -> int:
    """Survivors at which the two cost the same: midway (geometric) between the measurements on either side."""
    wins = [c["survivors"] for c in cost if c["ann_ms"] is None or c["exact_ms"] <= c["ann_ms"]]
    loses = [c["survivors"] for c in cost if c["survivors"] > max(wins, default=0)]
    if not loses:
        return size
    return min(loses) - 1 if not wins else int(np.sqrt(float(max(wins)) * min(loses)))


def _others(
    exact: ExactBackend, table: VectorTable, vectors: Vectors, own: Slots, k: int, mask: npt.NDArray[np.bool_] | None
) -> Slots:
    """True k nearest slots without the query's own object, best first."""
    slots = exact.search(vectors, k + 1, mask)
    slots = np.where(table.rows[slots] == own[:, None], -1, slots)
    order = np.argsort(-table.scores(vectors, slots), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(slots, order, axis=1)
