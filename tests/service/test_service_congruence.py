"""Every form of query, over HTTP, through every backend: the same answers as exact search by numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parts_fixture import write_parts
from starlette.testclient import TestClient
from survey import image_fits, sdss_fits

from index import BuildOptions, SurveyIndex, build_index
from index.backends import ANN
from service.app import make_app
from service.engine import Engine
from service.settings import Settings

N = 700
BACKENDS = ("numpy", "torch", *ANN)
A, B, C = "obj-000020", "obj-000333", "obj-000610"


@pytest.fixture(scope="module")
def clients(tmp_path_factory, tiny_embedder, tiny_model_dir):
    """(clients by backend, what was written)."""
    folder = tmp_path_factory.mktemp("congruence")
    truth = write_parts(folder / "parts", N, sha=tiny_embedder.model_sha256, lacking=0.02)
    record = json.loads((folder / "parts" / "embedding.json").read_text())
    record |= {"preprocess_version": str(tiny_embedder.preprocess_version), "model_id": tiny_embedder.model_id}
    (folder / "parts" / "embedding.json").write_text(json.dumps(record))
    out, engines = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("index.recall._QUERIES", 64)
        patch.setattr("index.recall._TIMED", 1)
        patch.setattr("index.recall._crossover", lambda cost, size: 20)  # approximate wherever it is good enough
        for kind in ANN.values():
            patch.setattr(kind, "least", 300)
        for name in BACKENDS:
            options = BuildOptions(backend=name if name in ANN else "none", heads="never")
            path = build_index(folder / "parts", folder / name, survey="same", index_id="same", options=options)
            exact = "torch" if name == "torch" else "numpy"
            settings = Settings(index_dir=path, model_dir=tiny_model_dir, exact_search=exact)
            index = SurveyIndex.open(path, exact=exact, device="cpu")
            engines.append(Engine(tiny_embedder, index, settings))
            out[name] = TestClient(make_app(settings, engines[-1]))
    yield out, truth
    for engine in engines:
        engine.close()


def combine(strategy, **more):
    positive = [{"object_id": A}, {"object_id": B, "modality": "spectrum"}]
    return {"query": {"combine": {"positive": positive, "negative": [{"object_id": C}], "strategy": strategy, **more}}}


def vector(truth):
    return {"query": {"vector": [float(x) for x in truth["image"][77]], "modality": "image"}}


def around(truth, width):
    return {"column": "redshift", "range": [float(truth["redshift"][77]) - width, float(truth["redshift"][77]) + width]}


def place(truth):
    return {"query": {"position": {"ra": float(truth["ra"][20]), "dec": float(truth["dec"][20]), "radius_arcsec": 2}}}


FORMS = {
    "object": lambda t: {"query": {"object_id": A}},
    "object, image to spectrum": lambda t: {"query": {"object_id": A, "modality": "image"}, "target": "spectrum"},
    "object, both": lambda t: {"query": {"object_id": A, "modality": "both"}, "fuse": {"image": 3}},
    "position": place,
    "vector": vector,
    "average": lambda t: combine("average"),
    "average, weighted": lambda t: combine("average", weights=[3, 1, 0.5]),
    "best score": lambda t: combine("best_score"),
    "best score, weighted": lambda t: combine("best_score", weights=[1, 0.2]),
    "filter": lambda t: vector(t) | {"filter": around(t, 0.4)},
    "selective filter": lambda t: vector(t) | {"filter": around(t, 0.01)},
    "cone": lambda t: vector(t) | {"filter": {"cone": {"ra": 180, "dec": 0, "radius_deg": 60}}, "target": "image"},
    "exclusion": lambda t: {"query": {"object_id": A}, "exclude_arcsec": 36000},
    "threshold": lambda t: vector(t) | {"score_threshold": 0.8, "k": 100},
    "least similar": lambda t: vector(t) | {"order": "least_similar", "target": "spectrum"},
    "estimate": lambda t: {"query": {"object_id": A}, "properties": ["redshift"], "coverage": 0.9},
}


def answer(client, path, request, files=None):
    if files is None:
        response = client.post(path, json=request)
    else:
        response = client.post(path, files={**files, "request": (None, json.dumps(request), "application/json")})
    assert response.status_code == 200, response.text
    return response.json()


def compare(found, wanted, name):
    got, true = ([hit["object_id"] for hit in a["hits"]] for a in (found, wanted))
    assert len(got) == len(true) == len(set(got)) and true
    if found["search"]["mode"] == "exact":
        assert got == true and found["search"]["expected_recall"] == 1.0
    else:
        assert found["search"]["mode"] == name and found["search"]["expected_recall"] >= 0.99
        assert len(set(got) & set(true)) >= 0.85 * len(true)  # one of nine may be missed
    scores = {hit["object_id"]: hit["score"] for hit in wanted["hits"]}
    for hit in found["hits"]:
        assert hit["score"] == pytest.approx(scores.get(hit["object_id"], hit["score"]), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_query_forms(clients, name, form):
    by, truth = clients
    request = {"k": 12, **FORMS[form](truth)}
    path = "/v1/estimate" if form == "estimate" else "/v1/search"
    found, wanted = (answer(by[n], path, request) for n in (name, "numpy"))
    compare(found, wanted, name)
    assert wanted["search"]["mode"] == "exact"


@pytest.mark.parametrize("sent", [("image",), ("spectrum",), ("image", "spectrum")])
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_uploads(clients, galaxy, spectrum, name, sent):
    by, _ = clients
    every = {"image": ("g.fits", image_fits(galaxy)), "spectrum": ("s.fits", sdss_fits(spectrum))}
    files = {modality: every[modality] for modality in sent}
    request = {"k": 9, "fuse": {"image": 1, "spectrum": 2}}
    found, wanted = (answer(by[n], "/v1/search", request, files) for n in (name, "numpy"))
    compare(found, wanted, name)
    assert wanted["query"]["modalities"] == list(sent)


def test_approximate_backends_were_asked(clients):
    by, truth = clients
    for name in ANN:
        for form in ("vector", "filter"):
            assert answer(by[name], "/v1/search", {"k": 9, **FORMS[form](truth)})["search"]["mode"] == name


def test_fuse_weights_move_the_answer_from_one_modality_to_the_other(clients):
    client, _ = clients[0]["numpy"], None

    def ids(**change):
        query = {"object_id": A, "modality": change.pop("modality", "both")}
        hits = answer(client, "/v1/search", {"query": query, "target": "spectrum", "k": 20, **change})["hits"]
        return [hit["object_id"] for hit in hits]

    assert ids(fuse={"image": 0}) == ids(modality="spectrum")
    assert ids(fuse={"spectrum": 0}) == ids(modality="image")
    assert ids() == ids(fuse={"image": 7, "spectrum": 7}) != ids(fuse={"image": 7})


def test_best_score_over_http_is_the_formula(clients):
    client, truth = clients[0]["numpy"], clients[1]
    positive, negative = truth["image"][[20, 600]], truth["image"][[333]]

    def query(v):
        return {"vector": v.astype(float).tolist(), "modality": "image"}

    request = {"combine": {"positive": [query(v) for v in positive], "negative": [query(v) for v in negative]}}
    request["combine"]["strategy"] = "best_score"
    found = answer(client, "/v1/search", {"query": request, "target": "image", "k": 25})
    p, n = ((truth["image"] @ v.T).max(axis=1) for v in (positive, negative))
    scores = np.where(p > n, p, -(n**2))
    scores[~truth["has_image"]] = -np.inf
    wanted = truth["id"][np.argsort(-scores)[:25]].tolist()
    assert [hit["object_id"] for hit in found["hits"]] == wanted
    assert all(hit["percentile"] is None for hit in found["hits"])
    assert found["search"]["mode"] == "exact"


def test_positives_that_cancel_are_no_fault_of_best_score(clients):
    client, truth = clients[0]["numpy"], clients[1]
    v = truth["image"][20].astype(float)
    terms = [{"vector": (sign * v).tolist(), "modality": "image"} for sign in (1, -1)]
    answer(client, "/v1/search", {"query": {"combine": {"positive": terms, "strategy": "best_score"}}})
    response = client.post("/v1/search", json={"query": {"combine": {"positive": terms}}})
    assert response.status_code == 422 and response.json()["error"]["code"] == "no_direction"


def test_torch_is_a_setting(clients, settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTROCLIP_EXACT_SEARCH", "torch")
        changed = Settings(index_dir=settings.index_dir, model_dir=settings.model_dir, device="cpu")
        patch.setenv("ASTROCLIP_EXACT_SEARCH", "abacus")
        with pytest.raises(ValueError, match="numpy"):
            Settings()
    engine = Engine.load(changed)
    try:
        assert {search.exact.name for search in engine.index._searches.values()} == {"torch"}
    finally:
        engine.close()
