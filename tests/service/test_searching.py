"""Searches of several requests in one call of the index: joined when alike, with the answers each would get alone."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from astroclip.errors import InputError
from service.searching import Search, answer_together
from service.trace import Trace


@pytest.fixture
def index(engine):
    return engine.index


@pytest.fixture
def calls(index, monkeypatch):
    """How many queries each call of the index had."""
    made, search = [], index.search

    def watched(queries, **how):
        made.append(len(queries))
        return search(queries, **how)

    monkeypatch.setattr(index, "search", watched)
    return made


def query(index, row, modality="spectrum", exclude=(), **how):
    vector = index.vector(row, modality)
    return Search(
        vector, np.asarray(exclude, np.int64), {"target": "either", "k": 5, "query_modality": modality, **how}
    )


def asking(*searches):
    """Work that asks one after another and returns the ids found."""

    def work():
        found = []
        for search in searches:
            hits, _ = yield search
            found.append((hits.object_ids, hits.scores.tolist()))
        return found

    return work


def test_plain_work_and_its_errors(index):
    def fail():
        raise InputError("no")

    one, error = answer_together(index, [lambda: 1, fail])
    assert one == 1 and isinstance(error, InputError)


def test_equal_searches_are_one_call_and_answer_as_alone(index, calls):
    works = [asking(query(index, row, exclude=[row])) for row in range(6)]
    together = answer_together(index, works)
    assert calls == [6]
    assert together == [answer_together(index, [work])[0] for work in works]


def test_own_objects_are_left_out_of_the_own_answer_only(index):
    alone, other = answer_together(index, [asking(query(index, 3, exclude=[3])), asking(query(index, 3, exclude=[4]))])
    own = index.catalog.row(3)["object_id"]
    assert own not in alone[0][0] and other[0][0][0] == own


@pytest.mark.parametrize(
    "changed",
    [
        {"k": 6},
        {"target": "image"},
        {"order": "least_similar"},
        {"score_threshold": 0.1},
        {"mask": "some"},
        {"exclude": [7, 8]},
        {"modality": "image"},
    ],
)
def test_searches_that_differ_are_not_joined(index, calls, changed):
    if "mask" in changed:
        changed = {"mask": np.arange(len(index)) % 2 == 0}
    answer_together(index, [asking(query(index, 0)), asking(query(index, 1, **changed))])
    assert calls == [1, 1]


def test_several_rounds_and_a_search_that_fails_alone(index, calls):
    bad = Search(np.full(index.dim, np.nan, np.float32), np.empty(0, np.int64), query(index, 0).how)
    good, failed = answer_together(index, [asking(query(index, 0), query(index, 1)), asking(bad)])
    assert len(good) == 2 and isinstance(failed, InputError)
    assert calls == [2, 1, 1, 1]  # joined, then each alone, then the second round


def test_many_excluded_rows_are_searched_alone(index, calls):
    wide = list(range(20))
    works = [asking(query(index, row, exclude=wide)) for row in (30, 31)]
    answer_together(index, works)
    assert calls == [1, 1]


FILTERS = {
    "none": (None, None),
    "the same": ({"column": "redshift", "range": [0, 9]}, {"range": [0, 9], "column": "redshift"}),
    "two": ({"column": "redshift", "range": [0, 9]}, {"column": "redshift", "range": [0, 8]}),
}


@pytest.mark.parametrize(("filters", "joined"), [("none", True), ("the same", True), ("two", False)])
def test_requests_over_http_are_joined(client, engine, calls, filters, joined):
    """Through the whole service: what waits while the search workers are busy is one call."""
    first, second = FILTERS[filters]
    gate, held = threading.Event(), []

    def hold():
        held.append(1)
        gate.wait(10)

    rows = np.flatnonzero(engine.index.catalog.flag("has_spectrum"))[:8]
    ids = [engine.index.catalog.row(int(i))["object_id"] for i in rows]
    answers = []

    def ask(object_id):
        body = {"query": {"object_id": object_id}, "k": 3, "filter": first if object_id == ids[0] else second}
        answers.append(client.post("/v1/search", json=body).json()["query"]["object_id"])

    async def run():
        holding = []
        while len(holding) < engine.settings.search_threads:  # one at a time, or one worker would take them all
            holding.append(asyncio.create_task(engine.search(Trace(), hold)))
            while len(held) < len(holding):
                await asyncio.sleep(0.001)
        threads = [threading.Thread(target=ask, args=(i,)) for i in ids]
        for thread in threads:
            thread.start()
        while len(engine.workers.search) < len(ids):
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(*holding)
        for thread in threads:
            await asyncio.to_thread(thread.join)

    asyncio.run(run())
    assert sorted(answers) == ids and sorted(calls) == ([len(ids)] if joined else [1, len(ids) - 1])
