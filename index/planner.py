"""The planner: which backend answers a search, how broadly, and what recall that is known to give.

Filters are where approximate indexes fail unseen (an IVF index was measured at recall 0.30 under a 0.1 % filter), and
the region a filter leaves out may be just the query's. So: a filtered search is exact over the survivors up to
`EXACT_SURVIVORS`, beyond that the graph with the recall measured under a filter. An unfiltered one uses the graph
where its measured recall reaches `RECALL_WANTED`, at the least breadth that does; else it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["EXACT_SURVIVORS", "RECALL_WANTED", "Mode", "Plan", "plan"]

EXACT_SURVIVORS = 1_000_000  # about 20 ms a query on one core at D = 128
RECALL_WANTED = 0.99

Mode = Literal["exact", "hnsw"]


@dataclass(frozen=True)
class Plan:
    """mode, `ef` (breadth of the graph search; 0 if exact) and the recall@k to expect (1 if exact)."""

    mode: Mode
    ef: int = 0
    expected_recall: float = 1.0


def plan(
    recall: Sequence[Mapping[str, Any]] | None,
    *,
    k: int,
    survivors: int,
    filtered: bool,
    query_modality: str | None,
    force: Mode | None = None,
) -> Plan:
    """Plan one search of one table.

    recall: the table measured at build ({"query", "filtered", "k", "ef", "recall"}), None where there is no graph.
    survivors: vectors that pass the filter. query_modality: None counts as the worst of those measured.
    force: "hnsw" takes the broadest measured search whatever its recall (measurements and tests).
    """
    if force == "exact" or recall is None or (force is None and filtered and survivors <= EXACT_SURVIVORS):
        return Plan("exact")
    fitting = _fitting(recall, k=k, filtered=filtered, query_modality=query_modality)
    for ef in sorted(fitting):
        if ef >= k and fitting[ef] >= RECALL_WANTED:
            return Plan("hnsw", ef, fitting[ef])
    if force == "hnsw":
        ef = max(fitting, default=512)
        return Plan("hnsw", ef, fitting.get(ef, 0.0))
    return Plan("exact")


def _fitting(
    recall: Sequence[Mapping[str, Any]], *, k: int, filtered: bool, query_modality: str | None
) -> dict[int, float]:
    """{ef: worst recall} of the measurements that speak for this search: at the least k measured from the asked up."""
    measured = sorted({entry["k"] for entry in recall if entry["k"] >= k})
    out: dict[int, float] = {}
    for entry in recall:
        speaks = measured and entry["k"] == measured[0] and entry["filtered"] == filtered
        if speaks and query_modality in (None, entry["query"]):
            out[entry["ef"]] = min(out.get(entry["ef"], 1.0), entry["recall"])
    return out
