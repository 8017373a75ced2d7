"""What a request may hold: JSON bounds, strict numbers, parameters there are, limits that an operator sets."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient
from survey import image_fits, npy

from service.app import make_app
from service.canary import canary
from service.engine import Engine, Prepared
from service.errors import validation_error
from service.schemas import EstimateRequest
from service.settings import Settings
from service.trace import Trace
from service.uploads import Upload

ID = "sim-00000020"


def error(response, status: int) -> dict:  # type: ignore[no-untyped-def]
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_json_just_below_and_just_above(settings, engine) -> None:
    small = settings.model_copy(update={"max_json_bytes": 2000})
    client = TestClient(make_app(small, Engine(engine.embedder, engine.index, small, engine.workers)))
    body = json.dumps({"query": {"object_id": ID}, "k": 1}).encode()
    assert client.post("/v1/search", content=body.ljust(2000), headers={"content-type": "application/json"}).is_success
    long = client.post("/v1/search", content=body.ljust(2001), headers={"content-type": "application/json"})
    assert error(long, 413)["code"] == "json_too_large" and error(long, 413)["limit"] == 2000
    form = client.post("/v1/search", files={"request": ("r", body.ljust(2001), "application/json")})
    assert error(form, 413)["code"] == "json_too_large"


@pytest.mark.parametrize(("depth", "code"), [(150, "malformed_request"), (1000, "nested_too_deeply")])
def test_depth_of_json(client, depth: int, code: str) -> None:
    body = b'{"filter":' + b"[" * depth + b"]" * depth + b"}"
    found = error(client.post("/v1/search", content=body, headers={"content-type": "application/json"}), 400)
    assert found["code"] == code
    if code == "nested_too_deeply":
        assert found["limit"] == 200 and "nested" in found["message"]


@pytest.mark.parametrize(
    "wrong",
    [{"exclude_arcsec": "5"}, {"exclude_arcsec": True}, {"score_threshold": "0.1"}, {"preview": "yes"}, {"preview": 1},
     {"fuse": {"image": "1"}}, {"query": {"vector": ["1"] * 16, "modality": "image"}}, {"k": 2.0}, {"k": "2"}],
    ids=str,
)  # fmt: skip
def test_numbers_are_numbers(client, wrong: dict) -> None:
    assert error(client.post("/v1/search", json={"query": {"object_id": ID}, **wrong}), 400)["code"]
    assert client.post(
        "/v1/search", json={"query": {"object_id": ID}, "exclude_arcsec": 5}
    ).is_success  # whole ones too


@pytest.mark.parametrize("path", ["/v1/objects?random=1", f"/v1/objects/{ID}?format=json", "/v1/info?", "/v1/lists?"])
def test_get_refuses_parameters_there_are_not(client, path: str) -> None:
    assert client.get(path).is_success
    found = error(client.get(f"{path}&radius_arcmin=1"), 400)
    assert found["code"] == "unknown_field" and found["field"] == "radius_arcmin"


def test_cone_search_ignores_them(client) -> None:
    assert client.get("/scs?RA=180&DEC=-0.2&SR=0.1&VERB=3&nonsense=1").is_success


def test_limits_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("ASTROCLIP_READER__MAX_HDUS", "7")
    monkeypatch.setenv("ASTROCLIP_FILTER__MAX_TERMS", "9")
    settings = Settings()
    assert settings.reader.max_hdus == 7 and settings.reader.max_axes == 4
    assert settings.filter.max_terms == 9 and settings.filter.max_depth == 8
    monkeypatch.setenv("ASTROCLIP_READER__MAX_HDUS", "0")
    with pytest.raises(ValueError, match="max_hdus"):
        Settings()


def test_limits_of_the_settings_bind(settings, engine, galaxy, monkeypatch) -> None:
    monkeypatch.setenv("ASTROCLIP_READER__MAX_IMAGE_PIXELS", str(galaxy.pixels[0].size - 1))
    monkeypatch.setenv("ASTROCLIP_FILTER__MAX_VALUES", "2")
    narrow = settings.model_copy(update={"reader": Settings().reader, "filter": Settings().filter})
    client = TestClient(make_app(narrow, Engine(engine.embedder, engine.index, narrow, engine.workers)))
    assert error(client.post("/v1/embed/image", content=image_fits(galaxy)), 413)["code"] == "image_too_large"
    ids = {"column": "target_class", "in": ["BGS", "LRG"]}
    ask = {"query": {"object_id": ID}, "filter": ids}
    assert client.post("/v1/search", json=ask).is_success
    ask["filter"] = {"or": [ids, ids]}
    assert error(client.post("/v1/search", json=ask), 413)["limit"] == 2
    limits = client.get("/v1/info").json()["limits"]
    assert limits["filter"]["max_values"] == 2 and limits["reader"]["max_image_pixels"] == galaxy.pixels[0].size - 1


def test_nonfinite_output_is_named_by_the_hash_of_its_input(settings, engine, galaxy, monkeypatch, caplog) -> None:
    encode = engine.embedder.encode

    data = npy(np.roll(galaxy.pixels, 5, axis=2))
    culprit = engine.embedder.prepare(replace(galaxy, pixels=np.roll(galaxy.pixels, 5, axis=2))).pixels

    def sick(grids):  # type: ignore[no-untyped-def]
        ill = np.array_equal(getattr(grids[0], "pixels", 0), culprit)
        return encode(grids) * np.float32("nan" if ill else 1)

    own = Engine(engine.embedder, engine.index, settings)
    monkeypatch.setattr(own.embedder, "encode", sick)
    client = TestClient(make_app(settings, own))
    with caplog.at_level(logging.ERROR):
        assert error(client.post("/v1/embed/image", content=data), 422)["code"] == "no_embedding"
    import hashlib

    assert hashlib.sha256(data).hexdigest() in caplog.text
    assert b"nonfinite" in own.workers.metrics.text()
    own.close()


def test_read_objects_hold_no_pixels(engine, galaxy) -> None:
    """64 small pictures can hold gigabytes; what an answer needs of them is not their pixels."""
    from service.engine import _Room
    from service.uploads import ReadOptions, Upload

    (prepared,) = engine._prepare(Upload(image_fits(galaxy)), "image", ReadOptions(), _Room(1), True)
    assert prepared.item.pixels.size == 0 and prepared.item.ra is not None and prepared.grid.pixels.size


def test_a_file_of_many_objects_is_hashed_once_and_not_in_the_event_loop(settings, engine, caplog, monkeypatch) -> None:
    own = Engine(engine.embedder, engine.index, settings)
    encode, hashed = own.embedder.encode, []
    sha256 = Upload.sha256
    monkeypatch.setattr(own.embedder, "encode", lambda grids: encode(grids) * np.float32("nan"))
    monkeypatch.setattr(own, "check", lambda now=False: asyncio.sleep(0))  # the model is well
    monkeypatch.setattr(
        Upload, "sha256", lambda upload: hashed.append(threading.current_thread().name) or sha256(upload)
    )
    upload = Upload(b"x" * 10, None, "many.fits")
    prepared = [Prepared("spectrum", grid=own.embedder.prepare(canary("spectrum")), upload=upload) for _ in range(5)]

    async def embed():
        return threading.current_thread().name, await own.embed(prepared, Trace())

    with caplog.at_level(logging.ERROR):
        loop, found = asyncio.run(embed())
    assert [each.error.code for each in found] == ["no_embedding"] * 5
    assert len(hashed) == 1 and hashed[0] != loop
    (record,) = [r for r in caplog.records if "not finite" in r.getMessage()]
    assert "5 x spectrum" in record.getMessage() and sha256(upload) in record.getMessage()
    own.close()


UNKNOWN = {f"u{i}": 1 for i in range(10_000)}


@pytest.mark.parametrize(
    "raw",
    [
        {"query": {"object_id": "a"}, "columns": [1] * 10_000},
        {"query": {"object_id": "a"}, "properties": [1] * 10_000},
        {"query": {"combine": {"positive": [1] * 10_000}}},
        {"query": {"combine": {"positive": [{"object_id": "a"}], "weights": [""] * 10_000}}},
        {"query": {"vector": [""] * 10_000, "modality": "image"}},
        {"query": {"object_id": "a"}, **UNKNOWN},
        {"query": {"object_id": "a", **UNKNOWN}},
        {"query": {"object_id": "a"}, "explain": UNKNOWN},
    ],
    ids=lambda raw: str(raw)[:60],
)
def test_one_fault_is_enough(raw: dict) -> None:
    """Two million of them took the event loop for seconds, and a gigabyte."""
    with pytest.raises(ValidationError) as caught:
        EstimateRequest.model_validate(raw)
    assert 1 <= caught.value.error_count() <= len(EstimateRequest.model_fields)
    assert validation_error(caught.value).message


def test_the_first_unknown_field_is_named_however_many_there_are(client) -> None:
    body = {"query": {"object_id": ID}, **{f"u{i}": 1 for i in range(500)}}
    found = error(client.post("/v1/search", json=body), 400)
    assert found["code"] == "unknown_field" and found["field"] == "u0"
