"""The survey-wide lists over HTTP, in the client and on the command line; none, stale or damaged ones."""

from __future__ import annotations

import io
import json
import logging
import shutil

import pyarrow.parquet as pq
import pytest
import typer
from astropy.io.votable import parse_single_table
from starlette.testclient import TestClient
from typer.testing import CliRunner

from astroclip.client import calls
from index.lists import lists_folder
from index.lists_build import build_lists
from service import cli
from service.app import make_app
from service.engine import Engine


@pytest.fixture(scope="module")
def listed(settings, tmp_path_factory):
    """Settings over a copy of the index with lists."""
    folder = tmp_path_factory.mktemp("listed") / "index"
    shutil.copytree(settings.index_dir, folder)
    build_lists(folder, limit=40, threshold=0.5)
    return settings.model_copy(update={"index_dir": folder, "max_rows": 30})


def serve(engine, settings, folder=None):
    """A client of the application over the index in `folder`."""
    from index import SurveyIndex

    own = Engine(engine.embedder, SurveyIndex.open(folder or settings.index_dir), settings)
    return TestClient(make_app(settings, own))


@pytest.fixture(scope="module")
def site(engine, listed):
    with serve(engine, listed) as client:
        yield client


def test_what_lists_there_are(site):
    answer = site.get("/v1/lists").json()
    found = {entry["kind"]: entry for entry in answer["lists"]}
    assert set(found) == {"isolated", "disagreeing", "duplicates"} and answer["note"] is None
    assert found["duplicates"]["parameters"]["threshold"] == 0.5 and found["disagreeing"]["found"] == 58
    assert answer["index"]["manifest_sha256"]


def test_a_page_of_a_list(site):
    answer = site.get("/v1/lists/isolated?modality=spectrum&offset=5&limit=7").json()
    assert [row["rank"] for row in answer["items"]] == list(range(6, 13)) and answer["total"] == 40
    assert {row["modality"] for row in answer["items"]} == {"spectrum"}
    scores = [row["score"] for row in answer["items"]]
    assert scores == sorted(scores) and all(0 < row["p"] <= 1 for row in answer["items"])
    assert site.get("/v1/lists/isolated?limit=2").json()["total"] == 80
    assert site.get("/v1/lists/isolated?offset=1000").json()["items"] == []
    duplicates = site.get("/v1/lists/duplicates?modality=image&limit=30").json()["items"]
    assert duplicates and all(row["image_score"] >= 0.5 for row in duplicates)
    row = site.get("/v1/lists/disagreeing?limit=1").json()["items"][0]
    assert {"object_id", "score", "disagreement", "nearer_spectra", "nearest_image_id"} <= set(row)


def test_tables(site):
    expected = [row["object_id"] for row in site.get("/v1/lists/disagreeing?limit=5").json()["items"]]
    csv = site.get("/v1/lists/disagreeing?limit=5", headers={"accept": "text/csv"}).text.splitlines()
    assert [line.split(",")[1] for line in csv] == ["object_id", *expected]
    votable = site.get("/v1/lists/disagreeing?limit=5&format=votable").content
    assert list(parse_single_table(io.BytesIO(votable)).to_table()["object_id"]) == expected
    parquet = site.get("/v1/lists/disagreeing?limit=5&format=parquet").content
    table = pq.read_table(io.BytesIO(parquet))
    assert table.column("object_id").to_pylist() == expected
    assert table.schema.metadata[b"list"] == b"disagreeing"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/lists/lonely", 404, "no_such_list"),
        ("/v1/lists/isolated?modality=sound", 422, "invalid_value"),
        ("/v1/lists/disagreeing?modality=image", 422, "invalid_value"),
        ("/v1/lists/isolated?limit=0", 422, "invalid_value"),
        ("/v1/lists/isolated?limit=31", 422, "invalid_value"),
        ("/v1/lists/isolated?offset=-1", 422, "invalid_value"),
        ("/v1/lists/isolated?offset=x", 400, "malformed_request"),
        ("/v1/lists/isolated?format=tiff", 422, "invalid_value"),
    ],
)
def test_bad_parameters(site, path, status, code):
    response = site.get(path)
    assert response.status_code == status and response.json()["error"]["code"] == code


def test_the_largest_page_is_answered(site):
    assert len(site.get("/v1/lists/isolated?limit=30").json()["items"]) == 30


def test_an_index_without_lists_says_so(client):
    answer = client.get("/v1/lists").json()
    assert answer["lists"] == [] and "astroclip index lists" in answer["note"]
    response = client.get("/v1/lists/isolated")
    assert response.status_code == 404 and response.json()["error"]["code"] == "no_lists"


@pytest.mark.parametrize("harm", ["stale", "damaged"])
def test_unusable_lists_are_left_out_and_named(engine, listed, settings, tmp_path, caplog, harm):
    folder = tmp_path / "index"
    shutil.copytree(listed.index_dir, folder)
    if harm == "damaged":
        (path,) = lists_folder(folder).glob("isolated-*.parquet")
        path.write_bytes(path.read_bytes()[:-7])
        wanted = path.name
    else:
        from dataclasses import replace

        from index.manifest import Manifest

        manifest, _ = Manifest.read(folder)
        (folder / "manifest.json").write_bytes(replace(manifest, version=2).to_bytes())
        wanted = "computed from an index with manifest"
    with caplog.at_level(logging.WARNING), serve(engine, settings, folder) as client:
        assert any(wanted in record.getMessage() for record in caplog.records)
        response = client.get("/v1/lists/isolated")
        assert response.status_code == 404 and wanted in response.json()["error"]["message"]
        assert wanted in client.get("/v1/lists").json()["note"]
        assert client.get("/readyz").status_code == 200


def test_client_reads_them(site):
    class Transport:
        def __call__(self, call):
            response = site.request(call.method, call.path, params=dict(call.params))
            return call.read(response)

    send = Transport()
    assert set(send(calls.lists())) == {"isolated", "disagreeing", "duplicates"}
    table = send(calls.one_list("isolated", "image", 3, 4))
    assert list(table["rank"]) == [4, 5, 6, 7] and str(table["ra"].unit) == "deg"
    assert table.meta["kind"] == "isolated" and table.meta["total"] == 40 and table.meta["index"]["id"] == "test"
    duplicates = send(calls.one_list("duplicates", None, 0, 5))
    assert "separation_arcsec" in duplicates.colnames


def test_command(listed):
    app = typer.Typer()
    cli.register(app)
    where = ["--index", str(listed.index_dir), "--model", str(listed.model_dir)]
    result = CliRunner().invoke(
        app, ["lists", "isolated", "--modality", "image", "--limit", "3", "--format", "csv", *where]
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("rank,") and len(lines) == 4
    result = CliRunner().invoke(app, ["lists", "disagreeing", "--limit", "2", "--format", "json", *where])
    assert len(json.loads(result.stdout)["items"]) == 2
    assert "disagreement" in CliRunner().invoke(app, ["lists", "disagreeing", "--limit", "2", *where]).stdout
