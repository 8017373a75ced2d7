"""Trust of an index: what it keeps of its objects, pairs that disagree, comparable percentiles, older indexes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts_fixture import SHA, write_parts

from astroclip.preprocess.statistics import STATISTICS
from index import (
    BuildOptions,
    SurveyIndex,
    append_index,
    assess,
    build_index,
    disagreement_flag,
    disagreement_p,
    own_statistics,
)
from index.manifest import MANIFEST, Manifest, sha256_file

OPTIONS = BuildOptions(heads="never")


def add_statistics(parts: Path, names: tuple[str, ...], seed: int = 3) -> None:
    """Image statistics that follow the redshift, as a later embedding job would have left them."""
    rng = np.random.default_rng(seed)
    for path in sorted(parts.glob("*.parquet")):
        table = pq.read_table(path)
        z = table["redshift"].to_numpy().astype(float)[:, None]
        values = (z * np.ones(len(names)) + 0.01 * rng.standard_normal((len(z), len(names)))).astype(np.float32)
        known = table["image_embedding"].is_valid().to_pylist()
        kind = pa.list_(pa.float32(), len(names))
        column = pa.array([row if ok else None for row, ok in zip(values.tolist(), known, strict=True)], kind)
        field = pa.field("image_statistics", kind, metadata={"names": ",".join(names)})
        pq.write_table(table.append_column(field, column), path)
        marker = path.with_suffix(".done.json")
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "parquet_sha256": sha256_file(path)}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    write_parts(folder / "parts", 600)
    add_statistics(folder / "parts", STATISTICS["image"])
    build_index(folder / "parts", folder / "index", survey="Toy Survey", options=OPTIONS)
    return folder


@pytest.fixture(scope="module")
def trusted(root: Path) -> SurveyIndex:
    return SurveyIndex.open(root / "index")


def test_the_index_keeps_the_statistics_of_its_objects(trusted):
    assert trusted.trust.measured["image"].names == STATISTICS["image"]
    assert trusted.trust.measured["spectrum"].names == ()
    assert "image_statistics" not in trusted.catalog.columns
    redshift = trusted.catalog.take([7], ["redshift"]).column(0).to_pylist()[0]
    assert own_statistics(trusted, 7, "image")[0] == pytest.approx(redshift, abs=0.05)
    assert own_statistics(trusted, 7, "spectrum") == ()
    without = int(np.flatnonzero(~trusted.catalog.flag("has_image"))[0])
    assert own_statistics(trusted, without, "image") == ()


def test_an_input_unlike_its_embedding_is_flagged(trusted):
    vector = trusted.vector(7, "image")[None]
    own = own_statistics(trusted, 7, "image")
    good, bad = (
        assess(trusted, vector, "image", statistics=[s], exclude_rows=[7])[0] for s in (own, tuple(x + 1 for x in own))
    )
    assert good.flags == () and good.ood_p > 0.05 and set(good.measures) == {"distance", "residual", "input"}
    assert bad.measures["input"] < 0.02 and bad.flags[0].code == "out_of_distribution"
    assert "like those of a galaxy" in bad.flags[0].message
    assert assess(trusted, vector, "image", statistics=[tuple(x + 1 for x in own)], level=0.0)[0].flags == ()


def test_statistics_of_another_release_are_not_compared(root, tmp_path):
    shutil.copytree(root / "parts", tmp_path / "parts")
    for path in (tmp_path / "parts").glob("*.parquet"):
        table = pq.read_table(path).drop_columns(["image_statistics"])
        pq.write_table(table, path)
    add_statistics(tmp_path / "parts", ("something", "else"))
    build_index(tmp_path / "parts", tmp_path / "index", survey="Toy", options=OPTIONS)
    index = SurveyIndex.open(tmp_path / "index")
    assert index.trust.typical["image"].names == ("something", "else")
    trust = assess(index, index.vector(7, "image")[None], "image", statistics=[(0.0,) * len(STATISTICS["image"])])[0]
    assert set(trust.measures) == {"distance", "residual"}


def test_appending_keeps_the_statistics_of_both(root, tmp_path):
    shutil.copytree(root / "index", tmp_path / "index", symlinks=True)
    write_parts(tmp_path / "more", 300, seed=8, prefix="new")
    add_statistics(tmp_path / "more", STATISTICS["image"])
    before = SurveyIndex.open(tmp_path / "index").trust.measured["image"].values
    append_index(tmp_path / "index", tmp_path / "more", options=OPTIONS)
    after = SurveyIndex.open(tmp_path / "index").trust.measured["image"].values
    np.testing.assert_array_equal(after[: len(before)], before)
    assert len(after) > len(before) and np.isfinite(after).all()


def test_exchanged_partners_disagree(trusted):
    both = np.flatnonzero(trusted.catalog.flag("has_image") & trusted.catalog.flag("has_spectrum"))
    image = np.stack([trusted.vector(row, "image") for row in both])
    spectrum = np.stack([trusted.vector(row, "spectrum") for row in both])
    own = [disagreement_p(trusted, i, s) for i, s in zip(image, spectrum, strict=True)]
    swapped = [disagreement_p(trusted, i, s) for i, s in zip(image, np.roll(spectrum, 7, axis=0), strict=True)]
    assert abs(np.mean(np.array(own) <= 0.1) - 0.1) < 0.02
    assert np.mean(np.array(swapped) <= 0.1) > 0.8
    assert disagreement_flag(trusted, 0.011) == disagreement_flag(trusted, None) == ()
    (flag,) = disagreement_flag(trusted, 0.01)
    assert flag.code == "modalities_disagree" and "1 % of the pairs of Toy Survey" in flag.message


def test_percentiles_compare_scores_across_modalities(trusted):
    """The cosines of unrelated pairs lie apart by the modality gap; their percentiles are uniform in both."""
    rng = np.random.default_rng(4)
    image, spectrum = trusted.tables["image"], trusted.tables["spectrum"]
    a, b, c = (rng.integers(0, len(t), 4000) for t in (image, image, spectrum))
    scores = {
        "image": np.einsum("nd,nd->n", image.take(a), image.take(b))[a != b],
        "spectrum": np.einsum("nd,nd->n", image.take(a), spectrum.take(c))[image.rows[a] != spectrum.rows[c]],
    }
    assert np.median(scores["image"]) - np.median(scores["spectrum"]) > 0.1
    for target, found in scores.items():
        percentiles = trusted._percentiles["image", target].percentiles(found)
        for level in (10, 50, 90):
            assert abs(np.mean(percentiles < level) - level / 100) < 0.03, (target, level)


def test_an_older_index_judges_by_the_neighbour_alone(root, tmp_path):
    old = tmp_path / "old"
    shutil.copytree((root / "index" / "CURRENT").resolve(), old)
    manifest, _ = Manifest.read(old)
    calibration = {k: v for k, v in manifest.calibration.items() if k not in ("typical", "statistics", "pairs")}
    files = [name for name in manifest.files if "typical" not in name and "pairs" not in name and "statis" not in name]
    (old / MANIFEST).write_bytes(replace(manifest, calibration=calibration).with_files(old, files).to_bytes())
    index = SurveyIndex.open(old)
    vector = index.vector(7, "image")
    trust = assess(index, vector[None], "image", statistics=[(1.0,) * 10], exclude_rows=[7])[0]
    assert trust.ood_p > 0.05 and trust.measures == {}
    assert assess(index, -vector[None], "image")[0].flags[0].code == "out_of_distribution"
    assert disagreement_p(index, vector, vector) is None and own_statistics(index, 7, "image") == ()


def test_too_few_pairs_say_nothing(tmp_path):
    write_parts(tmp_path / "parts", 19, sha=SHA, lacking=0.0)
    build_index(tmp_path / "parts", tmp_path / "index", survey="Toy", options=OPTIONS)
    index = SurveyIndex.open(tmp_path / "index")
    vector = index.vector(0, "image")
    assert disagreement_p(index, vector, index.vector(0, "spectrum")) is None
    assert assess(index, vector[None], "image")[0].ood_p is not None  # 18 neighbours: by the older measure
