"""POST /v1/search and /v1/estimate: every form of query, filters, exclusion, tables."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io.votable import parse_single_table
from sky import make_spectrum
from survey import CENTRE, COUNT, desi_fits, image_fits, sdss_fits, spectrum_csv

from service.query import position_of

ID = "sim-00000020"


def search(client, query=None, status=200, **request):
    response = client.post("/v1/search", json={"query": query, **request} if query else request)
    assert response.status_code == status, response.text
    return response.json()


def ids(answer) -> list[str]:
    return [hit["object_id"] for hit in answer["hits"]]


def best(engine, vector: np.ndarray, target: str, k: int, leave_out: tuple[int, ...] = ()) -> list[str]:
    """The k nearest by brute force."""
    rows = [r for r in range(len(engine.index)) if r not in leave_out and engine.index.vector(r, target) is not None]
    scores = [float(engine.index.vector(r, target) @ vector) for r in rows]
    order = np.argsort(-np.array(scores), kind="stable")[:k]
    return [engine.index.catalog.row(rows[i])["object_id"] for i in order]


@pytest.mark.parametrize("target", ["image", "spectrum"])
def test_object_asks_in_the_targets_modality_and_is_left_out(client, engine, target):
    answer = search(client, {"object_id": ID}, target=target, k=5)
    row = int(engine.index.catalog.rows_by_id(ID)[0])
    assert ids(answer) == best(engine, engine.index.vector(row, target), target, 5, leave_out=(row,))
    assert answer["query"]["modalities"] == [target]


def test_cross_modal_object_query(client, engine):
    answer = search(client, {"object_id": ID, "modality": "image"}, target="spectrum", k=4)
    row = int(engine.index.catalog.rows_by_id(ID)[0])
    assert ids(answer) == best(engine, engine.index.vector(row, "image"), "spectrum", 4, leave_out=(row,))


def test_answer_carries_what_the_contract_says(client):
    answer = search(client, {"object_id": ID}, k=3)
    assert {"hits", "search", "trust", "index", "model", "request_id"} <= set(answer)
    assert {"object_id", "score", "percentile", "ra", "dec", "properties"} <= set(answer["hits"][0])
    assert set(answer["search"]) == {"mode", "candidates", "expected_recall"}
    assert set(answer["trust"]) == {"ood_p", "measures", "disagreement_p", "flags"}
    assert answer["search"]["mode"] == "exact" and answer["search"]["expected_recall"] == 1.0
    scores = [hit["percentile"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)


def test_default_k_is_sixteen(client):
    assert len(search(client, {"object_id": ID})["hits"]) == 16


@pytest.mark.parametrize(
    "position",
    [
        {"ra": CENTRE[0] + 0.20, "dec": CENTRE[1]},
        {"ra": "12:00:48", "dec": "-00:12:00"},
        {"ra": "12h00m48s", "dec": "-0d12m00s"},
        {"ra": "180.2", "dec": "-0.2", "radius_arcsec": 2},
    ],
)
def test_position_means_the_nearest_object(client, position):
    answer = search(client, {"position": position}, k=3)
    assert answer["query"]["object_id"] == ID
    assert ids(answer) == ids(search(client, {"object_id": ID}, k=3))


def test_vector_query_equals_the_upload_it_came_from(client, galaxy):
    vector = client.post("/v1/embed/image", content=image_fits(galaxy)).json()["items"][0]["embedding"]
    by_vector = search(client, {"vector": (3 * np.array(vector)).tolist(), "modality": "image"}, target="image", k=5)
    by_upload = client.post(
        "/v1/search",
        files={"image": ("g.fits", image_fits(galaxy)), "request": (None, '{"target": "image", "k": 5}')},
    ).json()
    assert ids(by_vector) == ids(by_upload)


def test_uploads_are_fused_as_their_mean(client, engine, galaxy, spectrum):
    files = {"image": ("g.fits", image_fits(galaxy)), "spectrum": ("s.fits", sdss_fits(spectrum))}
    request = {"request": (None, json.dumps({"target": "spectrum", "k": 5}), "application/json")}
    answer = client.post("/v1/search", files={**files, **request})
    assert answer.status_code == 200, answer.text
    mean = engine.embedder.embed([galaxy])[0] + engine.embedder.embed([spectrum])[0]
    assert ids(answer.json()) == best(engine, mean / np.linalg.norm(mean), "spectrum", 5)
    assert answer.json()["query"]["modalities"] == ["image", "spectrum"]
    assert answer.json()["trust"]["ood_p"] is not None


def test_named_upload_and_unused_one(client, galaxy, spectrum):
    files = {"image": ("g.fits", image_fits(galaxy)), "spectrum": ("s.fits", sdss_fits(spectrum))}
    request = {"request": (None, json.dumps({"query": {"upload": "image"}, "k": 3}))}
    answer = client.post("/v1/search", files={**files, **request}).json()
    assert answer["query"]["modalities"] == ["image"]
    assert "upload_not_used" in {flag["code"] for flag in answer["trust"]["flags"]}


def test_combine_is_the_average_strategy(client, engine):
    index, target = engine.index, "spectrum"
    rows = [int(index.catalog.rows_by_id(f"sim-{i:08d}")[0]) for i in (10, 14, 40)]
    a, b, c = (index.vector(row, target).astype(float) for row in rows)
    positive = (3 * a + b) / 4
    vector = positive + (positive - c)
    query = {
        "combine": {
            "positive": [{"object_id": "sim-00000010"}, {"object_id": "sim-00000014"}],
            "negative": [{"object_id": "sim-00000040"}],
            "weights": [3, 1, 1],
        }
    }
    answer = search(client, query, target=target, k=6)
    assert ids(answer) == best(engine, vector / np.linalg.norm(vector), target, 6, leave_out=tuple(rows))
    assert ids(search(client, {"combine": {**query["combine"], "weights": [3, 1]}}, target=target, k=6)) == ids(answer)


def test_filter_limits_the_hits(client):
    expression = {"and": [{"column": "redshift", "range": [0.2, 0.5]}, {"column": "target_class", "in": ["LRG"]}]}
    answer = search(client, {"object_id": ID}, filter=expression, columns=["redshift", "target_class"], k=50)
    assert answer["hits"]
    for hit in answer["hits"]:
        assert 0.2 <= hit["properties"]["redshift"] <= 0.5 and hit["properties"]["target_class"] == "LRG"
    assert "fewer_hits" in {flag["code"] for flag in answer["trust"]["flags"]}


def test_filter_that_nothing_passes_gives_no_hits(client):
    answer = search(client, {"object_id": ID}, filter={"column": "redshift", "range": [5, 6]})
    assert answer["hits"] == []
    assert {"empty_filter", "fewer_hits"} <= {flag["code"] for flag in answer["trust"]["flags"]}
    assert "empty_filter" not in {flag["code"] for flag in search(client, {"object_id": ID})["trust"]["flags"]}


def test_estimate_behind_a_filter_that_nothing_passes(client):
    request = {"query": {"object_id": ID}, "filter": {"column": "redshift", "range": [5, 6]}}
    answer = client.post("/v1/estimate", json=request)
    assert answer.status_code == 200
    assert "empty_filter" in {flag["code"] for flag in answer.json()["trust"]["flags"]}


def test_threshold_and_order(client):
    answer = search(client, {"object_id": ID}, target="image", k=58)
    scores = [hit["score"] for hit in answer["hits"]]
    bound = (scores[9] + scores[10]) / 2
    assert ids(search(client, {"object_id": ID}, target="image", k=58, score_threshold=bound)) == ids(answer)[:10]
    other_end = search(client, {"object_id": ID}, target="image", k=5, order="least_similar")
    assert ids(other_end) == ids(answer)[::-1][:5]
    far = search(client, {"object_id": ID}, target="image", k=58, order="least_similar", score_threshold=bound)
    assert ids(far) == ids(answer)[::-1][:48]


def test_exclusion_radius(client):
    near = {f"sim-{i:08d}" for i in (18, 19, 20, 21, 22)}  # objects stand 36" apart
    assert near & set(ids(search(client, {"object_id": ID}, k=50)))
    assert not near & set(ids(search(client, {"object_id": ID}, k=50, exclude_arcsec=80)))


def test_columns_are_the_callers_choice(client):
    hit = search(client, {"object_id": ID}, columns=["target_class", "z"], k=1)["hits"][0]
    assert set(hit["properties"]) == {"target_class", "z"}


def test_every_object_can_be_asked_for(client):
    answer = search(client, {"object_id": ID}, target="image", k=100)
    assert len(answer["hits"]) == COUNT - 2  # itself, and the one without image


# --- estimate --------------------------------------------------------------------------------------------------------


def test_estimate_is_the_weighted_mean_of_the_hits(client):
    response = client.post("/v1/estimate", json={"query": {"object_id": ID}, "k": 8})
    assert response.status_code == 200, response.text
    answer = response.json()
    redshift = next(e for e in answer["estimates"] if e["name"] == "redshift")
    assert set(redshift) == {"name", "unit", "value", "lo", "hi", "coverage", "n_eff", "k", "calibrated"}
    scores = np.array([hit["score"] for hit in answer["hits"]])
    values = np.array([hit["properties"]["redshift"] for hit in answer["hits"]])
    weights = 1 / np.sqrt(2 - 2 * scores)
    np.testing.assert_allclose(redshift["value"], np.average(values, weights=weights), rtol=1e-4)
    assert redshift["lo"] <= redshift["value"] <= redshift["hi"] and redshift["coverage"] == 0.68
    assert 1 <= redshift["n_eff"] <= 8 and (redshift["k"], redshift["calibrated"]) == (8, False)
    assert {hit["modality"] for hit in answer["hits"]} == {"spectrum"}  # the query's own


def test_estimate_of_an_uploaded_spectrum_names_units(client, spectrum):
    files = {"spectrum": ("s.csv", spectrum_csv(spectrum)), "request": (None, '{"properties": ["log_stellar_mass"]}')}
    answer = client.post("/v1/estimate", files=files).json()
    assert [(e["name"], e["unit"]) for e in answer["estimates"]] == [("log_stellar_mass", "dex(solMass)")]


def test_wider_coverage_gives_a_wider_interval(client):
    def width(coverage: float) -> float:
        request = {"query": {"object_id": ID}, "properties": ["redshift"], "coverage": coverage}
        answer = client.post("/v1/estimate", json=request).json()
        return answer["estimates"][0]["hi"] - answer["estimates"][0]["lo"]

    assert width(0.3) < width(0.68) < width(0.95)


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "application/octet-stream", None])
def test_raw_body_with_the_request_in_the_address(client, spectrum, content_type):
    """What `curl --data-binary @file` sends."""
    headers = {"content-type": content_type} if content_type else {}
    url = '/v1/estimate?k=5&properties=redshift&filter={"column":"redshift","range":[0,1]}'
    response = client.post(url, content=sdss_fits(spectrum), headers=headers)
    assert response.status_code == 200, response.text
    assert len(response.json()["hits"]) == 5 and len(response.json()["estimates"]) == 1


def test_raw_image_is_recognised(client, galaxy):
    response = client.post("/v1/search?k=3&preview=true", content=image_fits(galaxy))
    assert response.json()["query"]["modalities"] == ["image"]
    assert response.json()["query"]["image"].startswith("data:image/jpeg;base64,")


def test_file_of_several_objects_asks_with_the_first_usable(client):
    spectra = [make_spectrum(np.random.default_rng(i), redshift=0.2 * i + 0.1) for i in range(3)]
    data = desi_fits(spectra, dead=[0])
    answer = client.post("/v1/search?k=3", content=data).json()
    assert answer["query"]["object_id"] == "39627000000000001"
    assert "several_objects" in {flag["code"] for flag in answer["trust"]["flags"]}
    chosen = client.post("/v1/search?k=3&object=39627000000000002", content=data).json()
    assert chosen["query"]["object_id"] == "39627000000000002"
    assert "several_objects" not in {flag["code"] for flag in chosen["trust"]["flags"]}


# --- tables ----------------------------------------------------------------------------------------------------------


def ask_table(client, accept: str):
    response = client.post(
        "/v1/search",
        json={"query": {"object_id": ID}, "k": 20, "target": "spectrum"},
        headers={"accept": accept},
    )
    assert response.status_code == 200, response.text
    return response


def test_tables_agree_with_json(client, engine):
    expected = ids(ask_table(client, "application/json").json())
    csv = ask_table(client, "text/csv")
    lines = csv.text.splitlines()
    assert lines[0].startswith("object_id,score,percentile,modality,ra,dec,redshift")
    assert [line.split(",")[0] for line in lines[1:]] == expected
    assert csv.headers["x-model-sha256"] == engine.embedder.model_sha256
    votable = parse_single_table(io.BytesIO(ask_table(client, "application/x-votable+xml").content)).to_table()
    assert list(votable["object_id"]) == expected and votable["ra"].unit == "deg"
    parquet = pq.read_table(io.BytesIO(ask_table(client, "application/vnd.apache.parquet").content))
    assert parquet["object_id"].to_pylist() == expected
    assert parquet.schema.metadata[b"index_manifest_sha256"].decode() == engine.index.manifest_sha256


def test_missing_values_are_empty_cells(client):
    response = client.post("/v1/search?format=votable", json={"query": {"object_id": "sim-00000010"}, "k": 50})
    table = parse_single_table(io.BytesIO(response.content)).to_table()
    row = list(table["object_id"]).index("sim-00000011")
    assert np.ma.is_masked(table["log_stellar_mass"][row]) or np.isnan(table["log_stellar_mass"][row])


def test_estimates_as_csv(client):
    response = client.post("/v1/estimate?format=csv", json={"query": {"object_id": ID}})
    assert response.text.splitlines()[0] == "name,unit,value,lo,hi,coverage,n_eff,k,calibrated"


def test_uploaded_object_of_the_index_is_left_out(client, engine, monkeypatch, spectrum):
    """A file that says it is an object of the index must not find itself, nor be estimated from itself."""
    from dataclasses import replace

    import service.engine

    own = replace(spectrum, object_id=ID)
    monkeypatch.setattr(service.engine, "read_spectra", lambda *_, **__: [own])
    answer = client.post("/v1/search?modality=spectrum&k=59&target=spectrum", content=sdss_fits(spectrum)).json()
    assert ID not in ids(answer) and len(answer["hits"]) == 58
    assert "own_object_left_out" in {flag["code"] for flag in answer["trust"]["flags"]}


def test_a_typographic_minus_is_a_minus():
    plain = position_of("14:15:04.097", "-00:25:14.28")
    assert position_of("14:15:04.097", "\u221200:25:14.28") == plain and plain[1] < 0


def test_weights_whose_ratio_underflows_count_for_nothing(client):
    positive = [{"object_id": name} for name in ids(search(client, {"object_id": "sim-00000010"}, k=2))]
    query = {"combine": {"positive": positive, "weights": [1e308, 1e-308], "strategy": "best_score"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search(client, query, k=3)["hits"]


@pytest.mark.parametrize(
    "against", [{}, {"object_id": 1}, {"object_id": "a", "modality": "both"}, {"object_id": "a", "why": 1}]
)
def test_what_is_wrong_with_explain_is_named(client, against):
    response = client.post("/v1/search", json={"query": {"object_id": "sim-00000010"}, "explain": against})
    error = response.json()["error"]
    assert response.status_code in (400, 422) and "bool" not in error["field"] and "boolean" not in error["message"]
    assert error["field"].startswith("explain.") and ":" not in error["field"]
