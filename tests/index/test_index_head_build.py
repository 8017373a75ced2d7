"""Heads of an index: fitted when it is built, listed, verified, used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parts_fixture import write_parts
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.errors import IndexFileError, InputError, NotFoundError
from index import BuildOptions, SurveyIndex, append_index, build_index, head_build, head_estimate, head_histogram
from index.heads import DENSITY
from index.manifest import Manifest

N = 500


@pytest.fixture(scope="module", autouse=True)
def quick_heads():
    """Fits of a second instead of ten."""
    patch = pytest.MonkeyPatch()
    patch.setattr(head_build.fit_heads, "__kwdefaults__", {**head_build.fit_heads.__kwdefaults__, "settings": QUICK})
    yield
    patch.undo()


QUICK = replace(DENSITY, hidden=(16,), epochs=5, min_steps=150, learning_rate=5e-3)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("survey")
    truth = write_parts(folder / "parts", N)
    build_index(folder / "parts", folder / "index", survey="toy", options=BuildOptions(heads="always"))
    return folder, truth


@pytest.fixture(scope="module")
def index(survey) -> SurveyIndex:
    return SurveyIndex.open(survey[0] / "index")


def test_an_index_has_a_head_for_each_modality_and_one_for_both(index):
    assert set(index.heads) == set(index.manifest.heads) == {"image", "spectrum", "both"}
    assert index.heads["both"].dim == 2 * index.dim
    record = index.manifest.heads["image"]
    assert record["file"] in index.manifest.files
    assert record["objects"] == index.manifest.counts["image"]
    assert set(record["properties"]) == {"redshift", "log_stellar_mass"}
    found = record["properties"]["log_stellar_mass"]
    assert found["labels"] + found["held_out"] < record["objects"]  # every seventh mass is unknown
    assert set(found["coverage"]) == {"0.68", "0.90", "0.95"}


def test_estimates_of_new_objects(index, tmp_path):
    new = write_parts(tmp_path / "new", 80, seed=9, lacking=0)
    inside = 0
    for i in range(80):
        estimates = head_estimate(index, {"spectrum": new["spectrum"][i]}, coverage=0.9)
        assert [(e.name, e.unit, e.n_eff) for e in estimates] == [
            ("redshift", "", None),
            ("log_stellar_mass", "dex(solMass)", None),
        ]
        assert estimates[0].lo < estimates[0].value < estimates[0].hi
        assert abs(estimates[0].value - new["redshift"][i]) < 0.25
        inside += estimates[0].lo <= new["redshift"][i] <= estimates[0].hi
    assert 0.75 <= inside / 80 <= 1.0


def test_both_vectors_are_read_by_the_head_for_both(index, survey):
    truth = survey[1]
    i = int(np.flatnonzero(truth["has_image"] & truth["has_spectrum"])[0])
    vectors = {"spectrum": truth["spectrum"][i], "image": truth["image"][i]}
    (found,) = head_estimate(index, vectors, ["redshift"])
    joined = np.concatenate([truth["image"][i], truth["spectrum"][i]])
    assert found.value == pytest.approx(index.heads["both"].predict(joined[None])[0, 0])


def test_a_histogram_holds_the_probability_and_the_median(index, survey):
    vector = {"image": survey[1]["image"][0]}
    (histogram,) = head_histogram(index, vector, ["redshift"], 64)
    mass = histogram.pdf * np.diff(histogram.edges)
    assert histogram.pdf.shape == (64,) and mass.sum() == pytest.approx(0.999, abs=1e-6)
    (estimate,) = head_estimate(index, vector, ["redshift"])
    below = np.interp(estimate.value, histogram.edges, np.concatenate([[0], np.cumsum(mass)]))
    assert below == pytest.approx(0.4995, abs=0.01)


def test_what_a_head_cannot_say_is_refused(index, survey):
    vector = {"image": survey[1]["image"][0]}
    with pytest.raises(NotFoundError, match="estimates no property 'colour'"):
        head_estimate(index, vector, ["colour"])
    with pytest.raises(InputError, match="coverage 1.0"):
        head_estimate(index, vector, coverage=1.0)
    lacking = SurveyIndex.open(index.folder)
    del lacking.heads["image"]
    with pytest.raises(InputError, match="no head for a query by image; .* --heads") as caught:
        head_estimate(lacking, vector)
    assert caught.value.code == "no_heads"


def test_the_same_parts_give_the_same_heads(survey, tmp_path):
    build_index(survey[0] / "parts", tmp_path / "again", survey="other", options=BuildOptions(heads="always"))
    for name in ("image", "spectrum", "both"):
        files = [root / "heads" / f"{name}.safetensors" for root in (survey[0] / "index", tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_heads_are_left_out_below_a_thousand_labels_and_where_told_so(survey, tmp_path, monkeypatch):
    def built(name: str, heads: str) -> SurveyIndex:
        build_index(survey[0] / "parts", tmp_path / name, survey="toy", options=BuildOptions(heads=heads))
        return SurveyIndex.open(tmp_path / name)

    assert head_build.HEADS_FROM == 1000 > N
    assert built("auto", "auto").heads == {}
    monkeypatch.setattr(head_build, "HEADS_FROM", 400)
    assert {k: h.names for k, h in built("auto-400", "auto").heads.items()} == {
        "image": ("redshift",),  # 444 objects, a seventh of them without a mass; 387 have both modalities
        "spectrum": ("redshift",),
    }
    assert built("never", "never").heads == {}
    write_parts(tmp_path / "few", 150)
    with pytest.raises(InputError, match="no property has 200 labels"):
        build_index(tmp_path / "few", tmp_path / "few-index", survey="few", options=BuildOptions(heads="always"))


def test_large_indexes_are_fitted_on_a_draw(survey, tmp_path, monkeypatch):
    monkeypatch.setattr(head_build, "HEAD_ROWS", 300)
    build_index(survey[0] / "parts", tmp_path / "index", survey="toy", options=BuildOptions(heads="always"))
    assert Manifest.read(tmp_path / "index")[0].heads["image"]["objects"] == 300


def test_appending_fits_the_heads_anew(survey, tmp_path):
    build_index(survey[0] / "parts", tmp_path / "index", survey="toy", options=BuildOptions(heads="never"))
    write_parts(tmp_path / "more", 60, seed=4, prefix="more")
    append_index(tmp_path / "index", tmp_path / "more", heads="always")
    grown = SurveyIndex.open(tmp_path / "index")
    assert grown.manifest.heads["image"]["objects"] == grown.manifest.counts["image"] > 450


def test_damaged_heads_are_named(survey, tmp_path):
    build_index(survey[0] / "parts", tmp_path / "index", survey="toy", options=BuildOptions(heads="always"), plain=True)
    file = tmp_path / "index" / "heads" / "image.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IndexFileError, match="heads/image.safetensors has SHA-256"):
        SurveyIndex.open(tmp_path / "index")
    result = CliRunner().invoke(build_app(), ["index", "verify", str(tmp_path / "index"), "--json"])
    assert result.exit_code == 1
    assert [row["file"] for row in json.loads(result.stdout)["files"] if row["problem"]] == ["heads/image.safetensors"]


def test_manifests_of_earlier_formats_are_read(survey, tmp_path):
    """An index built before there were heads: no entry, format 1, its own checksum; one of format 2 has them."""
    out = tmp_path / "index"
    build_index(survey[0] / "parts", out, survey="toy", options=BuildOptions(heads="never"), plain=True)
    manifest, _ = Manifest.read(out)
    old = replace(manifest, format_version=1).to_bytes()
    assert b'"heads"' not in old and b'"heads"' in manifest.to_bytes()
    (out / "manifest.json").write_bytes(old)
    index = SurveyIndex.open(out)
    assert index.heads == {} and index.manifest.to_bytes() == old
    (out / "manifest.json").write_bytes(replace(manifest, format_version=2).to_bytes())
    assert SurveyIndex.open(out).manifest.format_version == 2
    (out / "manifest.json").write_bytes(replace(manifest, format_version=4).to_bytes())
    with pytest.raises(IndexFileError, match="format version 4; wanted a version up to 3"):
        SurveyIndex.open(out)


def test_commands_build_and_show_heads(survey, tmp_path):
    out = str(tmp_path / "index")
    build = ["index", "build", str(survey[0] / "parts"), "--out", out, "--survey", "toy", "--quiet"]
    result = CliRunner().invoke(build_app(), [*build, "--heads"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "head for both" in result.stdout
    result = CliRunner().invoke(build_app(), [*build, "--no-heads"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "head for" not in result.stdout
