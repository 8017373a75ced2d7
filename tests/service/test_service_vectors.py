"""POST /v1/search/vectors: the answers of single searches, for many vectors at once."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from survey import npy

URL = "/v1/search/vectors"


@pytest.fixture(scope="module")
def vectors(engine):
    return np.stack([engine.index.vector(row, "spectrum") for row in range(7)])


@pytest.mark.parametrize("target", ["image", "spectrum", "either"])
def test_answers_are_those_of_single_searches(client, vectors, target):
    many = client.post(f"{URL}?modality=spectrum&target={target}&k=4", content=npy(vectors)).json()
    for i, vector in enumerate(vectors):
        query = {"vector": vector.tolist(), "modality": "spectrum"}
        one = client.post("/v1/search", json={"query": query, "target": target, "k": 4}).json()
        assert [hit["object_id"] for hit in one["hits"]] == many["object_id"][i]
        assert [hit["modality"] for hit in one["hits"]] == many["modality"][i]
        np.testing.assert_allclose([hit["score"] for hit in one["hits"]], many["score"][i], atol=1e-6)
        np.testing.assert_allclose([hit["percentile"] for hit in one["hits"]], many["percentile"][i], atol=1e-4)
    assert many["index"] == one["index"] and many["model"] == one["model"]
    assert many["search"]["mode"] == "exact"


def test_float64_and_any_length_of_vectors(client, vectors):
    scaled = client.post(f"{URL}?modality=spectrum&k=3", content=npy(7.0 * vectors.astype(np.float64))).json()
    plain = client.post(f"{URL}?modality=spectrum&k=3", content=npy(vectors)).json()
    assert scaled["object_id"] == plain["object_id"]


def test_filter_threshold_and_order(client, vectors, engine):
    wanted = {"column": "redshift", "range": [0.1, 0.4]}
    url = f"{URL}?modality=spectrum&k=50&filter={json.dumps(wanted)}&score_threshold=0.2"
    found = client.post(url, content=npy(vectors)).json()
    for ids, scores in zip(found["object_id"], found["score"], strict=True):
        rows = [int(engine.index.catalog.rows_by_id(i)[0]) for i in ids]
        assert all(0.1 <= engine.index.catalog.row(r)["redshift"] <= 0.4 for r in rows) and all(
            s >= 0.2 for s in scores
        )
    far = client.post(f"{URL}?modality=spectrum&target=spectrum&k=5&order=least_similar", content=npy(vectors)).json()
    assert all(scores == sorted(scores) for scores in far["score"])


@pytest.mark.parametrize("accept", ["application/vnd.apache.arrow.stream", "application/vnd.apache.parquet"])
def test_as_a_table(client, vectors, accept):
    response = client.post(f"{URL}?modality=spectrum&k=4", content=npy(vectors), headers={"accept": accept})
    assert response.headers["content-type"] == accept and response.headers["x-model-sha256"]
    if "arrow" in accept:
        table = pa.ipc.open_stream(response.content).read_all()
    else:
        table = pq.read_table(io.BytesIO(response.content))
    plain = client.post(f"{URL}?modality=spectrum&k=4", content=npy(vectors)).json()
    assert table.column_names == ["query", "object_id", "score", "percentile", "modality"]
    assert table["query"].to_pylist() == [i for i in range(len(vectors)) for _ in range(4)]
    assert table["object_id"].to_pylist() == sum(plain["object_id"], [])


def test_as_csv(client, vectors):
    text = client.post(f"{URL}?modality=spectrum&k=2&format=csv", content=npy(vectors)).text.splitlines()
    assert text[0] == "query,object_id,score,percentile,modality" and len(text) == 1 + 2 * len(vectors)


@pytest.mark.parametrize(
    ("body", "parameters", "status", "code"),
    [
        (np.ones((3, 5), "f4"), "modality=spectrum", 422, "wrong_dimension"),
        (np.ones(16, "f4"), "modality=spectrum", 422, "wrong_dimension"),
        (np.ones((0, 16), "f4"), "modality=spectrum", 422, "wrong_dimension"),
        (np.ones((2, 16), "i4"), "modality=spectrum", 422, "wrong_dimension"),
        (np.zeros((2, 16), "f4"), "modality=spectrum", 422, "no_direction"),
        (np.full((2, 16), np.nan, "f4"), "modality=spectrum", 422, "no_direction"),
        (np.full((2, 16), 1e300), "modality=spectrum", 422, "no_direction"),
        (np.full((2, 16), 3e38, "f4"), "modality=spectrum", 422, None),
        (np.ones((2, 16), "f4"), "", 400, None),
        (np.ones((2, 16), "f4"), "modality=radio", 422, None),
        (np.ones((2, 16), "f4"), "modality=spectrum&k=0", 422, "invalid_value"),
        (np.ones((2, 16), "f4"), "modality=spectrum&k=101", 422, "invalid_value"),
        (np.ones((2, 16), "f4"), "modality=spectrum&kk=5", 400, "unknown_field"),
        (np.ones((2, 16), "f4"), "modality=spectrum&filter={", 400, None),
        (b"", "modality=spectrum", 415, None),
        (b"1,2,3", "modality=spectrum", 415, None),
    ],
)
def test_bad_ones(client, engine, body, parameters, status, code):
    if isinstance(body, np.ndarray) and body.shape[-1] == 16:
        body = np.repeat(body, engine.index.dim // 16, axis=-1)
    content = npy(body) if isinstance(body, np.ndarray) else body
    response = client.post(f"{URL}?{parameters}", content=content)
    assert response.status_code == status, response.text
    if code:
        assert response.json()["error"]["code"] == code


def test_number_of_vectors_just_below_and_just_above(client, engine, vectors, monkeypatch):
    monkeypatch.setattr(
        "service.routes.vectors.settings_of", lambda _: engine.settings.model_copy(update={"max_vectors": 7})
    )
    assert client.post(f"{URL}?modality=spectrum&k=1", content=npy(vectors)).status_code == 200
    more = client.post(f"{URL}?modality=spectrum&k=1", content=npy(np.concatenate([vectors, vectors[:1]])))
    assert more.status_code == 413 and more.json()["error"]["limit"] == 7
