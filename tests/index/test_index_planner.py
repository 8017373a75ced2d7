"""The planner keeps its promise of recall, asks no backend what it cannot do, and what it promises was measured."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from index.backends import ANN, ExactBackend
from index.backends.base import Capabilities
from index.planner import MAX_FETCH, MeasuredSearch, Plan, fetch_for, plan
from index.recall import _crossover, recall_at_k

N = 1_000_000
CAN = Capabilities(filters=True, append=True)


def entry(query="image", filter="none", share=1.0, k=10, breadth=32, recall=0.999, answered=1.0):
    return {
        "query": query, "filter": filter, "share": share, "k": k, "breadth": breadth, "recall": recall,
        "answered": answered, "ms": 1.0,
    }  # fmt: skip


MEASURED = MeasuredSearch(
    [
        entry(breadth=32, recall=0.9),
        entry(breadth=64, recall=0.997),
        entry(query="spectrum", breadth=32, recall=0.996),
        entry(query="spectrum", breadth=64, recall=0.9999),
        entry(k=100, breadth=256, recall=0.998),
        entry(filter="random", share=0.3, breadth=64, recall=0.998),
        entry(filter="region", share=0.3, breadth=64, recall=0.99, answered=0.6),
        entry(filter="random", share=0.3, breadth=128, recall=0.999),
        entry(filter="region", share=0.3, breadth=128, recall=0.996, answered=0.6),
        entry(filter="random", share=0.1, breadth=256, recall=0.999, answered=0.8),
        entry(filter="random", share=0.1, breadth=512, recall=0.999),
    ],
    exact_below=50_000,
)


def ask(can=CAN, measured=MEASURED, name="hnsw", **change):
    return plan(name, can, measured, **{"k": 10, "size": N, "query_modality": "image", **change})


def test_least_breadth_that_reaches_the_recall():
    assert ask() == Plan("hnsw", 64, 0, 0.997)
    assert ask(query_modality="spectrum") == Plan("hnsw", 32, 0, 0.996)


def test_unknown_modality_counts_as_the_worst():
    assert ask(query_modality=None) == Plan("hnsw", 64, 0, 0.997)


def test_a_larger_k_is_judged_by_the_next_measured():
    assert ask(k=11).breadth == 256 and ask(k=101) == Plan()


def test_exact_without_a_backend_or_a_measurement():
    assert plan(None, Capabilities(), None, k=10, size=5) == Plan()
    assert ask(measured=MeasuredSearch([], 0)) == Plan()


def test_few_survivors_are_searched_exactly_up_to_the_measured_number():
    measured = replace(MEASURED, exact_below=150_000)
    assert ask(survivors=150_000, measured=measured) == Plan()
    assert ask(survivors=150_001, measured=measured).mode == "hnsw"
    measured = replace(MEASURED, exact_below=0)
    assert ask(survivors=0, measured=measured) == Plan()


def test_breadth_follows_from_the_selectivity_and_the_worst_kind_of_filter():
    chosen = ask(survivors=400_000)
    assert chosen == Plan("hnsw", 128, fetch_for(10, 0.4), 0.996)  # 64 reached it for random filters alone
    assert ask(survivors=200_000).breadth == 512  # measured at 0.1; at breadth 256 too many found too few
    assert ask(survivors=99_999) == Plan()  # nothing as selective was measured


def test_fetch_lets_k_pass_a_random_filter():
    rng = np.random.default_rng(0)
    for k in (1, 10, 100):
        for share in (0.5, 0.1, 0.03):
            assert np.mean(rng.binomial(fetch_for(k, share), share, 20_000) >= k) > 0.98


def test_a_search_that_would_look_too_far_is_exact():
    measured = MeasuredSearch([entry(filter="random", share=0.001)], 0)
    assert fetch_for(10, 0.001) > MAX_FETCH and ask(measured=measured, survivors=1000) == Plan()


def test_a_backend_that_ignores_filters_is_never_used_for_one():
    blind = replace(CAN, filters=False)
    assert ask(can=blind).mode == "hnsw"
    for survivors in (0, 1000, 400_000, N):
        for force in (None, "hnsw"):
            assert ask(can=blind, survivors=survivors, force=force) == Plan()


@pytest.mark.parametrize("need", [f.name for f in fields(Capabilities) if f.name != "filters"])
def test_what_is_not_declared_is_not_asked(need):
    needs = Capabilities(**{need: True})
    assert ask(needs=needs, can=replace(CAN, **{need: False})) == Plan()
    assert ask(needs=needs, can=replace(CAN, **{need: True})).mode == "hnsw"


def test_what_the_backends_declare():
    assert ExactBackend.can.covers(Capabilities(exact=True, filters=True, range_search=True, farthest=True))
    for kind in ANN.values():
        assert kind.can == Capabilities(filters=True, append=True)


def test_force():
    assert ask(force="exact") == Plan()
    assert ask(force="hnsw", survivors=3) == Plan("hnsw", 0, MAX_FETCH, 0.0)
    assert ask(force="hnsw", survivors=150_000).breadth == 512


def test_manifests_that_measured_no_selectivity_are_read():
    old = [{"query": "image", "filtered": f, "k": 10, "ef": 64, "recall": 0.997} for f in (False, True)]
    measured = MeasuredSearch.from_record({"m": 32, "recall": old}, N)
    assert ask(measured=measured) == Plan("hnsw", 64, 0, 0.997)
    assert ask(measured=measured, survivors=900_000) == Plan()


def test_crossover_lies_between_the_measurements():
    def cost(survivors, exact_ms, ann_ms):
        return {"share": 0.1, "survivors": survivors, "exact_ms": exact_ms, "ann_ms": ann_ms}

    assert _crossover([cost(100, 1.0, 2.0), cost(10_000, 9.0, 2.0)], N) == 1000
    assert _crossover([cost(100, 1.0, 2.0), cost(10_000, 9.0, None)], N) == N
    assert _crossover([cost(100, 3.0, 2.0), cost(10_000, 9.0, 2.0)], N) == 99


def test_measured_recall_is_in_the_manifest_and_true(index, toy):
    record = index.manifest.backends["spectrum"]["hnsw"]
    assert {(e["query"], e["filter"]) for e in record["recall"]} == {
        (q, f) for q in ("image", "spectrum") for f in ("none", "random", "region")
    }
    assert record["exact_below"] <= len(index.tables["spectrum"]) and record["cost"]
    for query in ("image", "spectrum"):
        assert max(e["recall"] for e in record["recall"] if e["k"] == 10 and e["query"] == query) >= 0.99
    _, report = index.search(toy.truth["image"][:4], target="spectrum", k=10, query_modality="image")
    assert report.mode == "hnsw" and report.expected_recall >= 0.99 and report.candidates >= 10


def test_recall_at_k():
    true, found = np.array([[1, 2], [3, -1]]), np.array([[2, 9, 8], [3, -1, -1]])
    assert recall_at_k(found, true) == 0.75
