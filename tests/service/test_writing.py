"""Long answers are written by a worker of their own, in turn, and not in the event loop or in front of searches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import npy

from service.app import make_app
from service.engine import Engine
from service.settings import Settings

TABLES = (
    "/v1/objects?ra=180&dec=0&radius_arcsec=36000",
    "/v1/objects?random=5",
    "/scs?RA=180&DEC=0&SR=10",
)


@pytest.fixture
def own(settings, engine, monkeypatch):
    monkeypatch.setattr("service.engine._FEW_ROWS", 1)
    made = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_wait_s": 0.5, "stuck_after_s": 2.0}))
    yield made
    made.close()


@pytest.fixture
def asking(own):
    with TestClient(make_app(own.settings, own)) as client:
        yield client


@pytest.fixture
def busy(own):
    """Somebody's long answer is being written until the test ends."""
    gate, begun = threading.Event(), threading.Event()
    write = own.workers.writing._work

    def slow(group, works):
        if not begun.is_set():
            begun.set()
            gate.wait(30)
        return write(group, works)

    own.workers.writing._work = slow
    yield begun, gate
    gate.set()


def where(monkeypatch, target, call):
    """The threads in which `target` ran during `call`."""
    module, _, name = target.rpartition(".")
    seen = []
    real = getattr(__import__(module, fromlist=[name]), name)

    def noted(*arguments, **keywords):
        seen.append(threading.current_thread().name)
        return real(*arguments, **keywords)

    monkeypatch.setattr(target, noted)
    call()
    return seen


def ask_vectors(client, engine, fmt="json", k=3):
    vectors = engine.index.tables["spectrum"].block(0, 4)
    url = f"/v1/search/vectors?modality=spectrum&k={k}"
    accept = {"json": "application/json", "votable": "application/x-votable+xml"}[fmt]
    return client.post(url, content=npy(np.asarray(vectors)), headers={"accept": accept})


def test_long_answers_are_written_by_their_worker(asking, own, monkeypatch):
    for url, target in (
        (TABLES[0], "service.routes.objects.object_models"),
        (TABLES[1], "service.routes.objects.object_models"),
        (TABLES[2], "service.routes.vo.votable"),
    ):
        with monkeypatch.context() as patch:
            assert where(patch, target, lambda url=url: asking.get(url)) == ["write-0"]
    with monkeypatch.context() as patch:
        threads = where(patch, "service.routes.vectors.arrow_response", lambda: ask_vectors(asking, own, "votable"))
    assert threads == ["write-0"]


def test_short_answers_do_not_wait_for_the_writer(asking, own, monkeypatch):
    target = "service.routes.objects.object_models"
    assert where(monkeypatch, target, lambda: asking.get("/v1/objects?random=1"))[0].startswith("search")


def test_while_one_is_written_others_are_searched_for(asking, own, busy):
    begun, gate = busy
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asking.get, TABLES[0])
        assert begun.wait(5)
        known = own.index.catalog.row(0)["object_id"]
        assert asking.post("/v1/search", json={"query": {"object_id": known}}).status_code == 200
        assert asking.get("/readyz").status_code == 200 and not long.done()
        gate.set()
        assert long.result().status_code == 200


def test_a_writer_that_hangs_ends_readiness(asking, own, busy):
    begun, gate = busy
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asking.get, TABLES[0])
        assert begun.wait(5)
        end = time.monotonic() + 10
        while (answer := asking.get("/readyz")).status_code == 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert answer.status_code == 503 and "write has been at one batch" in answer.json()["error"]["message"]
        gate.set()
        assert long.result().status_code == 200
        assert asking.get("/readyz").status_code == 200


def test_one_that_would_wait_too_long_is_refused_at_once(asking, own, busy):
    begun, gate = busy
    own.workers.writing._pace = {1: 100.0}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asking.get, TABLES[0])
        assert begun.wait(5)
        for url in TABLES[1:]:
            refused = asking.get(url)
            assert refused.status_code == 429 and refused.headers["retry-after"] and not long.done()
        gate.set()
        long.result()


def test_hits_of_many_vectors_just_below_and_just_above(settings, engine):
    made = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_hits": 12}))
    with TestClient(make_app(made.settings, made)) as client:
        assert ask_vectors(client, made, k=3).status_code == 200
        above = ask_vectors(client, made, k=4)
        assert above.status_code == 413 and above.json()["error"]["code"] == "too_many_hits"
        assert above.json()["error"]["limit"] == 12
    made.close()


def test_all_vectors_with_the_default_k_fit():
    bounds = Settings()
    assert bounds.max_vectors * bounds.default_k <= bounds.max_hits
