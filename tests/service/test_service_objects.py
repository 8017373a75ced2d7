"""Objects, previews, cone search, info, health, documents."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import PIL.Image
import pytest
from astropy.io.votable import parse
from fastapi.testclient import TestClient
from survey import CENTRE, desi_fits, image_fits

from astroclip.errors import NotReadyError
from service.app import make_app
from service.engine import Engine

ID = "sim-00000020"


def test_one_object(client):
    answer = client.get(f"/v1/objects/{ID}").json()
    found = answer["object"]
    assert found["object_id"] == ID and found["has_image"] and found["has_spectrum"]
    assert set(found["properties"]) == {"redshift", "log_stellar_mass"}
    assert found["columns"]["target_class"] == "ELG"
    assert answer["model"]["sha256"] and answer["index"]["manifest_sha256"] and answer["request_id"]


def test_previews_are_served_where_linked(client):
    links = client.get(f"/v1/objects/{ID}").json()["object"]["previews"]
    response = client.get(links["image"])
    assert response.headers["content-type"] == "image/jpeg"
    assert np.asarray(PIL.Image.open(io.BytesIO(response.content))).shape[2] == 3
    spectrum = client.get(links["spectrum"]).json()
    assert len(spectrum["wave"]) == len(spectrum["flux"]) > 100
    assert 3600 < spectrum["wave"][0] < spectrum["wave"][-1] < 9824


@pytest.mark.parametrize(("ra", "dec"), [(CENTRE[0] + 0.20, CENTRE[1]), ("12:00:48", "-00:12:00")])
def test_cone(client, ra, dec):
    answer = client.get("/v1/objects", params={"ra": ra, "dec": dec, "radius_arcsec": 50}).json()
    found = [(o["object_id"], round(o["separation_arcsec"], 1)) for o in answer["objects"]]
    assert found[0] == (ID, 0.0)
    assert sorted(found[1:]) == [("sim-00000019", 36.0), ("sim-00000021", 36.0)]


def test_limit_truncates_and_says_so(client):
    params = {"ra": CENTRE[0], "dec": CENTRE[1], "radius_arcsec": 3600, "limit": 5}
    answer = client.get("/v1/objects", params=params).json()
    assert len(answer["objects"]) == 5 and answer["truncated"] is True


def test_random_objects_repeat_with_their_seed(client):
    def draw(**params):
        objects = client.get("/v1/objects", params={"random": 8, **params}).json()["objects"]
        return [o["object_id"] for o in objects]

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert len(set(draw())) == 8


def test_objects_as_csv(client):
    response = client.get("/v1/objects?random=3&seed=1&format=csv")
    lines = response.text.splitlines()
    assert len(lines) == 4 and lines[0].startswith("object_id,ra,dec")


# --- cone search of the virtual observatory --------------------------------------------------------------------------


def test_scs_gives_a_votable_with_the_three_ucds(client):
    response = client.get("/scs", params={"RA": CENTRE[0], "DEC": CENTRE[1], "SR": 0.025})
    assert response.headers["content-type"].startswith("application/x-votable+xml")
    table = parse(io.BytesIO(response.content)).get_first_table()
    assert list(table.to_table()["object_id"]) == ["sim-00000000", "sim-00000001", "sim-00000002"]
    ucds = {field.ucd for field in table.fields}
    assert {"meta.id;meta.main", "pos.eq.ra;meta.main", "pos.eq.dec;meta.main"} <= ucds


def test_scs_of_radius_zero_gives_the_columns(client):
    response = client.get("/scs?ra=180&dec=-0.2&sr=0")
    table = parse(io.BytesIO(response.content)).get_first_table()
    assert len(table.array) == 0 and "redshift" in [field.name for field in table.fields]


@pytest.mark.parametrize("query", ["", "RA=180&DEC=-0.2", "RA=x&DEC=0&SR=1", "RA=1&DEC=95&SR=1", "RA=nan&DEC=0&SR=1"])
def test_scs_says_its_errors_as_the_standard_wants(client, query):
    response = client.get(f"/scs?{query}")
    assert response.status_code == 200
    infos = parse(io.BytesIO(response.content)).resources[0].infos
    assert infos[0].name == "Error" and infos[0].value


# --- info, health, documents -----------------------------------------------------------------------------------------


def test_info(client, settings):
    answer = client.get("/v1/info").json()
    assert {"models", "indexes", "limits", "versions", "licences", "citations"} <= set(answer)
    assert answer["limits"]["max_k"] == settings.max_k
    assert answer["indexes"][0]["counts"]["objects"] == 60
    assert "A survey made for tests" in answer["citations"]
    assert answer["versions"]["torch"]


def test_alive_and_ready(client):
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json()["status"] == "ready"


def test_not_ready_before_the_engine_is_there(settings):
    client = TestClient(make_app(settings))  # no lifespan: nothing is loaded
    assert client.get("/livez").status_code == 200
    for path in ("/readyz", "/v1/info", f"/v1/objects/{ID}"):
        response = client.get(path)
        assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"
        assert response.headers["retry-after"]


def test_not_ready_when_the_models_answer_changes(settings, engine, monkeypatch):
    sick = Engine(engine.embedder, engine.index, settings.model_copy(update={"canary_interval_s": 0.0}))
    with TestClient(make_app(sick.settings, sick)) as client:
        assert client.get("/readyz").status_code == 200
        monkeypatch.setattr(sick.embedder, "encode", lambda grids: np.full((len(grids), 16), np.nan, np.float32))
        assert client.get("/readyz").status_code == 503
        monkeypatch.undo()
        assert client.get("/readyz").status_code == 200
    sick.close()


@pytest.mark.parametrize("modality", ["image", "spectrum"])
def test_not_ready_where_one_modality_has_no_vectors(settings, engine, monkeypatch, galaxy, spectrum, modality):
    """NaN compares with nothing, and the other modality is well."""
    sick = Engine(engine.embedder, engine.index, settings.model_copy(update={"canary_interval_s": 0.0}))
    real = sick.embedder.encode

    def numb(grids):
        ill = hasattr(grids[0], "pixels") == (modality == "image")
        return np.full((len(grids), 16), np.nan, np.float32) if ill else real(grids)

    bodies = {"image": image_fits(galaxy), "spectrum": desi_fits([spectrum])}
    with TestClient(make_app(sick.settings, sick)) as client:
        assert client.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(sick.embedder, "encode", numb)
            assert client.get("/readyz").status_code == 503
            assert client.post(f"/v1/embed/{modality}", content=bodies[modality]).status_code == 503
        assert client.get("/readyz").status_code == 200
        assert client.post(f"/v1/embed/{modality}", content=bodies[modality]).status_code == 200
    sick.close()


def test_many_probes_share_one_question(settings, engine, monkeypatch):
    sick = Engine(engine.embedder, engine.index, settings.model_copy(update={"canary_interval_s": 0.0}))
    asked, real = [], sick._ask_canary

    async def slow():
        asked.append(1)
        await asyncio.sleep(0.1)
        await real()

    monkeypatch.setattr(sick, "_ask_canary", slow)

    async def probe():
        await asyncio.gather(*(sick.check() for _ in range(50)))

    asyncio.run(probe())
    assert len(asked) == 1
    monkeypatch.setattr(sick, "_ask_canary", lambda: 1 / 0)

    async def all_told():
        return await asyncio.gather(*(sick.check() for _ in range(5)), return_exceptions=True)

    assert all(isinstance(told, NotReadyError) for told in asyncio.run(all_told()))
    sick.close()


def test_openapi_lists_every_call_and_resolves(client):
    document = client.get("/openapi.json").json()
    for path in ("/v1/embed/image", "/v1/embed/spectrum", "/v1/search", "/v1/estimate", "/v1/objects", "/v1/info"):
        assert path in document["paths"]
    schemas = document["components"]["schemas"]
    text = client.get("/openapi.json").text
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas


@pytest.mark.parametrize("path", ["/", "/docs", "/page/js/app.js", "/page/page.css", "/page/icon.svg"])
def test_pages_name_no_other_host(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    text = response.text.replace("http://www.w3.org/", "")  # XML namespaces are names, not addresses
    assert "http://" not in text and "https://" not in text


def test_page_files_only(client):
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js"):
        assert client.get(path).status_code == 404
