"""A reader sees the old index or the new one, whatever happens to the builder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parts_fixture import write_parts

from astroclip.errors import IndexFileError, InputError, ProvenanceError
from index import BuildOptions, SurveyIndex, append_index, build_index
from index.publish import staging

BUILDER = """
import os, signal, sys
from index import append_index, build_index
calls, last = 0, int(sys.argv[3])
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("fsync", "rename", "replace", "symlink"):
    setattr(os, name, counted(getattr(os, name)))
build_index(sys.argv[1], sys.argv[2], survey="Next")
print("published after", calls)
"""


@pytest.fixture
def root(toy, tmp_path):
    build_index(toy.parts, tmp_path / "index", survey="Toy")
    return tmp_path / "index"


def ids(path: Path) -> list[str]:
    return SurveyIndex.open(path).catalog.object_ids.to_pylist()


def test_contract_files_are_where_the_contract_says(root):
    for name in ("manifest.json", "catalog.parquet", "vectors-image.npy", "vectors-spectrum.npy"):
        assert (root / name).is_file()
    assert os.readlink(root / "CURRENT") == "versions/v000001"
    assert len(SurveyIndex.open(root)) == len(SurveyIndex.open(root / "versions" / "v000001")) == 599


def test_rows_without_embedding_are_counted_not_indexed(toy, root):
    index = SurveyIndex.open(root)
    assert index.manifest.counts["skipped"] == 1
    assert len(index.catalog.rows_by_id(str(toy.truth["id"][300]))) == 0


@pytest.mark.parametrize("last", [1, 8, 15, 16, 17, 18, 19, 20, 22, 24])
def test_builder_killed_at_any_step_leaves_a_valid_index(root, tmp_path, last):
    write_parts(tmp_path / "small", 30, prefix="new")
    run = subprocess.run(
        [sys.executable, "-c", BUILDER, tmp_path / "small", root, str(last)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    index = SurveyIndex.open(root)
    current = os.readlink(root / "CURRENT")
    assert len(index) == {"versions/v000001": 599, "versions/v000002": 29}[current]
    build_index(tmp_path / "small", root, survey="Next")  # and the next build succeeds and cleans up
    assert len(SurveyIndex.open(root)) == 29
    assert not list((root / "versions").glob(".building-*"))


def test_a_failing_build_leaves_nothing(toy, root, tmp_path, monkeypatch):
    monkeypatch.setattr("index.build.kth_scores", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(toy.parts, root, survey="Next")
    assert [p.name for p in (root / "versions").iterdir()] == ["v000001"] and len(ids(root)) == 599


def test_an_open_index_survives_later_versions(toy, root):
    before = SurveyIndex.open(root)
    for _ in range(3):
        build_index(toy.parts, root, survey="Toy")
    hits, _ = before.search(toy.truth["image"][:3], target="either", k=5)
    assert len(hits[0]) == 5
    assert sorted(p.name for p in (root / "versions").iterdir()) == ["v000003", "v000004"]


def test_one_builder_at_a_time(toy, root):
    with staging(root), pytest.raises(InputError, match="another process"):
        build_index(toy.parts, root, survey="Toy")


@pytest.mark.parametrize("hnsw", ["always", "never"])
def test_append_equals_building_from_both(toy, tmp_path, hnsw):
    options = BuildOptions(hnsw=hnsw, properties={"redshift": ""}, citations=("Toy et al.",))
    build_index(toy.parts, tmp_path / "i", survey="Toy", previews=toy.survey, options=options)
    new = write_parts(tmp_path / "new", 80, prefix="new", seed=7)
    before = SurveyIndex.open(tmp_path / "i")
    append_index(tmp_path / "i", tmp_path / "new")
    after = SurveyIndex.open(tmp_path / "i")
    assert after.catalog.object_ids.to_pylist()[:599] == before.catalog.object_ids.to_pylist()
    assert len(after) == 599 + 79 and after.manifest.counts["skipped"] == 2
    assert after.manifest.version == 2 and after.index_id == before.index_id
    assert after.manifest.citations == ("Toy et al.",) and set(after.manifest.backends) == set(before.manifest.backends)
    assert after.previews.image_jpeg(12) == before.previews.image_jpeg(12) is not None
    for modality in ("image", "spectrum"):
        for row in range(0, 599, 50):
            np.testing.assert_array_equal(after.vector(row, modality), before.vector(row, modality))
        has = new[f"has_{modality}"]
        hits, report = after.search(new[modality][has], target=modality, k=1, query_modality=modality)
        assert np.mean([h.object_ids[0] == i for h, i in zip(hits, new["id"][has], strict=True)]) == 1.0
        assert report.mode == ("exact" if hnsw == "never" else "hnsw")


def test_append_refuses_what_is_there_already(toy, root, tmp_path):
    write_parts(tmp_path / "again", 20)
    with pytest.raises(InputError, match="20 object ids are already in the index|19 object ids") as caught:
        append_index(root, tmp_path / "again")
    assert caught.value.code == "duplicate_object_id" and len(ids(root)) == 599


def test_append_refuses_another_model(root, tmp_path):
    write_parts(tmp_path / "other", 20, prefix="new", sha="cd" * 32)
    with pytest.raises(ProvenanceError, match="cdcdcdcdcdcd.*abababababab"):
        append_index(root, tmp_path / "other")


def test_append_wants_a_root(toy, tmp_path):
    build_index(toy.parts, tmp_path / "plain", survey="Toy", plain=True)
    with pytest.raises(InputError, match="plain index"):
        append_index(tmp_path / "plain", toy.parts)


def test_plain_build_replaces_an_index_and_nothing_else(toy, tmp_path):
    out = tmp_path / "plain"
    for _ in range(2):
        assert build_index(toy.parts, out, survey="Toy", plain=True) == out
    assert len(ids(out)) == 599 and [p.name for p in tmp_path.iterdir()] == ["plain"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(InputError, match="no index"):
        build_index(toy.parts, tmp_path / "home", survey="Toy", plain=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_building_is_deterministic(toy, tmp_path):
    first, second = (
        SurveyIndex.open(build_index(toy.parts, tmp_path / n, survey="T", previews=toy.survey)) for n in "ab"
    )
    assert first.manifest.files == second.manifest.files


def test_duplicates_within_the_parts_are_refused(toy, tmp_path):
    write_parts(tmp_path / "p", 40)
    for suffix in (".parquet", ".done.json"):
        (tmp_path / "p" / f"part-00007{suffix}").write_bytes((tmp_path / "p" / f"part-00000{suffix}").read_bytes())
    with pytest.raises(InputError, match="more than once"):
        build_index(tmp_path / "p", tmp_path / "i", survey="Toy")


def test_unfinished_parts_are_refused(tmp_path):
    write_parts(tmp_path / "p", 40)
    (tmp_path / "p" / "part-00000.done.json").unlink()
    with pytest.raises(InputError, match="part-00000.parquet.*resumes"):
        build_index(tmp_path / "p", tmp_path / "i", survey="Toy")
    assert not (tmp_path / "i" / "CURRENT").exists()


def test_a_damaged_part_is_refused(tmp_path):
    write_parts(tmp_path / "p", 40)
    content = bytearray((tmp_path / "p" / "part-00000.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "p" / "part-00000.parquet").write_bytes(content)
    with pytest.raises(InputError, match="part-00000.parquet is not as it was written"):
        build_index(tmp_path / "p", tmp_path / "i", survey="Toy")


def test_parts_that_are_not_unit_vectors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("parts_fixture.embeddings", lambda rng, z, m, dim: np.full((len(z), dim), np.nan, np.float32))
    write_parts(tmp_path / "p", 40)
    with pytest.raises(InputError, match="not unit vectors"):
        build_index(tmp_path / "p", tmp_path / "i", survey="Toy")


def test_what_is_no_index_or_no_parts_is_said(tmp_path):
    with pytest.raises(IndexFileError, match="no manifest.json"):
        SurveyIndex.open(tmp_path)
    with pytest.raises(InputError, match="astroclip embed"):
        build_index(tmp_path, tmp_path / "i", survey="Toy")


def test_the_version_that_was_current_is_kept_beside_the_new_one(toy, root):
    """A newer version that a dead builder left and that never was current must not push it out."""
    import shutil

    shutil.copytree(root / "versions" / "v000001", root / "versions" / "v000007")
    build_index(toy.parts, root, survey="Toy")
    assert sorted(p.name for p in (root / "versions").iterdir()) == ["v000001", "v000008"]


def test_everything_is_durable_before_it_becomes_visible(toy, root, monkeypatch):
    """Files are fsynced before the rename that shows them, and the rename before CURRENT points there: a power cut
    leaves a whole version, too."""
    done: list[tuple[str, str]] = []

    def noted(name):
        real = getattr(os, name)

        def call(first, *rest, **more):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            done.append((name, path))
            return real(first, *rest, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        noted(name)
    final = build_index(toy.parts, root, survey="Toy")
    renamed = next(i for i, (name, path) in enumerate(done) if name == "rename")
    staged = done[renamed][1]
    synced = {path for name, path in done[:renamed] if name == "fsync"}
    assert {f"{staged}/{p.relative_to(final).as_posix()}" for p in final.rglob("*")} | {staged} <= synced
    current = next(i for i, (name, path) in enumerate(done) if name == "replace" and path.endswith(".CURRENT.new"))
    assert ("fsync", str(root / "versions")) in done[renamed:current]
    assert ("fsync", str(root)) in done[current:]
