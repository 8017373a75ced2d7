"""A damaged file is refused by its name before anything reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from astroclip.errors import IndexFileError
from index import SurveyIndex
from index.manifest import Manifest


@pytest.fixture
def copy(graph_root, tmp_path):
    return Path(shutil.copytree(graph_root / "versions" / "v000001", tmp_path / "index"))


def test_sampled_byte_flips_are_refused_by_name(copy):
    rng = np.random.default_rng(11)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    weights = np.array([p.stat().st_size for p in files], float) ** 0.25  # small files get their share
    for _ in range(60):
        path = files[rng.choice(len(files), p=weights / weights.sum())]
        content = path.read_bytes()
        at, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([content[at] ^ bit]))
        name = path.relative_to(copy).as_posix()
        with pytest.raises(IndexFileError, match=f"index file {name}") as caught:
            SurveyIndex.open(copy)
        assert caught.value.field == name
        path.write_bytes(content)
    SurveyIndex.open(copy)


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove"])
def test_truncated_extended_and_missing_files_are_refused_even_unverified(copy, damage):
    for path in sorted(p for p in copy.rglob("*") if p.is_file() and p.name != "manifest.json"):
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "truncate" else content + b"\0")
        name = path.relative_to(copy).as_posix()
        for verify in (True, False):
            with pytest.raises(IndexFileError, match=f"index file {name}"):
                SurveyIndex.open(copy, verify=verify)
        path.write_bytes(content)


def test_a_faiss_file_is_hashed_even_when_unverified(copy):
    path = copy / "image.faiss"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IndexFileError, match="image.faiss has SHA-256"):
        SurveyIndex.open(copy, verify=False)


def rewrite(copy, **change):
    """A manifest that is consistent with itself and the files, but says something else."""
    from dataclasses import replace

    manifest, _ = Manifest.read(copy)
    manifest = replace(manifest, **change)
    manifest = manifest.with_files(copy, manifest.files)
    (copy / "manifest.json").write_bytes(manifest.to_bytes())


def test_files_that_do_not_fit_each_other_are_refused(copy):
    counts = dict(Manifest.read(copy)[0].counts)
    for key, name in (("objects", "catalog.parquet"), ("image", "vectors-image.npy")):
        rewrite(copy, counts={**counts, key: counts[key] + 1})
        with pytest.raises(IndexFileError, match=name):
            SurveyIndex.open(copy)
    rewrite(copy, counts=counts, dim=17)
    with pytest.raises(IndexFileError, match="vectors-image.npy"):
        SurveyIndex.open(copy)


def test_a_graph_of_another_table_is_refused(copy):
    shutil.copy(copy / "image.faiss", copy / "spectrum.faiss")
    rewrite(copy)
    with pytest.raises(IndexFileError, match="spectrum.faiss holds IndexHNSWSQ"):
        SurveyIndex.open(copy)


def test_pickled_arrays_are_never_loaded(copy):
    np.save(copy / "calibration" / "kth-image.npy", np.array([{"a": 1}], object), allow_pickle=True)
    rewrite(copy)
    with pytest.raises(IndexFileError, match="kth-image.npy"):
        SurveyIndex.open(copy).kth_table("image")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"format_version": 2}', "[" * 100_000])
def test_a_manifest_that_is_none(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(IndexFileError, match="manifest.json"):
        SurveyIndex.open(copy)


def test_a_manifest_cannot_name_files_outside(copy):
    record = json.loads((copy / "manifest.json").read_text())
    record["files"]["../../secret"] = {"bytes": 1, "sha256": "00"}
    (copy / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(IndexFileError, match="secret"):
        SurveyIndex.open(copy)


def test_manifest_round_trip_and_digest(copy):
    import hashlib

    manifest, sha256 = Manifest.read(copy)
    content = (copy / "manifest.json").read_bytes()
    assert manifest.to_bytes() == content and sha256 == hashlib.sha256(content).hexdigest()
    assert SurveyIndex.open(copy).manifest_sha256 == sha256
    assert list(manifest.properties) == ["redshift", "log_stellar_mass"]
