"""Explanations over HTTP: what is answered, against whom, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import image_fits, sdss_fits

from astroclip.explain import explain
from service.app import make_app
from service.engine import Engine

ID = "sim-00000020"


def ask(client, call="search", files=None, **request):
    return client.post(f"/v1/{call}", files=files, data={"request": json.dumps(request)})


@pytest.fixture(scope="module")
def upload(spectrum):
    return {"spectrum": ("spectrum.fits", sdss_fits(spectrum))}


def drawn(found):
    """The plot, parsed."""
    head, _, body = found["plot"].partition(",")
    assert head == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(body))


def test_a_spectrum_is_explained_against_its_top_hit(client, upload, settings):
    answer = ask(client, files=upload, explain=True, k=3).json()
    found = answer["explanation"]["spectrum"]
    top = answer["hits"][0]
    assert found["against"] == {"object_id": top["object_id"], "modality": top["modality"]}
    assert found["score"] == pytest.approx(top["score"], abs=1e-5)
    assert len(found["windows"]) == len(found["drop"]) == len(found["share"])
    assert sum(found["share"]) == pytest.approx(1, abs=1e-3)
    assert 200 < found["passes"] <= settings.max_explain_passes
    assert all(3600 <= low < high <= 9824 for low, high in found["windows"])
    assert set(answer["explanation"]) == {"spectrum"} and found["unit"] == "Angstrom"
    assert drawn(found).tag.endswith("svg")


def test_both_uploads_are_explained_each_by_its_own_vector(client, upload, galaxy, engine):
    files = {**upload, "image": ("cutout.fits", image_fits(galaxy))}
    found = ask(client, "estimate", files=files, explain={"object_id": ID, "modality": "spectrum"}).json()
    assert set(found["explanation"]) == {"image", "spectrum"}
    image = found["explanation"]["image"]
    assert image["against"] == {"object_id": ID, "modality": "spectrum"}
    assert image["unit"] == "pixel" and image["pixel_scale_arcsec"] == 0.262
    assert image["windows"][0] == [0, 0, 12, 12] and image["windows"][-1] == [84, 84, 96, 96]
    reference = engine.index.vector(20, "spectrum")
    own = explain(engine.embedder.encode, engine.embedder.prepare(galaxy), reference)
    assert image["score"] == pytest.approx(own.score, abs=1e-5)
    np.testing.assert_allclose(image["drop"], own.drop, atol=1e-4)
    assert len(drawn(image).findall("{http://www.w3.org/2000/svg}image")) == 1


def test_a_raw_body_asks_in_the_address(client, spectrum):
    url = "/v1/search?modality=spectrum&k=2&explain=true"
    assert "explanation" in client.post(url, content=sdss_fits(spectrum)).json()
    url = f'/v1/search?modality=spectrum&k=2&explain={{"object_id":"{ID}"}}'
    found = client.post(url, content=sdss_fits(spectrum)).json()["explanation"]["spectrum"]
    assert found["against"]["object_id"] == ID


def test_one_explanation_more_than_may_wait_is_sent_away(client, upload, engine, settings, monkeypatch):
    monkeypatch.setattr(engine.workers, "explanations", settings.max_explain_waiting - 1)
    assert ask(client, files=upload, explain=True, k=1).status_code == 200
    assert engine.workers.explanations == settings.max_explain_waiting - 1
    monkeypatch.setattr(engine.workers, "explanations", settings.max_explain_waiting)
    refused = ask(client, files=upload, explain=True, k=1)
    assert refused.status_code == 429 and "explanations" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 5
    assert ask(client, files=upload, k=1).status_code == 200


def test_an_explanation_waits_for_its_turn_until_the_deadline(client, upload, engine, monkeypatch):
    monkeypatch.setattr(engine.workers, "explaining", asyncio.Semaphore(0))
    answer = client.post(
        "/v1/search",
        files=upload,
        data={"request": json.dumps({"explain": True, "k": 3})},
        headers={"x-deadline-ms": "1500"},
    )
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "deadline_passed"
    assert engine.workers.explanations == 0


def test_nothing_is_explained_unasked(client, upload):
    assert "explanation" not in ask(client, files=upload).json()


@pytest.mark.parametrize(
    ("files", "request_", "status", "code"),
    [
        (False, {"query": {"object_id": ID}, "explain": True}, 422, "no_upload"),
        (True, {"query": {"object_id": ID}, "explain": True}, 422, "no_upload"),
        (True, {"explain": {"object_id": "nobody"}}, 404, "no_such_object"),
        (True, {"explain": {"object_id": "sim-00000003", "modality": "image"}}, 422, "no_such_modality"),
        (True, {"explain": True, "filter": {"column": "redshift", "range": [5, 6]}}, 422, "no_hit"),
        (True, {"explain": {"object": ID}}, 400, None),
        (True, {"explain": "why"}, 400, None),
    ],
)
def test_what_cannot_be_explained_is_refused(client, upload, files, request_, status, code):
    if files:
        response = ask(client, files=upload, **request_)
    else:
        response = client.post("/v1/search", json=request_)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert code in (None, error["code"]) and error["message"]


def test_tables_have_no_place_for_it(client, upload):
    response = client.post("/v1/search?format=csv", files=upload, data={"request": '{"explain": true}'})
    assert response.status_code == 422 and "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(("passes", "status"), [(31, 422), (32, 200)])
def test_the_limit_binds(settings, engine, upload, passes, status):
    limited = Engine(engine.embedder, engine.index, settings.model_copy(update={"max_explain_passes": passes}))
    with TestClient(make_app(limited.settings, limited)) as client:
        response = ask(client, files=upload, explain=True)
        assert response.status_code == status
        if status == 200:
            assert response.json()["explanation"]["spectrum"]["passes"] <= passes
        else:
            assert response.json()["error"]["code"] == "explain_off"
    limited.close()


def test_other_requests_come_in_between(engine, upload, monkeypatch):
    """No batch of an explanation is longer than one of uploads."""
    sizes = []
    encode = engine.embedder.encode
    monkeypatch.setattr(engine.embedder, "encode", lambda grids: sizes.append(len(grids)) or encode(grids))
    with TestClient(make_app(engine.settings, engine)) as client:
        assert ask(client, files=upload, explain=True).status_code == 200
    assert max(sizes) == engine.settings.encode_batch and len(sizes) > 4
