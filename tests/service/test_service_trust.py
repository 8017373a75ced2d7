"""Trust over HTTP: what is said of uploads, of the index's own objects, of pairs, and the two levels."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from starlette.testclient import TestClient
from survey import COUNT, image_fits, sdss_fits

import service.answer
from astroclip.types import Flag, Image
from index import Trust, disagreement_p
from service.answer import flag_models
from service.app import make_app
from service.engine import Engine
from service.settings import Settings

ID = "sim-00000020"


def search(client: TestClient, query: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/search", json={"query": query, "k": 3})
    assert answer.status_code == 200, answer.text
    return answer.json()["trust"]


def codes(trust: dict[str, Any]) -> set[str]:
    return {flag["code"] for flag in trust["flags"]}


@pytest.fixture(scope="module")
def levels(settings: Settings, engine: Engine):  # type: ignore[no-untyped-def]
    """A client with other levels, on the same index and model."""

    def make(**changed: float) -> TestClient:
        other = Engine(engine.embedder, engine.index, settings.model_copy(update=changed))
        return TestClient(make_app(other.settings, other))

    return make


def test_an_object_is_judged_without_itself_and_with_both_its_sides(client, engine):
    trust = search(client, {"object_id": ID})
    assert set(trust["measures"]) == {"spectrum"} and "distance" in trust["measures"]["spectrum"]
    row = int(engine.index.catalog.rows_by_id(ID)[0])
    image, spectrum = (engine.index.vector(row, m) for m in ("image", "spectrum"))
    assert trust["disagreement_p"] == pytest.approx(disagreement_p(engine.index, image, spectrum))
    typical = engine.index.trust.typical["spectrum"]
    assert trust["ood_p"] == pytest.approx(typical.p_values(spectrum[None], exclude_rows=[row])["ood"][0])


def test_one_side_alone_cannot_disagree(client, galaxy):
    assert search(client, {"object_id": "sim-00000003"})["disagreement_p"] is None  # it has no image
    answer = client.post("/v1/search", files={"image": ("g.fits", image_fits(galaxy))}).json()
    assert answer["trust"]["disagreement_p"] is None


def test_an_upload_of_an_object_of_the_index_is_judged_by_what_was_uploaded(client, galaxy):
    """What the index has of that object has no part in it."""
    with fits.open(io.BytesIO(image_fits(galaxy))) as hdus:
        hdus[0].header["OBJECT"] = ID
        hdus.writeto(body := io.BytesIO())
    answer = client.post("/v1/search", files={"image": ("g.fits", body.getvalue())}).json()
    assert answer["query"]["object_id"] == ID and "own_object_left_out" in codes(answer["trust"])
    assert answer["trust"]["disagreement_p"] is None


def test_two_uploads_are_compared_and_both_judged(client, engine, galaxy, spectrum):
    files = {"image": ("g.fits", image_fits(galaxy)), "spectrum": ("s.fits", sdss_fits(spectrum))}
    trust = client.post("/v1/search", files={**files, "request": (None, json.dumps({"k": 3}))}).json()["trust"]
    image, other = engine.embedder.embed([galaxy])[0], engine.embedder.embed([spectrum])[0]
    assert trust["disagreement_p"] == pytest.approx(disagreement_p(engine.index, image, other))
    alone = [
        client.post(f"/v1/embed/{m}", content=body[1]).json()["items"][0]["trust"]["ood_p"] for m, body in files.items()
    ]
    assert trust["ood_p"] == pytest.approx(min(1.0, 2 * min(alone)))


def test_two_uploads_are_held_to_half_the_level_each(client, engine, galaxy, spectrum, monkeypatch):
    """So that an ordinary pair is flagged as rarely as an ordinary image."""
    seen = []

    def judge(index: object, queries: object, modality: str, *, level: float, **rest: object) -> list[Trust]:
        seen.append((modality, level))
        return [Trust({"image": 0.02, "spectrum": 0.3}[modality])]

    monkeypatch.setattr(service.answer, "assess", judge)
    files = {"image": ("g.fits", image_fits(galaxy)), "spectrum": ("s.fits", sdss_fits(spectrum))}
    assert client.post("/v1/search", files=files).json()["trust"]["ood_p"] == pytest.approx(0.04)
    half = engine.settings.ood_level / 2
    assert seen == [("image", half), ("spectrum", half)]


def test_the_levels_decide_the_flags_alone(levels):
    always, never = levels(ood_level=1.0, disagreement_level=1.0), levels(ood_level=0.0, disagreement_level=0.0)
    with always, never:
        assert {"out_of_distribution", "modalities_disagree"} <= codes(search(always, {"object_id": ID}))
        assert not {"out_of_distribution", "modalities_disagree"} & codes(search(never, {"object_id": ID}))
        assert search(always, {"object_id": ID})["ood_p"] == search(never, {"object_id": ID})["ood_p"]


@pytest.mark.parametrize("level", [-0.01, 1.01])
@pytest.mark.parametrize("name", ["ood_level", "disagreement_level"])
def test_levels_are_probabilities(name, level, index_dir: Path):
    with pytest.raises(ValueError, match=name):
        Settings(index_dir=index_dir, **{name: level})


def test_noise_is_flagged_as_faint(client, galaxy: Image):
    pixels = np.random.default_rng(1).normal(0, 0.02, galaxy.pixels.shape).astype(np.float32)
    item = client.post("/v1/embed/image", content=image_fits(replace(galaxy, pixels=pixels))).json()["items"][0]
    assert "low_snr" in codes(item["trust"]) and "low_snr" in codes(item["quality"])


def test_the_statistics_of_an_upload_reach_the_judge(client, engine, galaxy, monkeypatch):
    """The small index of these tests cannot weigh them; `tests/index` shows that they count."""
    seen = []
    judge = service.answer.assess
    monkeypatch.setattr(service.answer, "assess", lambda *a, statistics, **k: seen.append(statistics) or judge(*a, **k))
    expected = engine.embedder.prepare(galaxy).quality.statistics
    assert client.post("/v1/embed/image", content=image_fits(galaxy)).status_code == 200
    assert client.post("/v1/search", files={"image": ("g.fits", image_fits(galaxy))}).status_code == 200
    search(client, {"object_id": ID})
    upload, query, own = (found[0] for found in seen)
    assert upload == query == pytest.approx(expected, rel=1e-3) and own == ()


def test_a_bare_vector_is_judged_by_the_embedding(client, engine):
    vector = engine.index.vector(5, "image")
    trust = search(client, {"vector": vector.tolist(), "modality": "image"})
    assert set(trust["measures"]) == {"image"} and "input" not in trust["measures"]["image"]
    assert 1 / (COUNT + 1) <= trust["ood_p"] <= 1


def test_flags_of_image_and_spectrum_with_one_code_are_both_said():
    image, spectrum = Flag("low_snr", "The image ..."), Flag("low_snr", "The spectrum ...")
    said = flag_models([image, spectrum, image])
    assert [flag.message for flag in said] == ["The image ...", "The spectrum ..."]
