"""Limits that bind before parsing, and what happens when something inside breaks."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import CENTRE, desi_fits, image_fits, npy

from astroclip.errors import ProvenanceError
from service.app import make_app
from service.engine import Engine

LIMIT = 400_000


@pytest.fixture(scope="module")
def narrow(settings, engine):
    small = settings.model_copy(
        update={"max_body_bytes": LIMIT, "max_files": 2, "max_items": 3, "body_timeout_s": 0.3, "max_in_flight": 1}
    )
    engine = Engine(engine.embedder, engine.index, small)
    yield make_app(small, engine)
    engine.close()


def test_body_just_below_and_just_above(narrow):
    client = TestClient(narrow)
    below = client.post("/v1/embed/image", content=b"x" * LIMIT)
    assert below.status_code in (415, 422)  # read whole, and no file we know
    above = client.post("/v1/embed/image", content=b"x" * (LIMIT + 1))
    assert above.status_code == 413
    error = above.json()["error"]
    assert error["code"] == "body_too_large" and error["limit"] == LIMIT


@pytest.mark.parametrize("path", ["/v1/embed/image", "/v1/search", "/livez", "/nowhere"])
def test_chunked_body_is_counted_as_it_comes(narrow, path):
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    async def post():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(narrow), base_url="http://test") as client:
            return await client.post(path, content=chunks())

    response = asyncio.run(post())
    if path in ("/v1/embed/image", "/v1/search"):
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        assert response.headers["x-request-id"] == response.json()["error"]["request_id"]
    else:
        assert response.status_code in (404, 405)
    assert sent <= 3 * LIMIT + 20_000


def test_chunked_multipart_is_counted_too(narrow):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    async def chunks():
        yield head
        for _ in range(100):
            yield b"y" * 10_000

    async def post():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(narrow), base_url="http://test") as client:
            headers = {"content-type": "multipart/form-data; boundary=x"}
            return await client.post("/v1/embed/image", content=chunks(), headers=headers)

    assert asyncio.run(post()).json()["error"]["code"] == "body_too_large"


def test_slow_body(narrow):
    async def chunks():
        yield b"x"
        await asyncio.sleep(2)
        yield b"x"

    async def post():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(narrow), base_url="http://test") as client:
            return await client.post("/v1/embed/image", content=chunks())

    error = asyncio.run(post()).json()["error"]
    assert error["code"] == "body_timeout" and error["limit"] == 0.3


def test_files_and_items(narrow, galaxy, spectrum):
    client = TestClient(narrow)
    small = npy(galaxy.pixels[:, 44:108, 44:108].copy())
    two = client.post("/v1/embed/image", files=[("file", ("a", small))] * 2)
    assert two.status_code == 200
    three = client.post("/v1/embed/image", files=[("file", ("a", small))] * 3)
    assert three.status_code == 413 and three.json()["error"]["limit"] == 2


def test_too_many_items(settings, engine, spectrum):
    few = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_items": 2}))
    client = TestClient(make_app(few.settings, few))
    assert client.post("/v1/embed/spectrum", content=desi_fits([spectrum] * 2)).status_code == 200
    response = client.post("/v1/embed/spectrum", content=desi_fits([spectrum] * 3))
    assert response.status_code == 413 and response.json()["error"]["code"] == "too_many_items"
    few.close()


def test_nothing_is_prepared_of_files_that_hold_too_much(settings, engine, spectrum, monkeypatch):
    few, prepared = (
        Engine(engine.embedder, engine.index, settings.model_copy(update={"max_items": 3, "decode_threads": 2})),
        [],
    )
    real = engine.embedder.prepare
    monkeypatch.setattr(engine.embedder, "prepare", lambda item, **how: prepared.append(1) or real(item, **how))
    body = desi_fits([spectrum] * 2)
    answer = TestClient(make_app(few.settings, few)).post(
        "/v1/embed/spectrum", files=[("file", (name, body)) for name in "abcdef"]
    )
    assert answer.status_code == 413 and answer.json()["error"]["limit"] == 3
    assert len(prepared) == 2  # of the first
    few.close()


def test_all_bodies_together_just_below_and_just_above(settings, engine):
    """Bytes are counted while a request is at work, and no longer."""
    most = 2**20
    small = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_body_bytes_in_flight": most}))
    app = make_app(small.settings, small)

    async def both(second: int):
        sent, release = asyncio.Event(), asyncio.Event()

        async def slowly():
            yield b"x" * (most // 2)
            sent.set()
            await release.wait()

        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/embed/image", content=slowly()))
            await sent.wait()
            await asyncio.sleep(0.05)
            beside = await client.post("/v1/embed/image", content=b"y" * second)
            release.set()
            return (await first).status_code, beside

    for _ in range(2):
        first, beside = asyncio.run(both(most // 2))
        assert {first, beside.status_code} <= {415, 422}  # both were read, and are no image
        first, beside = asyncio.run(both(most // 2 + 1))
        assert first in (415, 422) and beside.status_code == 429 and beside.headers["retry-after"]
    alone = TestClient(app).post("/v1/embed/image", content=b"y" * (2 * most))
    assert alone.status_code in (415, 422)  # bounded by max_body_bytes alone
    small.close()


ID = {"object_id": "sim-00000020"}


def combined(depth: int):
    query = ID
    for _ in range(depth - 1):
        query = {"combine": {"positive": [query]}}
    return query


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"query": {"combine": {"positive": [ID] * 63}}}, 200, None),  # the combine counts as well
        ({"query": {"combine": {"positive": [ID] * 64}}}, 422, "query_too_large"),
        ({"query": combined(3)}, 200, None),
        ({"query": combined(4)}, 422, "query_too_deep"),
        ({"query": ID, "columns": ["ra"] * 64}, 200, None),
        ({"query": ID, "columns": ["ra"] * 65}, 422, "invalid_value"),
        ({"query": ID, "k": 100}, 200, None),
        ({"query": ID, "k": 101}, 422, "invalid_value"),
    ],
)
def test_queries_just_below_and_just_above(client, asked, status, code):
    answer = client.post("/v1/search", json=asked)
    assert answer.status_code == status, answer.text
    assert status == 200 or (answer.json()["error"]["code"] == code and answer.json()["error"]["limit"])


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/v1/objects?ra=180&dec=0&radius_arcsec=36000", 200),
        ("/v1/objects?ra=180&dec=0&radius_arcsec=36000.1", 422),
        ("/v1/objects?random=100", 200),
        ("/v1/objects?random=101", 422),
    ],
)
def test_lookups_just_below_and_just_above(client, address, status):
    assert client.get(address).status_code == status


def test_cone_searches_just_below_and_just_above(settings, engine):
    """The largest radius and the most rows, of lookups and of the IVOA's."""
    few = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_rows": 3}))
    with TestClient(make_app(few.settings, few)) as client:
        ra, dec = CENTRE[0] + 0.2, CENTRE[1]
        lookup = f"/v1/objects?ra={ra}&dec={dec}&radius_arcsec="
        found = {r: client.get(f"{lookup}{r}").json() for r in (50, 3600)}
        assert [(len(f["objects"]), f["truncated"]) for f in found.values()] == [(3, False), (3, True)]
        scs = {sr: client.get(f"/scs?RA={ra}&DEC={dec}&SR={sr}").text for sr in (0.014, 1, 10, 10.01)}
        assert [text.count("<TR>") for text in scs.values()] == [3, 3, 3, 0]
        assert ["only the nearest 3 rows" in text for text in scs.values()] == [False, True, True, False]
        assert 'name="Error"' in scs[10.01] and 'name="Error"' not in scs[10]
    few.close()


