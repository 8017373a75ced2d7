"""Inputs that made the model fail are kept away from it: the same content, for a while, and no other."""

from __future__ import annotations

import time

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import npy

from service.app import make_app
from service.canary import canary
from service.engine import Engine
from service.model_process import ModelDied
from service.quarantine import Quarantine


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
    own.workers.quarantine, own.workers.suspects = Quarantine(60.0), Quarantine(60.0)
    own.workers.inference._culprit = own.workers.quarantine.add
    deaths.clear()
    both = client.post("/v1/embed/image", files=[("file", ("a", body)), ("file", ("b", other))])
    assert [item["error"] is None for item in both.json()["items"]] == [False, True] and deaths == [2, 1]
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
