"""Inputs that made the model fail are kept away from it: the same content, for a while, and no other."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import npy

from service.app import make_app
from service.canary import canary
from service.engine import Engine
from service.model_process import ModelDied, NoModel
from service.quarantine import Quarantine, Suspects


@pytest.fixture
def grids(engine):
    return [engine.embedder.prepare(canary(modality)) for modality in ("image", "spectrum")]


def test_same_content_is_held_and_no_other(grids, engine):
    held = Quarantine(60.0)
    assert not any(map(held.holds, grids))
    held.add(grids[0])
    assert held.holds(engine.embedder.prepare(canary("image"))) and not held.holds(grids[1])
    held.add("a call of the search workers")
    assert len(held) == 1


def test_time_and_number_bound_it(grids, monkeypatch):
    held = Quarantine(60.0, most=1)
    held.add(grids[0])
    held.add(grids[1])
    assert not held.holds(grids[0]) and held.holds(grids[1])
    now = time.monotonic()
    monkeypatch.setattr("service.quarantine.time.monotonic", lambda: now + 61.0)
    assert not held.holds(grids[1]) and len(held) == 0


def test_none_without_seconds(grids):
    held = Quarantine(0.0)
    held.add(grids[0])
    assert not held.holds(grids[0])


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_suspects_are_convicted_alone_where_the_model_worked_in_between(grids):
    held = Suspects(60.0)
    assert not held.add(grids[0], False, 5) and not held.add(grids[0], False, 6)  # others were with it
    assert held.holds(grids[0]) and not held.times(grids[0]) and not held.holds(grids[1])
    assert not held.add(grids[0], True, 7) and held.times(grids[0]) == 1
    assert not held.add(grids[0], True, 7) and held.times(grids[0]) == 2  # everything may have failed
    assert held.add(grids[0], True, 8) and not held.add(grids[1], True, 8)
    held.forget(grids[0])
    assert not held.holds(grids[0]) and len(held) == 1


def test_what_ends_the_models_process_twice_is_kept_away(settings, engine, galaxy, monkeypatch):
    own, encode, deaths = Engine(engine.embedder, engine.index, settings), engine.embedder.encode, []
    killer = engine.embedder.prepare(galaxy).pixels

    def dies(batch):
        if any(np.array_equal(getattr(grid, "pixels", 0), killer) for grid in batch):
            deaths.append(len(batch))
            raise ModelDied("the process ended")
        return encode(batch)

    monkeypatch.setattr(own.embedder, "encode", dies)
    client = TestClient(make_app(settings, own))
    body, other = npy(galaxy.pixels), npy(galaxy.pixels + np.float32(0.5))
    answers = [client.post("/v1/embed/image", content=body) for _ in range(3)]
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [
        (503, "model_restarted"),
        (422, "no_embedding"),
        (422, "no_embedding"),
    ]
    assert answers[0].headers["retry-after"] and deaths == [1, 1]
    assert client.post("/v1/embed/image", content=other).status_code == 200
    own.close()
    own = Engine(engine.embedder, engine.index, settings)
    deaths.clear()
    client = TestClient(make_app(settings, own))
    both = client.post("/v1/embed/image", files=[("file", ("a", body)), ("file", ("b", other))])
    assert [item["error"] is None for item in both.json()["items"]] == [False, True] and deaths == [2, 1]
    own.close()


@pytest.mark.parametrize("error", [ModelDied("the process ended"), NoModel("no memory for another")])
def test_where_the_models_process_ends_at_everything_no_input_is_kept_away(
    settings, engine, galaxy, monkeypatch, error
):
    own, encode, sick = Engine(engine.embedder, engine.index, settings), engine.embedder.encode, [True]

    def dies(batch):
        if sick:
            raise error
        return encode(batch)

    monkeypatch.setattr(own.embedder, "encode", dies)
    client = TestClient(make_app(settings, own))
    body, other = npy(galaxy.pixels), npy(np.roll(galaxy.pixels, 3, axis=1))
    for _ in range(3):
        assert client.post("/v1/embed/image", content=body).status_code == 503
        files = [("file", ("a", body)), ("file", ("b", other))]
        assert client.post("/v1/embed/image", files=files).status_code == 503
    assert client.get("/readyz").status_code == 503 and not len(own.workers.quarantine)
    sick.clear()
    assert [item["error"] for item in client.post("/v1/embed/image", files=files).json()["items"]] == [None, None]
    own.close()


def test_what_ends_the_process_when_nobody_waits_for_it_any_more_is_known_all_the_same(
    settings, engine, galaxy, monkeypatch
):
    """An input that hangs the model is given up by its sender a minute before the process ends."""
    own, encode, passes, died = Engine(engine.embedder, engine.index, settings), engine.embedder.encode, [], []
    killer, ended = engine.embedder.prepare(galaxy).pixels, threading.Event()

    def hangs(batch):
        passes.append(len(batch))
        if any(np.array_equal(getattr(grid, "pixels", 0), killer) for grid in batch):
            assert ended.wait(30.0)
            died.append(1)
            raise ModelDied("no answer in 60 s")
        return encode(batch)

    monkeypatch.setattr(own.embedder, "encode", hangs)
    client = TestClient(make_app(settings, own))
    body, other = npy(galaxy.pixels), npy(np.roll(galaxy.pixels, 3, axis=1))
    workers = own.workers

    def ask(*bodies, deadline_ms=None):
        files = [("file", (str(place), each)) for place, each in enumerate(bodies)]
        headers = {"x-deadline-ms": str(deadline_ms)} if deadline_ms else {}
        return client.post("/v1/embed/image", files=files, headers=headers)

    def gives_up(*bodies):
        ended.clear()
        assert ask(*bodies, deadline_ms=1500).status_code == 429
        before = len(died)
        ended.set()
        wait_until(lambda: len(died) > before)

    assert ask(other).status_code == 200
    passes.clear()
    gives_up(body, other)
    wait_until(lambda: len(workers.suspects) == 2)
    assert passes == [2]  # none is worked again, as nobody waits
    gives_up(other, body)
    grid = own.embedder.prepare(galaxy)
    wait_until(lambda: workers.suspects.times(grid) == 1)
    assert passes == [2, 1, 1] and not len(workers.quarantine)  # each alone, since either may have been it
    assert ask(other).status_code == 200
    gives_up(body)
    wait_until(lambda: len(workers.quarantine) == 1)
    assert [item["error"] is None for item in ask(body, other).json()["items"]] == [False, True]
    assert len(died) == 3 and not workers.suspects.holds(
        own.embedder.prepare(replace(galaxy, pixels=np.roll(galaxy.pixels, 3, axis=1)))
    )
    own.close()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (ModelDied("the process ended"), (503, "model_restarted")),
        (NoModel("no process"), (503, "model_restarted")),
        (RuntimeError("device-side assert"), (422, "no_embedding")),
    ],
)
def test_a_pass_of_an_explanation_that_fails_is_no_fault_of_ours(settings, engine, galaxy, monkeypatch, error, answer):
    own, encode = Engine(engine.embedder, engine.index, settings), engine.embedder.encode

    def fails(batch):
        if len(batch) > 1 or passes:
            passes.append(len(batch))
            if len(passes) < 200:
                raise error
        return encode(batch)

    passes = []
    monkeypatch.setattr(own.embedder, "encode", fails)
    monkeypatch.setattr(own, "check", lambda now=False: asyncio.sleep(0))  # the model knows its own inputs
    client = TestClient(make_app(settings, own))
    found = client.post("/v1/search?modality=image&k=1&explain=true", content=npy(galaxy.pixels))
    assert (found.status_code, found.json()["error"]["code"]) == answer
    own.close()


@pytest.fixture
def picky(settings, engine, galaxy, monkeypatch):
    """A client of a service whose model raises on `galaxy`, and how often it was asked."""
    own, encode = Engine(engine.embedder, engine.index, settings), engine.embedder.encode
    culprit, passes = engine.embedder.prepare(galaxy).pixels, []

    def fails(batch):
        passes.append(len(batch))
        if any(np.array_equal(getattr(grid, "pixels", 0), culprit) for grid in batch):
            raise RuntimeError("device-side assert")
        return encode(batch)

    monkeypatch.setattr(own.embedder, "encode", fails)
    yield TestClient(make_app(settings, own)), passes
    own.close()


def codes(client, *bodies):
    items = client.post("/v1/embed/image", files=[("file", ("a", body)) for body in bodies]).json()["items"]
    return [item["error"] and item["error"]["code"] for item in items]


def test_a_culprit_is_not_given_to_the_model_again(picky, galaxy):
    client, passes = picky
    bad, good = npy(galaxy.pixels), npy(np.roll(galaxy.pixels, 3, axis=1))
    assert codes(client, good, bad, good) == [None, "no_embedding", None]
    before = len(passes)
    assert codes(client, good, bad, good) == [None, "no_embedding", None]
    assert passes[before:] == [2]


def test_what_fails_alone_is_blamed_once_the_model_knew_its_known_inputs(picky, galaxy):
    client, passes = picky
    for _ in range(2):
        assert client.post("/v1/embed/image", content=npy(galaxy.pixels)).status_code == 422
    assert passes == [1, 1, 1]  # its own, and the two of the canary
