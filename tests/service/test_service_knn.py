"""POST /v1/estimate by neighbours over an index with a calibration: k, intervals, densities, flags, client, command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parts_fixture import write_parts
from serving import asking
from survey import image_fits, spectrum_csv
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.client import Client, InProcessTransport
from index import BuildOptions, SurveyIndex, build_index, estimate
from service.app import make_app
from service.engine import Engine

ID = "obj-000020"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, engine, settings):
    """The same model over an index of made-up vectors, large enough to be calibrated."""
    folder = tmp_path_factory.mktemp("knn")
    embedder = engine.embedder
    truth = write_parts(folder / "parts", 900, dim=embedder.dim, sha=embedder.model_sha256)
    options = BuildOptions(heads="never")
    build_index(folder / "parts", folder / "index", survey="toy", index_id="toy", options=options, plain=True)
    made = Engine(embedder, SurveyIndex.open(folder / "index"), settings)
    yield made, truth, folder / "index"
    made.close()


@pytest.fixture(scope="module")
def app(settings, calibrated):
    return make_app(settings, calibrated[0])


@pytest.fixture(scope="module")
def ask(app):
    with asking(app) as post:
        yield post


def flags(answer) -> set[str]:
    return {flag["code"] for flag in answer["trust"]["flags"]}


DOUBTS = {"uncalibrated_interval", "calibrated_without_filter", "calibrated_for_other_k", "density_of_few"}


def test_without_k_each_property_uses_the_indexs_own_and_the_hits_hold_them_all(ask, calibrated):
    index = calibrated[0].index
    answer = ask({"object_id": ID, "modality": "image"})
    own = {name: entry.k for name, entry in index.knn["image", "image"].items()}
    assert {e["name"]: e["k"] for e in answer["estimates"]} == {e["name"]: own[e["name"]] for e in answer["estimates"]}
    assert all(e["calibrated"] for e in answer["estimates"]) and not flags(answer) & DOUBTS
    assert len(answer["hits"]) == max(16, *(e["k"] for e in answer["estimates"]))
    assert ID not in {hit["object_id"] for hit in answer["hits"]}
    row = int(index.catalog.rows_by_id(ID)[0])
    vector = index.vector(row, "image")
    hits, _ = index.search(vector, target="image", k=32, query_modality="image", exclude_rows=[row])
    for said, e in zip(answer["estimates"], estimate(index, hits[0], pair=("image", "image")), strict=True):
        for name in ("value", "lo", "hi", "n_eff"):
            assert said[name] == pytest.approx(getattr(e, name), rel=1e-5)


def test_an_exclusion_leaves_the_calibration_valid_and_a_filter_is_flagged(ask):
    assert not flags(ask({"object_id": ID}, exclude_arcsec=5)) & DOUBTS
    filtered = ask({"object_id": ID}, filter={"column": "redshift", "range": [0.0, 2.0]})
    assert flags(filtered) & DOUBTS == {"calibrated_without_filter"}
    assert not any(e["calibrated"] for e in filtered["estimates"])
    near = ask({"object_id": ID}, score_threshold=-1.0)
    assert "calibrated_without_filter" in flags(near) and not near["estimates"][0]["calibrated"]


def test_fewer_neighbours_than_calibrated_for_are_no_calibrated_interval(ask, calibrated):
    index = calibrated[0].index
    others = [i for i in index.catalog.take(np.arange(5), ["object_id"]).column(0).to_pylist() if i != ID][:2]
    answer = ask({"object_id": ID}, filter={"column": "object_id", "in": others})
    assert {"fewer_than_calibrated", "few_neighbours"} <= flags(answer)
    assert all(not e["calibrated"] and e["k"] <= 2 for e in answer["estimates"])


def test_best_score_is_no_distance_to_estimate_by(ask):
    query = {"combine": {"positive": [{"object_id": ID}], "strategy": "best_score"}}
    for method in ("knn", "head"):
        assert ask(query, 422, method=method)["code"] == "no_estimate"


def test_a_fuse_weight_of_0_leaves_a_modality_out_of_estimates_and_trust(ask, calibrated):
    catalog = calibrated[0].index.catalog
    row = int(np.flatnonzero(catalog.flag("has_image") & catalog.flag("has_spectrum"))[0])
    name = catalog.row(row)["object_id"]
    both, alone = {"object_id": name, "modality": "both"}, {"object_id": name, "modality": "spectrum"}
    left, single = ask(both, fuse={"image": 0}), ask(alone)
    assert left["estimates"] == single["estimates"] and left["estimates"][0]["calibrated"]
    assert left["trust"]["ood_p"] == single["trust"]["ood_p"]
    assert left["query"]["modalities"] == ["spectrum"]


@pytest.mark.parametrize(("k", "flagged"), [(1, False), (4, False), (6, True), (64, False), (70, True)])
def test_a_k_of_the_callers_is_used_and_flagged_where_no_calibration_is_its_own(ask, k, flagged):
    answer = ask({"object_id": ID}, k=k)
    assert {e["k"] for e in answer["estimates"]} == {k} and len(answer["hits"]) == k
    assert ("calibrated_for_other_k" in flags(answer)) == flagged and "few_neighbours" not in flags(answer)


def test_wider_coverage_is_a_wider_interval(ask):
    narrow, wide = (ask({"object_id": ID}, coverage=c)["estimates"][0] for c in (0.5, 0.9))
    assert wide["lo"] < narrow["lo"] < narrow["value"] == wide["value"] < narrow["hi"] < wide["hi"]


@pytest.mark.parametrize(("asked", "bins"), [(True, 200), (1, 1), (1000, 1000), (0, None)])
def test_densities_from_neighbours(ask, asked, bins):
    (found,) = ask({"object_id": ID}, density=asked, properties=["redshift"])["estimates"]
    if bins is None:
        assert "density" not in found
        return
    edges, pdf = np.array(found["density"]["edges"]), np.array(found["density"]["pdf"])
    assert (len(edges), len(pdf)) == (bins + 1, bins)
    assert np.sum(pdf * np.diff(edges)) == pytest.approx(0.999, abs=1e-6)
    assert edges[0] < found["value"] < edges[-1]


def test_a_density_of_fewer_neighbours_than_it_was_calibrated_with_is_flagged(ask):
    assert "density_of_few" in flags(ask({"object_id": ID}, density=4, k=2))
    assert "density_of_few" not in flags(ask({"object_id": ID}, density=4))
    assert ask({"object_id": ID}, 422, density=1001)["field"] == "density"


def test_a_combination_is_no_object_of_the_survey(ask):
    query = {"combine": {"positive": [{"object_id": ID, "modality": "image"}] * 2}}  # of one modality, even
    answer = ask(query)
    assert not any(e["calibrated"] for e in answer["estimates"]) and "uncalibrated_interval" in flags(answer)
    assert {e["k"] for e in answer["estimates"]} == {16}
    error = ask(query, 422, density=4)
    assert (error["code"], error["field"]) == ("no_density", "density") and "ask with method head" in error["message"]


@pytest.mark.parametrize("best", ["image", "spectrum"])
def test_image_and_spectrum_together_look_where_the_index_found_it_best(
    ask, calibrated, galaxy, spectrum, best, monkeypatch
):
    index = calibrated[0].index
    files = {"image": ("a.fits", image_fits(galaxy)), "spectrum": ("b.csv", spectrum_csv(spectrum))}
    monkeypatch.setattr("service.neighbours.best_target", lambda index, query: {"both": best}[query])
    answer = ask(files=files)
    assert all(e["calibrated"] for e in answer["estimates"])
    own = {name: entry.k for name, entry in index.knn["both", best].items()}
    assert {e["name"]: e["k"] for e in answer["estimates"]} == {e["name"]: own[e["name"]] for e in answer["estimates"]}
    assert {hit["modality"] for hit in answer["hits"]} == {best}
    across = ask(files=files, target="either")
    assert len({hit["modality"] for hit in across["hits"]}) <= 2 and across["estimates"][0]["calibrated"]


def test_info_lists_what_was_chosen_and_measured(ask, client):
    (index,) = ask.client.get("/v1/info").json()["indexes"]
    assert {(pair["query"], pair["target"]) for pair in index["knn"]} >= {("image", "spectrum"), ("both", "either")}
    assert set(index["knn"][0]["properties"]["redshift"]) == {"labels", "k", "statistic", "coverage", "pit_ks", "crps"}
    assert client.get("/v1/info").json()["indexes"][0]["knn"] == []


def test_the_client_and_the_command(ask, app, calibrated, tiny_model_dir):
    with Client("http://test", transport=InProcessTransport(app)) as api:
        table = api.estimate(object_id=ID, density=16, coverage=0.9)
    assert list(table.colnames[-2:]) == ["k", "calibrated"] and all(table["calibrated"])
    edges, pdf = table.meta["density"]["redshift"]
    assert (edges.shape, pdf.shape) == ((17,), (16,))
    words = ["estimate", "--id", ID, "--index", str(calibrated[2]), "--model", str(tiny_model_dir), "--device", "cpu"]
    result = CliRunner().invoke(build_app(), [*words, "--density", "4", "--coverage", "0.9", "--format", "json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["estimates"][0]
    assert len(said["density"]["pdf"]) == 4 and said["lo"] == pytest.approx(table["lo"][0])


@pytest.mark.parametrize("more", [{}, {"k": 4}, {"density": True}, {"k": 4, "properties": ["redshift"]}])
@pytest.mark.parametrize("left", [{"filter": {"column": "redshift", "range": [90, 91]}}, {"score_threshold": 1}])
def test_without_any_neighbour_there_is_no_value(ask, left, more):
    answer = ask({"object_id": ID}, **left, **more)
    assert answer["hits"] == [] and answer["estimates"]
    for said in answer["estimates"]:
        assert said["value"] is said["lo"] is said["hi"] is None and said["n_eff"] == 0 and not said["calibrated"]


@pytest.mark.parametrize("more", [{}, {"k": 4}, {"density": True}])
def test_no_property_asked_for_is_none_estimated(ask, more):
    assert ask({"object_id": ID}, properties=[], **more)["estimates"] == []


def test_a_combination_of_objects_is_judged_by_neither_trust_nor_a_head(ask):
    others = [{"object_id": hit["object_id"]} for hit in ask({"object_id": ID}, k=2)["hits"]]
    answer = ask({"combine": {"positive": others}})
    assert answer["trust"]["ood_p"] is None and "out_of_distribution" not in flags(answer)
    assert ask({"combine": {"positive": others}}, 422, method="head")["code"] == "no_heads"
    unweighted = others[1]["object_id"]
    only = {"column": "object_id", "in": [unweighted]}
    one = ask({"combine": {"positive": others, "weights": [1, 0]}}, filter=only, target="either")
    assert one["trust"]["ood_p"] is not None
    assert [hit["object_id"] for hit in one["hits"]] == [unweighted]  # left out of the query, not of the hits
