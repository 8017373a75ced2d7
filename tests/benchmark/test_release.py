"""Releases: a folder is what it was, to the bit or to a tolerance, or the shard and column that differ are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.errors import InputError
from tests.evaluate.conftest import write_shard
from training.benchmark.fingerprint import print_shard
from training.benchmark.release import Release, find_release, known_releases, make_release, verify, write_release
from training.evaluate.retrieval import draw_pools, pools_sha256

ROWS = 8


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release") / "survey"
    for shard in range(3):
        write_shard(root / f"healpix={100 + shard:04d}" / "001-of-001.hdf5", ROWS, seed=shard)
    plan = {"format_version": 2, "n": 24, "seed": 1, "mix": [], "shard_size": 8, "complete": True, "note": "test"}
    (root / "survey.json").write_text(json.dumps(plan))
    return root


@pytest.fixture(scope="module")
def release(survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    made = make_release(survey, "tiny", table_shards=1, pools=(4,))
    path = tmp_path_factory.mktemp("file") / "tiny.json"
    write_release(made, path)
    read = Release.load(path)
    assert read == made and read.sha256 == made.sha256
    return read


@pytest.fixture
def copy(survey: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(survey, tmp_path / "copy"))


def shard_of(folder: Path) -> Path:
    return sorted(folder.rglob("*.hdf5"))[1]


def rewrite(path: Path, change, compression: str | None = "gzip") -> None:  # type: ignore[no-untyped-def]
    with h5py.File(path, "r") as file:
        columns = {name: file[name][:] for name in file}
    change(columns)
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, compression=compression if values.ndim > 1 else None)


def test_the_same_bytes_and_the_same_values_are_identical(survey: Path, release: Release, copy: Path):
    assert verify(survey, release).status == "identical"
    rewrite(shard_of(copy), lambda columns: None)
    assert shard_of(copy).read_bytes() != shard_of(survey).read_bytes()
    assert verify(copy, release).status == "identical"


def test_another_rounding_is_equal_and_its_size_is_said(release: Release, copy: Path):
    def change(columns: dict) -> None:
        columns["spectrum_flux"] = columns["spectrum_flux"] * np.float32(1 + 1e-6)

    rewrite(shard_of(copy), change)
    verdict = verify(copy, release)
    assert verdict.status == "equal within tolerance" and 0 < verdict.largest < 1e-5
    assert "spectrum_flux" in verdict.where and "within tolerance" in str(verdict)


def test_one_galaxy_exchanged_or_two_swapped_are_different(release: Release, copy: Path):
    def exchanged(columns: dict) -> None:
        columns["redshift"][0] += 0.01

    rewrite(shard_of(copy), exchanged)
    verdict = verify(copy, release)
    assert verdict.status == "different"
    assert any("healpix=0101" in line and "redshift" in line for line in verdict.problems)

    def swapped(columns: dict) -> None:
        columns["redshift"][0] -= 0.01
        columns["image_array"][[0, 1]] = columns["image_array"][[1, 0]]

    rewrite(shard_of(copy), swapped)
    assert any("image_array" in line for line in verify(copy, release).problems)


def test_text_columns_shapes_and_missing_columns(release: Release, copy: Path):
    def change(columns: dict) -> None:
        columns["object_id"][0] = b"other"
        columns["ra"] = columns["ra"].astype("f4")
        del columns["dec"]
        columns["extra"] = np.zeros(ROWS)

    rewrite(shard_of(copy), change)
    said = "\n".join(verify(copy, release).problems)
    assert "object_id differs (other text)" in said and "dec is missing" in said and "extra is not" in said
    assert "column ra is <f4(8,), wanted <f8(8,)" in said


@pytest.mark.parametrize("at", [0.0, 0.02, 0.3, 0.9])
def test_damaged_files_are_named_and_nothing_raises(release: Release, copy: Path, at: float):
    path = shard_of(copy)
    data = bytearray(path.read_bytes())
    start = int(at * len(data))
    data[start : start + 64] = os.urandom(64)
    path.write_bytes(data)
    assert verify(copy, release).status == "different"
    path.write_bytes(data[: len(data) // 2])
    assert any("0101" in line for line in verify(copy, release).problems)


def test_missing_additional_and_irregular_shards(release: Release, copy: Path):
    path = shard_of(copy)
    path.unlink()
    assert f"{path.parent.name}/{path.name}: missing" in verify(copy, release).problems
    os.mkfifo(path)  # opening it would wait for ever
    assert verify(copy, release).status == "different"
    path.unlink()
    write_shard(copy / "healpix=0999" / "001-of-001.hdf5", 4, seed=9)
    assert any("0999" in line and "not of the release" in line for line in verify(copy, release).problems)


def test_a_shard_announcing_too_much_is_refused_unread(tmp_path: Path):
    with h5py.File(tmp_path / "big.hdf5", "w") as file:
        file.create_dataset("image_array", shape=(1 << 20, 1 << 14), dtype="f4", chunks=(1, 1 << 14))
    with pytest.raises(ValueError, match="announces"):
        print_shard(tmp_path / "big.hdf5")


def test_shipped_releases_hold_together():
    assert known_releases() == ["astroclip-sim-1", "astroclip-sim-small"]
    for name in known_releases():
        release = Release.load(name)
        listed = [path for part in release.split_names.values() for path in part]
        assert sorted(listed) == sorted(release.shards()) and len(set(listed)) == len(listed)
        n = sum(release.shards()[path]["rows"] for path in release.split_names["test"])
        digests = {str(size): pools_sha256(draw_pools(n, size, seed=release.seed)) for size in release.pools}
        assert digests == release.pool_digests
        assert 1 <= release.table_shards <= len(release.split_names["train"])
    assert Release.load("astroclip-sim-1").content["generator"]["n"] == 60_000
    with pytest.raises(InputError, match="astroclip-sim-1"):
        Release.load("nothing")


def test_a_folder_claims_a_release_by_its_manifest(survey: Path, tmp_path: Path):
    assert find_release(survey) is None and find_release(tmp_path) is None
    plan = {**Release.load("astroclip-sim-small").content["generator"], "complete": True}
    (tmp_path / "survey.json").write_text(json.dumps(plan))
    found = find_release(tmp_path)
    assert found is not None and found.name == "astroclip-sim-small"


def test_commands(survey: Path, copy: Path, tmp_path: Path):
    run = CliRunner()
    words = ["benchmark", "release", str(survey), "--name", "tiny", "--out", str(tmp_path / "t.json")]
    assert run.invoke(build_app(), [*words, "--table-shards", "1", "--pools", "4"]).exit_code == 0
    same = run.invoke(build_app(), ["benchmark", "verify", str(survey), "--release", str(tmp_path / "t.json")])
    assert same.exit_code == 0 and "identical" in same.output
    shard_of(copy).unlink()
    other = run.invoke(build_app(), ["benchmark", "verify", str(copy), "--release", str(tmp_path / "t.json")])
    assert other.exit_code == 1 and "missing" in other.output
    with pytest.raises(InputError, match="complete survey"):
        make_release(tmp_path, "x", table_shards=1, pools=(4,))
