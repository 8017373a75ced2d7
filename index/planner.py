"""The planner: which backend answers a search, how broadly, and what recall that is known to give.

Filters are where approximate indexes fail unseen (an IVF index was measured at recall 0.30 under a 0.1 % filter), and
the region a filter leaves out may be just the query's. So

* a backend is only asked what it declares it can do (`Capabilities`): one that knows no filters never answers a
  filtered search, and thresholds and least-similar rankings go to a backend that is exact;
* a filtered search over few survivors is exact. How many are few is measured when the index is built: the number at
  which going through them costs as much as the approximate search (`MeasuredSearch.exact_below`);
* beyond that the approximate search looks at the `fetch` nearest, so many that k of them pass a filter of this
  selectivity wherever it lies like a random one, at the least breadth whose measured recall reaches `RECALL_WANTED`.
  Queries of which fewer than k pass are searched more widely, then exactly (`index.table_search`).

The recall that is promised is the worst measured, under random filters and under regions of the embedding space alike,
at the next smaller selectivity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from index.backends.base import Capabilities

__all__ = ["ANSWERED_WANTED", "MAX_FETCH", "RECALL_WANTED", "MeasuredSearch", "Plan", "fetch_for", "plan"]

RECALL_WANTED = 0.995  # measured on 256 queries, so uncertain by 0.002: 0.99 is what is to hold
ANSWERED_WANTED = 0.95  # share of queries that must need no second search where the filter is random
MAX_FETCH = 4096  # nearest looked at under a filter: beyond, FAISS' heaps cost more than exact search of the survivors


@dataclass(frozen=True)
class Plan:
    """mode (name of the backend), breadth and fetch for it, and the recall@k to expect (1 if exact)."""

    mode: str = "exact"
    breadth: int = 0
    fetch: int = 0
    expected_recall: float = 1.0


@dataclass(frozen=True)
class MeasuredSearch:
    """What an approximate backend was measured to do, kept in the manifest; see `index.recall.measure`.

    recall: of {"query", "filter": none, random or region, "share", "k", "breadth", "recall", "answered", "ms"}.
    exact_below: survivors up to which a filtered search is made exactly.
    """

    recall: Sequence[Mapping[str, Any]]
    exact_below: int

    @classmethod
    def from_record(cls, record: Mapping[str, Any], size: int) -> MeasuredSearch:
        """From a manifest. Older ones measured no selectivities: their filtered searches are exact, up to `size`."""
        if "exact_below" in record:
            return cls(record["recall"], int(record["exact_below"]))
        whole = [
            {**entry, "filter": "none", "share": 1.0, "breadth": entry["ef"], "answered": 1.0}
            for entry in record["recall"]
            if not entry["filtered"]
        ]
        return cls(whole, size)


def fetch_for(k: int, share: float) -> int:
    """How many of the nearest to look at so that k of them pass a random filter of this share: three sigma more."""
    return math.ceil((k + 3.0 * math.sqrt(k)) / share)


def plan(
    name: str | None,
    can: Capabilities,
    measured: MeasuredSearch | None,
    *,
    k: int,
    size: int,
    survivors: int | None = None,
    needs: Capabilities | None = None,
    query_modality: str | None = None,
    force: str | None = None,
) -> Plan:
    """Plan one search of a table of `size` vectors that has the approximate backend `name` (None: it has none).

    survivors: vectors that pass the filter, None where there is no filter. needs: beyond filters. query_modality: None
    counts as the worst of those measured. force: "exact", or `name` for the broadest measured search whatever its
    recall (measurements and tests).
    """
    filtered = survivors is not None
    needs = needs or Capabilities()
    if name is None or measured is None or force == "exact" or not can.covers(needs) or (filtered and not can.filters):
        return Plan()
    share = 1.0 if survivors is None else survivors / max(1, size)
    fetch = 0 if survivors is None else fetch_for(k, share) if survivors else MAX_FETCH + 1
    if force is None and (fetch > MAX_FETCH or (survivors is not None and survivors <= measured.exact_below)):
        return Plan()
    fetch = min(fetch, MAX_FETCH)
    fitting = _fitting(measured.recall, k=k, share=share if filtered else None, query_modality=query_modality)
    for breadth in sorted(fitting):
        if fitting[breadth] >= RECALL_WANTED:
            return Plan(name, breadth, fetch, fitting[breadth])
    if force is not None:
        breadth = max(fitting, default=0)
        return Plan(name, breadth, fetch, fitting.get(breadth, 0.0))
    return Plan()


def _fitting(
    recall: Sequence[Mapping[str, Any]], *, k: int, share: float | None, query_modality: str | None
) -> dict[int, float]:
    """{breadth: worst recall} of the measurements that speak for this search: at the least k measured from the asked
    up, and under filters as selective or the next more selective. share: None without a filter."""
    entries = [
        entry
        for entry in recall
        if entry["k"] >= k
        and (entry["filter"] == "none") == (share is None)
        and (share is None or entry["share"] <= share)
        and query_modality in (None, entry["query"])
    ]
    least = min((entry["k"] for entry in entries), default=0)
    nearest = max((entry["share"] for entry in entries if entry["k"] == least), default=0.0)
    out: dict[int, float] = {}
    for entry in entries:
        if entry["k"] == least and entry["share"] == nearest:
            fails = entry["filter"] != "region" and entry["answered"] < ANSWERED_WANTED
            out[entry["breadth"]] = min(out.get(entry["breadth"], 1.0), 0.0 if fails else entry["recall"])
    return out
