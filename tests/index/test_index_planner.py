"""The planner keeps its promise of recall, and what it promises is what was measured."""

from __future__ import annotations

import numpy as np

from index.planner import EXACT_SURVIVORS, Plan, plan
from index.recall import recall_at_k

MEASURED = [
    {"query": q, "filtered": f, "k": 10, "ef": ef, "recall": r}
    for q, rs in {"image": (0.9, 0.995), "spectrum": (0.992, 0.999)}.items()
    for f in (False, True)
    for ef, r in zip((32, 64), rs, strict=True)
]


def ask(**change):
    request = {"k": 10, "survivors": 10**6, "filtered": False, "query_modality": "image", **change}
    return plan(MEASURED, **request)


def test_least_breadth_that_reaches_the_recall():
    assert ask() == Plan("hnsw", 64, 0.995)
    assert ask(query_modality="spectrum") == Plan("hnsw", 32, 0.992)


def test_unknown_modality_counts_as_the_worst():
    assert ask(query_modality=None) == Plan("hnsw", 64, 0.995)


def test_exact_without_a_graph_or_a_measurement():
    assert plan(None, k=10, survivors=5, filtered=False, query_modality=None) == Plan("exact")
    assert ask(k=11) == Plan("exact")


def test_filters_go_exact_up_to_the_limit():
    assert ask(filtered=True, survivors=EXACT_SURVIVORS).mode == "exact"
    assert ask(filtered=True, survivors=EXACT_SURVIVORS + 1).mode == "hnsw"


def test_force():
    assert ask(force="exact").mode == "exact"
    assert ask(force="hnsw", filtered=True, survivors=3).mode == "hnsw"


def test_measured_recall_is_in_the_manifest_and_true(index, toy):
    entries = index.manifest.backends["spectrum"]["hnsw"]["recall"]
    assert {(e["query"], e["filtered"]) for e in entries} == {
        (q, f) for q in ("image", "spectrum") for f in (True, False)
    }
    best = [e["recall"] for e in entries if e["k"] == 10 and e["ef"] == 512]
    assert min(best) >= 0.99
    _, report = index.search(toy.truth["image"][:4], target="spectrum", k=10, query_modality="image")
    assert report.mode == "hnsw" and report.expected_recall >= 0.99 and report.candidates >= 10


def test_recall_at_k():
    true, found = np.array([[1, 2], [3, -1]]), np.array([[2, 9, 8], [3, -1, -1]])
    assert recall_at_k(found, true) == 0.75