def test_a_lookup_has_a_deadline(settings, engine, monkeypatch):
    hurried = Engine(engine.embedder, engine.index, settings.model_copy(update={"deadline_s": 0.1}))
    gate = threading.Event()
    with TestClient(make_app(hurried.settings, hurried)) as client:
        monkeypatch.setattr(hurried.workers.search, "_work", lambda group, works: gate.wait(10) and [None] * len(works))
        answer = client.get("/v1/objects?random=1")
        gate.set()
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "deadline_passed"
    hurried.close()


def test_one_request_too_many_is_429(narrow, galaxy):
    """max_in_flight is 1: while one body is still arriving, the next POST is turned away; lookups are not."""

    async def both():
        started, release = asyncio.Event(), asyncio.Event()

        async def slowly():
            started.set()
            await release.wait()
            yield npy(galaxy.pixels[:, 44:108, 44:108].copy())

        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(narrow), base_url="http://test") as client:
            first = asyncio.create_task(client.post("/v1/embed/image", content=slowly()))
            await started.wait()
            await asyncio.sleep(0.05)
            second = await client.post("/v1/search", json={"query": {"object_id": "sim-00000020"}})
            alive = await client.get("/livez")
            release.set()
            return await first, second, alive

    first, second, alive = asyncio.run(both())
    assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1
    assert second.json()["error"]["code"] == "overloaded"
    assert alive.status_code == 200 and first.status_code == 200


# --- when something inside breaks ------------------------------------------------------------------------------------


def test_batch_that_raises_is_taken_apart(settings, engine, galaxy, monkeypatch):
    """The model fails on any batch with the culprit in it: the others are encoded alone, the culprit fails alone."""
    broken = Engine(engine.embedder, engine.index, settings)
    encode, culprit = engine.embedder.encode, engine.embedder.prepare(galaxy).pixels

    def picky(grids):
        if any(np.array_equal(grid.pixels, culprit) for grid in grids):
            raise RuntimeError("device-side assert")
        return encode(grids)

    other = npy(np.roll(galaxy.pixels, 3, axis=1))
    monkeypatch.setattr(broken.embedder, "encode", picky)
    files = [("file", (name, data)) for name, data in (("a", other), ("b", npy(galaxy.pixels)), ("c", other))]
    items = TestClient(make_app(settings, broken)).post("/v1/embed/image", files=files).json()["items"]
    assert [item["error"] and item["error"]["code"] for item in items] == [None, "no_embedding", None]
    broken.close()


def test_unexpected_exception_is_500_without_a_traceback(settings, engine, galaxy, monkeypatch, caplog):
    client = TestClient(make_app(settings, engine))

    def fail(*_):
        raise ZeroDivisionError("secret of the inside")

    monkeypatch.setattr("service.engine.Engine._prepare", fail)
    response = client.post("/v1/embed/image", content=image_fits(galaxy))
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error" and "secret" not in response.text and "Traceback" not in response.text
    assert error["request_id"] in caplog.text and "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert client.post("/v1/embed/image", content=image_fits(galaxy)).status_code == 200


def test_model_of_another_index_is_refused_at_the_start(settings, engine, monkeypatch):
    monkeypatch.setattr(engine.embedder, "model_sha256", "00" * 32)
    with pytest.raises(ProvenanceError, match="model sha256"):
        Engine(engine.embedder, engine.index, settings)


def test_every_setting_says_why():
    from service.settings import Settings

    for name, field in Settings.model_fields.items():
        assert field.description and len(field.description) > 20, name
        assert not field.is_required(), name
