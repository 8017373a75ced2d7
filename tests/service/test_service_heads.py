"""POST /v1/estimate with method head: every form of query, densities, flags, refusals; the client and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from parts_fixture import write_parts
from serving import asking
from survey import image_fits, spectrum_csv
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.client import Client, InProcessTransport
from astroclip.errors import InputError
from index import BuildOptions, SurveyIndex, build_index, head_build, head_estimate
from index.heads import DENSITY
from service.app import make_app
from service.engine import Engine

ID = "obj-000020"
QUICK = replace(DENSITY, hidden=(16,), epochs=2, min_steps=50, learning_rate=5e-3)


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory, engine, settings):
    """The same model over an index of made-up vectors with heads."""
    folder = tmp_path_factory.mktemp("heads")
    embedder = engine.embedder
    truth = write_parts(folder / "parts", 400, dim=embedder.dim, sha=embedder.model_sha256)
    patch = pytest.MonkeyPatch()
    patch.setattr(head_build.fit_heads, "__kwdefaults__", {**head_build.fit_heads.__kwdefaults__, "settings": QUICK})
    options = BuildOptions(heads="always")
    build_index(folder / "parts", folder / "index", survey="toy", index_id="toy", options=options, plain=True)
    patch.undo()
    made = Engine(embedder, SurveyIndex.open(folder / "index"), settings)
    yield made, truth, folder / "index"
    made.close()


@pytest.fixture(scope="module")
def app(settings, with_heads):
    return make_app(settings, with_heads[0])


@pytest.fixture(scope="module")
def ask(app):
    with asking(app, method="head") as post:
        yield post


def said(answer) -> dict[str, float]:
    return {e["name"]: e["value"] for e in answer["estimates"]}


def flags(answer) -> set[str]:
    return {flag["code"] for flag in answer["trust"]["flags"]}


def expected(index, **vectors) -> dict[str, float]:
    return {e.name: pytest.approx(e.value, rel=1e-5) for e in head_estimate(index, vectors)}


@pytest.mark.parametrize("modality", ["image", "spectrum"])
def test_an_object_is_estimated_by_its_own_modalitys_head_and_flagged(ask, with_heads, modality):
    index = with_heads[0].index
    answer = ask({"object_id": ID, "modality": modality}, k=5)
    row = int(index.catalog.rows_by_id(ID)[0])
    assert said(answer) == expected(index, **{modality: index.vector(row, modality)})
    assert answer["method"] == "head" and "trained_on" in flags(answer)
    assert len(answer["hits"]) == 5
    first = answer["estimates"][0]
    assert set(first) == {"name", "unit", "value", "lo", "hi", "coverage", "n_eff", "k", "calibrated"}
    assert first["n_eff"] is None and first["k"] is None and first["calibrated"] and first["coverage"] == 0.68


def test_the_target_moves_the_hits_and_not_the_estimate(ask):
    query = {"object_id": ID, "modality": "image"}
    same, across = ask(query, target="image"), ask(query, target="spectrum")
    assert said(same) == said(across)
    assert {h["modality"] for h in across["hits"]} == {"spectrum"}


def test_knn_is_the_default_and_says_so(ask):
    answer = ask({"object_id": ID}, method="knn")
    response = ask.client.post("/v1/estimate", json={"query": {"object_id": ID}})
    assert response.json()["estimates"] == answer["estimates"] and response.json()["method"] == "knn"
    assert answer["estimates"][0]["n_eff"] > 1 and "trained_on" not in flags(answer)


def test_a_vector_a_position_and_a_combination_of_one_modality(ask, with_heads):
    engine, truth, _ = with_heads
    vector = truth["image"][5]
    answer = ask({"vector": (3 * vector).tolist(), "modality": "image"})
    assert said(answer) == expected(engine.index, image=vector) and "trained_on" not in flags(answer)
    row = int(engine.index.catalog.rows_by_id(ID)[0])
    place = {"ra": truth["ra"][20], "dec": truth["dec"][20], "radius_arcsec": 5}
    answer = ask({"position": place, "modality": "spectrum"})
    assert said(answer) == expected(engine.index, spectrum=engine.index.vector(row, "spectrum"))
    alone = {"combine": {"positive": [{"object_id": ID, "modality": "image"}]}}
    assert said(ask(alone)) == expected(engine.index, image=engine.index.vector(row, "image"))


def test_uploads_alone_and_fused(ask, with_heads, galaxy, spectrum):
    engine = with_heads[0]
    files = {"image": ("a.fits", image_fits(galaxy)), "spectrum": ("b.csv", spectrum_csv(spectrum))}
    one = ask(files={"spectrum": files["spectrum"]})
    both = ask(files=files)
    vector = engine.embedder.embed([galaxy])[0]
    fused = head_estimate(engine.index, {"image": vector, "spectrum": engine.embedder.embed([spectrum])[0]})
    assert both["query"]["modalities"] == ["image", "spectrum"]
    assert said(both) == {e.name: pytest.approx(e.value, abs=0.02 * (e.hi - e.lo)) for e in fused}
    assert said(both) != said(one)
    raw = ask.client.post("/v1/estimate?method=head&density=8&modality=spectrum", content=files["spectrum"][1])
    assert raw.status_code == 200 and said(raw.json()) == said(one)
    assert len(raw.json()["estimates"][0]["density"]["pdf"]) == 8


@pytest.mark.parametrize(("asked", "bins"), [(True, 200), (1, 1), (1000, 1000), (0, None), (False, None)])
def test_densities(ask, asked, bins):
    answer = ask({"object_id": ID}, density=asked, properties=["redshift"])
    (estimate,) = answer["estimates"]
    if bins is None:
        assert "density" not in estimate
        return
    edges, pdf = np.array(estimate["density"]["edges"]), np.array(estimate["density"]["pdf"])
    assert (len(edges), len(pdf)) == (bins + 1, bins)
    assert np.sum(pdf * np.diff(edges)) == pytest.approx(0.999, abs=1e-6)
    assert edges[0] < estimate["lo"] < estimate["hi"] < edges[-1]


def test_wider_coverage_is_a_wider_interval(ask):
    narrow, wide = (ask({"object_id": ID}, coverage=c)["estimates"][0] for c in (0.5, 0.9))
    assert wide["lo"] < narrow["lo"] < narrow["value"] < narrow["hi"] < wide["hi"]
    assert (narrow["coverage"], wide["coverage"]) == (0.5, 0.9)


def test_refusals_say_how_to_mend(ask, client, engine):
    mixed = {"combine": {"positive": [{"object_id": ID, "modality": m} for m in ("image", "spectrum")]}}
    for query, request, code, field in (
        (mixed, {}, "no_heads", "query"),
        ({"object_id": ID}, {"density": 1001}, "invalid_value", "density"),
        ({"object_id": ID}, {"density": 5, "method": "knn"}, "no_density", "density"),
        ({"object_id": ID}, {"properties": ["colour"]}, "unknown_property", "properties"),
    ):
        error = ask(query, 422, **request)
        assert (error["code"], error["field"]) == (code, field)
    for query, request, field in (
        ({"vector": [1.0]}, {}, "query.modality"),
        ({"object_id": ID}, {"method": "forest"}, "method"),
        ({"object_id": ID}, {"density": -1}, "density"),
        ({"object_id": ID}, {"density": 1.5}, "density"),
        ({"object_id": ID}, {"density": "yes"}, "density"),
    ):
        response = ask.client.post("/v1/estimate", json={"method": "head", "query": query, **request})
        assert response.status_code in (400, 422) and response.json()["error"]["field"] == field
    response = client.post("/v1/estimate", json={"query": {"object_id": "sim-00000020"}, "method": "head"})
    assert response.status_code == 422 and response.json()["error"]["code"] == "no_heads"
    assert "--heads" in response.json()["error"]["message"]


def test_a_property_without_a_head_is_refused(ask, with_heads, monkeypatch):
    head = with_heads[0].index.heads["spectrum"]
    poorer = replace(head, names=head.names[:1], properties=head.properties[:1])
    monkeypatch.setitem(with_heads[0].index.heads, "spectrum", poorer)
    query = {"object_id": ID, "modality": "spectrum"}
    error = ask(query, 422, properties=["log_stellar_mass"])
    assert error["code"] == "no_head_for_property" and "method knn" in error["message"]
    assert list(said(ask(query))) == ["redshift"]  # by default what there is a head for


def test_info_lists_methods_and_heads(ask, client):
    index = ask.client.get("/v1/info").json()["indexes"][0]
    assert index["methods"] == ["knn", "head"]
    assert set(index["heads"]) == {"image", "spectrum", "both"}
    assert set(index["heads"]["image"]["redshift"]["coverage"]) == {"0.68", "0.90", "0.95"}
    without = client.get("/v1/info").json()
    assert without["indexes"][0]["methods"] == ["knn"] and without["indexes"][0]["heads"] == {}
    assert without["limits"]["max_density_bins"] == 1000


def test_a_table_of_a_heads_estimates(ask):
    response = ask.client.post("/v1/estimate?format=csv", json={"query": {"object_id": ID}, "method": "head"})
    lines = response.text.splitlines()
    assert lines[0] == "name,unit,value,lo,hi,coverage,n_eff,k,calibrated" and lines[1].endswith(",0.68,,,True")


def test_the_client_asks_for_heads_and_densities(app, with_heads):
    with Client("http://test", transport=InProcessTransport(app)) as api:
        table = api.estimate(object_id=ID, method="head", density=16, coverage=0.9)
        plain = api.estimate(object_id=ID)
        with pytest.raises(InputError, match="ask with method head"):
            api.estimate(object_id=ID, density=True)
    assert table["n_eff"].mask.all() and table.meta["method"] == "head"
    edges, pdf = table.meta["density"]["redshift"]
    assert (edges.shape, pdf.shape) == ((17,), (16,))
    assert plain.meta["method"] == "knn" and "density" not in plain.meta
    engine = with_heads[0]
    vector = engine.index.vector(int(engine.index.catalog.rows_by_id(ID)[0]), "spectrum")
    here = head_estimate(engine.index, {"spectrum": vector}, coverage=0.9)
    for column in ("value", "lo", "hi"):  # in process and over HTTP
        np.testing.assert_allclose(table[column], [getattr(e, column) for e in here], rtol=1e-6)


def test_the_command_estimates_by_head(with_heads, tiny_model_dir):
    words = ["estimate", "--id", ID, "--index", str(with_heads[2]), "--model", str(tiny_model_dir), "--device", "cpu"]
    result = CliRunner().invoke(build_app(), [*words, "--method", "head", "--density", "4", "--format", "json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["method"] == "head" and len(answer["estimates"][0]["density"]["pdf"]) == 4
    result = CliRunner().invoke(build_app(), [*words, "--method", "head"])
    assert result.exit_code == 0 and "redshift" in result.stdout
